"""What a compiled step costs in time, operations and memory, and what this
machine could do at most."""

import contextlib
import dataclasses
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.extend import core

_PRODUCTS = 8  # of matrices, in a row; one alone would time its dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A step to measure.

  Attributes:
    make_runner: (**changes) -> parallel.Runner, everything in it made anew;
      changes replace arguments of Runner.
    example: what its `init` reads.
    batches: host batches, used in turn.
    plainly: () -> context in which no layer does more work than it must.
  """

  make_runner: Callable
  example: dict
  batches: list
  plainly: Callable = contextlib.nullcontext


def measure(case, steps, warmup, cached=False):
  """Compiles, starts and times a step.

  Args:
    case: Case.
    steps: how many are timed one by one, and as many again in a row.
    warmup: steps before them, besides the first.
    cached: take what the user's compilation cache holds of it.

  Returns:
    (dict of numbers, the runner, the state).
  """
  rng = jax.random.key(1)
  with contextlib.nullcontext() if cached else _empty_cache():
    row = _compile(case, rng)
    begin = time.perf_counter()
    runner = case.make_runner()
    state = runner.init(jax.random.key(0), case.example)
    state, _ = _one_step(runner, state, case.batches[0], rng)
    row['first_step_seconds'] = time.perf_counter() - begin
  seconds = []
  for k in range(warmup + steps):
    batch = case.batches[k % len(case.batches)]
    state, spent = _one_step(runner, state, batch, rng)
    seconds.append(spent)
  seconds = seconds[warmup:]
  begin, used, ahead = time.perf_counter(), time.process_time(), None
  for k in range(steps):  # A batch travels while the step before it runs.
    batch = case.batches[k % len(case.batches)]
    state, metrics = runner.step(state, [batch], rng)
    jax.block_until_ready(ahead)
    ahead = metrics
  jax.block_until_ready((state, metrics))
  spent, used = time.perf_counter() - begin, time.process_time() - used
  row |= {'step_seconds_mean': spent / steps, 'cores_busy': used / spent}
  stats = [device.memory_stats() or {} for device in runner.devices]
  row |= {
    'step_seconds': seconds, 'step_seconds_median': float(np.median(seconds)),
    'step_seconds_p90': float(np.percentile(seconds, 90)),
    'device_peak_bytes':
      max(s.get('peak_bytes_in_use', 0) for s in stats) or None,
  }
  row['flops_per_second'] = row['flops'] / row['step_seconds_mean']
  return row, runner, state


def trace(runner, state, batches, folder, steps=3):
  """Writes a profile of a few steps (jax.profiler); returns the state."""
  with jax.profiler.trace(folder):
    for k in range(steps):
      batch = batches[k % len(batches)]
      state, _ = _one_step(runner, state, batch, jax.random.key(1))
  return state


def _one_step(runner, state, batch, rng):
  begin = time.perf_counter()
  state, _ = jax.block_until_ready(runner.step(state, [batch], rng))
  return state, time.perf_counter() - begin


@contextlib.contextmanager
def _empty_cache():
  """A compilation cache of one's own, so that the user's is left alone; gives
  its folder."""
  names = (
    'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs',
  )

  def use(*values):
    for name, value in zip(names, values):
      jax.config.update(name, value)
    compilation_cache.reset_cache()

  before = [getattr(jax.config, name) for name in names]
  with tempfile.TemporaryDirectory(prefix='hatjax') as folder:
    use(folder, 0.0)
    try:
      yield folder
    finally:
      use(*before)


def _compile(case, rng):
  """Times tracing and compiling, and asks the program what it costs."""
  runner = case.make_runner()
  times = [time.perf_counter()]
  state = jax.block_until_ready(
    runner.init(jax.random.key(0), case.example)
  )
  times.append(time.perf_counter())
  lowered = runner.lower(state, case.batches[0], rng)
  times.append(time.perf_counter())
  compiled = lowered.compile(compiler_options=runner.options or None)
  times.append(time.perf_counter())
  names = ('init_seconds', 'trace_seconds', 'compile_seconds')
  row = dict(zip(names, np.diff(times).tolist()))
  # A compiled program is that of one device; lowered, jit's is still whole.
  count = len(runner.devices)
  costs, before = _ask(compiled.cost_analysis), _ask(lowered.cost_analysis)
  flops = count * costs.get('flops', 0.0)
  whole = before.get('flops', 0.0) * (count if runner.mode == 'pmap' else 1)
  on_cpu = runner.devices[0].platform == 'cpu'
  jaxpr = runner.jaxpr(state, case.batches[0], rng)
  loops = _loop_flops(jaxpr) * (count if runner.mode == 'pmap' else 1)
  if not whole or not on_cpu:
    whole, loops = _count_flops(case, rng) or (whole, loops)
  # Library calls (convolutions on GPUs) are uncounted once compiled.
  known = on_cpu and flops >= 0.5 * whole
  row['flops'] = loops + (flops if known or not whole else whole)
  row['bytes_accessed'] = count * costs.get('bytes accessed', 0.0)
  stats = _ask(compiled.memory_analysis)
  parts = {
    name: getattr(stats, f'{name}_size_in_bytes', 0)
    for name in ('argument', 'output', 'temp', 'alias', 'generated_code')
  }
  total = parts['argument'] + parts['output'] + parts['temp']
  total -= parts['alias']
  row |= {'memory': parts, 'compiled_peak_bytes': total or None}
  return row


def _count_flops(case, rng):
  """Of the step as a CPU would get it: others count compiled programs alone.

  Done plainly, so that no form of a convolution counts what it adds.

  Returns:
    (FLOPs, those of later turns of loops), or None without a CPU.
  """
  try:
    cpu = jax.devices('cpu')[:1]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None
  runner = case.make_runner(devices=cpu, mode='jit')
  with jax.default_device(cpu[0]), case.plainly():
    state = runner.abstract_state(case.example)
    lowered = runner.lower(state, case.batches[0], rng)
    loops = _loop_flops(runner.jaxpr(state, case.batches[0], rng))
  return _ask(lowered.cost_analysis).get('flops', 0.0), loops


def _loop_flops(jaxpr):
  """What XLA's count leaves out: every turn of a loop but the first."""
  total = 0.0
  for equation in jaxpr.eqns:
    inner = sum(map(_loop_flops, core.jaxprs_in_params(equation.params)))
    if equation.primitive.name == 'scan':
      body, turns = equation.params['jaxpr'], equation.params['length']
      shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
      lowered = jax.jit(core.jaxpr_as_fun(body)).lower(*shapes)
      once = _ask(lowered.cost_analysis).get('flops', 0.0)
      inner = turns * inner + (turns - 1) * once
    total += inner
  return total


