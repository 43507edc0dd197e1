"""Scores a trained run, or any folder of videos, against real ones.

  python -m hatjax.evaluate --workdir runs/a --split test
  python -m hatjax.evaluate --generated made/ --real clips/
  python -m hatjax.evaluate --compare runs/a,runs/b
  python -m hatjax.evaluate --ablation configs/synthetic.py

Every clip is made anew from its first frame and label, then compared with the
real one, frame by frame. Beside it stand rows that need no model: `real`
against itself; `copy` repeats the first frame; `blend` fades from the first
real frame to the last (it has seen the answer); and `temporal mean`, every
frame of the draft averaged with its neighbours. Everything goes into a folder:
report.html, report.md, scores.json (every setting, every clip), strips, videos.
"""

import pathlib
import sys
from importlib import metadata

import jax
import numpy as np
import tqdm
from absl import app, flags, logging

from hatjax import (
  ablation,
  command,
  comparison,
  data,
  extractors,
  face_embedding,
  metrics,
  remake,
  runs,
  score_report,
  scores,
  video,
  workdir,
)

PROTOCOLS = ('profile', 'linear', 'oracle')


def evaluate(
  run, split='test', protocols=('profile',), strengths=(), *,
  num_sample_steps=None, num_clips=0, directory=None, ssim='gaussian', seed=0,
  sizes=(), faces='auto', classifier=None, nets=True, keep=None,
):
  """Scores of a run, and of what needs none.

  Args:
    run: see `hatjax.load`.
    split: a named split of its records.
    protocols: some of PROTOCOLS.
    strengths: of the refining stage; () for the config's.
    num_sample_steps: of the refining stage.
    num_clips: so many, always the same; 0 for all.
    directory: where the records live; see `records.data_dir`.
    ssim: window, see `metrics.ssim`.
    seed: of the noise and the bootstrap.
    sizes: sides that clips are also shrunk to and scored at.
    faces: face embedding, see `face_embedding.make`; the workdir of a
      face_classifier run for its identity code; 'none'.
    classifier: workdir of a face_classifier run that names expressions.
    nets: whether Inception, LPIPS and video features are computed where their
      weights are there.
    keep: takes (clip dict, {row: video}) of every clip, e.g. to show it.

  Returns:
    dict: settings, n clips and subjects, skipped clips, rows {name: {score:
    {mean, low, high, n}}}, low and high being the bootstrap's 95 % interval
    over clips, clips {row: {score: [value of each clip]}}, ids, not_computed
    {score: why}. `scores.COLUMNS` says what the scores are; psnr and ssim are
    means over all frames but the first (`blend`: nor the last, which it has
    by right). The row `alpha` holds the Spearman correlation, of each clip,
    of the intensity inferred from the real frames with the true one, or with
    time where that is unknown.

  Raises:
    ValueError: unknown split or protocol; a run that cannot refine.
  """
  infer = remake.make_infer(run)
  _check(run, protocols, strengths, infer)
  block = dict(run.config[run.config['stages'][-1]]['data'])
  batches = data.make_batches(
    **{**block, 'split': split, 'directory': directory}
  )
  labels = run.config['info']['labels']
  parts = extractors.gather(
    faces, classifier and _load(classifier), _identity(faces), labels, nets
  )
  if infer is None:
    parts.absent['alpha_order'] = 'not computed: this run infers no intensity'
  scorer = scores.Scorer(
    ssim=ssim, sizes=tuple(sizes), infer=infer, seed=seed, **parts.arguments
  )
  orders, subjects, skipped = [], set(), []
  count = min(num_clips or len(batches.clips), len(batches.clips))
  found = batches.whole_clips(
    num_clips or None, lambda name, error: skipped.append(f'{name}: {error}')
  )
  for clip in tqdm.tqdm(found, 'evaluating', count, file=sys.stderr):
    real = clip['video']
    subjects.add(clip['subject'])
    alpha = infer and infer(real, clip['label'])
    made, drafts = remake.make_rows(
      run, clip, labels, protocols, strengths, alpha, num_sample_steps, seed
    )
    scorer.add(clip['id'], clip['label'], real, made, drafts)
    if alpha is not None and len(real) > 3:
      true = batches.records.alphas(batches.records.clips[clip['id']])
      true = true if len(true) == len(real) else np.arange(len(real))
      orders.append(metrics.spearman(alpha[1:], true[1:]))
    if keep:
      keep({**clip, 'label_name': labels[clip['label']]}, made)
  result = scorer.result()
  if orders:
    result['rows']['alpha'] = {'spearman': metrics.bootstrap(orders, seed)}
    result['clips']['alpha'] = {'spearman': orders}
  settings = {
    'split': split, 'records': block['name'], 'image_size': batches.image_size,
    'protocols': list(protocols), 'strengths': list(strengths),
    'num_sample_steps': num_sample_steps, 'num_clips': num_clips,
    'notes': dict(getattr(run.method, 'notes', {})),
  } | _describe(run)
  return _finish(result, settings, scorer, parts, len(subjects), skipped)


