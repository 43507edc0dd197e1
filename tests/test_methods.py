"""The tiny preset of every method through the same checks."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from hatjax import methods, parallel

LABELS = 3
CONFIGS = ('ck_plus', 'frame_folders')


def tiny_stages(wanted=methods.makes_video):
  """Stages of those methods over all configs; equal ones once."""
  stages = {}
  for name in CONFIGS:
    module = importlib.import_module(f'configs.{name}')
    for method in filter(wanted, common.METHODS):
      stage = module.get_config(f'{method},tiny')[method].to_dict()
      key = json.dumps([method, stage['model'], stage['optim']], default=str)
      stages.setdefault(key, stage)
  return list(stages.values())


def toy_batch(stage, batch_size=2):
  """Clips that brighten in one corner, with masks and labels."""
  size = stage['data']['image_size']
  frames = 1 + stage['data']['num_frames']
  rng = np.random.default_rng(0)
  time = np.linspace(0, 1, frames, dtype=np.float32)
  image = rng.uniform(-0.6, 0.6, (batch_size, 1, size, size, 3))
  video = np.repeat(image, frames, 1).astype(np.float32)
  video[:, :, size // 2 :, size // 2 :] += (
    0.6 * time[None, :, None, None, None] - 0.3
  )
  mask = np.zeros((batch_size, frames, size, size, 1), np.float32)
  mask[:, :, size // 2 :, size // 2 :] = 1
  return {
    'video': video, 'lip_mask': mask, 'time': np.tile(time, (batch_size, 1)),
    'label': np.arange(batch_size, dtype=np.int32) % LABELS,
    'subject': np.arange(batch_size, dtype=np.int32),
  }


def identity(batch, resident, rng):
  del resident, rng
  return batch


def make(stage, **changes):
  stage = {**stage, 'model': {**stage['model'], **changes}}
  size = stage['data']['image_size']
  return methods.make(stage, num_labels=LABELS, image_size=size)


@pytest.fixture(scope='module', params=tiny_stages(), ids=lambda s: s['method'])
def trained(request):
  """A tiny method, its state at 0, and 40 steps on one batch later."""
  stage = request.param
  method = make(stage)
  batch = toy_batch(stage)
  traces = []

  def prepare(batch, resident, rng):
    traces.append(1)
    return identity(batch, resident, rng)

  one = jax.devices()[:1]
  runner = parallel.Runner(method, prepare, devices=one)
  first = runner.init(jax.random.key(0), batch)
  before = jax.device_get(first)
  state, history = first, []
  for k in range(40):
    state, metrics = runner.step(state, [batch], jax.random.key(1))
    history.append(jax.device_get(metrics))
    if k == 1:
      second = jax.device_get(state)
  # The first steps' draws once more, so that luck does not count.
  again = []
  late = jax.tree.map(jnp.copy, state).replace(step=state.step - 40)
  for _ in range(5):
    late, metrics = runner.step(late, [batch], jax.random.key(1))
    again.append(jax.device_get(metrics))
  return dict(
    stage=stage, method=method, batch=batch, before=before, state=state,
    second=second, history=history, again=again, traces=len(traces),
  )


def test_init_has_its_shapes_without_work(trained):
  abstract = jax.eval_shape(
    trained['method'].init, jax.random.key(0), trained['batch']
  )
  same = jax.tree.map(
    lambda a, b: a.shape == b.shape and a.dtype == b.dtype,
    abstract, trained['before'],
  )
  assert all(jax.tree.leaves(same))


def test_steps_are_finite_and_trace_once(trained):
  for metrics in trained['history']:
    assert all(np.isfinite(v) for v in metrics.values()), metrics
  floats = [x for x in jax.tree.leaves(trained['state']) if x.dtype.kind == 'f']
  assert all(np.isfinite(x).all() for x in floats)
  assert trained['traces'] == 1
  assert int(trained['state'].step) == 40


def test_nets_with_an_optimizer_move_and_others_do_not(trained):
  before, after = trained['before'].params, trained['state'].params
  for name in before:
    moved = any(
      not np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(before[name]), jax.tree.leaves(after[name])
      )
    )
    assert moved == (name in trained['state'].opt_state), name


def test_training_on_one_batch_lowers_the_reconstruction(trained):
  if trained['stage']['method'] == 'super_resolution':
    pytest.skip('white noise cannot be restored; test_super_resolution does')
  names = ('loss/l1', 'loss/denoise', 'loss/judge')
  name = next(n for n in names if n in trained['history'][0])
  first, again = (
    np.mean([m[name] for m in trained[key][:5]]) for key in ('history', 'again')
  )
  assert again < 0.8 * first


def test_animate_has_shape_and_range_and_repeats(trained):
  method, state, batch = (trained[k] for k in ('method', 'state', 'batch'))
  if not hasattr(method, 'animate'):
    pytest.skip('makes no videos')
  inputs = {
    'image': batch['video'][:, 0], 'label': batch['label'],
    'driving': batch['video'],
  }
  if hasattr(method, 'sharpen'):
    inputs['draft'] = batch['video']
  inputs = {k: v for k, v in inputs.items() if k in method.reads}
  animate = jax.jit(method.animate, static_argnums=3)
  a = animate(state, inputs, jax.random.key(3), 4)
  b = animate(state, inputs, jax.random.key(3), 4)
  assert a.shape == (2, 4, *batch['video'].shape[2:])
  assert np.abs(a).max() <= 1
  np.testing.assert_array_equal(a, b)


# Noise off, which devices under pmap draw each on its own.
QUIET = {
  'fev_gan': dict(eid_dropout=0.0),
  # lambda_alpha: its real samples are random.
  'hat_cgan': dict(feature_noise=0.0, dropout=0.0, lambda_alpha=0.0),
  'motion_transfer': dict(
    lambda_equivariance=0.0, lambda_equivariance_jacobian=0.0
  ),
  'super_resolution': dict(jpeg_quality=(60, 60)),
}


def worst(a, b):
  """Largest difference of parameters, biases before a norm left out."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)
  )
  return max(
    float(np.abs(np.asarray(x) - np.asarray(y)).max())
    for (path, x), y in pairs if path[-1].key != 'bias'
  )


