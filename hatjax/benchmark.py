"""Times any method on this machine: its step, its videos, or its input.

  python -m hatjax.benchmark --config configs/ck_plus.py --batch_sizes 1,2,4 \\
    --json out/benchmark.json

--mode train and generate need no records: they take random pictures. --mode
data reads the config's records and runs the training loop on them. With
--config.profile=4gb or --config.deterministic everything is measured without
it too, and compared. In the JSON:

  init_, trace_, compile_seconds   with an empty cache, unless --cached
  first_step_seconds    all of it again with a full cache, and one step
  step_seconds          of each step, waiting for the device after every one
  step_seconds_mean     of as many in a row, as training goes: the device waits
                        for no batch. What is per second comes of it
  encode_, decode_seconds_median   of generation, apart, on one device
  flops, bytes_accessed of a step over all devices, by XLA's count, bytes of a
                        loop those of one turn; on a CPU rewritten convolutions
                        count the zeros that they pad
  share_of_peak         flops per second over those of matrix products of the
                        same type on the same devices, in the same process
  cores_busy            CPU seconds of this process (threads that spin as they
                        wait, too) per second of the steps in a row
  compiled_peak_bytes   of one device, by the compiled program; on a CPU an
                        estimate: bfloat16 works on float32 copies there
  device_peak_bytes     of one device, the most so far; CPUs do not report it
                        (a profile goes first, so that its own is seen)
  waiting_share         of the training loop's time: fetching a batch while the
                        device had nothing left to do
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time

# Set before jax starts: a CPU user wants no warnings about missing GPUs.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from hatjax import (
  command,
  config_flag,
  data,
  methods,
  parallel,
  runs,
  settings,
  timing,
  video,
)
from hatjax import report as report_lib
from hatjax.nets import lowerings

MODES = ('train', 'generate', 'data')
_PIXELS = ('video', 'image', 'driving', 'draft')
_LABELS = range(7)  # as many as CK+ has; only mode data opens the records
_READ_AHEAD = 32  # more batches than data.iterate holds ready


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What to measure; `_define` says each in words."""

  mode: str = 'train'
  batch_sizes: tuple[int, ...] = ()
  dtype: str = ''
  devices: int = 0
  lowering: str = ''
  steps: int = 20
  warmup: int = 3
  num_frames: int = 0
  cached: bool = False
  data_dir: str | None = None
  trace: str | None = None

  def __post_init__(self):
    settings.check_choices(**{
      '--mode': (self.mode, MODES),
      '--lowering': (self.lowering or 'auto', lowerings.LOWERINGS),
    })
    for name, low in dict(steps=1, warmup=0, devices=0, num_frames=0).items():
      if getattr(self, name) < low:
        raise ValueError(f'--{name} must be at least {low}.')


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Animate:
  """Generation as a training step, so that one loop measures everything."""

  method: object
  num_frames: int
  axis_name: str | None = None

  def init(self, rng, batch):
    return self.method.init(rng, batch)

  def train_step(self, state, batch, rng):
    frames = self.method.animate(state, batch, rng, self.num_frames)
    return state, {'frames': video.to_uint8(frames)}


def _prepare(batch, resident=None, rng=None):
  """Inside jit: ranges as `data.Batches.prepare` leaves them."""
  del resident, rng
  batch = {
    k: video.to_float(v) if k in _PIXELS else v for k, v in batch.items()
  }
  if 'lip_mask' in batch:
    batch['lip_mask'] = batch['lip_mask'].astype(jnp.float32)
  return batch


def _random_batch(example, seed):
  """Random host batch like `example`: zeros may run faster than faces."""
  rng = np.random.default_rng(seed)
  batch = {}
  for key, value in example.items():
    if key in _PIXELS or key == 'lip_mask':
      top = 256 if key in _PIXELS else 2
      batch[key] = rng.integers(0, top, value.shape, np.uint8)
    elif np.issubdtype(value.dtype, np.integer):
      batch[key] = rng.integers(0, len(_LABELS), value.shape, value.dtype)
    else:
      batch[key] = np.sort(rng.random(value.shape, value.dtype), -1)
  return batch


def _make_method(stage, labels=_LABELS):
  return runs.make_method(
    stage, {'labels': labels}, stage['data']['image_size']
  )


