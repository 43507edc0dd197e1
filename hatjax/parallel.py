"""One step function -> jit over a mesh, or pmap. The only file that knows
devices."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hatjax import cache, environment, guard, heap, programs

MODES = ('jit', 'pmap')
AXIS = 'devices'
# What 'auto' means. On CPU: matrix products through YNNPACK, each by itself
# (what it fuses with a product it also writes out, such as broadcasts); and
# parameters and moments updated in place where the order of work allows it:
# else a step copies them first.
COMPILER_OPTIONS = {'cpu': {
  'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT',
  'xla_cpu_copy_insertion_use_region_analysis': True,
}}
# No atomics, and no kernel chosen by the stop watch. Others need nothing.
DETERMINISTIC_OPTIONS = {'gpu': {'xla_gpu_deterministic_ops': True}}
# For profiles: XLA:CPU's usual order of work keeps more alive.
FRUGAL_OPTIONS = {
  'cpu': {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'},
}
LONG = 5.0  # seconds of compiling, after which the heap is worth mending
# For programs that run once: compiling takes longer than running.
QUICK_COMPILE = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def start_process():
  """What every command does before it uses a device.

  Keeps compiled programs in the user's cache folder between runs;
  JAX_COMPILATION_CACHE_DIR chooses another folder, or none if empty. And keeps
  memory between steps, in one piece.
  """
  heap.keep_freed()
  folder = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  if folder is None:
    # XLA:CPU divides a program among the cores that it is compiled on, and JAX
    # would find it again on any other number.
    folder = str(cache.folder('xla') / f'{environment.cores()}_cores')
  jax.config.update('jax_compilation_cache_dir', folder or None)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  _listen()


@functools.cache  # once, however often a process starts
def _listen():
  jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def _after_compiling(event, seconds, **_):
  compiled = event == '/jax/core/compile/backend_compile_duration'
  if compiled and seconds > LONG and jax.default_backend() == 'cpu':
    heap.fill_holes()


def join_processes():
  """Connects this process to the others of a run; before any device is used."""
  get = os.environ.get
  if get('JAX_COORDINATOR_ADDRESS'):
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      get('JAX_COORDINATOR_ADDRESS'), int(get('JAX_NUM_PROCESSES', '1')),
      int(get('JAX_PROCESS_ID', '0')),
    )
  else:
    jax.distributed.initialize()


def _suited(method):
  """What 'auto' means on this platform; a method may know better for the
  programs that make its videos."""
  backend = jax.default_backend()
  own = getattr(method, 'video_options', {}).get(backend, {})
  return COMPILER_OPTIONS.get(backend, {}) | own


def compiler_options(config, show=print, method=None):
  """What XLA is told when it compiles the programs of a run.

  Args:
    config: mapping with, each of them optional, `compiler_options`: 'auto'
      (what suits the platform), '' (nothing), or such as
      'auto,xla_cpu_enable_fast_min_max=true', or a mapping; `deterministic`:
      two runs on one GPU are to be equal bit for bit; `profile`: '' or the
      name of one that saves memory.
    show: takes a line on the result, one per option that XLA does not know
      (which is left out), and one where `deterministic` changes nothing.
    method: whose videos the programs make, if they do.

  Returns:
    dict for `jax.jit(compiler_options=...)`.

  Raises:
    ValueError: the setting cannot be read, or a value is wrong.
  """
  backend, options = jax.default_backend(), {}
  words = config.get('compiler_options', 'auto')
  if isinstance(words, str):
    words = [word.strip() for word in words.split(',') if word.strip()]
    words = dict(word.partition('=')[::2] for word in words)
  for name, value in words.items():
    if name == 'auto':
      options |= _suited(method)
    elif value == '':
      raise ValueError(
        f"config.compiler_options: {name!r} has no value. Write 'auto', or "
        'name=value with commas between.'
      )
    else:
      booleans = {'true': True, 'false': False}
      options[name] = booleans.get(str(value).lower(), value)
  if config.get('profile'):
    options |= FRUGAL_OPTIONS.get(backend, {})
  if config.get('deterministic'):
    needed = DETERMINISTIC_OPTIONS.get(backend, {})
    if not needed:
      show(f'deterministic: nothing to add on a {backend}, which repeats.')
    options |= needed
  known = _known(options)
  for name in options:
    if name not in known:
      show(f'note: compiler option {name} is unknown here and left out.')
  shown = ', '.join(f'{k}={v}' for k, v in known.items())
  show(f'compiler options: {shown or "none"}')
  return known


def jit(function, method=None, **options):
  """`jax.jit` with the compiler options that suit the platform and a method,
  where no run's config is asked: programs that make videos."""
  known = _known(_suited(method))
  return jax.jit(function, compiler_options=known, **options)


def _known(options):
  return {k: v for k, v in options.items() if _is_known(k, v)}


@functools.cache
def _is_known(name, value):
  try:
    probe = jax.jit(lambda x: x + 1, compiler_options={name: value})
    probe.lower(jnp.zeros(())).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'No such compile option' not in str(error):
      reason = str(error).splitlines()[0]
      raise ValueError(f'config.compiler_options: {reason}') from error
    return False
  return True