def test_scan_and_loop_dispatch_agree(trained):
  runner = parallel.Runner(
    trained['method'], identity, devices=jax.devices()[:1], dispatch='scan'
  )
  batch, looped = trained['batch'], trained['second']
  state = runner.init(jax.random.key(0), batch)
  state, _ = runner.step(state, [batch] * 2, jax.random.key(1))
  assert int(state.step) == int(looped.step) == 2
  diffs = [
    np.abs(a - b).ravel() for a, b in zip(
      jax.tree.leaves(looped.params),
      jax.tree.leaves(jax.device_get(state.params)),
    )
  ]
  assert np.quantile(np.concatenate(diffs), 0.95) < 1e-6


def test_batch_that_does_not_divide_is_refused(trained):
  runner = parallel.Runner(trained['method'], identity)
  with pytest.raises(ValueError, match='Use 2 or another multiple of 2'):
    runner.check_batch_size(3)


def still(stage, batch_size, **changes):
  """A method without noise that depends on the order of work, and its batch.

  Its optimizers keep the last gradients as their state. Parameters start off
  their zeros, so that every path carries a gradient.
  """
  batch = toy_batch(stage, batch_size)
  if stage['method'] == 'hat_cgan':
    changes |= dict(feature_noise=0.0, dropout=0.0, alpha_noise=False)
  else:
    batch['draft'] = batch['video'][:, ::-1]
  if stage['method'] == 'fev_gan':
    changes |= QUIET['fev_gan']
  method = make(stage, **changes)
  sgd = optax.chain(optax.trace(0.0), optax.scale(-1e-2))
  tx = {name: sgd for name in method.tx}
  method = dataclasses.replace(method, tx=tx)
  state = jax.jit(method.init)(jax.random.key(0), batch)
  return method, perturbed(state), batch


def assert_same_gradients(a, b):
  """Of every net, to 1e-5 of its largest one; a bias that a norm cancels is
  rounding noise, far below that."""
  for net in a.opt_state:
    x, y = (
      np.concatenate([np.ravel(g) for g in jax.tree.leaves(s.opt_state[net])])
      for s in (a, b)
    )
    size = np.abs(x).max()
    assert size > 1e-5, net
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * size, err_msg=net)


@pytest.mark.parametrize('changes', (
  dict(microbatches=2), dict(microbatches=2, mode='paired'),
  dict(microbatches=4, loop='scan', generator_steps=2, discriminator_steps=2),
), ids=str)
@pytest.mark.parametrize('stage', tiny_stages(), ids=lambda s: s['method'])
def test_microbatches_equal_the_whole_batch(stage, changes, monkeypatch):
  fields = dataclasses.fields(methods.METHODS[stage['method']])
  known = {field.name for field in fields}
  if 'microbatches' not in known:
    pytest.skip('has no microbatches')
  if 'mode' in changes and stage['method'] != 'video_diffusion':
    pytest.skip('a setting of another method')
  if 'mode' not in changes and stage['method'] == 'video_diffusion':
    pytest.skip("mode 'paired' does all of it and more")
  if 'loop' in changes and 'generator_steps' not in known:
    pytest.skip('the loop is shared, and seen with hat_cgan')
  if changes.get('loop') == 'scan':
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  changes = {k: v for k, v in changes.items() if k in known}
  results = []
  for count in (1, changes.pop('microbatches')):
    method, state, batch = still(stage, 4, microbatches=count, **changes)
    step = jax.jit(method.train_step)
    results.append(step(state, batch, jax.random.key(1)))
  (a, metrics), (b, others) = jax.device_get(results)
  assert_same_gradients(a, b)
  assert metrics.keys() == others.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(value, others[name], 1e-4, 1e-5, err_msg=name)
  for x, y in zip(*map(jax.tree.leaves, (a.model_state, b.model_state))):
    np.testing.assert_allclose(x, y, 1e-4, 1e-5)


def test_microbatches_must_divide_what_a_device_has(trained):
  stage = trained['stage']
  if not hasattr(trained['method'], 'microbatches'):
    pytest.skip('has no microbatches')
  runner = parallel.Runner(make(stage, microbatches=3), identity)
  runner.check_batch_size(12)
  with pytest.raises(ValueError, match='the 4 clips .*These do: 1, 2, 4.'):
    runner.check_batch_size(8)
  with pytest.raises(ValueError, match='model.microbatches is 0. Use 1'):
    make(stage, microbatches=0)




def perturbed(state):
  """Parameters off their zeros, so that every path carries gradient."""
  rng = np.random.default_rng(5)
  move = lambda p: p + rng.normal(0, 0.05, p.shape).astype(p.dtype)
  return state.replace(params=jax.tree.map(move, state.params))