def _check(run, protocols, strengths, infer):
  """ValueError unless the run can be scored that way."""
  for protocol in protocols:
    if protocol not in PROTOCOLS:
      raise ValueError(
        f'Unknown protocol {protocol!r}. Choose some of: '
        f'{", ".join(PROTOCOLS)}.'
      )
  if strengths and len(run.stages) < 2:
    raise ValueError(
      '--refine: this run has no stage that refines. Leave it out.'
    )
  if 'oracle' in protocols and infer is None:
    raise ValueError(
      'protocol oracle: this run infers no intensity. Use profile.'
    )


def _describe(run):
  """What a result must remember of its run."""
  return {
    'workdir': str(getattr(run, 'folder', '')), 'step': run.step,
    'stages': list(run.config['stages']),
    'fingerprint': run.config['info']['fingerprint'],
    'config': {name: run.config[name] for name in run.config['stages']},
  }


def evaluate_folders(
  generated, real, *, ssim='gaussian', seed=0, sizes=(), faces='auto',
  nets=True, num_clips=0, keep=None,
):
  """Scores of videos of anybody's making; see `evaluate`.

  Args:
    generated: folder of videos, or of folders of pictures.
    real: the same with the real ones, by the same names (endings aside).
    ssim, seed, sizes, faces, nets, num_clips, keep: see `evaluate`.

  Returns:
    As `evaluate`. Frame i of F is compared with the real one of N that is
    nearest in time, round(i (N - 1) / (F - 1)), shrunk or enlarged to the
    generated size.

  Raises:
    ValueError: no such folders, no common names.
  """
  ours, theirs = _list_videos(generated), _list_videos(real)
  names = [name for name in ours if name in theirs]
  if not names:
    raise ValueError(
      f'{generated} and {real} have no video of the same name. They have '
      f'{", ".join(list(ours)[:3])}, ... and {", ".join(list(theirs)[:3])}, ...'
    )
  skipped = [
    f'{name}: no {"real" if name in ours else "generated"} video'
    for name in sorted(ours.keys() ^ theirs.keys())
  ]
  parts = extractors.gather(faces, None, _identity(faces), (), nets)
  parts.absent['recognised'] = 'not computed: folders tell no labels'
  parts.absent['alpha_order'] = 'not computed: needs --workdir'
  scorer = scores.Scorer(
    ssim=ssim, sizes=tuple(sizes), seed=seed, **parts.arguments
  )
  names = names[: num_clips or None]
  for name in tqdm.tqdm(names, 'evaluating', file=sys.stderr):
    try:
      fake, truth = _read_pair(ours[name], theirs[name])
    except ValueError as error:
      skipped.append(f'{name}: {error}')
      continue
    made = scores.baselines(truth) | {'generated': fake}
    scorer.add(name, None, truth, made)
    if keep:
      keep({'id': name, 'label_name': '', 'video': truth}, made)
  if not scorer.ids:
    raise ValueError(f'No pair could be read: {skipped[0]}')
  settings = {'generated': str(generated), 'real': str(real)}
  return _finish(scorer.result(), settings, scorer, parts, None, skipped)


def _load(folder):
  run = runs.load(folder)
  run.folder = folder
  return run


def _identity(faces):
  """The run whose identity code `faces` asks for, or None."""
  is_run = (pathlib.Path(faces) / 'config.json').is_file()
  return _load(faces) if is_run else None


def _read_pair(generated, real):
  """Two videos uint8 [T, H, W, 3] of the generated one's size and length."""
  fake, truth = video.read_video(generated)[0], video.read_video(real)[0]
  times = np.linspace(0, len(truth) - 1, len(fake)).round().astype(int)
  return fake, video.resize(truth[times], fake.shape[1:3])


def _list_videos(folder):
  """{name without its ending: path} of the videos in a folder."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f'{folder} is not a folder. Pass one with videos in it.')
  return {
    (path.name if path.is_dir() else path.stem): path
    for path in sorted(folder.iterdir()) if path.name[0] != '.'
  }


def _finish(result, settings, scorer, parts, subjects, skipped):
  """The result with its settings and counts."""
  settings |= {
    'ssim': scorer.ssim, 'sizes': ['native', *scorer.sizes],
    'resize': 'areas (OpenCV INTER_AREA)', 'psnr_cap': scores.PSNR_CAP,
    'seed': scorer.seed, 'bootstrap_resamples': 1000,
    'acd_frames': scores.ACD_FRAMES, 'extractors': parts.described,
    'versions': {
      name: metadata.version(name)
      for name in ('hatjax', 'jax', 'dm-pix', 'opencv-python-headless')
    },
    'device': jax.devices()[0].device_kind,
  }
  n = {
    'clips': len(scorer.ids), 'subjects': subjects, 'skipped': len(skipped)
  }
  return {'settings': settings, 'n': n, 'skipped': skipped, **result}


def _define():
  """The flags; not when imported, since other commands share their names."""
  integer, string = flags.DEFINE_integer, flags.DEFINE_string
  string('workdir', None, 'Folder of the run.')
  string('generated', None, 'Folder of videos to score instead of a run.')
  string('real', None, 'The real videos, by the same names.')
  flags.DEFINE_list('compare', [], 'Folders of runs: one table of all.')
  string(
    'ablation', None, 'A config such as configs/synthetic.py, or '
    'configs/synthetic.py:identity_encoder,fev_gan: trains its variants under '
    '--workdir (resumes what is there) and compares them.',
  )
  integer('ablation_steps', 300, 'Of each variant.', lower_bound=1)
  string('split', 'test', 'A named split of the records.')
  flags.DEFINE_list(
    'protocol', ['profile'],
    'Where the intensity of a frame comes from: profile, its time and what '
    'training saw then; linear, its time; oracle, inferred from the real '
    'frame.',
  )
  flags.DEFINE_list(
    'refine', [],
    'Strengths of the refining stage to compare, 0 being its draft; default: '
    "the config's.",
  )
  integer(
    'num_sample_steps', None, 'Of the refining stage, from pure noise.',
    lower_bound=1,
  )
  integer(
    'num_clips', 0, 'How many clips of the split, drawn once for all; 0: all.',
    lower_bound=0,
  )
  string('data_dir', None, 'Where the records live; see hatjax.train.')
  _define_scores()


def _define_scores():
  """Flags of what is scored, and where it is written."""
  integer, string = flags.DEFINE_integer, flags.DEFINE_string
  flags.DEFINE_enum(
    'ssim', 'gaussian', sorted(metrics.WINDOWS), 'Window of SSIM.'
  )
  flags.DEFINE_list(
    'sizes', ['native', '128', '64'],
    'Sides to score at; only smaller ones than the clips have count.',
  )
  string(
    'faces', 'auto', f'Face embedding of ACD: auto, none, '
    f'{", ".join(face_embedding.NAMES)}, or the folder of a face_classifier '
    'run.',
  )
  string(
    'classifier', None,
    'Folder of a face_classifier run, which names the expressions made.',
  )
  flags.DEFINE_bool(
    'nets', True, 'LPIPS, FID, KID, IS, video FID, where weights are there.'
  )
  flags.DEFINE_list(
    'image', [], 'Photos that the shown clips drive, in the report (motion '
    'transfer).',
  )
  integer('seed', 0, 'Of the noise and the bootstrap.')
  integer('shown', 6, 'Clips shown in the report.', lower_bound=0)
  flags.DEFINE_bool(
    'frames', False, 'Also write every frame scored, frames/<row>/<clip>/*.png'
  )
  string(
    'out', None, 'Folder of the report (default <workdir>/eval/<split>, or '
    '<split>-<num_clips>), or a json file to write the scores alone.',
  )


def _options(given):
  """Flags -> keyword arguments that every way of scoring shares."""
  sizes = [s for s in given.sizes if s != 'native']
  if not all(s.isdigit() and int(s) > 0 for s in sizes):
    raise ValueError(f'--sizes {",".join(given.sizes)}: give native or sides.')
  return dict(
    ssim=given.ssim, seed=given.seed, sizes=tuple(map(int, sizes)),
    faces=given.faces, nets=given.nets, num_clips=given.num_clips,
  )


def _score_run(given, folder, out):
  """Scores a run and writes its report; returns the result."""
  try:
    strengths = [float(x) for x in given.refine]
  except ValueError:
    raise ValueError(
      f'--refine {",".join(given.refine)}: give numbers from 0 to 1.'
    ) from None
  run = _load(folder)
  faces = remake.read_faces(run, given.image)
  keep = score_report.Gallery(out, given.shown, given.frames)
  result = evaluate(
    run, given.split, given.protocol, strengths,
    num_sample_steps=given.num_sample_steps, directory=given.data_dir,
    classifier=given.classifier, keep=keep, **_options(given),
  )
  shown = [clip for clip, _ in keep.clips]
  for clip, made in remake.drive_faces(run, faces, shown):
    keep.add(clip, made)
  _write(result, keep, out, folder)
  return result


def _write(result, gallery, out, folder=None):
  out = pathlib.Path(out)
  if out.suffix == '.json':
    out.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_atomically(out, score_report.to_json(result))
    return
  stages = result['settings'].get('stages', ())
  curves = [(s, pathlib.Path(folder) / s / 'losses.png') for s in stages]
  score_report.write(result, gallery, out, curves)


def main(argv):
  """The command."""
  given = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument: {argv[1]}')
  logging.set_verbosity(logging.FATAL)  # Orbax tells of every file.
  try:
    result, out = _run_command(given)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  if result:
    print(score_report.table(result))
    said = '\nScored {frames} frames at {frames_per_second:.0f} frames/s.'
    print(said.format(**result['scoring']))
  print(f'\nEverything, clip by clip: {out}')


def _run_command(given):
  """(result or None, where it was written)."""
  others = (given.ablation, given.compare, given.generated, given.real)
  if given.image and any(others):
    raise ValueError('--image goes with --workdir, one run. Leave it out.')
  if given.ablation:
    root = given.workdir or ablation.default_root(given.ablation)
    root = pathlib.Path(root)
    ablation.train(
      given.ablation, root, given.ablation_steps, given.data_dir
    )
    given.classifier = given.classifier or str(root / ablation.JUDGE)
    folders = ablation.folders(given.ablation, root)
    return None, _compare(given, folders, given.out or root / 'comparison')
  if given.compare:
    folders = {folder: folder for folder in given.compare}
    return None, _compare(given, folders, given.out or 'out/compare')
  if given.generated or given.real:
    if not (given.generated and given.real):
      raise ValueError('Pass both --generated and --real.')
    out = given.out or 'out/evaluate'
    gallery = score_report.Gallery(out, given.shown, given.frames)
    result = evaluate_folders(
      given.generated, given.real, keep=gallery, **_options(given)
    )
    _write(result, gallery, out)
    return result, out
  if not given.workdir:
    raise ValueError(
      'Pass --workdir, the folder of a trained run; or --generated and --real, '
      'folders of videos.'
    )
  out = given.out or _default_out(given.workdir, given)
  return _score_run(given, given.workdir, out), out


def _compare(given, folders, out):
  """Scores runs {name: folder} one after another; one table of all."""
  results = {}
  for name, folder in folders.items():
    print(f'\n{name}', file=sys.stderr)
    path = _default_out(folder, given)
    results[name] = _score_run(given, folder, path)
  print(comparison.write(results, out))
  return out


def _default_out(folder, given):
  clips = f'-{given.num_clips}' * bool(given.num_clips)
  return pathlib.Path(folder) / 'eval' / f'{given.split}{clips}'


_GROUPS = {
  'what to score': 'workdir split data_dir num_clips generated real compare '
  'ablation ablation_steps',
  'how': 'protocol refine num_sample_steps ssim sizes faces classifier nets',
  'the rest': 'seed out shown image frames',
}

if __name__ == '__main__':
  _define()
  parse = app.parse_flags_with_usage
  sys.exit(command.run_absl(main, parse, __doc__, _GROUPS))
