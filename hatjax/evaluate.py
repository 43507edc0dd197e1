"""Scores a trained run on a split of its records.

  python -m hatjax.evaluate --workdir runs/a --split test

Every clip is made anew from its first frame and label, then compared with the
real one, frame by frame. Beside it stand two rows that need no model: `copy`
repeats the first frame, `blend` fades from the first real frame to the last;
and `temporal mean`, every frame of the draft averaged with its neighbours.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import tqdm
from absl import app, flags, logging

from hatjax import data, metrics, runs, video, workdir

PROTOCOLS = ('profile', 'linear', 'oracle')
RESAMPLES = 1000


def evaluate(
  run, split='test', protocols=('profile',), strengths=(), *,
  num_sample_steps=None, num_clips=0, directory=None, ssim='gaussian', seed=0,
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

  Returns:
    dict: settings, n clips and subjects, rows {name: {score: {mean, low,
    high}}}, low and high being the bootstrap's 95 % interval over clips, and
    clips {row: {score: [value of each clip]}}. PSNR in dB and SSIM are means
    over all frames but the first (`blend`: nor the last, which it has by
    right), psnr_last and ssim_last those of the last; flicker is the mean
    absolute second difference in time (levels of 0..255) and flicker_error
    its distance to the real clip's; sharpness is the gradient energy over the
    real frames', sharpness_of_draft over the draft's. `alpha` holds the
    Spearman correlation, of each clip, of the inferred with the true
    intensity, or with time where that is unknown.

  Raises:
    ValueError: unknown split or protocol; a run that cannot refine.
  """
  for protocol in protocols:
    if protocol not in PROTOCOLS:
      raise ValueError(
        f'Unknown protocol {protocol!r}. Choose some of: '
        f'{", ".join(PROTOCOLS)}.'
      )
  block = dict(run.config[run.config['stages'][-1]]['data'])
  batches = data.make_batches(
    **{**block, 'split': split, 'directory': directory}
  )
  infer = _make_infer(run)
  if 'oracle' in protocols and infer is None:
    raise ValueError(
      'protocol oracle: this run infers no intensity. Use profile.'
    )
  cascade = len(run.stages) > 1
  if strengths and not cascade:
    raise ValueError(
      '--refine: this run has no stage that refines. Leave it out.'
    )
  clips, orders, subjects = {}, [], set()
  count = min(num_clips or len(batches.clips), len(batches.clips))
  found = batches.whole_clips(num_clips or None)
  for clip in tqdm.tqdm(found, 'evaluating', count, file=sys.stderr):
    real, subject = clip['video'], clip['subject']
    subjects.add(subject)
    alpha = infer and infer(real, clip['label'])
    made, drafts = _baselines(real), {}

    def make(protocol, strength, real=real, alpha=alpha, clip=clip):
      return run.animate(
        real[0], run.config['info']['labels'][clip['label']],
        num_frames=len(real),
        sweep='linear' if protocol == 'linear' else 'profile',
        alpha=alpha[None] if protocol == 'oracle' else None, seed=seed,
        refine=strength,
        num_sample_steps=None if strength == 0 else num_sample_steps,
      )[0]

    for protocol in protocols:
      draft = make(protocol, 0 if cascade else None)
      made[f'{protocol} temporal mean'] = temporal_mean(draft)
      for strength in strengths or (None,):
        name = ' '.join(
          [protocol, *([] if strength is None else [f'refine {strength:g}'])]
        )
        is_draft = strength == 0 or not cascade
        made[name] = draft if is_draft else make(protocol, strength)
        if cascade:
          drafts[name] = draft
    for name, fake in made.items():
      scores = _scores(fake, real, name == 'blend', ssim)
      if name in drafts:
        scores['sharpness_of_draft'] = _sharpness(fake, drafts[name])
      for score, value in scores.items():
        clips.setdefault(name, {}).setdefault(score, []).append(value)
    if alpha is not None and len(real) > 3:
      true = batches.records.alphas(batches.records.clips[clip['id']])
      true = true if len(true) == len(real) else np.arange(len(real))
      orders.append(spearman(alpha[1:], true[1:]))
  if orders:
    clips['alpha'] = {'spearman': orders}
  rng = np.random.default_rng(seed)
  return {
    'settings': {
      'split': split, 'step': run.step, 'records': block['name'],
      'fingerprint': run.config['info']['fingerprint'],
      'image_size': batches.image_size, 'ssim': ssim, 'seed': seed,
      'num_sample_steps': num_sample_steps,
    },
    'n': {'clips': count, 'subjects': len(subjects)},
    'rows': {
      name: {score: _interval(values, rng) for score, values in row.items()}
      for name, row in clips.items()
    },
    'clips': clips,
  }


def _make_infer(run):
  """(uint8 [T, S, S, 3], label) -> float [T], or None."""
  _, method, state = run.stages[0]
  if not hasattr(method, 'infer'):
    return None

  @jax.jit
  def infer(state, real, label):
    frames = video.to_float(real)[None]
    return method.infer(
      state, {'image': frames[:, 0], 'driving': frames, 'label': label[None]}
    )[0]

  return lambda real, label: np.asarray(infer(state, real, np.int32(label)))


def _baselines(real):
  """What needs no model: uint8 [T, S, S, 3] each."""
  share = np.linspace(0, 1, len(real))[:, None, None, None]
  blend = np.rint((1 - share) * real[0] + share * real[-1])
  return {
    'copy': np.repeat(real[:1], len(real), 0), 'blend': blend.astype(np.uint8),
  }


