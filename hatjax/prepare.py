"""Raw folder -> checked, cropped TFDS records. Runs a builder of datasets/.

  python -m hatjax.prepare frame_folders --raw DIR
  python -m hatjax.prepare ck_plus --raw DIR --crop none --image_size 286
  python -m hatjax.prepare synthetic

The table goes to stdout; progress, skipped files and errors go to stderr. The
records take their place only when they are whole: until then, and after any
failure, what stood there before stays as it was.
"""

import argparse
import collections
import importlib
import importlib.util
import json
import pathlib
import shutil
import signal
import sys
import tempfile
import textwrap

from hatjax import command

PACKAGE = 'hatjax._datasets'
SHARED = 'face_video'  # the module of the folder that is no builder
TEMPORARY = '.hatjax-prepare-'
MAX_IMAGE_SIZE = 4096
MADE_OPTIONS = {
  'num_identities': 'how many people (default: 64)',
  'num_frames': 'of each of their 6 clips (default: 32)',
  'seed': 'who they are (default: 0)',
}
# Option -> (where a module lists its values, the one that does).
OWN_OPTIONS = {
  'half': ('HALVES', 'mug'), 'condition': ('CONDITIONS', 'oulu_casia'),
}
SAME_REASON = 10  # skipped files listed one by one, of those with one reason


def main(argv=None):
  """Runs the command; returns its exit code."""
  args = _parse(argv)
  try:
    return _prepare(args)
  except (ValueError, OSError) as error:
    print(f'error: {_one_line(error)}', file=sys.stderr)
  except KeyboardInterrupt:
    print('error: interrupted, nothing was written', file=sys.stderr)
  return 1


def _parse(argv):
  names = builder_names()
  parser = argparse.ArgumentParser(
    prog='python -m hatjax.prepare',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description='Checks, crops and stores a raw data set as TFDS records.',
    epilog=f'Data sets: {", ".join(names)}.\n'
    'What each expects in its raw folder: the head of datasets/NAME.py.\n\n'
    'examples:\n'
    '  python -m hatjax.prepare ck_plus --raw ~/ck_plus\n'
    '  python -m hatjax.prepare frame_folders --raw ~/my_clips\n'
    '  python -m hatjax.prepare voxceleb --raw ~/clips --crop face\n'
    '  python -m hatjax.prepare synthetic --num_identities 64\n',
  )
  add = parser.add_argument
  add('name', metavar='NAME', help='the data set, one of those below')
  add('--raw', metavar='DIR',
      help='folder of the raw data; synthetic has none')
  add(
    '--data_dir', metavar='DIR',
    help='where records go (default: $TFDS_DATA_DIR, else '
    '~/tensorflow_datasets)',
  )
  add(
    '--image_size', type=int, metavar='N',
    help='side of the stored squares in pixels, 0 for no resizing '
    '(default: 256; synthetic 128)',
  )
  add(
    '--crop', choices=('face', 'none', 'track', 'given'),
    help='face: one square around the head per clip; none: whole frames, '
    'squeezed to a square if resized (default: face); voxceleb also has track '
    'and given, its default',
  )
  add(
    '--subjects', metavar='REGEX',
    help='who a clip shows, for layouts that do not say: searched in the '
    "clip's id, the first group is the person",
  )
  add(
    '--half', choices=('first', 'farthest', 'none'),
    help='mug, whose takes return to neutral: keep the first half of each '
    '(default), all up to the frame farthest from neutral, or cut none',
  )
  add(
    '--condition', metavar='C',
    help='oulu_casia: camera and light, such as vl_strong (default), ni_weak',
  )
  add(
    '--background', choices=('keep', 'black'),
    help='black: nothing but the face is left, what lies within its landmarks '
    'or, where they are unknown, an ellipse (default: keep)',
  )
  for name, what in MADE_OPTIONS.items():
    add(f'--{name}', type=int, metavar='N', help=f'synthetic: {what}')
  add('--grey', action='store_true', default=None, help='synthetic: no colour')
  add(
    '--strict', action='store_true',
    help='write nothing and exit 1 if any file had to be skipped',
  )
  add('--force', action='store_true', help='prepare again what is prepared')
  args = parser.parse_args(argv)
  if args.name not in names:
    parser.error(f'unknown NAME {args.name!r}. Choose one of: '
                 f'{", ".join(names)}.')
  if args.image_size not in (None, 0, *range(16, MAX_IMAGE_SIZE + 1)):
    parser.error(f'--image_size is {args.image_size}. Use 0, or 16 to '
                 f'{MAX_IMAGE_SIZE}.')
  return args


