"""Trains any method: config + records -> workdir. One loop for all.

  python -m hatjax.train --config configs/synthetic.py --workdir runs/a
  python -m hatjax.train --config configs/ck_plus.py:paper,256
  python -m hatjax.train --config configs/mug.py:fev_gan,tiny \\
    --config.fev_gan.train.num_steps=500

The same command again resumes; Ctrl-C saves. Exit code 0 if it trained or was
stopped and saved, 1 on an error.
"""

import contextlib
import copy
import functools
import inspect
import os
import pathlib
import signal
import sys
import time
from concurrent import futures

# Set before jax starts: a CPU user wants no warnings about missing GPUs.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax
import numpy as np
import tqdm
from absl import app, flags, logging

from hatjax import (
  command,
  config_flag,
  data,
  guard,
  init_from,
  methods,
  parallel,
  prepare,
  replay,
  runs,
  settings,
  validation,
  workdir,
)
from hatjax.nets import lowerings

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string(
  'workdir', None,
  'Folder of the run; default runs/<config and arguments>. Run again with '
  'the same one to resume.',
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None,
  'Where the records live; default $TFDS_DATA_DIR, else '
  '~/tensorflow_datasets.',
)


_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False,
  'Several processes: calls jax.distributed.initialize() first, which finds '
  'Slurm and Cloud TPU by itself, else reads JAX_COORDINATOR_ADDRESS, '
  'JAX_NUM_PROCESSES and JAX_PROCESS_ID.',
)
_VERIFY = flags.DEFINE_string(
  'verify', None,
  'A run: computes its last steps again, says whether the checkpoints are '
  'equal bit for bit, or where they part (exit code 1), and ends.',
)
_VERIFY_STEPS = flags.DEFINE_integer(
  'verify_steps', None,
  'How many steps at least; default: from the checkpoint before the newest.',
)


class Interrupted(Exception):
  """SIGTERM or Ctrl-C came; the state is saved."""


