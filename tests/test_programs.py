"""What is kept in the cache folder is found again, is the same, and never
misleads."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_pipeline import assert_same

from configs.frame_folders import get_config
from hatjax import cache, data, optim, parallel, programs, train
from hatjax import state as state_lib
from hatjax.nets import lowerings


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A cache folder of its own; returns where programs are kept."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'xla'))
  yield tmp_path / 'xla' / 'programs'
  jax.config.update('jax_compilation_cache_dir', before)


def run(words=('a',), x=(1.0, 2.0), factor=3.0):
  """(y, whether it was traced) of calls in what could be a new process."""
  traces = []

  def function(state, x):
    traces.append(1)
    return {'state': state + x.sum(), 'y': factor * x}

  kept = programs.Kept(function, list(words), donate_argnums=0)
  state = jnp.zeros(())
  for _ in range(2):
    before = state
    out = kept(before, np.array(x, np.float32))
    state = out['state']
    assert before.is_deleted() or jax.config.jax_debug_nans  # donated
  assert float(state) == 2 * sum(x)
  return out['y'].tolist(), bool(traces)


def test_a_program_is_found_again(folder):
  assert run() == ([3, 6], True)
  assert run() == ([3, 6], False)
  assert run(words=('b',), factor=5.0) == ([5, 10], True)
  assert run() == ([3, 6], False)
  assert len(list(folder.iterdir())) == 2


def test_other_cores_have_programs_of_their_own(folder, monkeypatch):
  """XLA:CPU divides a program among the cores that it is compiled on."""
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  monkeypatch.setattr(parallel.heap, 'keep_freed', lambda: None)
  places = []
  for count in (1, 2):
    monkeypatch.setattr(parallel.environment, 'cores', lambda n=count: n)
    parallel.start_process()
    places.append(jax.config.jax_compilation_cache_dir)
  assert len({str(cache.folder('xla')), *places}) == 3


def test_a_program_for_other_arguments_is_made_again(folder):
  run()
  assert run(x=(1.0, 2.0, 4.0)) == ([3, 6, 12], True)
  assert run(x=(1.0, 2.0, 4.0)) == ([3, 6, 12], False)


@pytest.mark.parametrize('harm', ['cut', 'flipped', 'empty'])
def test_a_damaged_program_is_made_again(harm, folder):
  run()
  (path,) = folder.iterdir()
  saved = bytearray(path.read_bytes())
  saved[len(saved) // 2] ^= 1
  path.write_bytes({'cut': saved[:-9], 'flipped': saved, 'empty': b''}[harm])
  assert run() == ([3, 6], True)
  assert run() == ([3, 6], False)


@pytest.mark.parametrize('what', ['_CODE', 'machine'])
def test_other_code_and_machines_have_programs_of_their_own(
  what, folder, monkeypatch
):
  run()
  if what == 'machine':
    monkeypatch.setattr(programs.environment, 'machine', lambda: {'jax': '9'})
  else:
    for name in ('_CODE', '_digest'):
      value = (lambda: 'new') if name == '_digest' else 'new'
      monkeypatch.setattr(cache, name, value)
  assert run() == ([3, 6], True)
  assert run() == ([3, 6], False)


def test_code_that_was_edited_meanwhile_keeps_nothing(folder, monkeypatch):
  run()
  monkeypatch.setattr(cache, '_digest', lambda: 'edited')
  assert run() == ([3, 6], True)
  assert len(list(folder.iterdir())) == 1


def test_without_a_cache_or_room_programs_are_traced(folder, monkeypatch):
  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(cache.os, 'replace', full)
    assert run() == ([3, 6], True)
  assert not list(folder.iterdir())
  assert run() == ([3, 6], True)
  with monkeypatch.context() as patch:
    patch.setattr(cache.os, 'utime', full)  # only to be read
    assert run() == ([3, 6], False)
  with jax.debug_nans(True):
    assert run() == ([3, 6], True)
  jax.config.update('jax_compilation_cache_dir', None)
  assert run() == ([3, 6], True)


def test_only_so_much_is_kept(folder, monkeypatch):
  run('a')
  (path,) = folder.iterdir()
  monkeypatch.setattr(programs, 'LIMIT', int(2.5 * path.stat().st_size))
  for word in 'bac':  # b goes: a was used since
    run(word)
  assert len(list(folder.iterdir())) == 2
  assert run('a') == ([3, 6], False)
  assert run('b') == ([3, 6], True)


def test_results_of_every_kind_of_state_are_known_without_tracing(folder):
  make = {
    'adam': optim.make_tx(), 'swats': optim.make_tx(name='swats'),
    'clipped': optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9)),
  }

  def init(rng):
    params = {'w': jax.random.normal(rng, (2, 3)), 'b': [jnp.zeros(3)]}
    return state_lib.create(dict.fromkeys(make, params), make, {}, ('adam',))

  key, real = jax.random.key(0), None
  for _ in range(2):
    kept = programs.Kept(init, [])
    shapes = kept.result_shapes(key)
    assert shapes == jax.eval_shape(init, key)
    again, real = kept(key), real or kept(key)
    assert jax.tree.structure(again) == jax.tree.structure(real)
    jax.tree.map(np.testing.assert_array_equal, again, real)
  assert kept._exported and len(list(folder.iterdir())) == 1


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


def test_a_run_that_starts_again_computes_the_same_without_tracing(folder):
  traced = []
  plain = walk(None, traced)
  assert len(traced) == 2 and not folder.exists()
  for expected in (4, 4):  # One more step and scan, then none.
    again = walk({'config': 1}, traced)
    np.testing.assert_array_equal(again[0], plain[0])
    assert again[1] == plain[1]
    assert len(traced) == expected
  walk({'config': 2}, traced)
  assert len(traced) == 6


def frames_of(toy_records, **settings):
  """Resident frames of the toy clips, kept; and the names in the cache."""
  batches = data.make_batches(
    'frame_folders/none-16', 'everything', 16, directory=toy_records,
    **settings,
  )
  frames = batches.resident_frames(keep=True)
  return batches, frames, sorted(cache.folder('frames').glob('*.npz'))


def test_frames_are_decoded_once(folder, toy_records, monkeypatch):
  batches, first, names = frames_of(toy_records)
  assert len(names) == 1
  whole = [clip['video'] for clip in batches.whole_clips()]
  np.testing.assert_array_equal(first['video'], np.concatenate(whole))
  with monkeypatch.context() as patch:
    patch.setattr(data.Batches, '_read_frames', None)  # cannot be called
    _, again, _ = frames_of(toy_records)
  jax.tree.map(np.testing.assert_array_equal, again, first)
  _, larger, names = frames_of(toy_records, load_size=20)
  assert larger['video'].shape[1:] == (20, 20, 3) and len(names) == 2
  _, fewer, names = frames_of(toy_records, labels=('happy',))
  assert len(fewer['video']) < len(first['video']) and len(names) == 3


def test_frames_that_were_not_all_read_are_not_kept(folder, toy_records):
  batches = data.make_batches(
    'frame_folders/none-16', 'everything', 16, directory=toy_records
  )
  batches.resident_frames(lambda: True, keep=True)
  assert not cache.folder('frames').exists()


def test_damaged_frames_are_decoded_again(folder, toy_records):
  _, first, (path,) = frames_of(toy_records)
  saved = bytearray(path.read_bytes())
  saved[len(saved) // 3] ^= 1
  path.write_bytes(saved)
  _, again, _ = frames_of(toy_records)
  jax.tree.map(np.testing.assert_array_equal, again, first)


def test_what_a_killed_process_left_is_cleared_and_disks_are_not_filled(
  folder, monkeypatch
):
  run()
  old, new = folder / 'a.npz.1.part', folder / 'b.npz.2.part'
  for part in (old, new):
    part.write_bytes(b'half')
  os.utime(old, (0, 0))
  run('b')
  assert not old.exists() and new.exists()
  assert folder.stat().st_mode & 0o077 == 0
  kept = set(folder.glob('*.npz'))
  usage = shutil.disk_usage(folder)
  monkeypatch.setattr(
    cache.shutil, 'disk_usage', lambda _: usage._replace(free=1000)
  )
  assert run('c') == ([3, 6], True)
  assert set(folder.glob('*.npz')) == kept


def test_options_of_jax_have_programs_of_their_own(folder):
  run()
  with jax.default_matmul_precision('float32'):
    assert run() == ([3, 6], True)
  assert run() == ([3, 6], False)


def test_the_form_of_convolutions_decides_on_a_program(toy_records):
  config = json.loads(get_config('tiny').to_json())
  batches = data.make_batches(
    'frame_folders/none-16', 'everything', 16, directory=toy_records
  )
  words = lambda: train._decisive(config, config['hat_cgan'], batches)
  before = words()
  with lowerings.lowering('plain'):
    assert words() != before
  assert words() == before


def test_editors_do_no_harm(folder, monkeypatch, tmp_path):
  """Locks that are links to nothing, files gone between two looks."""
  (tmp_path / 'cache.py').write_text('')
  monkeypatch.setattr(cache, '__file__', str(tmp_path / 'cache.py'))
  before = cache._digest()
  (tmp_path / '.#cache.py').symlink_to('nobody@nowhere.1')
  assert before == cache._digest()
  (tmp_path / 'gone.py').symlink_to('nowhere')
  assert cache._digest() is None and cache.path('place', []) is None


def test_a_kept_step_of_a_net_computes_the_same_bits(toy_records, tmp_path):
  config = get_config('tiny,face_classifier')
  stage = config.face_classifier
  stage.data.update(name='frame_folders/none-16', split='everything')
  stage.train.update(num_steps=3, val_split='everything', val_clips=1)
  plain, kept = (
    jax.tree.leaves(train.train(
      json.loads(config.to_json()), tmp_path / str(keep), toy_records, keep=keep
    )) for keep in (False, True)
  )
  assert_same(plain, kept)