def builder_names():
  """Names of the data sets this command can prepare."""
  files = _datasets_folder().glob('[a-z]*.py')
  return sorted(file.stem for file in files if file.stem != SHARED)


def load_builder(name):
  """(module of the layout, its TFDS class, module face_video), by file path.

  The folder is datasets/ in a checkout and hatjax/_datasets in a wheel; it is
  never imported as `datasets`, the name of another well-known package.
  """
  if PACKAGE not in sys.modules:
    folder = _datasets_folder()
    spec = importlib.util.spec_from_file_location(
      PACKAGE, folder / '__init__.py', submodule_search_locations=[str(folder)]
    )
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACKAGE])
  shared = importlib.import_module(f'{PACKAGE}.{SHARED}')
  module = importlib.import_module(f'{PACKAGE}.{name}')
  cls = getattr(module, name.title().replace('_', ''))
  return module, cls, shared


def _datasets_folder():
  here = pathlib.Path(__file__).resolve().parent
  inside = here / '_datasets'
  return inside if inside.is_dir() else here.parent / 'datasets'


def ensure_synthetic(name, directory=None):
  """Makes records of synthetic faces where there are none of that name.

  Args:
    name: of records, such as 'synthetic/default'; others are left alone.
    directory: where records live; see `records.data_dir`.

  Returns:
    Whether records were made.
  """
  builder, _, config = name.partition(':')[0].partition('/')
  if builder != 'synthetic':
    return False
  from hatjax import records

  module, cls, face_video = load_builder(builder)
  options = module.options_of(config)
  root = records.data_dir(directory).absolute()
  target = root / builder / config / str(cls.VERSION)
  scan, version = module.scan(options), module.digest()
  stored = _stored_metadata(target)
  if stored:
    if stored.get('raw_digest') != version:
      print(f'note: {target} was drawn by other code than this. To draw it '
            'again: python -m hatjax.prepare synthetic', file=sys.stderr)
    return False
  print(f'Making the synthetic faces (once, about {module.seconds(options):.0f}'
        f' s) in {target}', file=sys.stderr, flush=True)
  _quiet_tfds()
  _build(
    lambda folder: face_video.build(cls, scan, options, version, folder),
    root, target, scan, strict=False,
  )
  return True


def _quiet_tfds():
  from absl import logging

  logging.set_verbosity(logging.ERROR)  # TFDS tells of its own doings


def _prepare(args):
  # Late, so that --help and misspelt arguments answer at once.
  from hatjax import records

  module, cls, face_video = load_builder(args.name)
  plan = _plan_made if hasattr(module, 'OPTIONS') else _plan_read
  options, config, scan, raw_digest = plan(args, module, face_video)
  _quiet_tfds()
  data_dir = records.data_dir(args.data_dir).absolute()
  target = data_dir / cls.name / config / str(cls.VERSION)
  metadata = _stored_metadata(target)
  title = f'{cls.name}/{config}:{cls.VERSION} in {target}'
  known = (metadata.get('raw_digest'), metadata.get('options'))
  if known == (raw_digest, options) and not args.force:
    print(f'{title}\nalready prepared from the same files and options')
  else:
    if metadata:
      print(f'{target}: {_why(known, raw_digest, options)}, preparing again',
            file=sys.stderr)
    metadata = _build(
      lambda folder: face_video.build(cls, scan, options, raw_digest, folder),
      data_dir, target, scan, args.strict,
    )
    print(title)
  print_report(metadata)
  return _judge(metadata['report']['skipped'], args.strict)


