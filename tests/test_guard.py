"""Steps that are not finite: found, named, dropped; one in a row of good."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_methods import identity, make, tiny_stages, toy_batch
from test_pipeline import parameters, tiny_config

from hatjax import data, guard, parallel, runs, state, train, workdir


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Line:
  """w + x -> 0; 'root' has no gradient at x = 0, 'loss' no value below."""

  axis_name: str | None = None
  tx = {'line': optax.adam(0.1)}

  def init(self, rng, batch):
    return state.create({'line': jnp.ones(2)}, self.tx)

  def train_step(self, now, batch, rng):
    x = batch['x'].mean()

    def loss(w):
      fine = jnp.square(w + x).sum()
      return fine + 0.0 * jnp.log(x + 2), fine

    grad, _ = jax.grad(loss, has_aux=True)(now.params['line'])
    grad = grad + 0.0 * jnp.sqrt(jnp.abs(x - 1)) * jnp.where(x == 1, 1, 0) / (
      jnp.where(x == 1, 0.0, 1.0)
    )
    grad = state.pmean(grad, self.axis_name)
    log = state.pmean(jnp.log(x + 2), self.axis_name)
    new = now.apply_gradients(self.tx, line=grad)
    return new, {'a/x': x, 'loss/log': log, 'loss/z': x}


GOOD, BAD_LOSS, BAD_GRADIENT = 0.5, -3.0, 1.0
KINDS = [('jit', 'loop', 1), ('jit', 'scan', 1), ('jit', 'scan', 2),
         ('pmap', 'loop', 2)]


def batches(*values):
  return [{'x': np.full(2, value, np.float32)} for value in values]


def runner_of(method, on_nan, mode='jit', dispatch='loop', count=1):
  return parallel.Runner(
    method, identity, mode=mode, dispatch=dispatch, on_nan=on_nan,
    devices=jax.devices()[:count],
  )


@pytest.mark.parametrize('mode, dispatch, count', KINDS)
def test_the_first_bad_step_is_named(mode, dispatch, count):
  values = [GOOD, GOOD, BAD_GRADIENT, GOOD, BAD_LOSS, GOOD]
  for action in guard.ACTIONS:
    runner = runner_of(Line(), action, mode, dispatch, count)
    now = runner.init(jax.random.key(0), batches(GOOD)[0])
    watch = guard.Watch(action, 0)
    for part in (values[:3], values[3:]):
      now, metrics = runner.step(now, batches(*part), jax.random.key(1))
      watch.add(metrics.pop(guard.KEY))
    if action == 'stop':
      with pytest.raises(ValueError, match='^A gradient became nan at step 3'):
        watch.look(metrics)
    else:
      watch.look(metrics)
      assert watch.skipped == 2 and int(runner.fetch(now).step) == 6


def test_a_loss_is_named_before_what_follows_from_it():
  runner = runner_of(Line(), 'stop')
  now = runner.init(jax.random.key(0), batches(GOOD)[0])
  watch = guard.Watch('stop', 40)
  now, metrics = runner.step(now, batches(BAD_LOSS), jax.random.key(1))
  watch.add(metrics.pop(guard.KEY))
  with pytest.raises(ValueError, match='^loss/log became nan at step 41.$'):
    watch.look(metrics)


@pytest.mark.parametrize('mode, dispatch, count', KINDS)
def test_a_dropped_step_leaves_no_trace(mode, dispatch, count):
  runner = runner_of(Line(), 'skip', mode, dispatch, count)
  rng = jax.random.key(1)
  start = lambda: runner.init(jax.random.key(0), batches(GOOD)[0])
  now, metrics = runner.step(
    start(), batches(GOOD, BAD_LOSS, BAD_GRADIENT, 0.25), rng
  )
  other, _ = runner.step(start(), batches(GOOD, 0.25), rng)
  for a, b in zip(jax.tree.leaves((now.params, now.opt_state)),
                  jax.tree.leaves((other.params, other.opt_state))):
    np.testing.assert_array_equal(a, b)
  codes = [np.atleast_1d(c) for c in jax.device_get(metrics[guard.KEY])]
  assert np.concatenate(codes).tolist() == [0, 2, 4, 0]


def test_a_run_that_only_drops_steps_stops():
  watch = guard.Watch('skip', 10)
  watch.add([np.array([0, 1])])
  for _ in range(guard.MOST - 2):
    watch.add([np.int32(1)])
  watch.look(['loss/l1'])
  assert watch.skipped == guard.MOST - 1
  watch.add([np.int32(2)])
  with pytest.raises(ValueError, match=f'A gradient was nan in all.*{111}'):
    watch.look(['loss/l1'])


@pytest.mark.parametrize('mode', [
  'jit', pytest.param('pmap', marks=pytest.mark.slow),
])
@pytest.mark.parametrize('stage', tiny_stages(), ids=lambda s: s['method'])
def test_every_method_drops_a_bad_batch(stage, mode):
  batch = toy_batch(stage)
  bad = {**batch, 'video': np.full_like(batch['video'], np.nan)}
  if 'draft' in bad:
    bad['draft'] = np.full_like(batch['draft'], np.nan)
  runner = runner_of(make(stage), 'skip', mode, count=1 + (mode == 'pmap'))
  rng = jax.random.key(1)
  before = runner.init(jax.random.key(0), batch)
  kept = jax.device_get(before)
  now, metrics = runner.step(before, [bad], rng)
  (code,) = jax.device_get(metrics[guard.KEY])
  assert code > 0
  assert int(runner.fetch(now).step) == 1
  now = jax.device_get(now)
  for a, b in zip(jax.tree.leaves(kept.replace(step=now.step)),
                  jax.tree.leaves(now)):
    np.testing.assert_array_equal(a, b)


def spoil(monkeypatch, *steps):
  """Makes training batches of these steps (from 1 on) not finite."""
  iterate = data.Batches.iterate
  prepare = data.Batches.prepare

  def spoilt(self, start=0):
    for step, batch in enumerate(iterate(self, start), start + 1):
      bad = np.isin(step, steps)
      yield {**batch, 'time': batch['time'] + np.float32(np.nan if bad else 0)}

  def spread(self, batch, resident, rng):
    batch = prepare(self, batch, resident, rng)
    lost = batch['time'].sum() * 0
    return {**batch, 'video': batch['video'] + lost}

  monkeypatch.setattr(data.Batches, 'iterate', spoilt)
  monkeypatch.setattr(data.Batches, 'prepare', spread)


@pytest.mark.parametrize('mode', [
  'jit', pytest.param('pmap', marks=pytest.mark.slow),
])
def test_a_run_stops_or_goes_on_as_asked(
  mode, toy_records, tmp_path, monkeypatch
):
  spoil(monkeypatch, 7)
  for action in guard.ACTIONS:
    config = tiny_config(train__on_nan=action) | {'parallel': mode}
    folder = tmp_path / action
    if action == 'stop':
      with pytest.raises(ValueError, match='nan at step 7.*checkpoints/4'):
        train.train(config, folder, toy_records)
      assert workdir.Run(folder / 'hat_cgan', read_only=True).steps() == [4]
    else:
      train.train(config, folder, toy_records)
    for leaf in parameters(folder):
      assert np.isfinite(leaf).all()
  rows = workdir.Run(folder / 'hat_cgan', read_only=True).history()
  counts = {r['step']: r['skipped'] for r in rows if 'skipped' in r}
  assert counts == {2: 0, 4: 0, 6: 0, 8: 1}
  text = (folder / 'hat_cgan' / 'metrics.jsonl').read_text()
  assert 'NaN' not in text and json.loads(text.splitlines()[0])
  assert runs.load(folder).step == 8


def test_unknown_action_is_named(toy_records, tmp_path):
  with pytest.raises(ValueError, match="on_nan is 'no'.*one of: stop, skip"):
    train.train(tiny_config(train__on_nan='no'), tmp_path / 'a', toy_records)