def _scores(fake, real, has_last, ssim):
  """{score: value} of a clip, uint8 [T, S, S, 3] both."""
  a, b = (video.to_float(x) for x in (fake, real))
  psnr, similar = jax.device_get(
    (metrics.psnr(a, b), metrics.ssim(a, b, ssim))
  )
  shown = slice(1, len(real) - 1 if has_last and len(real) > 2 else None)
  scores = {'psnr': psnr[shown].mean(), 'ssim': similar[shown].mean()}
  if not has_last:
    scores |= {'psnr_last': psnr[-1], 'ssim_last': similar[-1]}
  if len(real) > 2:
    ours, theirs = (127.5 * metrics.flicker(x[None])[0] for x in (a, b))
    scores |= {'flicker': ours, 'flicker_error': abs(ours - theirs)}
  scores['sharpness'] = _sharpness(fake, real)
  return {name: float(value) for name, value in scores.items()}


def _sharpness(fake, other):
  """Gradient energy over that of another clip; the first frames left out."""
  ours, theirs = (
    metrics.gradient_energy(video.to_float(x[None, 1:]))[0]
    for x in (fake, other)
  )
  return float(ours / theirs)


def temporal_mean(frames):
  """Each frame averaged with its two neighbours, uint8 [T, H, W, 3].

  The first and the last count twice, having one. A clip's plainest smoothing:
  what a refining stage must beat.
  """
  padded = np.pad(frames, ((1, 1), (0, 0), (0, 0), (0, 0)), mode='edge')
  mean = (padded[:-2].astype(np.float32) + padded[1:-1] + padded[2:]) / 3
  return np.rint(mean).astype(np.uint8)


def spearman(a, b):
  """Rank correlation; ties share their mean rank. nan for a constant."""
  ranks = []
  for values in (a, b):
    _, index, counts = np.unique(
      values, return_inverse=True, return_counts=True
    )
    ranks.append((np.cumsum(counts) - (counts - 1) / 2)[index])
  if any(np.ptp(r) == 0 for r in ranks):
    return float('nan')
  return float(np.corrcoef(*ranks)[0, 1])


def _interval(values, rng):
  """Mean and its bootstrap 95 % interval."""
  values = np.array(values)
  drawn = rng.integers(0, len(values), (RESAMPLES, len(values)))
  low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
  return {'mean': values.mean(), 'low': low, 'high': high}


def table(result):
  """Markdown: one row each, means, PSNR with its interval."""
  columns = {
    'psnr': '.2f', 'ssim': '.4f', 'psnr_last': '.2f', 'ssim_last': '.4f',
    'flicker': '.2f', 'flicker_error': '.2f', 'sharpness': '.2f',
    'sharpness_of_draft': '.2f',
  }
  lines = [
    '| | ' + ' | '.join(columns) + ' |', '|---' * (1 + len(columns)) + '|'
  ]
  for name, row in result['rows'].items():
    cells = []
    for score, form in columns.items():
      value = row.get(score)
      cell = '' if value is None else format(value['mean'], form)
      if value and score == 'psnr':
        cell += f' ({value["low"]:.2f} to {value["high"]:.2f})'
      cells.append(cell)
    if name != 'alpha':
      lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  if 'alpha' in result['rows']:
    orders = result['clips']['alpha']['spearman']
    lines.append(
      f'\nInferred alpha, Spearman with the true one: mean '
      f'{np.mean(orders):.3f}, median {np.median(orders):.3f}, lowest '
      f'{np.min(orders):.3f}.'
    )
  n = result['n']
  lines.append(
    f'\n{n["clips"]} clips of {n["subjects"]} people, '
    f'{result["settings"]["split"]}, step {result["settings"]["step"]}.'
  )
  return '\n'.join(lines)


def _define():
  """The flags; not when imported, since other commands share their names."""
  integer, string = flags.DEFINE_integer, flags.DEFINE_string
  string('workdir', None, 'Folder of the run.')
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
  flags.DEFINE_enum(
    'ssim', 'gaussian', sorted(metrics.WINDOWS), 'Window of SSIM.'
  )
  integer('seed', 0, 'Of the noise and the bootstrap.')
  string('out', None, 'Json file; default <workdir>/eval/<split>.json')


def main(argv):
  """The command."""
  given = flags.FLAGS
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument: {argv[1]}')
  logging.set_verbosity(logging.FATAL)  # Orbax tells of every file.
  try:
    if not given.workdir:
      raise ValueError('Pass --workdir, the folder of a trained run.')
    try:
      strengths = [float(x) for x in given.refine]
    except ValueError:
      raise ValueError(
        f'--refine {",".join(given.refine)}: give numbers from 0 to 1.'
      ) from None
    result = evaluate(
      runs.load(given.workdir), given.split, given.protocol, strengths,
      num_sample_steps=given.num_sample_steps, num_clips=given.num_clips,
      directory=given.data_dir, ssim=given.ssim, seed=given.seed,
    )
    default = pathlib.Path(given.workdir) / 'eval' / f'{given.split}.json'
    path = pathlib.Path(given.out or default)
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_atomically(path, json.dumps(result, indent=1))
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(table(result))
  print(f'\nEverything, clip by clip: {path}')


if __name__ == '__main__':
  _define()
  app.run(main)