def _plan_made(args, module, _):
  """(options, name of the records, scan, digest) of a set that is drawn."""
  for name in ('raw', 'crop', 'subjects', 'background', *OWN_OPTIONS):
    if getattr(args, name) is not None:
      raise ValueError(f'--{name} is for data that are read: leave it out '
                       f'with {args.name}.')
  given = {name: getattr(args, name) for name in module.OPTIONS}
  options = module.complete({k: v for k, v in given.items() if v is not None})
  return options, module.config_name(options), module.scan(options), (
    module.digest())


def _plan_read(args, module, face_video):
  """(options, name of the records, scan, digest) of a set in a raw folder."""
  for name in (*MADE_OPTIONS, 'grey'):
    if getattr(args, name) is not None:
      raise ValueError(f'--{name} is for synthetic: leave it out with '
                       f'{args.name}.')
  if args.raw is None:
    raise ValueError(f'{args.name} is read from a folder. Pass it: --raw DIR')
  raw = pathlib.Path(args.raw).expanduser().resolve()
  if not raw.is_dir():
    raise ValueError(f'--raw {args.raw} is no folder. Pass the raw data.')
  own = {}
  for name, (known, owner) in OWN_OPTIONS.items():
    value = getattr(args, name)
    if hasattr(module, known):
      own[name] = value or getattr(module, known)[0]
      if own[name] not in getattr(module, known):
        raise ValueError(
          f'--{name} is {value!r}. Choose one of: '
          f'{", ".join(getattr(module, known))}.'
        )
    elif value:
      raise ValueError(
        f'--{name} is for {owner}: leave it out with {args.name}.'
      )
  crops = getattr(module, 'CROPS', ('face', 'none'))
  if args.crop not in (None, *crops):
    raise ValueError(
      f'--crop {args.crop} is not for {args.name}. Use one of: '
      f'{", ".join(crops)}.'
    )
  options = {
    'crop': args.crop or crops[0],
    'image_size': 256 if args.image_size is None else args.image_size,
    'subjects': args.subjects,
    **own,
  }
  if args.background == 'black':
    options['background'] = 'black'
  print(f'checking {raw}', file=sys.stderr)
  scan = module.scan(raw, args.subjects, **own)
  return options, face_video.config_name(options), scan, face_video.digest(scan)


def _stored_metadata(target):
  """What earlier records say of themselves; {} where there are none."""
  try:
    metadata = json.loads((target / 'metadata.json').read_text())
    return metadata if (target / 'dataset_info.json').is_file() else {}
  except (OSError, ValueError):
    return {}


def _why(known, raw_digest, options):
  if known[0] != raw_digest:
    return 'the raw folder or what is read from it has changed'
  return 'options have changed' if known[1] != options else '--force given'