def _make_case(stage, make_runner, options):
  """(Case, frames per video) of the modes train and generate."""
  method, example = _make_method(stage), runs.example_batch(stage)
  if options.mode == 'train':
    frames, inputs = stage['data']['num_frames'], example
    if getattr(method, 'needs_draft', False):
      example['draft'] = example['video']
  else:
    frames = options.num_frames or getattr(method, 'num_frames', 20)
    image = example['video'][:, 0]
    clip = np.repeat(image[:, None], frames, 1)
    known = {**example, 'image': image, 'driving': clip, 'draft': clip}
    inputs = {key: known[key] for key in method.reads if key in known}

  def make(**changes):
    method = _make_method(stage)
    if options.mode == 'generate':
      method = _Animate(method=method, num_frames=frames)
    return make_runner(method, _prepare, **changes)

  batches = [_random_batch(inputs, seed) for seed in range(4)]
  case = timing.Case(
    make_runner=make, example=example, batches=batches,
    plainly=functools.partial(lowerings.lowering, 'plain'),
  )
  return case, frames


def _measure_steps(config, stage, make_runner, options):
  """The row of a batch size in the modes train and generate."""
  case, frames = _make_case(stage, make_runner, options)
  row, runner, state = timing.measure(
    case, options.steps, options.warmup, options.cached
  )
  if options.trace:
    name = f'{stage["method"]}_{stage["data"]["batch_size"]}'
    folder = str(pathlib.Path(options.trace) / name)
    state = timing.trace(runner, state, case.batches, folder)
  videos = stage['data']['batch_size'] / row['step_seconds_mean']
  row |= {
    'num_frames': frames, 'videos_per_second': videos,
    'frames_per_second': videos * frames,
  }
  if options.mode == 'generate' and len(runner.devices) == 1:
    state = runner.fetch(state)
    row |= _time_parts(runner, state, case.batches, frames, options)
  yield row


def _time_parts(runner, state, batches, num_frames, options):
  """Encoding a face and decoding its frames apart, where a method can."""
  method, rng = runner.method.method, jax.random.key(1)
  jit = functools.partial(jax.jit, compiler_options=runner.options or None)
  if not hasattr(method, 'encode'):
    return {}

  @jit
  def encode(state, inputs):
    inputs = _prepare(inputs)
    chunk = inputs.get('driving')
    if hasattr(method, 'sweep_alpha'):
      label = inputs.get('label', jnp.zeros(len(inputs['image']), jnp.int32))
      chunk = method.sweep_alpha(state, label, num_frames)
    return method.encode(state, inputs, rng), chunk

  @jit
  def decode(state, context, chunk):
    return video.to_uint8(method.decode(state, context, chunk, rng))

  seconds = []
  for k in range(1 + options.warmup + options.steps):
    times = [time.perf_counter()]
    code = jax.block_until_ready(encode(state, batches[k % len(batches)]))
    times.append(time.perf_counter())
    jax.block_until_ready(decode(state, *code))
    times.append(time.perf_counter())
    seconds.append(np.diff(times))
  medians = np.median(seconds[1 + options.warmup :], 0).tolist()
  return dict(zip(('encode_seconds_median', 'decode_seconds_median'), medians))


def _measure_input(config, stage, make_runner, options):
  """Rows of mode data: streamed, and resident where the frames fit."""
  block = {
    **stage['data'], 'seed': config['seed'], 'directory': options.data_dir,
  }
  fits = data.make_batches(**block).resident
  for resident, kind in (('no', 'streamed'), ('yes', 'resident'))[: 1 + fits]:
    batches = data.make_batches(**{**block, 'resident': resident})
    yield {'input': kind, **_time_input(stage, batches, make_runner, options)}


def _time_input(stage, batches, make_runner, options):
  """Times the pipeline alone, then the training loop on it."""
  steps, stream = options.steps, batches.iterate()
  first, later = _time_fetches(stream, steps), _time_fetches(stream, steps)
  train, method = stage['train'], _make_method(stage, batches.labels)
  prepare = batches.prepare
  if getattr(method, 'needs_draft', False):  # Making it is not input.
    prepare = lambda *x: (b := batches.prepare(*x)) | {'draft': b['video']}
  runner = make_runner(
    method, prepare, batches.resident_frames(),
    dispatch=train.get('dispatch', 'auto'),
  )
  chunk = math.gcd(steps, train.get('steps_per_dispatch', 1))
  done = (runner.init(jax.random.key(0), batches.example()), {})
  for _ in range(1 + math.ceil(options.warmup / chunk)):
    done, _ = _train_loop(runner, done, stream, chunk, chunk)
  _time_fetches(stream, _READ_AHEAD)  # What piled up while compiling.
  _, times = _train_loop(runner, done, stream, steps, chunk)
  total, fetching, waiting = times
  videos = batches.batch_size * steps / total
  return {
    'num_frames': batches.num_frames, 'steps_per_dispatch': chunk,
    'first_batches_per_second': steps / first,
    'batches_per_second': steps / later, 'step_seconds_mean': total / steps,
    'fetch_seconds_mean': fetching / steps, 'waiting_share': waiting / total,
    'videos_per_second': videos,
    'frames_per_second': videos * batches.num_frames,
  }