def _ask(analysis):
  """The analysis of a program; {} where the platform has none."""
  try:
    return analysis() or {}
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    return {}


def measure_peak(dtype, devices, longest=0.1):
  """What matrix products reach on all devices at once.

  Args:
    dtype: of the matrices.
    devices: list.
    longest: seconds; a size that takes longer is the last.

  Returns:
    dict: size (side of the best), flops_per_second, by_size.
  """

  @jax.jit
  def multiply(x, w):
    for _ in range(_PRODUCTS):
      x = x @ w
    return x

  by_size, seconds, size = {}, 0.0, 512
  while seconds < longest and size <= 8192:
    x, w = (
      jax.random.normal(jax.random.key(k), (size, size), dtype)
      for k in range(2)
    )
    pairs = [jax.device_put((x, w / size**0.5), d) for d in devices]
    times = [time.perf_counter()]
    for _ in range(8):
      jax.block_until_ready([multiply(*pair) for pair in pairs])
      times.append(time.perf_counter())
    seconds = np.diff(times)[1:].min()
    by_size[size] = 2 * _PRODUCTS * len(devices) * size**3 / seconds
    size *= 2
  best = max(by_size, key=by_size.get)
  return {
    'size': best, 'flops_per_second': by_size[best], 'by_size': by_size,
  }


def describe_machine(devices):
  """What the numbers depend on besides the code."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  cpus = [x.split(':')[1].strip() for x in lines if x.startswith('model name')]
  packages = ('hatjax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
  versions = [f'{name} {metadata.version(name)}' for name in packages]
  return {
    'device': devices[0].device_kind, 'platform': devices[0].platform,
    'devices': len(devices), 'cpu': (cpus or [platform.machine()])[0],
    'cores': os.cpu_count(), 'load_average': os.getloadavg()[0],
    'time': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
    'versions': ', '.join([f'python {platform.python_version()}', *versions]),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }
