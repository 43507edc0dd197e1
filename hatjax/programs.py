"""Compiled programs kept on disk: a run that starts again need not trace.

JAX's compilation cache spares the compiling, but looks a program up by what was
traced, and tracing a training step takes longer than loading it. Here a program
is looked up by what it was made from: the code of hatjax, words of the caller's
(a run's settings and data), packages, devices and compiler flags.
"""

import functools
import hashlib
import json
import os
import pathlib
import pickle
import platform
import tempfile

import jax
import numpy as np
from jax.experimental import serialize_executable

from hatjax import environment

MOST = 32  # programs kept; those not used for longest go first
_DIGEST = 32  # bytes of a sha256
_HIT = '/jax/compilation_cache/cache_hits'
_hits = []  # what JAX's own cache has found
_unproven = []  # files of programs that were loaded and have not run yet


def _listen(event, **_):
  if event == _HIT:
    _hits.append(event)


jax.monitoring.register_event_listener(_listen)


class Kept:
  """A jitted function whose programs are kept in the compilation cache.

  It is called as the function is, with arguments of which only the second may
  change its shapes from call to call.

  Attributes:
    function: what `jax.jit` returns.
    words: all that decides on the program besides the second argument's shapes
      and this machine; a tree that json can hold.
    devices: all that its arguments are on.
    wait: for the first results of a program from the disk. Without it, what is
      wrong with them shows in a program that waits.
  """

  def __init__(self, function, words, devices, wait=True):
    self.function, self.words, self.wait = function, words, wait
    self.devices = list(devices)
    self._programs, self._new = {}, set()

  def __call__(self, *args):
    program, shapes = self.load(args[1]), _shapes(args[1])
    if program is None:
      hits = len(_hits)
      program = self._programs[shapes] = self.function.lower(*args).compile()
      if len(_hits) == hits:  # What was loaded cannot be saved again on a CPU.
        _save(self._path(args[1]), program)
    if shapes not in self._new:
      return program(*args)
    self._new.remove(shapes)
    _unproven.append(self._path(args[1]))
    return _prove(program, args) if self.wait else program(*args)

  def load(self, changing):
    """The program for a second argument like this, or None if none is kept."""
    shapes = _shapes(changing)
    if shapes not in self._programs:
      program = _load(self._path(changing), self.devices)
      if program is None:
        return None
      self._programs[shapes] = program
      self._new.add(shapes)
    return self._programs[shapes]

  def lower(self, *args):
    """As the function's own."""
    return self.function.lower(*args)

  def _path(self, changing):
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
      return None
    text = json.dumps(
      [self.words, list(map(str, self.devices)), _shapes(changing),
       _surroundings()], sort_keys=True, default=str,
    )
    name = hashlib.sha256(text.encode()).hexdigest()
    return pathlib.Path(folder) / 'programs' / name


def _prove(program, args):
  """Its results, or a ValueError if it, or one before it, does not run here."""
  try:
    results = jax.block_until_ready(program(*args))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise
    for path in _unproven:
      path.unlink(missing_ok=True)
    raise ValueError(
      f'A program kept in {_unproven[-1].parent} does not run here '
      f'({str(error).splitlines()[0]}). It is removed: run the same command '
      'again.'
    ) from error
  finally:
    _unproven.clear()
  return results


def _shapes(tree):
  leaves, structure = jax.tree.flatten(tree)
  return str(structure), str([(np.shape(x), str(x.dtype)) for x in leaves])


@functools.cache
def _surroundings():
  """Code and machine: what makes another program of the same words."""
  digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent
  for path in sorted(folder.rglob('*.py')):
    digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
  info = pathlib.Path('/proc/cpuinfo')
  processor = platform.processor()
  if info.is_file():  # Vector instructions differ between processors.
    lines = {
      line for line in info.read_text().splitlines()
      if line.startswith(('model name', 'flags', 'Features'))
    }
    processor = sorted(lines)
  return [digest.hexdigest(), environment.machine(), processor]


def _load(path, devices):
  """The program in a file; None where there is none, or it is damaged."""
  try:
    saved = path.read_bytes()
    digest, body = saved[:_DIGEST], saved[_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
      return None
    program = serialize_executable.deserialize_and_load(
      *pickle.loads(body), execution_devices=devices
    )
    os.utime(path)
  except Exception:  # Whatever it is, the program can be compiled.
    return None
  return program


def _save(path, program):
  """Writes a program where it can be; a run does without as well."""
  if path is None:
    return
  try:
    body = pickle.dumps(serialize_executable.serialize(program))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
      file.write(hashlib.sha256(body).digest() + body)
    os.replace(file.name, path)
    old = sorted(path.parent.iterdir(), key=os.path.getmtime)[:-MOST]
    for other in old:
      other.unlink(missing_ok=True)
  except (OSError, ValueError, TypeError, pickle.PicklingError,
          NotImplementedError, jax.errors.JaxRuntimeError):
    return
