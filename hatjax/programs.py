"""Traced programs kept on disk: a run that starts again need not trace.

JAX's compilation cache spares the compiling, but looks a program up by what was
traced, and tracing a training step takes longer than loading what was compiled.
Here the traced program itself is kept (`jax.export`) and found by what it was
made from; see `cache`.
"""

import collections
import contextlib
import inspect
from concurrent import futures

import jax
import numpy as np
import optax
from jax import export

from hatjax import cache, environment, optim, state

LIMIT = 64 << 20  # bytes kept; a training step takes half a megabyte


def _name_types():
  """Tells `jax.export` of the nodes that states are made of."""
  export.register_pytree_node_serialization(
    state.TrainState, serialized_name='hatjax.TrainState',
    serialize_auxdata=lambda _: b'', deserialize_auxdata=lambda _: (),
    from_children=lambda _, children: state.TrainState(*children),
  )
  named = collections.OrderedDict()  # optax has some under two names
  for module in (optax, optim):
    for cls in vars(module).values():
      if inspect.isclass(cls) and issubclass(cls, tuple) and (
        hasattr(cls, '_fields')
      ):
        named[cls] = f'{cls.__module__}.{cls.__qualname__}'
  for cls, name in named.items():
    with contextlib.suppress(ValueError):  # An application knows it, too.
      export.register_namedtuple_serialization(cls, serialized_name=name)


_name_types()


class Kept:
  """As `jax.jit(function, **options)`, but what it traces is kept.

  It is for arguments of the same shapes always. What was kept is loaded and
  compiled in the background, from now on.

  Args:
    function: what is traced.
    words: all that decides on the program besides the code and this machine; a
      tree that json can hold.
    **options: of `jax.jit`.
  """

  def __init__(self, function, words, **options):
    self.function, self._options = function, options
    self._path = _path([function.__name__, *words])
    self._exported = self._program = None
    reader = futures.ThreadPoolExecutor(1)
    self._loading = reader.submit(self._load)
    reader.shutdown(wait=False)

  def __call__(self, *args):
    if self._program is None:
      self._program = self._loading.result()
      if self._program is not None:
        try:
          return self._program(*args)
        except (TypeError, ValueError):
          pass  # It was made for other arguments than these.
      self._program = self._make(args)
    return self._program(*args)

  def result_shapes(self, *args):
    """As `jax.eval_shape`."""
    if self._loading.result() is None:
      return jax.eval_shape(self.function, *args)
    known = self._exported
    return jax.tree.unflatten(known.out_tree, _abstract(known.out_avals))

  def _load(self):
    """The program on the disk, compiled; None if there is none."""
    saved = cache.load(self._path)
    try:
      return saved and self._compile(saved['program'])
    except Exception:  # Whatever it is, the program can be traced.
      return None

  def _make(self, args):
    """Traces the function, keeps what came of it, compiles it."""
    jitted = jax.jit(self.function, **self._options)
    if self._path is None:
      return jitted
    try:
      saved = export.export(jitted)(*args).serialize()
      program = self._compile(saved)
    except Exception:  # Some cannot be kept; other errors come again.
      return jitted
    cache.save(self._path, {'program': np.frombuffer(saved, np.uint8)}, LIMIT)
    return program

  def _compile(self, saved):
    self._exported = export.deserialize(bytearray(saved))
    args, kwargs = jax.tree.unflatten(
      self._exported.in_tree, _abstract(self._exported.in_avals)
    )
    call = self._exported.call
    named = lambda *args, **kwargs: call(*args, **kwargs)
    named.__name__ = self.function.__name__  # in profiles
    program = jax.jit(named, **self._options)
    return program.lower(*args, **kwargs).compile()


def _path(words):
  """None where JAX keeps nothing, or is to look into every operation."""
  config = jax.config
  folder = config.jax_compilation_cache_dir
  if not folder or '://' in folder or not config.jax_enable_compilation_cache:
    return None
  if config.jax_debug_nans or config.jax_debug_infs or config.jax_disable_jit:
    return None
  options = {
    name: getattr(config, name, value)  # of a context, if one is open
    for name, value in config.values.items() if 'cache' not in name
  }
  words = [words, environment.machine(), options]
  return cache.path(f'{folder}/programs', words)


def _abstract(avals):
  return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
