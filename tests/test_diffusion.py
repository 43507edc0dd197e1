"""Schedules and samplers against formulas and oracles; the 3-D U-Net's
invariances."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.methods import video_diffusion as diffusion_config
from hatjax import diffusion, methods
from hatjax import state as state_lib
from hatjax.nets import attention, layers, lowerings
from hatjax.nets import video_diffusion as nets

LABELS = 3
SMALL = dict(image_size=8, dim_mults=(1,), window=0)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make(**changes):
  stage = diffusion_config.get_stage('tiny', 16, {}).to_dict()
  stage['model'] |= changes
  size = stage['model']['image_size']
  return methods.make(stage, num_labels=LABELS, image_size=size)


def toy_batch(size=8, frames=4):
  shape = (2, frames, size, size, 3)
  return {
    'video': np.clip(0.4 * normal(0, *shape), -1, 1),
    'draft': np.clip(0.4 * normal(1, *shape), -1, 1),
    'time': np.tile(np.linspace(0, 1, frames, dtype=np.float32), (2, 1)),
    'label': np.array([0, 2], np.int32),
  }


def lively(tree, seed=5):
  """Random parameters in the shapes of a tree, none of them zero."""
  leaves, structure = jax.tree.flatten(tree)

  def draw(i, shape):
    if len(shape) < 2:
      return 0.5 + 0.1 * normal(seed + i, *shape)
    return normal(seed + i, *shape) / math.sqrt(math.prod(shape[:-1]))

  return jax.tree.unflatten(
    structure, [draw(i, p.shape) for i, p in enumerate(leaves)]
  )


def lively_state(method, batch):
  """A state that compiles nothing, whose average differs from its params."""
  shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
  state = state_lib.create(lively(shapes.params), method.tx)
  return state.replace(ema=lively(shapes.ema, 500))


# -- schedules -----------------------------------------------------------------


@pytest.mark.parametrize('name', diffusion.SCHEDULES)
@pytest.mark.parametrize('num_steps', [20, 300, 1000])
def test_schedules_start_clean_and_lose_signal_to_noise(name, num_steps):
  signal, sigma = schedule = diffusion.SCHEDULES[name](num_steps)
  assert schedule.num_steps == num_steps == len(signal) - 1
  assert (signal[0], sigma[0]) == (1, 0)
  assert (np.diff(sigma / signal) > 0).all()
  if name == 'additive':
    assert (signal == 1).all()
    np.testing.assert_allclose(sigma[[1, -1]], [0.01, 50])
  else:
    np.testing.assert_allclose(signal**2 + sigma**2, 1, rtol=1e-12)
    assert (np.diff(signal**2) < 0).all() and signal[-1] ** 2 < 1e-2


def test_cosine_schedule_equals_its_formula_and_the_linear_one_its_betas():
  t = np.arange(301) / 300
  f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  signal = diffusion.cosine_schedule(300).signal
  # The last beta is clipped to 0.9999.
  np.testing.assert_allclose(signal[:-1] ** 2, f[:-1] / f[0], rtol=1e-9)
  np.testing.assert_allclose(signal[-1] ** 2, 1e-4 * f[-2] / f[0])
  # Noise of a draft at a strength of 0.15: 0.243 in the specification's table.
  np.testing.assert_allclose(diffusion.cosine_schedule(300).sigma[45], 0.243,
                             atol=1e-3)
  signal = diffusion.linear_schedule(1000).signal
  beta = 1 - signal[1:] ** 2 / signal[:-1] ** 2
  np.testing.assert_allclose(beta, np.linspace(1e-4, 0.02, 1000))


def test_noised_video_has_its_moments():
  schedule = diffusion.cosine_schedule(300)
  noise = normal(0, 2, 100_000)
  t = np.array([0, 150])
  xt = diffusion.add_noise(schedule, np.full_like(noise, 0.5), noise, t)
  np.testing.assert_array_equal(xt[0], 0.5)
  assert abs(xt[1].mean() - 0.5 * schedule.signal[150]) < 0.01
  assert abs(xt[1].std() - schedule.sigma[150]) < 0.01


@pytest.mark.parametrize('name', diffusion.SCHEDULES)
@pytest.mark.parametrize('prediction', diffusion.PREDICTIONS)
def test_conversions_invert_one_another(name, prediction):
  schedule = diffusion.SCHEDULES[name](300)
  x0, noise = normal(0, 4, 2, 5), normal(1, 4, 2, 5)
  t = np.array([1, 60, 150, 250])
  xt = diffusion.add_noise(schedule, x0, noise, t)
  value = diffusion.make_target(prediction, schedule, x0, noise, t)
  back = diffusion.to_x0_and_noise(prediction, schedule, value, xt, t)
  # What is divided by (signal or sigma) amplifies float32 rounding of xt.
  tolerance = {'eps': (1e-4, 1e-6), 'x0': (1e-6, 3e-4), 'v': (1e-5, 3e-4)}
  for got, want, atol in zip(back, (x0, noise), tolerance[prediction]):
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-5)


def test_v_is_the_rotated_pair_and_additive_input_is_scaled():
  vp = diffusion.Schedule(np.array([1, 0.6]), np.array([0, 0.8]))
  v = diffusion.make_target('v', vp, *np.float32([2, 3]), 1)
  np.testing.assert_allclose(v, 0.6 * 3 - 0.8 * 2, rtol=1e-6)
  additive = diffusion.Schedule(np.array([1.0, 1]), np.array([0, 0.75]))
  # sqrt(1 + 0.75^2) = 1.25.
  x = np.ones((1, 2), np.float32)
  scaled = diffusion.scale_input(additive, x, np.array([1]))
  np.testing.assert_allclose(scaled, 0.8, rtol=1e-6)
  cosine = diffusion.cosine_schedule(300)
  for t in (0, 7, 300):
    scaled = diffusion.scale_input(cosine, x, np.array([t]))
    np.testing.assert_allclose(scaled, 1, rtol=1e-6)


def test_min_snr_weights_by_hand():
  # alpha_bar 0.9: SNR 9, capped at 5; 0.8: SNR 4, left alone.
  alpha_bar = np.array([1, 0.9, 0.8])
  schedule = diffusion.Schedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
  weight = functools.partial(
    diffusion.min_snr_weight, schedule=schedule, t=np.array([1, 2]), gamma=5.0
  )
  for prediction, expected in (
    ('eps', [5 / 9, 1]), ('x0', [5, 4]), ('v', [5 / 10, 4 / 5]),
  ):
    np.testing.assert_allclose(weight(prediction), expected, rtol=1e-5)


# -- sampling ------------------------------------------------------------------


def test_ancestral_step_is_the_posterior_of_ddpm():
  schedule = diffusion.cosine_schedule(300)
  alpha_bar = schedule.signal**2
  t = np.arange(1, 301)
  # Ho et al. 2020, eqs 6 and 7.
  alpha = alpha_bar[t] / alpha_bar[t - 1]
  beta = 1 - alpha
  to_x0 = np.sqrt(alpha_bar[t - 1]) * beta / (1 - alpha_bar[t])
  to_xt = np.sqrt(alpha) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
  variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
  got = diffusion.step_coefficients(schedule, t, t - 1, 1.0)
  for a, b in zip(got, (to_x0, to_xt, np.sqrt(variance))):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_ancestral_step_of_the_additive_walk():
  # Eq. 3: x_s = x_0 + N(0, sigma_s^2), x_t = x_s + N(0, rest): the product of
  # two Gaussians in x_s.
  schedule = diffusion.additive_schedule(50)
  t, s = np.array([30, 50, 1]), np.array([29, 10, 0])
  sigma_t, sigma_s = schedule.sigma[t], schedule.sigma[s]
  rest = sigma_t**2 - sigma_s**2
  got = diffusion.step_coefficients(schedule, t, s, 1.0)
  expected = (
    rest / sigma_t**2, sigma_s**2 / sigma_t**2,
    np.sqrt(rest * sigma_s**2) / sigma_t,
  )
  for a, b in zip(got, expected):
    np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize('name', diffusion.SCHEDULES)
@pytest.mark.parametrize('count', [1, 7, 300])
def test_ddim_with_an_oracle_recovers_x0(name, count):
  schedule = diffusion.SCHEDULES[name](300)
  x0 = np.clip(normal(0, 2, 3, 4, 4, 3), -1, 1)
  xt = diffusion.add_noise(schedule, x0, normal(1, *x0.shape), 150)

  def oracle(xt, t):
    signal, sigma = (
      jnp.asarray(table, jnp.float32)[t] for table in schedule
    )
    noise = (xt - signal * x0) / sigma
    return diffusion.to_x0_and_noise('eps', schedule, noise, xt, t)[0]

  times = diffusion.sample_times(150, count)
  assert times[0] == 150 and times[-1] == 0 and len(times) <= count + 1
  got = diffusion.sample(oracle, schedule, xt, times, jax.random.key(0))
  np.testing.assert_allclose(got, x0, atol=2e-5)


@pytest.mark.parametrize('name', diffusion.SCHEDULES)
@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_sampling_a_gaussian_gets_its_mean_and_deviation(name, eta):
  schedule = diffusion.SCHEDULES[name](300)
  mean, std = 0.3, 0.5

  def best_guess(xt, t):  # E[x_0 | x_t] for x_0 ~ N(mean, std^2)
    signal, sigma = (
      jnp.asarray(table, jnp.float32)[t] for table in schedule
    )
    gain = signal * std**2 / (signal**2 * std**2 + sigma**2)
    return mean + gain * (xt - signal * mean)

  xt = schedule.sigma[-1] * normal(0, 20_000, 1)
  times = diffusion.sample_times(300, 300)
  got = diffusion.sample(
    best_guess, schedule, xt.astype(np.float32), times, jax.random.key(0), eta
  )
  assert abs(got.mean() - mean) < 0.02
  assert abs(got.std() - std) < 0.02


def test_limit_clips_or_rescales():
  x = np.array([[0.5, -0.2, 0.9, 0.1], [4.0, -2.0, 1.0, 3.0]], np.float32)
  np.testing.assert_array_equal(diffusion.limit(x), np.clip(x, -1, 1))
  # Median of |row 1| is 2.5; row 0 lies within 1 and stays.
  expected = [x[0], np.clip(x[1], -2.5, 2.5) / 2.5]
  np.testing.assert_allclose(diffusion.limit(x, 0.5), expected)


@pytest.mark.parametrize('length', [2, 4, 5, 11])
def test_windows_are_averaged_where_they_overlap(length):
  x = normal(0, 2, length, 3)
  window, stride = 4, 2
  double = lambda a: 2 * a['x']
  got = diffusion.average_windows(double, {'x': x}, window, stride)
  np.testing.assert_allclose(got, 2 * x, rtol=1e-6)

  # A function that does mix frames, against a loop.
  mix = lambda a: a['x'] + a['x'].mean(1, keepdims=True)
  starts = [0] if length <= window else [
    *range(0, length - window, stride), length - window
  ]
  total, count = np.zeros_like(x), np.zeros((length, 1))
  for start in starts:
    part = slice(start, start + window)
    total[:, part] += mix({'x': x[:, part]})
    count[part] += 1
  got = jax.jit(
    lambda x: diffusion.average_windows(mix, {'x': x}, window, stride)
  )(x)
  np.testing.assert_allclose(got, total / count, rtol=1e-5, atol=1e-6)


def test_patches_are_channels_and_back():
  x = normal(0, 2, 3, 8, 8, 3)
  deep = layers.space_to_depth(x, 4)
  assert deep.shape == (2, 3, 2, 2, 48)
  np.testing.assert_array_equal(
    deep[1, 2, 1, 0].reshape(4, 4, 3), x[1, 2, 4:8, 0:4]
  )
  np.testing.assert_array_equal(layers.depth_to_space(deep, 4), x)


# -- network -------------------------------------------------------------------


@pytest.mark.parametrize('changes, expected', [
  ({}, 35_714_307),                           # the released code's 35.71 M
  (dict(norm='rms'), 35_706_243),
  (dict(dim_mults=(1, 2, 4, 8, 8, 8, 8)), 135_654_147),  # 64 -> 1x1
])
def test_parameter_count(changes, expected):
  zeros = jnp.zeros((1, 2, 64, 64, 3))
  params = jax.eval_shape(
    nets.UNet3D(**changes).init, jax.random.key(0), zeros, jnp.zeros(1, int)
  )
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize('conv, mults', [
  ('space', (1, 2)), ('space_time', (1,)),
])
def test_frames_of_isolated_samples_do_not_see_one_another(conv, mults):
  net = nets.UNet3D(
    dim=8, dim_mults=mults, heads=2, head_dim=4, conv=conv
  )
  x = normal(0, 2, 3, 8, 8, 3)
  t = np.array([3, 3])
  params = lively(jax.eval_shape(net.init, jax.random.key(0), x, t))

  @jax.jit
  def pull(isolate):
    """Gradient of frame 1, summed with fixed weights, for all frames."""
    weights = normal(1, 2, 8, 8, 3)
    loss = lambda x: (weights * net.apply(params, x, t, None, isolate)[:, 1])
    return jax.grad(lambda x: loss(x).sum())(x)

  size = np.abs(pull(np.array([True, False]))).max((2, 3, 4))
  np.testing.assert_array_equal(size[0] > 0, [False, True, False])
  assert (size[1] > 0).all()


def test_isolated_frames_equal_one_frame_clips():
  net = nets.UNet3D(dim=8, dim_mults=(1,), heads=2, head_dim=4)
  x, t = normal(0, 2, 3, 4, 4, 3), np.array([3, 5])
  params = lively(jax.eval_shape(net.init, jax.random.key(0), x, t))
  apply = jax.jit(net.apply)
  together = apply(params, x, t, None, np.array([True, True]))
  alone = apply(params, x.reshape(6, 1, 4, 4, 3), t.repeat(3))
  np.testing.assert_allclose(
    together, alone.reshape(x.shape), atol=2e-4, rtol=1e-4
  )


def test_turned_products_depend_on_distances_only():
  q, k = normal(0, 2, 5, 8), normal(1, 2, 5, 8)
  frames = np.arange(5)

  def scores(shift):
    turn = lambda x: attention.rotate(x, frames + shift)
    return jnp.einsum('htd,hsd->hts', turn(q), turn(k))

  np.testing.assert_allclose(scores(0), scores(17), atol=2e-5)
  assert np.abs(scores(0) - jnp.einsum('htd,hsd->hts', q, k)).max() > 0.1
  np.testing.assert_array_equal(attention.rotate(q, frames)[:, 0], q[:, 0])


def test_distance_buckets_by_hand():
  bucket = attention.bucket_distances(40)
  # query - key: exact below 8, then 8 + floor(8 ln(d / 8) / ln 4), at most 15;
  # 16 more where the key is later.
  expected = {
    0: 0, 1: 1, 7: 7, 8: 8, 10: 9, 16: 12, 31: 15, 32: 15, 39: 15, -1: 17,
    -7: 23, -8: 24, -39: 31,
  }
  for d, value in expected.items():
    assert bucket[max(d, 0), max(-d, 0)] == value, d


def test_linear_attention_by_hand():
  q, k, v = (normal(i, 1, 3, 2) for i in range(3))
  softmax = lambda x, axis: np.exp(x) / np.exp(x).sum(axis, keepdims=True)
  weights = softmax(q[0], 1) @ softmax(k[0], 0).T / math.sqrt(2)
  np.testing.assert_allclose(
    attention.attend_linearly(q, k, v)[0], weights @ v[0], rtol=1e-5
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('lowering', ['plain', 'rewritten'])
def test_values_that_are_never_made_change_nothing(lowering, dtype):
  x, q, k, v = normal(0, 2, 9, 4), *(normal(i, 4, 3, 2) for i in (1, 2, 3))
  args, weights = (x, q, k, v, normal(4, 3, 2, 4)), normal(5, 2, 9, 4)
  args = [jnp.asarray(a, dtype) for a in args]

  def pull(attend):
    loss = lambda *args: (weights * attend(*args)).sum()
    with lowerings.lowering(lowering):
      return jax.value_and_grad(loss, range(5))(*args)

  linear = attention.heads_first(attention.attend_linearly)
  pairs = zip(*map(jax.tree.leaves, (
    pull(attention.attend_linearly_to_many), pull(linear)
  )))
  for a, b in pairs:
    assert a.dtype == b.dtype
    a, b = (np.asarray(y, np.float32) for y in (a, b))
    error = 1e-5 if dtype == 'float32' else 0.05 * np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=error)


def test_attention_over_time_is_the_same_for_cpus_and_others():
  x, bias = normal(0, 2, 5, 2, 2, 8), normal(1, 3, 5, 5)
  isolate = np.array([True, False])
  net = attention.TemporalAttention(3, 4)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, bias)

  def run(lowering):
    def loss(*args):
      y = net.apply(*args, isolate)
      return jnp.sin(3 * y).sum(), y
    args = lively(shapes), x, bias
    with lowerings.lowering(lowering):
      pull = jax.jit(jax.value_and_grad(loss, (0, 1, 2), True))
      return pull(*args), jax.jit(loss)(*args)

  plain, rewritten = run('plain'), run('rewritten')
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rewritten)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_linear_attention_is_exported_for_any_number_of_clips():
  net, x = attention.SpatialAttention(2, 4), normal(0, 3, 2, 4, 4, 8)
  params = lively(jax.eval_shape(net.init, jax.random.key(0), x))
  any_number = jax.ShapeDtypeStruct(
    jax.export.symbolic_shape('b, 2, 4, 4, 8'), x.dtype
  )
  program = jax.export.export(jax.jit(lambda x: net.apply(params, x)))
  y = program(any_number).call(x)
  np.testing.assert_allclose(y, net.apply(params, x), rtol=1e-5, atol=1e-5)


def test_attention_is_exported_for_any_number_of_clips():
  net, bias = attention.TemporalAttention(2, 4), normal(1, 2, 5, 5)
  x = normal(0, 3, 5, 2, 2, 8)
  params = lively(jax.eval_shape(net.init, jax.random.key(0), x, bias))
  any_number = jax.ShapeDtypeStruct(
    jax.export.symbolic_shape('b, 5, 2, 2, 8'), x.dtype
  )
  with lowerings.lowering('rewritten'):
    program = jax.export.export(jax.jit(lambda x: net.apply(params, x, bias)))
    y = program(any_number).call(x)
  np.testing.assert_allclose(y, net.apply(params, x, bias), atol=1e-5)


def test_attention_in_pieces_equals_attention_at_once():
  x, weights = normal(0, 2, 6, 4, 4, 8), normal(1, 2, 6, 4, 4, 8)
  bias, isolate = normal(2, 2, 6, 6), np.array([True, False])

  def pull(piece, params, x, bias):
    """Outputs, and gradients of them, summed with fixed weights."""
    def loss(params, x, bias):
      y = attention.SpatialAttention(2, 4, piece=piece).apply(params[0], x)
      z = attention.TemporalAttention(2, 4, piece=piece).apply(
        params[1], x, bias, isolate
      )
      return (weights * (y + z)).sum(), (y, z)
    return jax.value_and_grad(loss, (0, 1, 2), True)(params, x, bias)

  params = (
    jax.eval_shape(attention.SpatialAttention(2, 4).init, jax.random.key(0), x),
    jax.eval_shape(
      attention.TemporalAttention(2, 4).init, jax.random.key(0), x, bias
    ),
  )
  args = lively(params), x, bias
  # Two frames of 16 pixels at a time, and 4 of the 16 pixels in time.
  pieces = jax.jit(functools.partial(pull, 32))
  assert pieces.lower(*args).as_text().count('stablehlo.while') > 1
  whole = jax.jit(functools.partial(pull, 0))(*args)
  for a, b in zip(jax.tree.leaves(pieces(*args)), jax.tree.leaves(whole)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
