"""The diffusion method: refinement, guidance, the two modes, its settings."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusion import (
  LABELS,
  SMALL,
  lively,
  lively_state,
  make,
  normal,
  toy_batch,
)

from configs.methods import video_diffusion as diffusion_config
from hatjax import data, methods


@pytest.fixture(scope='module')
def tiny():
  """A tiny method, a state with lively parameters, jitted animate."""
  method = make(**SMALL)
  state = lively_state(method, toy_batch())
  return method, state, jax.jit(method.animate, static_argnums=3)


def test_later_frames_are_sorted_by_time_and_drafts_with_them():
  method = make(mode='paired')
  batch = toy_batch()
  order = np.array([[0, 2, 3, 1], [0, 3, 2, 1]])
  shuffled = {
    key: np.take_along_axis(
      batch[key], order.reshape(2, 4, *(1,) * (batch[key].ndim - 2)), 1
    ) for key in ('video', 'draft', 'time')
  }
  for got, key in zip(method._sorted_clip(shuffled), ('video', 'draft')):
    np.testing.assert_array_equal(got, batch[key][:, 1:])
  # A window that begins with the neutral frame again keeps it.
  batch['time'][:, 1] = 0
  np.testing.assert_array_equal(
    method._sorted_clip(batch)[0], batch['video'][:, 1:]
  )


def test_a_draft_at_no_strength_comes_back_bit_for_bit(tiny):
  _, state, _ = tiny
  draft = toy_batch()['draft']
  for mode in ('noise', 'paired'):
    method = make(**SMALL, strength=0.0, mode=mode)
    animate = jax.jit(method.animate, static_argnums=3)
    got = animate(state, {'draft': draft}, jax.random.key(0), 4)
    np.testing.assert_array_equal(got, draft)


def test_animate_refines_repeats_and_reads_the_average(tiny):
  _, state, animate = tiny
  batch = toy_batch()
  inputs = {'draft': batch['draft'], 'label': batch['label']}
  first = animate(state, inputs, jax.random.key(0), 4)
  assert first.shape == batch['draft'].shape and np.abs(first).max() <= 1
  assert 1e-3 < np.abs(first - batch['draft']).mean() < 0.5
  again = animate(state, inputs, jax.random.key(0), 4)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(
    first, animate(state, inputs, jax.random.key(1), 4)
  )
  # The latest parameters do not matter, the averaged ones do.
  moved = state.replace(params=lively(state.params, 900))
  np.testing.assert_array_equal(
    first, animate(moved, inputs, jax.random.key(0), 4)
  )
  moved = state.replace(ema=lively(state.ema, 900))
  assert not np.array_equal(
    first, animate(moved, inputs, jax.random.key(0), 4)
  )


def test_guidance_goes_from_the_null_label_through_the_label(tiny):
  _, state, _ = tiny
  params, xt = state.params['denoiser'], 0.2 * normal(0, 2, 2, 8, 8, 3)

  def guess(guidance):
    method = make(**SMALL, guidance=guidance)
    return jax.jit(
      lambda label: method._guess(params, xt, 1, label, None, None)
    )

  label = np.array([0, 2])
  # A scale of 1 is one pass with the label, not two.
  labelled, null = guess(1.0)(label), guess(1.0)(np.full(2, LABELS))
  assert np.abs(labelled - null).max() > 1e-3
  guided = guess(3.0)(label)
  assert np.abs(guided).max() < 1  # else the limit would show
  np.testing.assert_allclose(guided, 3 * labelled - 2 * null, atol=1e-5)


@pytest.mark.parametrize('changes', [
  dict(
    mode='paired', conv='space_time', schedule='additive', patch=2,
    sampler='ancestral', prediction='eps', loss='l1', guidance=2.0,
    dynamic_threshold=0.9, remat=True, mean_fraction=0.0, dim_mults=(1, 2),
  ),
  dict(
    norm='rms', schedule='linear', prediction='x0', dtype='bfloat16',
    image_fraction=0.0, ema_decay=0.0, num_labels=0, strength=1.0,
  ),
], ids=['paired', 'plain'])
def test_variants_step_and_animate(changes):
  method = make(**{**SMALL, 'window': 3, **changes})
  batch = toy_batch()
  rng = jax.random.key(1)
  inputs = {'label': batch['label']}
  if method.mode == 'paired':
    state = jax.jit(method.init)(jax.random.key(0), batch)
    new, metrics = jax.jit(method.train_step)(state, batch, rng)
    # The output layer starts at zero: E|noise| = sqrt(2 / pi) = 0.798.
    np.testing.assert_allclose(metrics['loss/denoise'], 0.798, rtol=0.05)
    kernels = (
      x.params['denoiser']['conv_out']['kernel'] for x in (state, new)
    )
    assert not np.array_equal(*kernels)
    inputs['draft'] = np.repeat(batch['draft'], 2, 1)[:, :5]
  else:
    new = lively_state(method, batch)
    _, metrics = jax.jit(method.denoiser_loss)(
      new.params['denoiser'], method.draw_task(batch, rng)
    )
  assert all(np.isfinite(v) for v in jax.device_get(metrics).values())
  # Longer than the window; from pure noise where no draft is needed.
  animate = jax.jit(method.animate, static_argnums=3)
  got = animate(new, inputs, jax.random.key(0), 5)
  assert got.shape == (2, 5, 8, 8, 3) and got.dtype == jnp.float32
  assert np.isfinite(got).all() and np.abs(got).max() <= 1
  assert method.reads[0] == 'draft'
  assert ('label' in method.reads) == bool(method.num_labels)


def test_paired_mode_diffuses_what_the_draft_lacks():
  method = make(
    **SMALL, mode='paired', prediction='v', loss='l2', strength=0.5,
    num_sample_steps=2, draft_error=0.1, min_snr_gamma=0.0,
    mean_fraction=0.0,
  )
  batch, noise = toy_batch(), normal(3, 2, 3, 8, 8, 3)
  state = jax.jit(method.init)(jax.random.key(0), batch)  # says 0 to everything
  real, draft = (batch[k][:, 1:] for k in ('video', 'draft'))
  t = np.array([3, 9])
  signal, sigma = (
    np.reshape(x[t], (2, 1, 1, 1, 1)) for x in method.noise_schedule
  )
  task = {
    'x0': real, 'draft': draft, 'noise': noise, 't': t,
    'image': batch['video'][:, 0], 'label': batch['label'],
  }
  loss, metrics = jax.jit(method.denoiser_loss)(
    state.params['denoiser'], task
  )
  error = (signal * noise - sigma * (real - draft) / 0.1) ** 2
  np.testing.assert_allclose(loss, error.mean(), rtol=1e-5)
  mse = ((real - draft) ** 2).mean((1, 2, 3, 4))
  np.testing.assert_allclose(
    metrics['psnr/draft'], (10 * np.log10(4 / mse)).mean(), rtol=1e-5
  )
  # One step from half of the levels: of x_t = sigma noise, signal x_t is x_0.
  draft = 0.5 * draft
  got = jax.jit(method.animate, static_argnums=3)(
    state, {'draft': draft, 'noise': noise}, jax.random.key(0), 3
  )
  half = method.num_noise_steps // 2
  signal, sigma = (x[half] for x in method.noise_schedule)
  want = np.clip(draft + 0.1 * signal * sigma * noise, -1, 1)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_paired_mode_learns_the_mean_without_noise():
  method = make(
    **SMALL, mode='paired', prediction='v', loss='l2', strength=0.5,
    num_sample_steps=2, draft_error=0.1, mean_fraction=1.0, image_fraction=0.0,
  )
  batch, noise = toy_batch(), normal(3, 2, 3, 8, 8, 3)
  state = jax.jit(method.init)(jax.random.key(0), batch)
  task = jax.jit(method.draw_task)(batch, jax.random.key(0))
  assert task['blank'].all() and (task['t'] == method.num_noise_steps).all()
  state = state.replace(
    params=jax.tree.map(lambda p: p + 0.05, state.params), ema={}
  )
  loss = lambda task: jax.jit(method.denoiser_loss)(
    state.params['denoiser'], task
  )[0]
  # Whatever the noise, the net sees none; it does see the photo.
  assert loss(task) == loss(task | {'noise': 9 * task['noise']})
  assert loss(task) != loss(task | {'image': 0.5 * task['image']})
  # A net that says v = -c everywhere means x_0 = c at the top.
  zeros = jax.tree.map(jnp.zeros_like, state.params['denoiser'])
  zeros['conv_out']['bias'] -= 0.5
  x0 = (task['x0'] - task['draft']) / 0.1
  sigma = method.noise_schedule.sigma[-1]
  got, _ = jax.jit(method.denoiser_loss)(zeros, task)
  missed = ((sigma * x0 - 0.5) ** 2).mean((2, 3, 4))  # of each frame
  np.testing.assert_allclose(got, np.log(missed + 0.01).mean(), rtol=1e-5)
  # It is noised from there: the walk starts at signal 0.5 + sigma noise, where
  # v = -0.5 once more.
  half = method.num_noise_steps // 2
  signal, sigma = (x[half] for x in method.noise_schedule)
  draft = 0.5 * batch['draft'][:, 1:]
  got = jax.jit(method.animate, static_argnums=3)(
    state.replace(params={'denoiser': zeros}),
    {'draft': draft, 'noise': noise, 'image': batch['video'][:, 0]},
    jax.random.key(0), 3,
  )
  start = signal * 0.5 + sigma * noise
  want = np.clip(draft + 0.1 * (signal * start + sigma * 0.5), -1, 1)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_paired_mode_asks_for_its_draft(tiny):
  _, state, _ = tiny
  method, batch = make(**SMALL, mode='paired'), toy_batch()
  with pytest.raises(ValueError, match="reads 'draft'"):
    method.animate(state, {'label': batch['label']}, jax.random.key(0), 4)
  del batch['draft']
  with pytest.raises(ValueError, match='learns from drafts'):
    method.draw_task(batch, jax.random.key(0))


@pytest.mark.parametrize('changes, message', [
  (dict(mode='refine'), 'model.mode'),
  (dict(norm='batch'), 'model.norm'),
  (dict(conv='3d'), 'space_time'),
  (dict(schedule='sigmoid'), 'additive'),
  (dict(prediction='noise'), 'eps, x0, v'),
  (dict(sampler='ddpm'), 'ancestral'),
  (dict(strength=1.5), 'model.strength'),
  (
    dict(mean_fraction=0.5, prediction='eps'), 'model.mean_fraction.*eps'
  ),
  (dict(draft_error=0.0), 'model.draft_error'),
  (dict(dim_mults=(1,) * 6), 'multiple of 32'),
  (dict(dim=12), 'multiple of 8'),
  (dict(head_dim=3), 'use an even one'),
  (dict(ema_every=0), '1 or more'),
])
def test_wrong_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


@pytest.mark.parametrize('preset', diffusion_config.PRESETS)
@pytest.mark.parametrize('size', [16, 64, 256])
def test_presets_build_and_survive_json(preset, size):
  stage = diffusion_config.get_stage(preset, size, {'name': 'none'})
  stage = json.loads(stage.to_json_best_effort())
  method = methods.make(stage, num_labels=LABELS, image_size=size)
  assert method.patch == (4 if size == 256 else 1)
  if preset == 'paper_1x1':
    side = size // method.patch
    assert side == 2 ** (len(method.dim_mults) - 1)
  adam = stage['optim']['denoiser']
  expected = (1e-4, 0.9, 0.999) if preset == 'reference' else (
    2e-3 if preset == 'tiny' else 2e-4, 0.5, 0.999
  )
  assert (adam['lr'], adam['b1'], adam['b2']) == expected
  assert (method.num_labels == 0) == (preset == 'reference')
  known = inspect.signature(data.make_batches).parameters
  assert set(stage['data']) <= set(known)