class Runner:
  """Initializes, steps and moves the state of a method over the devices.

  Args:
    method: see `hatjax.methods`.
    prepare: (batch, resident, rng) -> the method's batch, inside jit.
    resident: tree of arrays that stay on the device, {} if none; or a function
      that returns it, which the first step asks.
    mode: 'jit' over a mesh, or 'pmap'.
    devices: default all.
    dispatch: how several steps are dispatched: 'scan' as one program, 'loop'
      one by one, 'auto': loop on CPU, where XLA runs a rolled training step
      ten times slower, scan elsewhere.
    options: for the compiler of the step; see `compiler_options`.
    on_nan: one of `guard.ACTIONS`, or None for a step without a guard.
    words: tree for json with all that decides on the programs but the code,
      the machine and the options above; they are then kept for runs to come
      (`programs`). None: they are traced, as always under pmap and with
      several processes.
  """

  def __init__(
    self, method, prepare, resident=None, mode='jit', devices=None,
    dispatch='auto', options=None, on_nan=None, words=None,
  ):
    if mode not in MODES:
      raise ValueError(
        f'config.parallel is {mode!r}. Choose one of: {", ".join(MODES)}.'
      )
    self.devices = list(devices or jax.devices())
    if mode == 'pmap' and jax.process_count() > 1:
      raise ValueError('config.parallel: several processes need jit.')
    if dispatch == 'auto':
      dispatch = 'loop' if self.devices[0].platform == 'cpu' else 'scan'
    self.mode, self.dispatch, self.options = mode, dispatch, options or {}
    self.on_nan = on_nan
    self._words = None
    if mode == 'jit' and jax.process_count() == 1 and words is not None:
      self._words = [words, self.options, on_nan, len(self.devices)]
    if mode == 'pmap':
      method = dataclasses.replace(method, axis_name=AXIS)
    self.method, self._prepare = method, prepare
    self._mesh = jax.make_mesh(
      (len(self.devices),), (AXIS,), axis_types=(AxisType.Auto,),
      devices=self.devices,
    )
    self._replicated = NamedSharding(self._mesh, PartitionSpec())
    self._given, self._scans = resident or {}, {}
    if mode == 'pmap':
      self._pmapped = jax.pmap(
        self._one, AXIS, in_axes=(0, 0, 0, None), devices=self.devices,
        donate_argnums=0,
      )
      self._step = self._compile_and_step
    else:
      self._step = self._jit(self._one, PartitionSpec(AXIS))
    self._init = self._kept(
      method.init, out_shardings=self._replicated,
      compiler_options=_known(QUICK_COMPILE),
    )

  @functools.cached_property
  def _resident(self):
    resident = self._given() if callable(self._given) else self._given
    self._given = None  # Its memory is not needed twice.
    if self.mode == 'pmap':
      return jax.tree.map(self._copies, resident)
    if jax.process_count() == 1:
      return jax.device_put(resident, self._replicated)
    return self._global(resident, PartitionSpec())

  def _global(self, batch, spec):
    """Host arrays, equal in every process -> arrays over all devices."""
    if jax.process_count() == 1:
      return batch
    sharding = NamedSharding(self._mesh, spec)
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(
        np.shape(x), sharding, lambda index: np.asarray(x)[index]
      ), batch,
    )

  def _jit(self, function, batch_spec, *words):
    r = self._replicated
    batch = NamedSharding(self._mesh, batch_spec)
    return self._kept(
      function, *words, donate_argnums=0, in_shardings=(r, batch, r, r),
      out_shardings=(r, r), compiler_options=self.options,
    )

  def _kept(self, function, *words, **options):
    if self._words is None:
      return jax.jit(function, **options)
    return programs.Kept(function, [*self._words, *words], **options)

  def _scan(self, count):
    if count not in self._scans:
      spec = PartitionSpec(None, AXIS)
      self._scans[count] = self._jit(self._several, spec, count)
    return self._scans[count]

  def expect(self, count):
    """Loads a kept program of so many steps while other things are done."""
    if self._words is not None and self.dispatch == 'scan' and count > 1:
      self._scan(count)

  def _compile_and_step(self, *args):
    """pmap takes no compiler options, but its compiled program does."""
    lowered = self._pmapped.lower(*args)
    self._step = lowered.compile(compiler_options=self.options)
    return self._step(*args)

  def _one(self, state, batch, resident, rng):
    """Step k with the key fold_in(rng, k)."""
    rng = jax.random.fold_in(rng, state.step)
    if self.mode == 'pmap':
      rng = jax.random.fold_in(rng, jax.lax.axis_index(AXIS))
    rng_data, rng_step = jax.random.split(rng)
    batch = self._prepare(batch, resident, rng_data)
    new, metrics = self.method.train_step(state, batch, rng_step)
    if self.on_nan:
      code = guard.judge(new, metrics)
      if self.mode == 'pmap':
        code = jax.lax.pmax(code, AXIS)
      if self.on_nan == 'skip':
        new = guard.keep_if_finite(code, new, state)
      metrics = {**metrics, guard.KEY: code}
    return new.replace(step=state.step + 1), metrics

  def _several(self, state, batches, resident, rng):
    body = lambda state, batch: self._one(state, batch, resident, rng)
    state, metrics = jax.lax.scan(body, state, batches)
    last = {k: m[-1] for k, m in metrics.items()}
    return state, last | {k: m for k, m in metrics.items() if k == guard.KEY}

  def _copies(self, x):
    """[...] -> [devices, ...], one copy on each."""
    x = np.broadcast_to(np.asarray(x), (len(self.devices), *np.shape(x)))
    return jax.device_put(x, NamedSharding(self._mesh, PartitionSpec(AXIS)))

  def check_batch_size(self, batch_size):
    """Raises ValueError unless devices and microbatches share it evenly."""
    n, parts = len(self.devices), getattr(self.method, 'microbatches', 1)
    if batch_size % n:
      raise ValueError(
        f'data.batch_size {batch_size} does not divide over {n} devices. '
        f'Use {max(n, batch_size // n * n)} or another multiple of {n}.'
      )
    share = batch_size // n
    if share % parts:
      known = [str(k) for k in range(1, share + 1) if share % k == 0]
      raise ValueError(
        f'model.microbatches {parts} does not divide the {share} clips of a '
        f'device (data.batch_size {batch_size} over {n}). These do: '
        f'{", ".join(known)}.'
      )

  def abstract_state(self, example):
    """Shapes of the state as one device (and a checkpoint) sees it."""
    args = jax.random.key(0), example
    if self._words is None:
      shapes = jax.eval_shape(self.method.init, *args)
    else:
      shapes = self._init.result_shapes(*args)
    # Here, wherever it was when it was saved.
    place = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=self._replicated
    )
    return jax.tree.map(place, shapes)

  def init(self, rng, example):
    """State at step 0, placed on the devices."""
    return self.place(self._init(rng, example))

  def place(self, state):
    """A single state -> replicas."""
    if self.mode == 'pmap':
      return jax.tree.map(self._copies, state)
    return jax.device_put(state, self._replicated)

  def fetch(self, state):
    """Replicas -> the single state (still on device)."""
    if self.mode == 'pmap':
      return jax.tree.map(lambda x: x[0], state)
    return state

  def step(self, state, batches, rng):
    """Runs one step per host batch; donates `state`.

    Args:
      state: as `init` or `place` gives it.
      batches: list of host batches.
      rng: the root key of the run; step k uses fold_in(rng, k).

    Returns:
      The new state, and the metrics of the last step (not fetched); under
      `guard.KEY`, where there is a guard, a list of the findings of all.
    """
    if self.mode == 'jit' and self.dispatch == 'scan' and len(batches) > 1:
      stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
      stacked = self._global(stacked, PartitionSpec(None, AXIS))
      scan = self._scan(len(batches))
      state, metrics = scan(state, stacked, self._resident, rng)
      return state, _gathered(metrics, [metrics])
    every = []
    for batch in batches:
      if self.mode == 'pmap':
        batch = jax.tree.map(self._shard, batch)
      else:
        batch = self._global(batch, PartitionSpec(AXIS))
      state, metrics = self._step(state, batch, self._resident, rng)
      every.append(metrics)
    metrics = _gathered(metrics, every)
    if self.mode == 'pmap':
      metrics = jax.tree.map(lambda m: m[0], metrics)
    return state, metrics

  def lower(self, state, batch, rng):
    """One step on a host batch, lowered: `.compile()` tells what it costs.

    Under pmap hand `.compile` the compiler options; jit knows them.
    """
    if self.mode == 'pmap':
      batch = jax.tree.map(self._shard, batch)
      return self._pmapped.lower(state, batch, self._resident, rng)
    batch = self._global(batch, PartitionSpec(AXIS))
    return self._step.lower(state, batch, self._resident, rng)

  def jaxpr(self, state, batch, rng):
    """What one step on a host batch is traced to, before XLA sees it; under
    pmap, what each device does."""
    if self.mode == 'pmap':
      batch = jax.tree.map(self._shard, batch)
      args = state, batch, self._resident, rng
      return jax.make_jaxpr(self._pmapped)(*args).jaxpr
    batch = self._global(batch, PartitionSpec(AXIS))
    return self._step.trace(state, batch, self._resident, rng).jaxpr.jaxpr

  def _shard(self, x):
    n = len(self.devices)
    return x.reshape(n, len(x) // n, *x.shape[1:])


def _gathered(metrics, every):
  """`metrics`, with the guard's findings in `every` one of a list."""
  if guard.KEY not in metrics:
    return metrics
  return {**metrics, guard.KEY: [m[guard.KEY] for m in every]}


def first_process(function):
  """Calls a function in the first process; the others wait for it."""
  if not jax.distributed.is_initialized():
    return function()
  from jax.experimental import multihost_utils

  result = function() if jax.process_index() == 0 else None
  multihost_utils.sync_global_devices(function.__name__)
  return result


def any_process(flag):
  """Whether the flag is up in any process; a meeting point for all."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.array(flag)).any())
