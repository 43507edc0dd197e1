"""hatjax against eager PyTorch on this machine, turn by turn.

  bash launch/install.sh reference
  python tests/in_turn.py --work step generate unet motion --turns 10

Two processes, of which one waits, take a step each, over and over, so that a
clock that drifts cannot favour one: what counts is the median of the turns'
ratios. Before every turn PyTorch multiplies matrices. Its seconds times their
rate, over 300 GFLOP/s, say how long it would take on the machine where the
released code was timed, whose seconds are printed beside it. Not a test:
pytest passes it by.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import pathlib
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # configs

import jax
import numpy as np
import torch
import torch_motion_transfer
import torch_reference
import torch_video_diffusion
import tqdm

from hatjax import benchmark, parallel

# name: (config, its argument, data, options, seconds of the released code)
WORK = {
  'step': ('frame_folders', 'reference,128', {}, {}, (3.4, 4.3)),
  'generate': (
    'frame_folders', 'reference,128', {}, {'mode': 'generate'}, (1.2, 1.4)
  ),
  'unet': (
    'synthetic', 'video_diffusion,reference,32', {'num_frames': 8}, {},
    (1.0, 1.2),
  ),
  'motion': (
    'voxceleb', 'reference', {}, {'mode': 'generate', 'num_frames': 32},
    (0.50, 0.55),
  ),
}
RATE = 300.0  # GFLOP/s where the released code was timed
FRAMES = 8  # of a motion that PyTorch draws in a turn; hatjax draws all 32


def ours(name):
  """(what does the work, how many calls of PyTorch's are as much)."""
  file, argument, data, options, _ = WORK[name]
  config = importlib.import_module(f'configs.{file}').get_config(argument)
  config, options = config.to_dict(), benchmark.Options(**options)
  config[config['stages'][-1]]['data'] |= {'batch_size': 1, **data}
  (stage,) = benchmark._stages(config, config['stages'][-1], options, 1)
  make_runner = functools.partial(
    parallel.Runner, mode='jit', devices=jax.devices()[:1],
    options=parallel.compiler_options(config, lambda line: None),
  )
  case, frames = benchmark._make_case(stage, make_runner, options)
  runner, rng = case.make_runner(), jax.random.key(1)
  state = runner.init(jax.random.key(0), case.example)

  def work():
    nonlocal state
    state, metrics = runner.step(state, [case.batches[0]], rng)
    jax.block_until_ready((state, metrics))

  return work, frames if name == 'motion' else 1


def theirs(name):
  """What PyTorch does for it; of a motion one frame."""
  if name == 'motion':
    return torch_motion_transfer.make(256, 'cpu')[0]
  if name == 'unet':
    trainer = torch_video_diffusion.Trainer('cpu')
    return functools.partial(trainer.step, torch.rand(1, 3, 8, 32, 32))
  trainer = torch_reference.Trainer(128, 64, 5, 'cpu')
  clip = torch_reference.clip(128, 5, 'cpu', 0)
  if name == 'generate':
    return functools.partial(trainer.generate, clip[0])
  return functools.partial(trainer.step, *clip)


def prepare_theirs(name):
  """In PyTorch's process: makes its side and fills its pools and caches."""
  global their_work
  their_work = theirs(name)
  torch_reference.seconds(their_work, 2, 'cpu')


def take_turn(count):
  """In PyTorch's process: (GFLOP/s of matrix products, seconds of its work)."""
  rate = torch_reference.matrix_rate('cpu', 2)
  return rate, np.mean(torch_reference.seconds(their_work, count, 'cpu'))


def compare(name, turns):
  """Prints medians and quartiles; returns every turn's numbers."""
  work, count = ours(name)
  torch_reference.seconds(work, 2, 'cpu')
  rows = []
  spawn = multiprocessing.get_context('spawn')
  with spawn.Pool(1, prepare_theirs, (name,)) as other:
    for _ in tqdm.trange(turns, desc=name, leave=False):
      rate, slow = other.apply(take_turn, (min(count, FRAMES),))
      (fast,) = torch_reference.seconds(work, 1, 'cpu')
      rows.append((rate, slow, fast / count, slow / fast * count))
  rates, slow, fast, ratios = np.transpose(rows)
  low, middle, high = np.percentile(ratios, (25, 50, 75))
  least, most = WORK[name][-1]
  print(
    f'{name}: PyTorch {np.median(slow):.3f} s, hatjax {np.median(fast):.3f} s: '
    f'{middle:.2f} times as fast (quartiles {low:.2f} to {high:.2f})\n'
    f'  matrix products: {np.median(rates):.0f} GFLOP/s; at {RATE:.0f} PyTorch '
    f'would take {np.median(slow * rates) / RATE:.2f} s, the released code '
    f'took {least} to {most}', flush=True,
  )
  names = ('gflops', 'pytorch_seconds', 'hatjax_seconds', 'times_as_fast')
  return [dict(zip(names, map(float, row))) for row in rows]


def main():
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--work', nargs='+', choices=WORK, default=list(WORK),
      help='default: all of them')
  add('--turns', type=int, default=10, help='default: %(default)s')
  add('--json', help='where every turn is written')
  args = parser.parse_args()
  parallel.start_process()
  print(f'torch {torch.__version__}, jax {jax.__version__}')
  report = {name: compare(name, args.turns) for name in args.work}
  if args.json:
    with open(args.json, 'w') as file:
      json.dump(report, file, indent=2)


if __name__ == '__main__':
  main()
