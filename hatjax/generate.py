"""Makes expression videos from face photos with a trained run, or refines one.

  python -m hatjax.generate --workdir runs/a --image face.jpg --label happy \\
    --out smile.mp4
"""

import argparse
import collections
import contextlib
import itertools
import os
import pathlib
import re
import sys
import time
from concurrent import futures

import numpy as np
import tqdm

from hatjax import command, driving, photos, provenance, video

_EPILOG = """\
names:
  The ending of --out decides what is written: .mp4 (H.264), .gif, .webp, or
  with no ending, or a '/' at the end, a folder of 0000.png, 0001.png, ...
  One image and one label give exactly that file or folder. {image} and {label}
  in --out stand for the image's name and the label. Where several images or
  labels need them and they are missing, they are added:
    --out smile.mp4 --label all     smile_happy.mp4 ... and smile_grid.mp4
    --out smile.mp4 --image a b     smile_a.mp4 smile_b.mp4
    --out frames/ --label all       frames/happy/0000.png ...
    --out 'gifs/{label}/{image}.gif'
  Several labels also give a grid of all of them with captions, per image; with
  --split, where {image} is the subject, one more of all images (all_grid).
  Videos of the same name are replaced, each only when the new one is whole.

exit code:
  0 if a video was made for at least one image. Of several images, one that
  cannot be read or shows no face is skipped with a warning. 1 on any other
  error, 2 on a wrong option.

examples:
  python -m hatjax.generate --workdir runs/a --image face.jpg
  python -m hatjax.generate --workdir runs/a --image photos/ --label happy,anger
  python -m hatjax.generate --workdir runs/a --image face.jpg --label happy \\
    --num_frames 48 --boomerang --out smile.gif
  python -m hatjax.generate --workdir runs/a --split test --num_images 4
  python -m hatjax.generate --workdir runs/a --image face.jpg --refine 0.2
  python -m hatjax.generate --workdir runs/a --video in.mp4 --out refined.mp4
  python -m hatjax.generate --workdir runs/a --image me.jpg --driving clip.mp4
"""


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f'error: {message}. See python -m hatjax.generate --help.\n')