def _time_fetches(stream, count):
  begin = time.perf_counter()
  for _ in range(count):
    next(stream)
  return time.perf_counter() - begin


def _train_loop(runner, done, stream, steps, chunk):
  """As hatjax.train: a chunk computes while the next one is fetched.

  Returns:
    ((state, metrics), (seconds in all, seconds fetching batches, those of them
    at whose end the device had nothing left to do)).
  """
  rng, fetching, waiting = jax.random.key(1), 0.0, 0.0
  begin = time.perf_counter()
  for _ in range(steps // chunk):
    spent = time.perf_counter()
    batches = [next(stream) for _ in range(chunk)]
    spent = time.perf_counter() - spent
    fetching += spent
    if all(metric.is_ready() for metric in jax.tree.leaves(done[1])):
      waiting += spent
    ahead = done[1]
    done = runner.step(done[0], batches, rng)
    jax.block_until_ready(ahead)
  jax.block_until_ready(done)
  return done, (time.perf_counter() - begin, fetching, waiting)


def benchmark(config, options, show=lambda line: None):
  """Measures every stage of a config.

  Args:
    config: dict, as the configs make it.
    options: Options.
    show: takes each line of the table as soon as it is known.

  Returns:
    dict, fit for JSON: options, config, machine, peaks {dtype: see `timing`}
    and rows, one per stage and batch size, with the numbers of the module.

  Raises:
    ValueError: a setting is wrong.
  """
  form = config.get('lowering') or 'auto'
  settings.check_choices(config__lowering=(form, lowerings.LOWERINGS))
  devices = _devices(options.devices)
  report = {
    'options': dataclasses.asdict(options), 'config': config,
    'machine': timing.describe_machine(devices), 'peaks': {}, 'rows': [],
  }
  for name, value in report['machine'].items():
    show(f'{name.replace("_", " ")}: {value}')
  # Without the profile or determinism too: what do they cost?
  plain = {**config, 'profile': '', 'deterministic': False}
  words = (config.get('profile'), 'deterministic')
  words = filter(None, words if config.get('deterministic') else words[:1])
  label = ' '.join(words)
  variants = {label: config, '': plain} if label else {'': config}
  for name in config['stages']:
    if options.mode == 'generate' and not hasattr(
      _make_method(config[name]), 'animate'
    ):
      show(f'\n{name}: makes no videos')
      continue
    rows = []
    for label, variant in variants.items():
      found = _measure_variant(variant, name, options, report, show)
      rows.append([{**row, 'variant': label} for row in found])
      report['rows'] += rows[-1]
    for line in report_lib.compare(*rows) if len(rows) > 1 else ():
      show(line)
  return report


def _measure_variant(config, name, options, report, show):
  """Shows and yields the rows of one stage of a config."""
  devices = _devices(options.devices)
  stages = _stages(config, name, options, len(devices))
  method = _make_method(stages[0])
  maker = method if options.mode == 'generate' else None
  make_runner = functools.partial(
    parallel.Runner, mode=config['parallel'], devices=devices,
    options=parallel.compiler_options(config, show, maker),
  )
  for stage in stages:
    runner = make_runner(_make_method(stage), _prepare)
    runner.check_batch_size(stage['data']['batch_size'])
  dtype = getattr(method, 'dtype', 'float32')
  peaks = report['peaks']
  if options.mode != 'data' and dtype not in peaks:
    peaks[dtype] = timing.measure_peak(dtype, devices)
    rate = peaks[dtype]['flops_per_second'] / 1e9
    show(f'matrix products in {dtype}: {rate:.4g} GFLOP/s')
  size, profile = stages[0]['data']['image_size'], config.get('profile')
  title = [f'{size}x{size}', dtype, profile and f'profile {profile}']
  show(f'\n{name}: {options.mode}, {", ".join(filter(None, title))}')
  show(report_lib.line(options.mode))
  rows = []
  for row in _measure_stage(config, stages, make_runner, options, show):
    row = {'stage': name, 'mode': options.mode, 'dtype': dtype, **row}
    if row.get('flops'):
      peak = peaks[dtype]['flops_per_second']
      row['share_of_peak'] = row['flops_per_second'] / peak
    show(report_lib.line(options.mode, row))
    rows.append(row)
    yield row
  for line in report_lib.growth(rows):
    show(line)


def _measure_stage(config, stages, make_runner, options, show):
  """Rows of a stage, until a batch size is too large for the device."""
  measure = _measure_input if options.mode == 'data' else _measure_steps
  for stage in stages:
    size = stage['data']['batch_size']
    try:
      with lowerings.lowering(options.lowering or config.get('lowering')):
        for row in measure(config, stage, make_runner, options):
          yield {'batch_size': size, 'lowering': lowerings.form(), **row}
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      show(f'batch size {size} does not fit: {str(error).splitlines()[0]}')
      return


def _devices(count):
  devices = jax.devices()
  if count > len(devices):
    raise ValueError(
      f'--devices is {count}, but there are {len(devices)} '
      f'({devices[0].device_kind}). More can be feigned on a CPU: '
      f'XLA_FLAGS=--xla_force_host_platform_device_count={count}'
    )
  return devices[: count or None]


def _stages(config, name, options, num_devices):
  """The stage with each batch size, small to large, and the chosen dtype."""
  stage, stages = config[name], []
  sizes = options.batch_sizes or (stage['data']['batch_size'],)
  for size in sorted(set(sizes)):
    block = {**stage['data'], 'batch_size': size}
    sized = methods.settle(config, {**stage, 'data': block}, num_devices)
    if options.dtype:
      sized['model']['dtype'] = options.dtype
    stages.append(sized)
  return stages


# -- the command -------------------------------------------------------------


def _define():
  """The flags; not when imported, since other commands share their names."""
  integer, string, d = flags.DEFINE_integer, flags.DEFINE_string, Options()
  string('mode', d.mode, f'What to time: {", ".join(MODES)}.')
  string('batch_sizes', '', "Such as 1,2,4, over all devices; default: the "
         "config's.")
  string('dtype', d.dtype, "float32 or bfloat16; default: the config's.")
  integer('devices', d.devices, 'Use the first N; default all.')
  string(
    'lowering', d.lowering,
    'How convolutions are compiled: plain, aligned (what tensor cores like), '
    'rewritten (what CPUs like), or auto (by the platform); default: the '
    "config's.",
  )
  integer('steps', d.steps, 'Timed steps (or videos, or batches).')
  integer('warmup', d.warmup, 'Steps before them, besides the first.')
  integer('num_frames', d.num_frames, 'Per generated video; default 20.')
  flags.DEFINE_boolean(
    'cached', d.cached, 'Load what the compilation cache holds, as a run that '
    'starts again does; compile s then says how long that took.',
  )
  string('trace', d.trace, 'Folder for a profile of three steps, to be opened '
         'with tensorboard --logdir or xprof; not in mode data.')
  string('data_dir', d.data_dir, 'Where the records live; only for mode data.')
  string('json', None, 'Where the numbers go; a plot beside it: out.json and '
         'out.png.')
  return config_flag.define()


def _batch_sizes(text):
  words = [word.strip() for word in text.split(',') if word.strip()]
  if not all(word.isdecimal() and int(word) for word in words):
    raise ValueError(
      f'--batch_sizes is {text!r}. Pass numbers above 0, such as 1,2,4.'
    )
  return tuple(map(int, words))


def _run(config):
  names = [field.name for field in dataclasses.fields(Options)]
  values = {name: flags.FLAGS[name].value for name in names}
  values['batch_sizes'] = _batch_sizes(values['batch_sizes'])
  options = Options(**values)
  path = flags.FLAGS['json'].value
  if path:
    path = pathlib.Path(path)
    if path.suffix != '.json':
      raise ValueError(f'--json is {str(path)!r}. It must end with .json')
    path.parent.mkdir(parents=True, exist_ok=True)
  report = benchmark(
    config, options, lambda line: print(line, flush=True)
  )
  if path:
    path.write_text(json.dumps(report, indent=2) + '\n')
    report_lib.plot(report, path.with_suffix('.png'))
    print(f'\nWritten: {path} and {path.with_suffix(".png")}')


def main():
  """The command."""
  config = _define()

  def run(argv):
    if len(argv) > 1:
      raise app.UsageError(f'Unexpected argument: {argv[1]}')
    logging.set_verbosity(logging.WARNING)
    parallel.start_process()
    try:
      _run(config.value.to_dict())
    except (ValueError, OSError) as error:
      sys.exit(f'error: {error}')

  groups = {
    'options': 'config mode batch_sizes num_frames dtype devices lowering '
    'steps warmup cached data_dir json trace'
  }
  return command.run_absl(run, config_flag.parse, __doc__, groups)


if __name__ == '__main__':
  sys.exit(main())
