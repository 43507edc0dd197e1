"""hatjax against eager PyTorch on this machine, turn by turn.

  bash launch/install.sh reference
  .venv/bin/python tests/in_turn.py --turns 10 --json out/turns.json

Two processes take turns at the same work, over and over, so that a clock that
drifts cannot favour one: what counts is the median of the turns' ratios. In
each turn a side works once untimed, then is timed. Before and after each timed
call of PyTorch stand its matrix products, for the clock moves within a turn.
Its seconds times their rate, over 300 GFLOP/s, say how long it would take on
the machine where the released code was timed, whose seconds are printed beside
it. Each side has the memory and threads of its users: hatjax what its commands
set, PyTorch its defaults. hatjax's programs come from the user's compilation
cache, where they are there. Not a test: pytest passes it by.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import pathlib
import sys
from concurrent import futures

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

# name: (what it is, config, its argument, data, options, seconds of the
# released code)
WORK = {
  'step': (
    'HAT-cGAN, a step', 'frame_folders', 'reference,128', {}, {}, (3.4, 4.3)
  ),
  'generate': (
    'HAT-cGAN, 20 frames', 'frame_folders', 'reference,128', {},
    {'mode': 'generate'}, (1.2, 1.4),
  ),
  'unet': (
    '3-D U-Net, a step', 'synthetic', 'video_diffusion,reference,32',
    {'num_frames': 8}, {}, (1.0, 1.2),
  ),
  'motion': (
    'motion transfer, a frame', 'voxceleb', 'reference', {},
    {'mode': 'generate', 'num_frames': 32}, (0.50, 0.55),
  ),
}
RATE = 300.0  # GFLOP/s where the released code was timed
FRAMES = 8  # of a motion that PyTorch draws in a turn; hatjax draws all 32


def ours(name):
  """(what does the work, how many calls of PyTorch's are as much)."""
  _, file, argument, data, options, _ = WORK[name]
  config = importlib.import_module(f'configs.{file}').get_config(argument)
  config, options = config.to_dict(), benchmark.Options(**options)
  config[config['stages'][-1]]['data'] |= {'batch_size': 1, **data}
  (stage,) = benchmark._stages(config, config['stages'][-1], options, 1)
  method = benchmark._make_method(stage) if options.mode == 'generate' else None
  make_runner = functools.partial(
    parallel.Runner, mode='jit', devices=jax.devices()[:1],
    options=parallel.compiler_options(config, lambda line: None, method),
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
  """In PyTorch's process: makes its side."""
  global their_work
  their_work = theirs(name)
  torch_reference.seconds(their_work, 1, 'cpu')


def take_turn(count):
  """In PyTorch's process: (GFLOP/s of matrix products, seconds of its work).

  The rate is the mean over the work's time of the products on either side.
  """
  torch_reference.seconds(their_work, 1, 'cpu')
  times, rates = [], [torch_reference.matrix_rate('cpu', 1)]
  for _ in range(count):
    times += torch_reference.seconds(their_work, 1, 'cpu')
    rates.append(torch_reference.matrix_rate('cpu', 1))
  around = np.add(rates[1:], rates[:-1]) / 2
  return np.average(around, weights=times), np.mean(times)


def compare(name, turns):
  """Prints medians and quartiles; returns every turn's numbers."""
  work, count = ours(name)
  torch_reference.seconds(work, 1, 'cpu')
  rows = []
  with futures.ProcessPoolExecutor(
    1, multiprocessing.get_context('spawn'), prepare_theirs, (name,)
  ) as other:
    for _ in tqdm.trange(turns, desc=name, leave=False):
      rate, slow = other.submit(take_turn, min(count, FRAMES)).result()
      fast = torch_reference.seconds(work, 2, 'cpu')[1] / count
      rows.append((rate, slow, fast, slow / fast))
  rates, slow, fast, ratios = np.transpose(rows)
  low, middle, high = np.percentile(ratios, (25, 50, 75))
  (*_, (least, most)), scaled = WORK[name], np.median(slow * rates) / RATE
  print(
    f'{WORK[name][0]}: PyTorch {np.median(slow):.3f} s, hatjax '
    f'{np.median(fast):.3f} s: {middle:.2f} times as fast (quartiles {low:.2f} '
    f'to {high:.2f}, all {min(ratios):.2f} to {max(ratios):.2f})\n'
    f'  matrix products: {min(rates):.0f} to {max(rates):.0f} GFLOP/s; at '
    f'{RATE:.0f} PyTorch would take {scaled:.2f} s, the released code took '
    f'{least} to {most}', flush=True,
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
  if args.turns < 1:
    parser.error('--turns must be at least 1.')
  if args.json:
    path = pathlib.Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
  parallel.start_process()
  print(
    f'torch {torch.__version__}, {torch.get_num_threads()} threads; '
    f'jax {jax.__version__}'
  )
  report = {}
  for name in args.work:
    report[name] = compare(name, args.turns)
    if args.json:
      path.write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
  main()
