"""Floors 0 and 1 against references and invariances."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, signal, stats
from skimage.metrics import peak_signal_noise_ratio

from hatjax import intensity, losses, metrics, validation, warp
from hatjax.nets import hat_cgan, layers, lowerings, norms


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- convolutions -------------------------------------------------------------


def same_conv(x, kernel):
  return layers.correlate(x, kernel, 1)


@pytest.mark.parametrize('nd, form', [
  (1, 'taps'), (2, 'taps'), (3, 'taps'), (2, 'cells'), (3, 'cells'),
  (2, 'filter'), (2, 'large'), (2, 'aligned'), (3, 'aligned'),
  (2, 'aligned wide'), (2, 'aligned few'), (3, 'aligned few'),
  (2, 'aligned taps'),
])
@pytest.mark.parametrize('kernel', [3, 4])
@pytest.mark.parametrize(
  'op', [layers.downsample_conv, layers.upsample_conv, same_conv]
)
def test_every_form_of_a_convolution_equals_plain(
  op, kernel, nd, form, monkeypatch
):
  inputs, features = {
    'aligned wide': (10, 11), 'aligned few': (9, 3),
  }.get(form, (3, layers.FEW + 1))
  x = normal(0, 2, *(8, 4, 6)[:nd], inputs)
  w = 0.1 * normal(1, *(kernel,) * nd, inputs, features)
  if form != 'taps':
    sides = {'plain': 0, 'rewritten': 2, 'aligned': 8 * ('taps' in form)}
    monkeypatch.setattr(layers, 'SMALL', sides)
  if form == 'filter':
    monkeypatch.setattr(layers, '_filter_pays', lambda *_: True)
  if form == 'large':
    monkeypatch.setattr(layers, '_is_large', lambda *_: True)

  def run(name):
    def step(x, w):
      y, pull = jax.vjp(op, x, w)
      return y, *pull(jnp.sin(y))

    with lowerings.lowering(name):
      text = jax.jit(step).lower(x, w).as_text()
      return text, *jax.jit(step)(x, w)

  name = 'aligned' if 'aligned' in form else 'rewritten'
  (_, *plain), (text, *others) = run('plain'), run(name)
  halves = op is layers.downsample_conv
  products = {
    'taps': op is not same_conv, 'cells': False, 'filter': True,
    'large': op is same_conv and kernel == 3, 'aligned': False,
    'aligned taps': op is not same_conv,
  }
  assert ('stablehlo.convolution' in text) != products.get(form, False)
  # Of few channels, a stride is in the order of the pixels.
  strided = re.search(r'(?:stride|lhs_dilate|rhs_dilate) = \[2', text)
  few = inputs < 8 and halves or features < 8 and op is layers.upsample_conv
  if 'aligned' in form and op is not same_conv and form != 'aligned taps':
    assert bool(strided) != few
  for one, other in zip(plain, others):
    assert one.shape == other.shape
    # A gradient of the kernel sums thousands of terms.
    atol = max(2e-5, 3e-6 * np.abs(one).max())
    np.testing.assert_allclose(one, other, atol=atol, rtol=1e-5)


@pytest.mark.parametrize('op, side', [
  (layers.downsample_conv, 16), (layers.upsample_conv, 8),
])
def test_small_pictures_are_filtered_where_they_are_many(op, side):
  for count in (15, 16):  # a thousand pixels of 8x8 lie between
    x = np.zeros((count, side, side, 64), 'f4')
    w = np.zeros((4, 4, 64, 64), 'f4')
    with lowerings.lowering('rewritten'):
      text = jax.jit(op).lower(x, w).as_text()
    # F(4, 2) makes 25 products of matrices.
    assert ('tensor<25x' in text) == (count == 16)


@pytest.mark.parametrize('k, pad, features', [(3, 1, 2), (4, 1, 1), (7, 0, 5)])
def test_convolution_to_few_features_equals_plain(k, pad, features):
  x, w = normal(0, 2, 9, 8, 20), 0.1 * normal(1, k, k, 20, features)

  def run(name):
    def step(x, w):
      y, pull = jax.vjp(lambda x, w: layers.correlate(x, w, pad), x, w)
      return y, *pull(jnp.sin(y))

    with lowerings.lowering(name):
      return jax.jit(step).lower(x, w).as_text(), jax.jit(step)(x, w)

  (_, plain), *forms = map(run, ('plain', 'rewritten', 'aligned'))
  wide = {'rewritten': k * features, 'aligned': -8 * (-k * features // 8)}
  for (text, others), columns in zip(forms, wide.values()):
    inputs = 20 if columns == wide['rewritten'] else 24
    if columns == wide['rewritten'] or features <= 4:
      assert f'tensor<{k}x1x{inputs}x{columns}xf32>' in text
    for one, other in zip(plain, others):
      atol = max(2e-5, 3e-6 * np.abs(one).max())
      np.testing.assert_allclose(one, other, atol=atol, rtol=1e-5)


def test_downsample_conv_equals_scipy():
  x, w = normal(0, 1, 8, 6, 1), normal(1, 4, 4, 1, 1)
  full = signal.correlate2d(np.pad(x[0, ..., 0], 1), w[..., 0, 0], 'valid')
  y = layers.downsample_conv(x, w)
  np.testing.assert_allclose(y[0, ..., 0], full[::2, ::2], atol=1e-5)


def test_upsample_conv_is_the_transpose_of_downsample_conv():
  # <conv(x), y> = <x, conv^T(y)>, the kernel's channels swapped.
  x, y, w = normal(0, 1, 8, 8, 3), normal(1, 1, 4, 4, 5), normal(2, 4, 4, 3, 5)
  left = jnp.vdot(layers.downsample_conv(x, w), y)
  right = jnp.vdot(x, layers.upsample_conv(y, w.swapaxes(2, 3)))
  np.testing.assert_allclose(left, right, rtol=1e-4)


@pytest.mark.parametrize('name', lowerings.LOWERINGS[1:])
@pytest.mark.parametrize('k', (3, 4))
def test_strided_convolution_of_odd_sides_equals_scipy(k, name):
  x, w = normal(0, 1, 7, 5, 1), normal(1, k, k, 1, 1)
  full = signal.correlate2d(np.pad(x[0, ..., 0], 1), w[..., 0, 0], 'valid')
  with lowerings.lowering(name):
    y, pull = jax.vjp(layers.downsample_conv, x, w)
  np.testing.assert_allclose(y[0, ..., 0], full[::2, ::2], atol=1e-5)
  assert [g.shape for g in pull(y)] == [x.shape, w.shape]


def test_noise_of_bytes_is_normal():
  x = np.asarray(hat_cgan._normal(
    jax.random.key(0), (64, 64, 7), jnp.bfloat16
  ).astype(jnp.float32)).ravel()
  assert len(np.unique(x)) == 256
  for moment, want in ((1, 0), (2, 1), (3, 0), (4, 3)):
    np.testing.assert_allclose((x**moment).mean(), want, atol=0.15)


def test_unknown_lowering_is_refused():
  with pytest.raises(ValueError, match='rewritten'):
    with lowerings.lowering('fast'):
      pass


def formula(x, gain, shift, isolate, size):
  """`norms.group_norm` as its docstring says it."""
  b, t, *_, c = x.shape
  grouped = x.reshape(b, t, -1, c // size, size)

  def normalize(axes):
    centred = grouped - grouped.mean(axes, keepdims=True)
    var = jnp.square(centred).mean(axes, keepdims=True)
    return (centred / jnp.sqrt(var + 1e-5)).reshape(x.shape)

  y = normalize((1, 2, 4))
  if isolate is not None:
    alone = isolate.reshape(-1, *[1] * (x.ndim - 1))
    y = jnp.where(alone, normalize((2, 4)), y)
  spread = lambda v: v.reshape(-1, *[1] * (x.ndim - 2), c)
  return spread(gain) * y + spread(shift)


@pytest.mark.parametrize('name', ('plain', 'rewritten'))
@pytest.mark.parametrize('isolate', (None, np.array([True, False])))
@pytest.mark.parametrize('size, rows', ((1, 1), (3, 1), (3, 2)))
def test_group_norm_and_its_gradients(size, rows, isolate, name):
  normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  x, weights = 3 + 2 * normal(0, 2, 2, 32, 8, 24), normal(1, 2, 2, 32, 8, 24)
  gain, shift = 1 + normal(2, rows, 24), normal(3, rows, 24)

  def pull(f):
    loss = lambda *args: (weights * f(*args, isolate, size)).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, gain, shift)

  def check(ours):
    with lowerings.lowering(name):
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        pull(ours), pull(formula),
      )

  check(norms.group_norm)
  if size == 1 and isolate is None:  # Its own gain and shift are 1 and 0.
    check(lambda x, gain, shift, *_: norms.modulate(
      norms.instance_norm(x), *(jnp.repeat(v, 2, 0) for v in (gain, shift))
    ))


@pytest.mark.parametrize('name', ('plain', 'rewritten'))
def test_bias_and_modulation_have_autodiffs_gradients(name):
  normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  x, weights = normal(0, 2, 16, 64, 3), normal(1, 2, 16, 64, 3)
  gain, shift = normal(2, 2, 3), normal(3, 2, 3)

  def pull(f, *args):
    loss = lambda *args: (weights * f(*args)).sum()
    return jax.jit(jax.grad(loss, tuple(range(len(args)))))(*args)

  plainly = lambda x, a, b: x * a[:, None, None] + b[:, None, None]
  with lowerings.lowering(name):
    for ours, theirs in (
      (pull(norms.add_bias, x, shift[0]), pull(jnp.add, x, shift[0])),
      (pull(norms.modulate, x, gain, shift), pull(plainly, x, gain, shift)),
    ):
      for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_instance_norm_has_mean_0_and_biased_variance_1():
  y = np.asarray(norms.instance_norm(5 + 3 * normal(0, 2, 8, 8, 4)))
  np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.var((1, 2)), 1, atol=1e-4)


def test_instance_norm_in_bfloat16_computes_in_float32():
  x = 100 + normal(0, 1, 16, 16, 2)
  x16 = jnp.asarray(x, jnp.bfloat16)
  expected = norms.instance_norm(x16.astype(jnp.float32))
  got = norms.instance_norm(x16).astype(jnp.float32)
  np.testing.assert_allclose(got, expected, atol=0.02)


# -- warps --------------------------------------------------------------------


@pytest.mark.parametrize('form', ['gather', 'matrix'])
def test_identity_grid_leaves_an_image(form):
  image = normal(0, 2, 7, 5, 3)
  where = jnp.tile(warp.grid(7, 5), (2, 1, 1, 1))
  np.testing.assert_allclose(
    warp.warp_frames(image, where, form), image, atol=1e-5
  )


@pytest.mark.parametrize('form', ['gather', 'matrix'])
def test_warp_equals_scipy(form):
  image = normal(0, 1, 9, 7, 2)
  where = np.random.default_rng(1).uniform(-1.3, 1.3, (1, 6, 5, 2))
  got = jax.jit(functools.partial(warp.warp_frames, form=form))(image, where)
  y, x = (where[0, ..., 1] + 1) * 4, (where[0, ..., 0] + 1) * 3
  for c in range(2):
    expected = ndimage.map_coordinates(
      image[0, ..., c], [y, x], order=1, mode='nearest'
    )
    np.testing.assert_allclose(got[0, ..., c], expected, atol=1e-5)


def test_affine_shift_by_one_pixel_moves_the_image():
  image = normal(0, 1, 5, 5, 1)
  # Five pixels span 4 steps of 0.5: looking 0.5 to the right moves it left.
  theta = jnp.array([[[1.0, 0, 0.5], [0, 1, 0]]])
  out = warp.warp_frames(image, warp.affine_grid(theta, 5, 5))
  np.testing.assert_allclose(out[0, :, :4], image[0, :, 1:], atol=1e-5)


def part_inputs():
  theta = warp.identity_affine() + 0.2 * normal(1, 2, 3, 2, 2, 3)
  maps = jax.nn.softmax(normal(2, 2, 8, 8, 3), -1)
  return normal(0, 2, 8, 8, 4), theta, maps


def test_warp_parts_is_the_masked_sum_of_warps():
  image, theta, maps = part_inputs()
  expected = maps[..., :1] * image
  frame = 1
  for p in range(2):
    where = warp.affine_grid(theta[:, frame, p], 8, 8)
    moved = warp.warp_frames(image, where)
    expected = expected + maps[..., p + 1 : p + 2] * moved
  for form in ('gather', 'matrix'):
    got = warp.warp_parts(image, theta, maps, form)[:, frame]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_both_forms_have_the_same_gradients():
  inputs = part_inputs()
  loss = lambda form: lambda *a: jnp.sum(jnp.sin(warp.warp_parts(*a, form)))
  gather = jax.jit(jax.grad(loss('gather'), (0, 1, 2)))(*inputs)
  matrix = jax.jit(jax.grad(loss('matrix'), (0, 1, 2)))(*inputs)
  for a, b in zip(gather, matrix):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_gradient_of_the_affine_map_points_to_the_true_shift():
  # A ramp image: moving the look-up right by d raises every value by d.
  ramp = jnp.tile(jnp.linspace(-1, 1, 9), (9, 1))[None, ..., None]
  theta = warp.identity_affine()[None]
  inner = lambda th: warp.warp_frames(ramp, warp.affine_grid(th, 9, 9))[
    0, 2:7, 2:7
  ].mean()
  grad = jax.grad(inner)(theta)[0]
  np.testing.assert_allclose(grad[0, 2], 1.0, atol=1e-4)
  np.testing.assert_allclose(grad[1, 2], 0.0, atol=1e-4)


# -- losses, metrics, optimizers ----------------------------------------------


def test_gan_losses_by_hand():
  logits = jnp.array([[0.0, 2.0]])
  # softplus(-0) = ln 2, softplus(-2) = ln(1 + e^-2) = 0.126928.
  np.testing.assert_allclose(
    losses.bce(logits, 1.0), [(np.log(2) + 0.126928) / 2], rtol=1e-5
  )
  # (0 - 1)^2 = 1 and (2 - 1)^2 = 1.
  np.testing.assert_allclose(losses.least_squares(logits, 1.0), [1.0])
  assert np.isfinite(jax.grad(lambda x: losses.bce(x, 0.0)[0])(1e4 + logits)
                     ).all()


def test_l1_is_the_mean_per_sample():
  a, b = jnp.zeros((2, 2, 2, 1)), jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
  np.testing.assert_allclose(losses.l1(a, a + b), [1.0, 3.0])


def test_psnr_equals_skimage_and_is_symmetric():
  a, b = np.tanh(normal(0, 3, 8, 8, 3)), np.tanh(normal(1, 3, 8, 8, 3))
  expected = [peak_signal_noise_ratio(x, y, data_range=2) for x, y in zip(a, b)]
  np.testing.assert_allclose(metrics.psnr(a, b), expected, rtol=1e-5)
  np.testing.assert_allclose(metrics.psnr(a, b), metrics.psnr(b, a))


# -- intensity ----------------------------------------------------------------


def test_alpha_rules_by_hand_and_per_sample():
  residual = jnp.array([[0.0, 2.0], [3.0, 4.0]])
  neutral = jnp.array([[1.0, 1.0], [0.0, 0.0]])
  frames = jnp.array([[[1.0, 3.0], [9.0, 0.0]], [[3.0, 4.0], [-3.0, -4.0]]])
  # Shifts (0, 2), (8, -1): <., r> = 4, -2. Second clip: 25, -25.
  np.testing.assert_allclose(
    intensity.infer_alpha(frames, neutral, residual),
    [[2, 1], [5, 5]], rtol=1e-5,
  )
  np.testing.assert_allclose(
    intensity.infer_alpha(frames, neutral, residual, 'least_squares'),
    [[1, -0.5], [1, -1]], rtol=1e-5,
  )
  alone = intensity.infer_alpha(frames[:1], neutral[:1], residual[:1])
  np.testing.assert_allclose(alone, [[2, 1]], rtol=1e-5)


def test_least_squares_alpha_inverts_the_latent_path():
  base, r = normal(0, 2, 16), normal(1, 2, 16)
  alpha = np.array([[0.0, 0.3, 1.0], [-0.2, 0.5, 1.7]], np.float32)
  frames = base[:, None] + alpha[..., None] * r[:, None]
  got = intensity.infer_alpha(frames, base, r, 'least_squares')
  np.testing.assert_allclose(got, alpha, atol=1e-5)


def test_alpha_gradient_is_finite_where_the_residual_vanishes():
  zero = jnp.zeros((1, 4))
  for rule in intensity.RULES:
    loss = lambda r, rule=rule: intensity.infer_alpha(
      jnp.ones((1, 2, 4)), zero, r, rule
    ).sum()
    assert np.isfinite(jax.grad(loss)(zero)).all()


def test_visible_progress_of_a_linear_change():
  change = normal(0, 4, 4, 3)
  steps = np.array([0, 0.5, 1.0, 0.25], np.float32)
  clip = (steps[:, None, None, None] * change)[None]
  np.testing.assert_allclose(
    intensity.visible_progress(clip), [[0.5, 1.0, 0.25]], atol=1e-5
  )


def test_code_error_vanishes_on_the_line_only():
  r, progress = normal(0, 1, 8), jnp.array([[0.25, 1.0]])
  shift = progress[..., None] * r[:, None]
  codes = jnp.concatenate([jnp.zeros((1, 1, 8)), shift], 1) + 3.0
  np.testing.assert_allclose(
    intensity.code_error(codes, r, progress), [0], atol=1e-6
  )
  # Twice too far: |2s - s|^2 / |2s|^2 = 1/4.
  doubled = 3.0 + 2 * (codes - 3.0)
  np.testing.assert_allclose(
    intensity.code_error(doubled, r, progress), [0.25], rtol=1e-4
  )


def test_profile_remembers_the_onset_of_each_label():
  time = jnp.tile(jnp.linspace(0, 1, 31)[1:], (2, 1))
  alpha = jnp.stack([time[0] ** 2, 0.5 * time[1]])
  profile = intensity.empty_profile(3)
  terms = intensity.profile_terms(alpha, time, jnp.array([0, 2]), 3)
  for _ in range(5):
    profile = intensity.update_profile(profile, terms)
  got = intensity.sweep('profile', 11, 2.0, profile, jnp.array([0, 2, 1]))
  at = np.linspace(0, 1, 11)
  # A knot averages the frames around it; the last has them on one side only.
  np.testing.assert_allclose(got[0, :-1], 2 * at[:-1] ** 2, atol=0.01)
  np.testing.assert_allclose(got[0, -1], 2.0, atol=0.05)
  np.testing.assert_allclose(got[1], at, atol=0.02)
  np.testing.assert_allclose(got[2], 0, atol=1e-6)  # never seen


def test_profile_bridges_times_never_seen():
  profile = intensity.empty_profile(0)
  terms = intensity.profile_terms(
    jnp.array([[1.0]]), jnp.array([[1.0]]), jnp.array([0]), 0
  )
  profile = intensity.update_profile(profile, terms)
  got = intensity.sweep('profile', 5, 1.0, profile, jnp.array([0]))
  np.testing.assert_allclose(got, [[0, 0.25, 0.5, 0.75, 1]], atol=1e-5)


def test_sweeps():
  profile, row = intensity.empty_profile(0), jnp.array([0, 0])
  linear = intensity.sweep('linear', 5, 1.2, profile, row)
  np.testing.assert_allclose(linear[1], np.linspace(0, 1.2, 5), rtol=1e-6)
  reference = intensity.sweep('reference', 99, 3.0, profile, row)
  np.testing.assert_allclose(reference[0], np.arange(20) / 20, atol=1e-6)
  with pytest.raises(ValueError, match='linear, profile, reference'):
    intensity.sweep('lineal', 5, 1.0, profile, row)


def test_spearman_equals_scipy():
  values = normal(0, 12)
  expected = stats.spearmanr(np.arange(12), values)[0]
  np.testing.assert_allclose(validation._spearman(values), expected, atol=1e-6)