def _build(build, data_dir, target, scan, strict):
  """Builds in a temporary folder beside the data sets, then swaps it in."""
  try:
    data_dir.mkdir(parents=True, exist_ok=True)
    for old in data_dir.glob(f'{TEMPORARY}*'):
      print(f'note: {old} is of an interrupted or running prepare. Delete it '
            'if none runs.', file=sys.stderr)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=data_dir))
  except OSError as error:
    raise OSError(
      f'Cannot write to {data_dir}: {error.strerror}. Pass another --data_dir.'
    ) from error
  try:
    folder, metadata = build(temporary)
    if strict and scan.skipped:
      _print_skipped(scan.skipped)
      raise ValueError(
        f'{len(scan.skipped)} skipped, and --strict: nothing was written.'
      )
    _swap_in(folder, target, temporary / 'replaced')
    return metadata
  except ValueError:
    if not strict:
      _print_skipped(scan.skipped)
    raise
  except (OSError, RuntimeError, MemoryError) as error:
    raise OSError(
      f'Cannot write the records of {target}: {_one_line(error)}. Free some '
      'space or pass another --data_dir. Earlier records were not touched.'
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(folder, target, aside):
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    if target.exists():
      target.rename(aside)
    folder.rename(target)
  except BaseException:
    if aside.exists() and not target.exists():
      aside.rename(target)
    raise


def print_report(metadata):
  """The table of what the records hold."""
  report, splits = metadata['report'], metadata['splits']
  moving = [metadata['clips'][name] for name in splits['everything']]
  _print_table(metadata['labels'], metadata['clips'].values())
  subjects = collections.Counter(clip['subject'] for clip in moving)
  if set(subjects) != set(splits['everything']):
    count = [f'{who} {n}' for who, n in sorted(subjects.items())]
    _print_wrapped('clips per subject: ' + ', '.join(count))
  masks = [f'{n} {source}' for source, n in sorted(report['masks'].items())]
  _print_wrapped('lip masks, clips and stills: ' + ', '.join(masks))
  sizes = [f'{name} {len(ids)}' for name, ids in splits.items()]
  _print_wrapped('splits: ' + ', '.join(sizes))
  for note in [*report['notes'], *_warn_of_splits(metadata)]:
    _print_wrapped(f'note: {note}')
  print(f'skipped: {len(report["skipped"])}')
  print(f'fingerprint: {metadata["fingerprint"]}')


def _print_table(labels, clips):
  width = max(len(label) for label in (*labels, 'total'))
  columns = ('clips', 'subjects', 'frames', 'stills')
  print('\n' + 'label'.ljust(width), *(f'{name:>9}' for name in columns))
  for label in (*labels, None):
    of_label = [clip for clip in clips if label in (None, clip['label'])]
    moving = [clip for clip in of_label if not clip['still']]
    row = (
      len(moving),
      len({clip['subject'] for clip in moving}),
      sum(clip['num_frames'] for clip in moving),
      len(of_label) - len(moving),
    )
    print((label or 'total').ljust(width), *(f'{n:>9}' for n in row))
  print()


def _warn_of_splits(metadata):
  clips, splits = metadata['clips'], metadata['splits']
  each = lambda key, name: {clips[i][key] for i in splits[name]}
  unseen = sorted(each('label', 'everything') - each('label', 'train'))
  if unseen:
    yield (
      f'split train has no clip of: {", ".join(unseen)}. With few subjects '
      'train on split everything.'
    )
  test = each('subject', 'by_video_test')
  both = test & each('subject', 'by_video_train')
  yield (
    'by_video_train and by_video_test split by video, as the papers do: '
    f'{len(both)} of the {len(test)} test subjects are known to be in training '
    'as well, so scores say nothing about new faces.'
  )


def _print_wrapped(text):
  print(textwrap.fill(text, 80, subsequent_indent='  ',
                      break_long_words=False, break_on_hyphens=False))


def _judge(skipped, strict):
  """Lists what was skipped; the exit code."""
  _print_skipped(skipped)
  if skipped and strict:
    print('error: files were skipped, and --strict', file=sys.stderr)
    return 1
  return 0


def _print_skipped(skipped):
  sys.stdout.flush()
  reasons = collections.Counter(reason for _, reason in skipped)
  listed = collections.Counter()
  for path, reason in skipped:
    listed[reason] += 1
    if listed[reason] <= SAME_REASON:
      print(f'skipped {path}: {reason}', file=sys.stderr)
  for reason, count in reasons.items():
    if count > SAME_REASON:
      print(f'skipped {count - SAME_REASON} more, all named in metadata.json: '
            f'{reason}', file=sys.stderr)


def _one_line(error):
  return ' '.join(str(error).split()) or type(error).__name__


if __name__ == '__main__':
  # A terminated run cleans up like an interrupted one.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  sys.exit(command.run(main))