class _Signals:
  """Notes SIGTERM and SIGINT; the loop looks between steps."""

  def __init__(self):
    self.name = None
    self._before = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    if self.name == 'SIGINT':
      raise KeyboardInterrupt  # The second Ctrl-C does not wait.
    self.name = signal.Signals(number).name

  def __exit__(self, *exc):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def train(config, folder, data_dir=None, keep=False):
  """Trains every stage of a config in order; resumes what is there.

  Args:
    config: dict with `stages`, `seed`, `parallel`, and a block per stage.
    folder: workdir.
    data_dir: where the records live; see `records.data_dir`.
    keep: traced programs and decoded frames in the user's cache folder, for
      runs to come, if JAX has a compilation cache. Not where a function was
      replaced since it was imported.

  Returns:
    {stage name: final state}.

  Raises:
    ValueError: a setting, the data or the workdir is wrong, or a loss is nan.
    Interrupted: a signal asked to stop; the run is saved.
  """
  # Everything that can be wrong in the settings is found here, before the
  # workdir is made and a device is touched.
  parts, info = [], None
  lowering = config.get('lowering') or 'auto'
  settings.check_choices(config__lowering=(lowering, lowerings.LOWERINGS))
  for name in config['stages']:
    block = methods.settle(config, config[name])
    config = {**config, name: block}
    _ensure_records(block['data'].get('name', ''), data_dir)
    batches = _call(
      data.make_batches, f'{name}.data', seed=config['seed'],
      directory=data_dir, **block['data'],
    )
    info = _agree(info, describe(batches), name)
    epoch = max(1, len(batches.clips) // batches.batch_size)
    method = runs.make_method(block, info, batches.image_size, epoch)
    settings.check_choices(
      train__draft_alpha=(
        block['train'].get('draft_alpha', 'inferred'), validation.DRAFT_ALPHAS
      ),
      train__on_nan=(block['train'].get('on_nan', 'stop'), guard.ACTIONS),
    )
    begin, frozen = None, {}
    if not block['train'].get('start_from'):
      frozen = init_from.load(config, method)
    elif not workdir.list_steps(pathlib.Path(folder) / name):
      begin = init_from.trained({**config, 'info': info}, name)
    parts.append((name, block, batches, method, begin, frozen))
  config = _absolute({**config, 'info': info})
  earlier = runs.load_earlier(config)
  runs.check_cascade(
    [stage[:2] for stage in earlier]
    + [(p[0], p[3]) for p in parts if hasattr(p[3], 'animate')]
  )
  previous = _frozen(*earlier[-1]) if earlier else None
  options = parallel.compiler_options(
    config, print if jax.process_index() == 0 else lambda line: None
  )
  root = jax.random.key(config['seed'])
  keep = keep and bool(jax.config.jax_compilation_cache_dir)
  states = {}
  with (
    lowerings.lowering(lowering), workdir.open_workdir(folder, config) as folder
  ):
    for name, block, batches, method, begin, frozen in parts:
      run = workdir.Run(folder / name, block['train'].get('keep', 3))
      try:
        state = _finished(run, method, block)
        if state is None:
          for net, source in getattr(method, 'pretrained', {}).items():
            if source in states:
              frozen[net] = states[source].params[net]
          stage = _Stage(
            config, block, batches, method, run, data_dir, options, previous,
            begin, frozen, keep,
          )
          with contextlib.closing(stage):
            state = _train_stage(stage, root)
      finally:
        run.close()
      states[name] = state
      if hasattr(method, 'animate'):
        previous = _frozen(name, method, state)
  return states


def _ensure_records(name, data_dir):
  """Makes synthetic records where they are missing."""
  def make():
    return prepare.ensure_synthetic(name, data_dir)

  if name.startswith('synthetic/'):
    parallel.first_process(make)


def _frozen(name, method, state):
  """A stage as the next one needs it, on the host."""
  return runs.Stage(name, method, jax.device_get(state.frozen()))


def _finished(run, method, block):
  """The state of a stage that has all its steps, else None."""
  step = run.latest_step()
  if step is None or step < block['train']['num_steps']:
    return None
  state = runs.restore_state(run, method, block)
  if int(state.step) < block['train']['num_steps']:
    return None  # The last checkpoint was damaged.
  print(f'{run.folder} is done: step {int(state.step)}.')
  return state


def _agree(info, other, name):
  """`other`, what the data of a stage say; its labels must be `info`'s."""
  if info and info['labels'] != other['labels']:
    raise ValueError(
      f'config.{name}.data.name: its labels are {", ".join(other["labels"])}, '
      f'those of the stage before {", ".join(info["labels"])}. Use the same '
      'records.'
    )
  return other


def _absolute(config):
  """A run must find the runs it builds on from any folder."""
  full = lambda folder: folder and os.path.abspath(os.path.expanduser(folder))
  config = copy.deepcopy(config)
  if config.get('lowering') in ('', 'auto'):  # as of older runs, which go on
    del config['lowering']
  init_from = config.get('init_from', {})
  for source in init_from:
    init_from[source] = full(init_from[source])
  for name in config['stages']:
    block = config[name]['train']
    folder = block.pop('start_from', '')  # '' says nothing, either
    if folder:
      block['start_from'] = full(folder)
  return config


def _call(function, block, **kwargs):
  """function(**kwargs), a misspelt setting being named."""
  known = inspect.signature(function).parameters
  for key in kwargs:
    if key not in known:
      raise ValueError(
        f'Unknown setting config.{block}.{key}. It has: {", ".join(known)}.'
      )
  return function(**kwargs)


def describe(batches):
  """What the data say and a run must remember."""
  metadata = batches.records.metadata
  return {
    'labels': list(batches.labels),
    'trained_labels': batches.trained_labels(),
    'crop': metadata['options']['crop'],
    'background': metadata['options'].get('background', 'keep'),
    'fingerprint': metadata['fingerprint'],
  }


def _decisive(config, stage, batches):
  """All that decides on the programs of a stage; see `parallel.Runner`."""
  others = (*config['stages'], 'seed')
  train = {
    k: v for k, v in stage['train'].items()
    if k not in workdir.FREE or k in ('num_steps', 'on_nan')
  }
  return [
    {k: v for k, v in config.items() if k not in others},
    {**stage, 'train': train}, describe(batches), batches.resident,
    [clip.num_frames for clip in batches.clips], lowerings.form(),
  ]


class _Stage:
  """One stage being trained: what the loop below does between steps."""

  def __init__(
    self, config, stage, batches, method, run, data_dir, options,
    previous=None, begin=None, frozen=None, keep=False,
  ):
    self.settings, self.run, self.batches = stage['train'], run, batches
    self.begin, self.frozen = begin, frozen
    prepare = batches.prepare
    words = _decisive(config, stage, batches) if keep else None
    held_out = data.make_batches(
      directory=data_dir,
      **{**stage['data'], 'split': self.settings.get('val_split', 'val')},
    )

    def resident():
      self._clips.result()  # What is wrong with them shows here, too.
      frames, self._frames = self._frames, None  # The device has them now.
      return frames.result()

    if getattr(method, 'needs_draft', False):
      alpha = self.settings.get('draft_alpha', 'inferred')
      prepare = validation.add_drafts(
        prepare, previous.method, alpha, getattr(method, 'microbatches', 1)
      )
      read, state = resident, previous.state
      resident = lambda: {'frames': read(), 'previous': state}
      words = None  # These steps hold what another stage is made of.
    self.runner = parallel.Runner(
      method, prepare, resident, config.get('parallel', 'jit'),
      dispatch=self.settings.get('dispatch', 'auto'), options=options,
      on_nan=self.settings.get('on_nan', 'stop'), words=words,
    )
    self.runner.check_batch_size(batches.batch_size)
    self.runner.expect(self.settings.get('steps_per_dispatch', 1))
    self.scorer = validation.make_scorer(method, previous)
    # A stage that refines is scored on as many frames as it learns from.
    self.limit = validation.MAX_FRAMES
    if 'draft' in method.reads:
      self.limit = batches.num_frames
    # Both while the state is being made; the first step waits for them.
    self._stopped, self._reader = False, futures.ThreadPoolExecutor(1)
    clips = held_out.whole_clips(self.settings.get('val_clips', 8))
    self._clips = self._reader.submit(list, clips)
    self._frames = self._reader.submit(
      batches.resident_frames, lambda: self._stopped, keep
    )

  def close(self):
    """Ends what still reads."""
    self._stopped = True
    self._reader.shutdown(wait=False, cancel_futures=True)

  def start(self, root):
    """(step, state): the newest checkpoint, or step 0."""
    example = self.batches.example()
    state = None
    if self.run.latest_step() is not None:  # Else `init` need not be traced.
      state = self.run.restore(self.runner.abstract_state(example))
    if state is None:
      state = self.runner.init(jax.random.fold_in(root, 2**31), example)
      if self.begin or self.frozen:
        state = self.runner.fetch(state)
        if self.begin:
          state = init_from.start(state, self.begin)
        # To the host: what others hold must outlive the steps' donation.
        state = jax.device_get(init_from.put(state, self.frozen))
        state = self.runner.place(state)
      return 0, state
    step = int(state.step)
    print(f'Resuming {self.run.folder} at step {step}.')
    return step, self.runner.place(state)

  def due(self, name, before, step):
    """Whether a multiple of settings[name] lies in (before, step]."""
    every = self.settings.get(name, 500)
    return step == self.settings['num_steps'] or (
      step // every > before // every
    )

  def check(self, watch, metrics):
    """Host metrics of the last step; ValueError if the run is to stop."""
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    try:
      watch.look(metrics)
    except ValueError as error:
      good = self.run.latest_step()
      where = f'{self.run.folder}/checkpoints/{good}' if good else 'none'
      raise ValueError(f'{error} Last good checkpoint: {where}.') from None
    # A dropped step's own may be left.
    return {k: v for k, v in metrics.items() if np.isfinite(v)}

  def save(self, step, state, with_sample, in_haste):
    """Scores, saves and perhaps draws the state; in haste it only saves."""
    state = self.runner.fetch(state)
    if in_haste:
      self.run.save(step, state)
      return
    scores, shown = validation.score_clips(
      self.scorer, state, self._clips.result(), self.limit
    )
    if scores:
      self.run.log(step, scores)
    self.run.save(step, state, scores)
    if with_sample and shown:
      self.run.sample(step, shown[:6])
    self.run.plot_losses()


def _train_stage(stage, root):
  """The loop: steps in chunks, and what is due after each."""
  step, state = stage.start(root)
  stage.run.forget_after(step)
  num_steps = stage.settings['num_steps']
  chunk = stage.settings.get('steps_per_dispatch', 1)
  if stage.runner.dispatch == 'loop':
    chunk = 1  # One by one anyway: signals need not wait for the rest.
  watch = guard.Watch(stage.runner.on_nan, step)
  metrics = {}
  frames = stage.batches.batch_size * stage.batches.num_frames
  stream = stage.batches.iterate(step)
  clock = _Clock(step)
  with _Signals() as signals, _progress_bar(stage, step) as bar:
    while step < num_steps:
      before = step
      # Chunks align to step 0, so that resumed equals unbroken.
      step += min(chunk - step % chunk, num_steps - step)
      batches = [next(stream) for _ in range(step - before)]
      ahead = metrics
      state, metrics = stage.runner.step(state, batches, root)
      watch.add(metrics.pop(guard.KEY))
      # One chunk computes while the next is prepared; the bar and signals
      # would be minutes behind if more were on their way.
      jax.block_until_ready(ahead)
      bar.update(step - before)
      stop = signals.name is not None
      if jax.process_count() > 1:  # Asked seldom: all wait for the slowest.
        stop = stage.due('log_every', before, step) and (
          parallel.any_process(stop)
        )
      if stop or stage.due('log_every', before, step):
        metrics = stage.check(watch, metrics)
        if watch.action == 'skip':
          metrics, watch.skipped = metrics | {'skipped': watch.skipped}, 0
        speed = clock.lap(step) * frames
        stage.run.log(step, metrics | {'frames_per_second': speed})
        bar.set_postfix(_shown(metrics), fps=f'{speed:.0f}')
      if stop or stage.due('ckpt_every', before, step):
        stage.check(watch, metrics)
        sample = stage.due('sample_every', before, step)
        stage.save(step, state, sample, in_haste=stop)
        clock.lap(step)
      if stop:
        stage.run.wait()
        raise Interrupted(
          f'{signals.name or "Another process"}: saved {stage.run.folder} at '
          f'step {step}. Run the same command again to go on.'
        )
  stage.run.wait()
  return stage.runner.fetch(state)


def _progress_bar(stage, step):
  return tqdm.tqdm(
    total=stage.settings['num_steps'], initial=step, unit='step',
    desc=stage.run.folder.name, dynamic_ncols=True, file=sys.stderr,
    disable=jax.process_index() > 0,
  )


def _shown(metrics):
  """The few numbers that fit beside the bar."""
  names = (
    'loss/l1', 'loss/gan', 'loss/generator', 'loss/denoise', 'psnr/train',
  )
  short = {n.split('/')[0 if 'psnr' in n else 1]: n for n in names}
  return {k: f'{metrics[n]:.3g}' for k, n in short.items() if n in metrics}


class _Clock:
  """Steps per second since the last look."""

  def __init__(self, step):
    self.logged, self._time = step, time.perf_counter()

  def lap(self, step):
    now = time.perf_counter()
    rate = (step - self.logged) / max(now - self._time, 1e-9)
    self.logged, self._time = step, now
    return rate


def main(argv):
  """The command."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument: {argv[1]}')
  # Orbax tells of every file, and of errors that are raised here as well.
  logging.set_verbosity(logging.FATAL)
  parallel.start_process()
  if _DISTRIBUTED.value:
    parallel.join_processes()
  try:
    if _VERIFY.value:
      steps = _VERIFY_STEPS.value
      again = functools.partial(train, keep=True)
      sys.exit(not replay.verify(again, _VERIFY.value, steps, _DATA_DIR.value))
    folder = _WORKDIR.value or config_flag.default_workdir()
    train(_CONFIG.value.to_dict(), folder, _DATA_DIR.value, keep=True)
  except Interrupted as stop:
    print(stop)
    return
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(f'Trained. Everything is in {folder}')


if __name__ == '__main__':
  sys.exit(command.run_absl(main, config_flag.parse, __doc__, {
    'options': 'config workdir data_dir distributed',
  }))