def _parser():
  parser = _Parser(
    prog='python -m hatjax.generate', epilog=_EPILOG,
    description='Makes expression videos from face photos with a trained run.',
    usage='%(prog)s (--workdir RUN | --model FILE) --image FACE ... [options]',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  part = parser.add_argument_group('the model')
  add = part.add_argument
  model = part.add_mutually_exclusive_group(required=True)
  model.add_argument('--workdir', help='folder of the trained run')
  model.add_argument('--model', help='instead, a file that python -m '
      'hatjax.convert export made of one')
  add('--step', type=int, help='checkpoint to use; default: the newest')
  part = parser.add_argument_group('what to animate')
  add = part.add_argument
  source = part.add_mutually_exclusive_group(required=True)
  source.add_argument('--image', nargs='+', action='extend',
      help='pictures, or folders of them')
  source.add_argument('--split',
      help="instead, neutral faces of this split of the run's records, such "
      'as test: one per subject')
  source.add_argument('--video',
      help='instead, a face video to refine, of any length, with its frame '
      'rate but without its sound; a folder of pictures is one too')
  source.add_argument('--from_noise', action='store_true',
      help='instead, videos from pure noise: of --label, else of anything')
  add('--num_images', type=_count, default=4,
      help='how many of the split, or from noise; default: 4')
  add('--data_dir', help="where the run's records live, for --split")
  add('--label', action='append',
      help='expression: one, several with commas or by repeating the option, '
      'or all; default: all, but none for --video and --from_noise')
  part = parser.add_argument_group('the video')
  add = part.add_argument
  add('--out', type=_out, help='where to; default: out/{image}_{label}.mp4')
  add('--crop', choices=('auto', 'track', 'none'), default='auto',
      help='auto: find the face and crop to it, as the training data were '
      '(of a --video: where it is in the first frame, and not if the frames '
      'have the size that the run makes); track: follow the face through a '
      '--video or --driving clip; none: squeeze the whole picture to a square')
  add('--num_frames', type=_count, help='default: 32; 20 for --sweep reference')
  add('--fps', type=float,
      help="frames per second; default: 25, or that of --video")
  add('--refine', type=_share, metavar='S',
      help='how strongly the second stage changes a video, 0 to 1: the share '
      "of the noise levels it adds and removes; 0 leaves the video as it is; "
      "default: the config's")
  add('--num_sample_steps', type=_count,
      help='denoising steps from pure noise; a video noised at strength S '
      "needs S times as many; default: the config's")
  add('--sweep', choices=('linear', 'profile', 'reference'), default='profile',
      help='how the intensity rises from 0: evenly; as in the training data; '
      'or 0, 0.05 ... 0.95 as the released AffineGAN code does')
  add('--alpha_max', type=float,
      help='intensity at the end; 1 is a full expression, the default')
  add('--boomerang', action='store_true', help='play forth, then back')
  add('--seed', type=int, default=0)
  add('--batch_size', type=_count, default=0,
      help='videos (with --driving: frames) made at once; default: 8, 1 frame')
  add('--strip', action='store_true',
      help='beside every video, a PNG with eight of its frames in a row')
  provenance.add_option(parser)
  driving.add_options(parser)
  return parser


def _out(text):
  ending = pathlib.Path(text).suffix.lower()
  if text.endswith('/') or ending in ('', *video.VIDEO_ENDINGS):
    return text
  raise argparse.ArgumentTypeError(
    f'cannot write {ending!r}. End it with one of: '
    f'{", ".join(video.VIDEO_ENDINGS)}, or with / for a folder of PNGs'
  )


def _count(text):
  if text.isdecimal() and int(text) > 0:
    return int(text)
  raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0')


def _share(text):
  with contextlib.suppress(ValueError):
    if 0 <= float(text) <= 1:
      return float(text)
  raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to 1')


def main(argv=None):
  """Runs the command; returns its exit code."""
  args = _parser().parse_args(argv)
  try:
    return _generate(args)
  except (ValueError, OSError) as error:
    _say(f'error: {error}')
    return 1
  except KeyboardInterrupt:
    _say('error: interrupted. Finished videos stand, no other is left behind.')
    return 130


def _say(message):
  tqdm.tqdm.write(' '.join(message.split()), file=sys.stderr)


def _generate(args):
  sweep = _sweep(args)
  paths = _image_paths(args.image or ())
  if args.model and (args.split or args.step is not None):
    raise ValueError('--split and --step need a --workdir, not a --model.')
  import hatjax  # load brings JAX: after the checks that need no run
  run = hatjax.load(args.model or args.workdir, args.step)
  args.signature = provenance.sign(run, args.watermark)
  if args.video:
    return _refine_video(run, args)
  if args.driving:
    return _drive(run, args, paths)
  labels = _labels(args.label, run, '' if args.from_noise else 'all')
  if args.split:
    known = run.neutral_faces(args.split, args.num_images, args.data_dir)
    names = list(known)
  elif args.from_noise:
    names = [f'noise-{n}' for n in range(args.num_images)]
  else:
    names = _names(paths)
  outs = _outs(args.out, names, labels)
  for path in itertools.chain(*(by_label.values() for by_label in outs)):
    video.check_writable(path)
  if args.from_noise:
    crops = range(args.num_images)
  elif args.split:
    crops = list(known.values())
  else:
    crops = _crops(paths, run, args.crop)
  jobs = [
    (i, label) for i in range(len(crops)) if crops[i] is not None
    for label in labels or (None,)
  ]
  seconds, args.batch_size = [], args.batch_size or 8
  args.fps = 25.0 if args.fps is None else args.fps
  make = run.animate_noise if args.from_noise else run.animate
  clips = _animate(make, crops, jobs, args.batch_size, sweep, seconds)
  progress = tqdm.tqdm(total=len(jobs), unit='video', disable=None, leave=False)
  with progress, _Writer() as writer:
    rows = []
    for i, group in itertools.groupby(zip(jobs, clips), lambda x: x[0][0]):
      rows += _write(
        ((job[1], clip) for job, clip in group), outs[i], args, progress,
        writer,
      )
  if args.split and len(labels) > 1 and len(names) > 1:
    _write_table(rows, labels, _outs(args.out, ['all', ''], labels)[0], args)
  _report(len(jobs), sweep['num_frames'], args.batch_size, seconds)
  return 0


def _refine_video(run, args):
  """Refines a video frame by frame; its length does not matter."""
  if args.num_frames or args.boomerang or args.strip:
    raise ValueError(
      '--video keeps every frame once. Leave --num_frames, --boomerang and '
      '--strip out.'
    )
  labels = _labels(args.label, run, '')
  if len(labels) > 1:
    raise ValueError(f'--video takes one --label, not {len(labels)}.')
  label = labels[0] if labels else None
  name = pathlib.Path(args.video).stem
  path = _outs(args.out or 'out/{image}_refined.mp4', [name], labels)[0]
  path = path[label]
  video.check_writable(path)
  fps = video.read_fps(args.video) if args.fps is None else args.fps
  refined = run.refine(
    driving.crops_of(args.video, run, args.crop, photos.find_face), label,
    strength=args.refine, num_sample_steps=args.num_sample_steps,
    seed=args.seed,
  )
  begin, count = time.perf_counter(), itertools.count()
  with (
    contextlib.closing(_ahead(refined)) as frames,
    tqdm.tqdm(frames, unit='frame', disable=None, leave=False) as bar,
  ):
    counted = (frame for frame, _ in zip(bar, count))
    args.signature.write_video(path, counted, fps)
  tqdm.tqdm.write(path)
  _report(1, next(count), 1, [time.perf_counter() - begin])
  return 0


def _drive(run, args, paths):
  """Every image takes on the motion of a clip; its length does not matter."""
  if not paths:
    raise ValueError('--driving needs a face to drive: pass --image me.jpg')
  outs = _outs(args.out or 'out/{image}_driven.mp4', _names(paths), ())
  crops = lambda: _ahead(
    driving.crops_of(args.driving, run, args.crop, photos.find_face)
  )
  for crop, out in zip(_crops(paths, run, args.crop), outs):
    if crop is not None:
      driving.write(run, crop, out[None], args, crops)
  return 0


def _sweep(args):
  reference = args.sweep == 'reference'
  if reference and (args.num_frames or 20, args.alpha_max) != (20, None):
    raise ValueError(
      '--sweep reference is always 20 frames up to 0.95. '
      'Leave --num_frames and --alpha_max out, or use another --sweep.'
    )
  given = {k: getattr(args, k) for k in ('refine', 'num_sample_steps')}
  sweep = dict(
    num_frames=args.num_frames or (20 if reference else 32), seed=args.seed,
    **{k: v for k, v in given.items() if v is not None},
  )
  if args.from_noise:
    if args.refine is not None:
      raise ValueError('--from_noise has nothing to --refine. Leave one out.')
    return sweep
  return sweep | dict(
    sweep=args.sweep,
    alpha_max=1.0 if args.alpha_max is None else args.alpha_max,
  )


def _image_paths(images):
  paths = []
  for image in map(pathlib.Path, images):
    paths += video.list_images(image) if image.is_dir() else [image]
  return paths


def _names(paths):
  """One name per path, its stem; the second face becomes face-2."""
  names = []
  for path in paths:
    taken = (f'{path.stem}-{n}' for n in itertools.count(2))
    candidates = itertools.chain([path.stem], taken)
    names.append(next(name for name in candidates if name not in names))
  return names


def _labels(wanted, run, default):
  if not run.labels:
    if wanted:
      raise ValueError('This run reads no label. Leave --label out.')
    return ()
  words = [w.strip() for w in ','.join(wanted or [default]).split(',')]
  labels = []
  for word in filter(None, words):
    labels += run.labels if word == 'all' else [run.match_label(word)]
  return tuple(dict.fromkeys(labels))


def _outs(out, names, labels):
  """Per image: the path of each label's video, and of 'grid' if it has one."""
  pattern = out or ('out/{image}_{label}.mp4' if labels else 'out/{image}.mp4')
  if '{label}' in pattern and not labels:
    raise ValueError('This run reads no label. Take {label} out of --out.')
  several = {'{image}': len(names) > 1, '{label}': len(labels) > 1}
  added = '_'.join(k for k in several if several[k] and k not in pattern)
  root, ending = os.path.splitext(pattern)
  if not ending:
    pattern = os.path.join(pattern, added, '')
  elif added:
    pattern = f'{root}_{added}{ending}'
  keys = [*labels, 'grid'] if len(labels) > 1 else labels or [None]
  return [
    {key: _fill(pattern, image=name, label=key) for key in keys}
    for name in names
  ]


def _fill(pattern, **words):
  word = lambda match: words[match[1]].replace('/', '-').replace('..', '-')
  return re.sub(r'\{(image|label)\}', word, pattern)


def _crops(paths, run, mode):
  """Per image uint8 [S, S, 3], or None where it cannot be used."""
  whole = mode == 'none' or run.crop == 'none'
  if whole:
    why = '' if mode == 'none' else ': so was this run\'s training data'
    size = f'{run.image_size}x{run.image_size}'
    _say(f'note: whole pictures are squeezed to {size} pixels{why}.')
  crops = []
  for path in paths:
    try:
      crops.append(photos.crop_face(
        path, run.image_size, 'none' if whole else 'auto', run.background
      ))
    except ValueError as error:
      if len(paths) == 1:
        raise
      _say(f'warning: skipped: {error}')
      crops.append(None)
  if all(crop is None for crop in crops):
    raise ValueError(
      f'None of the {len(paths)} images could be used. Each warning says why.'
    )
  return crops


def _animate(make, crops, jobs, batch_size, sweep, seconds):
  """Yields a clip [T, S, S, 3] per job; appends to seconds, per batch."""
  batch_size = min(batch_size, len(jobs))
  for start in range(0, len(jobs), batch_size):
    batch = jobs[start:start + batch_size]
    # A smaller last batch would be another shape and compile again.
    full = batch + batch[-1:] * (batch_size - len(batch))
    images = np.stack([crops[i] for i, _ in full])
    labels = [label for _, label in full]
    labels = None if None in labels else labels
    begin = time.perf_counter()
    clips = np.asarray(make(images, labels, **sweep))
    seconds.append(time.perf_counter() - begin)
    yield from clips[:len(batch)]


class _Writer:
  """A thread that encodes and writes, in order, while the next clips are made.

  The first error ends its work; the next call, or the end, raises it.
  """

  def __init__(self, ahead=16):
    self._pool = futures.ThreadPoolExecutor(1)
    self._jobs, self._ahead, self._failed = collections.deque(), ahead, False

  def submit(self, function, *args):
    """Has function(*args) called; waits while `ahead` others are to do."""
    while self._jobs and (
      self._jobs[0].done() or len(self._jobs) >= self._ahead
    ):
      self._jobs.popleft().result()
    self._jobs.append(self._pool.submit(self._run, function, args))

  def _run(self, function, args):
    if self._failed:
      return
    self._failed = True
    function(*args)
    self._failed = False

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    self._pool.shutdown(cancel_futures=kind is not None)
    for job in self._jobs if kind is None else ():
      job.result()


def _ahead(items, count=16):
  """Yields the items, up to `count` of which a thread makes in advance."""
  items, end = iter(items), object()
  pool = futures.ThreadPoolExecutor(1)
  make = lambda: pool.submit(next, items, end)
  try:
    jobs = collections.deque(make() for _ in range(count))
    while (item := jobs.popleft().result()) is not end:
      jobs.append(make())
      yield item
  finally:
    pool.shutdown(cancel_futures=True)


def _write(clips, outs, args, progress, writer):
  """Writes one image's clips (label, [T, S, S, 3]), then their grid.

  Returns the clips as written, [T, S, S, 3] each.
  """
  kept = []
  for label, clip in clips:
    if args.boomerang:
      clip = np.concatenate([clip, clip[-2:0:-1]])
    writer.submit(_write_clip, clip, outs[label], args, progress)
    kept.append((label, clip))
  if 'grid' in outs:
    writer.submit(_write_grid, kept, outs['grid'], args)
  return [clip for _, clip in kept]


def _write_clip(clip, path, args, progress):
  args.signature.write_video(path, clip, args.fps)
  tqdm.tqdm.write(path)
  if args.strip:
    path = f'{os.path.splitext(path.rstrip("/"))[0]}_strip.png'
    video.write_image(path, video.strip(clip))
    tqdm.tqdm.write(path)
  progress.update()


def _write_grid(kept, path, args):
  labels, clips = zip(*kept)
  grid = video.grid_with_labels(np.stack(clips), labels)
  args.signature.write_video(path, grid, args.fps)
  tqdm.tqdm.write(path)


def _write_table(clips, labels, outs, args):
  """All subjects (rows) by all labels (columns): a grid and its last frames."""
  rows = len(clips) // len(labels)
  names = [*labels, *[' '] * (len(clips) - len(labels))]
  grid = video.grid_with_labels(np.stack(clips), names, columns=len(labels))
  args.signature.write_video(outs['grid'], grid, args.fps)
  tqdm.tqdm.write(f"{outs['grid']} ({rows} faces by {len(labels)} labels)")
  path = f'{os.path.splitext(outs["grid"].rstrip("/"))[0]}.png'
  apex = len(clips[0]) // 2 if args.boomerang else -1
  video.write_image(path, grid[apex])
  tqdm.tqdm.write(path)


def _report(num_videos, num_frames, batch_size, seconds):
  timed, note = num_videos, 'compilation included'
  total = f'{num_videos} x {num_frames} frames in {sum(seconds):.1f} s'
  if len(seconds) > 1:
    timed, note = num_videos - batch_size, 'after the first batch'
    seconds = seconds[1:]
  rate = timed * num_frames / sum(seconds)
  _say(f'{total}, {rate:.1f} frames/s {note}')


if __name__ == '__main__':
  sys.exit(command.run(main))
