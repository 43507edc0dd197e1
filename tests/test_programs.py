"""Programs kept on disk are found again, are the same, and never mislead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hatjax import parallel, programs
from hatjax import state as state_lib


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A compilation cache of its own; returns where programs are kept."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  yield tmp_path / 'programs'
  jax.config.update('jax_compilation_cache_dir', before)


def counted(factor=3.0):
  """A jitted function, and the list of its traces."""
  traces = []

  def function(state, x):
    traces.append(1)
    return {'state': state + x['x'].sum(), 'y': factor * x['x']}

  return jax.jit(function, donate_argnums=0), traces


def run(words=('a',), x=(1.0, 2.0), factor=3.0):
  """(y, whether it was traced) of a call in what could be a new process."""
  function, traces = counted(factor)
  kept = programs.Kept(function, list(words), jax.devices()[:1])
  state = jnp.zeros(())
  for _ in range(2):
    out = kept(state, {'x': np.array(x)})
    state = out['state']
  assert float(state) == 2 * sum(x)
  return out['y'].tolist(), bool(traces)


def test_a_program_is_found_again(cache):
  assert run() == ([3, 6], True)
  assert run() == ([3, 6], False)
  assert run(x=(1.0, 2.0, 4.0)) == ([3, 6, 12], True)  # other shapes
  assert run(words=('b',), factor=5.0) == ([5, 10], True)
  assert run() == ([3, 6], False)
  assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize('harm', ['cut', 'flipped', 'empty'])
def test_a_damaged_program_is_made_again(harm, cache):
  run()
  (path,) = cache.iterdir()
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes({'cut': data[:-9], 'flipped': data, 'empty': b''}[harm])
  assert run() == ([3, 6], True)
  assert run() == ([3, 6], False)


@pytest.mark.parametrize('what', ['code', 'machine'])
def test_other_code_and_machines_have_programs_of_their_own(
  what, cache, monkeypatch
):
  run()
  before = programs._surroundings()
  other = {'code': ['0' * 64, *before[1:]], 'machine': [before[0], {}, '']}
  monkeypatch.setattr(programs, '_surroundings', lambda: other[what])
  assert run() == ([3, 6], True)


def test_a_program_that_does_not_run_is_removed(cache, monkeypatch):
  run()

  def broken(*args):
    raise jax.errors.JaxRuntimeError('INTERNAL: Function f not found')

  monkeypatch.setattr(
    programs.serialize_executable, 'deserialize_and_load',
    lambda *_, **__: broken,
  )
  with pytest.raises(ValueError, match=r'f not found.*same command again'):
    run()
  assert not list(cache.iterdir())
  assert run() == ([3, 6], True)


def test_without_a_cache_or_room_programs_are_traced(cache, monkeypatch):
  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(programs.tempfile, 'NamedTemporaryFile', full)
    assert run() == ([3, 6], True)
  assert run() == ([3, 6], True)
  jax.config.update('jax_compilation_cache_dir', None)
  assert run() == ([3, 6], True)


def test_only_so_many_are_kept(cache, monkeypatch):
  monkeypatch.setattr(programs, 'MOST', 2)
  for words in 'abac':
    run(words)
  assert len(list(cache.iterdir())) == 2
  assert run('a') == ([3, 6], False)
  assert run('b') == ([3, 6], True)


def test_what_jax_had_in_its_own_cache_is_not_kept(cache):
  # XLA cannot save a program again that it has loaded on a CPU.
  programs._listen(programs._HIT)
  assert programs._hits

  class Found:
    def lower(self, *args):
      programs._listen(programs._HIT)
      return counted()[0].lower(*args)

  kept = programs.Kept(Found(), [], jax.devices()[:1])
  kept(jnp.zeros(()), {'x': np.ones(2)})
  assert not cache.exists()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Walk:
  """A method that adds the mean of a clip and noise to its only parameter."""

  axis_name: str | None = None

  def init(self, rng, batch):
    return state_lib.create({'net': {'w': jax.random.normal(rng, (8,))}}, {})

  def train_step(self, state, batch, rng):
    w = state.params['net']['w'] + batch['video'].mean()
    w += jax.random.normal(rng, w.shape)
    return state.replace(params={'net': {'w': w}}), {'loss/w': w.sum()}


def walk(words, prepared):
  """Parameters after three steps, the second and third dispatched together."""
  def prepare(batch, resident, rng):
    prepared.append(1)
    return {'video': batch['video'] * resident['scale']}

  runner = parallel.Runner(
    Walk(), prepare, lambda: {'scale': jnp.array(2.0)}, dispatch='scan',
    on_nan='stop', words=words,
  )
  batches = [{'video': np.full((2, 3), n, np.float32)} for n in range(3)]
  rng, example = jax.random.key(0), {'video': np.zeros((2, 3), np.float32)}
  state = runner.init(rng, example)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  abstract = runner.abstract_state(example)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == shapes
  state, _ = runner.step(state, batches[:1], rng)
  state, metrics = runner.step(state, batches[1:], rng)
  return np.array(state.params['net']['w']), float(metrics['loss/w'])


def test_a_run_that_starts_again_computes_the_same_without_tracing(cache):
  traced = []
  plain = walk(None, traced)
  assert len(traced) == 2 and not cache.exists()
  for expected in (4, 4):  # One more step and scan, then none.
    again = walk({'config': 1}, traced)
    np.testing.assert_array_equal(again[0], plain[0])
    assert again[1] == plain[1]
    assert len(traced) == expected
  walk({'config': 2}, traced)
  assert len(traced) == 6
