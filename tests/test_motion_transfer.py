"""Motion transfer: its geometry, nets, losses, optimizer and method."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.methods import motion_transfer as config
from hatjax import losses, methods, optim, warp
from hatjax.nets import layers, lowerings, resnet
from hatjax.nets import motion_transfer as nets


def make(preset='tiny', size=16, **changes):
  stage = config.get_stage(preset, size, {'name': 'none'})
  stage = json.loads(stage.to_json_best_effort())
  stage['model'] |= changes
  return methods.make(stage, image_size=size)


def toy_batch(size=16, frames=3, batch=2):
  """A bright square that wanders over a smooth background."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:size, :size] / size
  video = np.zeros((batch, frames, size, size, 3), np.float32)
  for b in range(batch):
    video[b] = 0.4 * np.sin(3 * x + 2 * y + rng.uniform(0, 6))[..., None]
    for t in range(frames):
      i, j = rng.integers(1, size // 2, 2)
      video[b, t, i : i + size // 4, j : j + size // 4] = 0.8
  return {'video': jnp.asarray(video)}


# -- geometry -----------------------------------------------------------------


def sample_by_hand(image, x, y, outside):
  """Bilinear sample at pixel (x, y) in plain Python."""
  h, w = image.shape[:2]
  total = np.zeros(image.shape[2])
  for i in (int(np.floor(y)), int(np.floor(y)) + 1):
    for j in (int(np.floor(x)), int(np.floor(x)) + 1):
      weight = (1 - abs(y - i)) * (1 - abs(x - j))
      if 0 <= i < h and 0 <= j < w:
        total += weight * image[i, j]
      elif outside == 'edge':
        total += weight * image[np.clip(i, 0, h - 1), np.clip(j, 0, w - 1)]
  return total


@pytest.mark.parametrize('form', ('gather', 'matrix'))
@pytest.mark.parametrize('corners', (True, False))
@pytest.mark.parametrize('outside', ('edge', 'zero'))
def test_warp_equals_bilinear_sampling_by_hand(form, corners, outside):
  rng = np.random.default_rng(0)
  image = rng.normal(size=(1, 5, 7, 2)).astype(np.float32)
  where = rng.uniform(-1.6, 1.6, (1, 4, 3, 2)).astype(np.float32)
  where[0, 0, 0] = (-40, 1e9)
  got = warp.warp_frames(image, where, form, outside, corners)
  for i, j in np.ndindex(4, 3):
    x, y = np.float64(where[0, i, j])
    if corners:
      x, y = (x + 1) / 2 * 6, (y + 1) / 2 * 4
    else:
      x, y = (x + 1) / 2 * 7 - 0.5, (y + 1) / 2 * 5 - 0.5
    if outside == 'edge':  # Python's floats, but nothing 1e9 pixels away.
      x, y = np.clip(x, -3, 9), np.clip(y, -3, 7)
    want = sample_by_hand(image[0], x, y, outside)
    np.testing.assert_allclose(got[0, i, j], want, atol=1e-5)


def test_warp_equals_torch_grid_sample():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(1)
  image = rng.normal(size=(2, 6, 5, 3)).astype(np.float32)
  where = rng.uniform(-1.9, 1.9, (2, 4, 4, 2)).astype(np.float32)
  modes = {'zero': 'zeros', 'edge': 'border', 'reflect': 'reflection'}
  for outside, mode in modes.items():
    for corners in (True, False):
      want = torch.nn.functional.grid_sample(
        torch.tensor(image).permute(0, 3, 1, 2), torch.tensor(where),
        padding_mode=mode, align_corners=corners,
      ).permute(0, 2, 3, 1)
      got = warp.warp_frames(image, where, 'gather', outside, corners)
      np.testing.assert_allclose(got, want, atol=1e-5)


def test_reflection_mirrors_at_the_centres_of_the_edge_pixels():
  row = jnp.arange(5.0)[None, None, :, None].repeat(2, 1)
  x = jnp.array([-1.5, -1.0, 1.5, 2.0, 3.5])  # pixels -1, 0, 5, 6, 9
  where = jnp.stack([x, jnp.zeros(5)], -1)[None, None]
  got = warp.warp_frames(row, where, 'gather', 'reflect')[0, 0, :, 0]
  np.testing.assert_allclose(got, [1, 0, 3, 2, 1], atol=1e-5)


def test_thin_plate_by_hand_and_its_jacobian():
  plate = {
    'theta': jnp.array([[[1.0, 0.2, 0.1], [-0.1, 0.9, -0.3]]]),
    'weights': jnp.zeros((1, 4)).at[0, 3].set(0.5),  # control point (1, 1)
  }
  got = warp.thin_plate_points(plate, jnp.array([[[0.5, -0.25]]]))[0, 0]
  # r = |0.5 - 1| + |-0.25 - 1| = 1.75.
  bend = 0.5 * 1.75**2 * np.log(1.75 + 1e-6)
  x, y = 0.5 + 0.2 * -0.25 + 0.1, -0.1 * 0.5 + 0.9 * -0.25 - 0.3
  np.testing.assert_allclose(got, (x + bend, y + bend), rtol=1e-5)
  plate = warp.random_thin_plate(jax.random.key(0), 2, 0.2, 0.1)
  points = jax.random.uniform(jax.random.key(1), (2, 3, 2), minval=-1)
  slope = warp.thin_plate_jacobian(plate, points)
  for axis in range(2):
    step = 1e-2 * jnp.eye(2)[axis]
    ahead, behind = (
      warp.thin_plate_points(plate, points + s) for s in (step, -step)
    )
    np.testing.assert_allclose(
      slope[..., axis], (ahead - behind) / 2e-2, atol=2e-2
    )


def test_thin_plate_without_noise_leaves_a_frame():
  plate = warp.random_thin_plate(jax.random.key(0), 1, 0.0, 0.0)
  image = toy_batch()['video'][:1, 0]
  np.testing.assert_allclose(
    warp.thin_plate_frames(plate, image, 'gather'), image, atol=1e-5
  )


# -- nets ---------------------------------------------------------------------


@pytest.mark.parametrize('side', (6, 10))
def test_repeated_pixels_convolved_equal_the_merged_taps(side):
  x = jax.random.normal(jax.random.key(0), (2, side, 8, 3))
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
  wide = x.repeat(2, 1).repeat(2, 2)
  with lowerings.lowering('plain'):
    want = layers._convolve(wide, kernel, (1, 1), [(1, 1)] * 2)
    np.testing.assert_allclose(layers.nearest_conv(x, kernel), want, atol=1e-4)
  with lowerings.lowering('rewritten'):
    np.testing.assert_allclose(layers.nearest_conv(x, kernel), want, atol=1e-4)


def test_seven_wide_strided_convolution_is_the_same_rewritten():
  x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
  kernel = jax.random.normal(jax.random.key(1), (7, 7, 3, 4))
  found = []
  for name in ('plain', 'rewritten'):
    with lowerings.lowering(name):
      found.append(layers.downsample_conv(x, kernel))
  np.testing.assert_allclose(*found, atol=1e-4)


def test_max_pool_by_hand():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(
    resnet.max_pool(x)[0, ..., 0], [[5, 7], [13, 15]]
  )


def test_shrink_is_the_gaussian_then_every_fourth_pixel():
  # FOMM: sigma 1.5, 13 taps, zeros outside.
  x = np.random.default_rng(0).normal(size=(1, 16, 16, 1)).astype(np.float32)
  taps = np.exp(-(np.arange(-6, 7) ** 2) / (2 * 1.5**2))
  taps /= taps.sum()
  padded = np.pad(x[0, ..., 0], 6)
  for i, j in ((0, 0), (1, 2), (3, 3)):
    part = padded[4 * i : 4 * i + 13, 4 * j : 4 * j + 13]
    want = taps @ part @ taps
    np.testing.assert_allclose(nets.shrink(x, 4)[0, i, j, 0], want, atol=1e-5)


@pytest.mark.parametrize('name, millions', (
  ('keypoint_detector', 14.2), ('dense_motion', 37.7), ('generator', 7.8),
))
def test_reference_has_the_released_parameter_counts(name, millions):
  method = make('reference', 256)
  batch = {'video': jnp.zeros((1, 2, 256, 256, 3))}
  state = jax.eval_shape(method.init, jax.random.key(0), batch)
  count = sum(x.size for x in jax.tree.leaves(state.params[name]))
  assert round(count / 1e6, 1) == millions
  moving = {k: v for k, v in state.params.items() if k != 'vgg19'}
  total = sum(x.size for x in jax.tree.leaves(moving))
  assert round(total / 1e6, 1) == 59.8


def test_resnet_18_trunk_has_torchvisions_parameter_count():
  net = resnet.ResNetUNet()
  shapes = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), False)
  )['params']
  trunk = {k: v for k, v in shapes.items() if not k.startswith('up_')}
  leaves = jax.tree_util.tree_leaves_with_path(trunk)
  # torchvision: 11 689 512 less fc's 513 000; convolutions without biases.
  count = sum(
    x.size for path, x in leaves
    if not (path[-2].key == 'conv' and path[-1].key == 'bias')
  )
  assert count == 11_176_512


def test_keypoints_are_the_softmax_means_of_the_maps():
  class Peaks(nets.nn.Module):
    @nets.nn.compact
    def __call__(self, x, train):
      return x[..., :1]

  net = nets.KeypointDetector(Peaks(), 1, False, kernel=1, pad=0, scale=1)
  image = -jnp.ones((1, 9, 9, 3)).at[0, 2, 6].set(-100.0)
  params = {'maps': {'kernel': jnp.ones((1, 1, 1, 1)), 'bias': jnp.zeros(1)}}
  found = net.apply({'params': params}, image)
  # Row 2, column 6 of 0..8.
  np.testing.assert_allclose(found['value'][0, 0], (0.5, -0.5), atol=1e-5)
  np.testing.assert_array_equal(found['jacobian'][0, 0], np.eye(2))


def random_points(seed, n=2, k=3):
  rng = np.random.default_rng(seed)
  return {
    'value': jnp.asarray(rng.uniform(-0.7, 0.7, (n, k, 2)), jnp.float32),
    'jacobian': jnp.asarray(
      np.eye(2) + rng.normal(0, 0.3, (n, k, 2, 2)), jnp.float32
    ),
  }


def test_motion_is_the_identity_where_nothing_moved_and_affine_elsewhere():
  source, driving = random_points(0), random_points(1)
  still = nets.motions(source, source, 4, 5)
  np.testing.assert_allclose(
    still, np.broadcast_to(warp.grid(4, 5), still.shape), atol=1e-5
  )
  moved = nets.motions(source, driving, 4, 5)
  np.testing.assert_array_equal(moved[:, 0], still[:, 0])
  n, k, (i, j) = 1, 2, (3, 1)
  z = np.asarray(warp.grid(4, 5))[i, j]
  turn = source['jacobian'][n, k] @ np.linalg.inv(driving['jacobian'][n, k])
  want = source['value'][n, k] + turn @ (z - driving['value'][n, k])
  np.testing.assert_allclose(moved[n, 1 + k, i, j], want, atol=1e-5)


@pytest.mark.parametrize('bias, drawn', ((-1e3, False), (1e3, True)))
def test_blend_keeps_the_warped_picture_or_draws(bias, drawn):
  # Eq. 2 at M = 0 and M = 1.
  net = nets.Generator(
    'image', True, 4, num_down=1, num_residual=1, norm='group'
  )
  image = toy_batch()['video'][:, 0]
  flow = warp.grid(8, 8)[None].repeat(2, 0)  # the identity
  variables = jax.jit(net.init)(jax.random.key(0), image, flow, flow[..., :1])
  last = variables['params']['last']
  last['kernel'] = jnp.zeros_like(last['kernel'])
  last['bias'] = jnp.array([0.0, 0.0, 0.0, bias])
  out = net.apply(variables, image, flow, flow[..., :1])
  np.testing.assert_allclose(out, 0 if drawn else image, atol=2e-2)


@pytest.mark.parametrize('form', nets.WARPS)
def test_generator_caches_what_does_not_depend_on_the_motion(form):
  net = nets.Generator(form, True, 4, num_residual=1, norm='group')
  image = toy_batch()['video'][:1, 0]
  flow = jnp.tanh(jax.random.normal(jax.random.key(2), (3, 8, 8, 2)))
  visible = jax.random.uniform(jax.random.key(3), (3, 8, 8, 1))
  variables = jax.jit(net.init)(jax.random.key(0), image, flow, visible)
  code = net.apply(variables, image, method='encode')
  moved = net.apply(variables, code, flow, visible, method='move')
  frames = net.apply(variables, moved, method='draw')
  for t in range(3):
    alone = net.apply(variables, image, flow[t : t + 1], visible[t : t + 1])
    np.testing.assert_allclose(frames[t], alone[0], atol=1e-5)


# -- losses -------------------------------------------------------------------


def test_pyramid_by_hand():
  a = np.zeros((1, 2, 2, 1), np.float32)
  a[0, 0, 0] = 1.0
  # Pixels 1/4; differences down (1, 0) and across (1, 0): 1/2 each; then one
  # pixel of 1/4 without neighbours.
  got = losses.pyramid(jnp.asarray(a), jnp.zeros_like(a), 1)
  np.testing.assert_allclose(got, [0.25 + 0.5 + 0.5])
  same = losses.pyramid(jnp.asarray(a), jnp.asarray(a), 2)
  np.testing.assert_array_equal(same, [0.0])


def test_equivariance_is_nothing_for_a_detector_that_moves_with_the_frame():
  method = make(
    jacobian=True, lambda_equivariance=2.0, lambda_equivariance_jacobian=3.0
  )
  plate = warp.random_thin_plate(jax.random.key(0), 2, 0.1, 0.05)
  looked = random_points(3)
  # A perfect detector: y = T(x) for the values, J = dT J' for the Jacobians.
  turn = warp.thin_plate_jacobian(plate, looked['value'])
  driving = {
    'value': warp.thin_plate_points(plate, looked['value']),
    'jacobian': turn @ looked['jacobian'],
  }
  out = {'driving': driving, 'looked': looked, 'plate': plate}
  for weight, term in method._equivariance(out).values():
    assert weight in (2.0, 3.0)
    np.testing.assert_allclose(term, 0, atol=1e-5)
  moved = {**driving, 'value': driving['value'] + 0.25}
  terms = method._equivariance({**out, 'driving': moved})
  np.testing.assert_allclose(terms['equivariance'][1], 0.25, atol=1e-5)


# -- SWATS --------------------------------------------------------------------


def test_swats_on_a_quadratic_by_hand():
  # f(w) = (w1^2 + 4 w2^2) / 2 in plain Python: the same rule, written out.
  scale, lr, b1, b2, eps, tol = np.array([1.0, 4.0]), 0.1, 0.9, 0.99, 1e-8, 0.02
  w, m, v, mean = np.array([1.0, -2.0]), 0.0, 0.0, 0.0
  rows, rate, velocity = [], None, 0.0
  for k in range(1, 41):
    g = scale * w
    if rate is None:
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
      p = -lr * np.sqrt(1 - b2**k) / (1 - b1**k) * m / (np.sqrt(v) + eps)
      gamma = p @ p / -(p @ g)
      mean = b2 * mean + (1 - b2) * gamma
      lam = mean / (1 - b2**k)
      if k > 1 and abs(lam - gamma) < tol and lam > 0:
        rate = lam
      w = w + p
    else:
      velocity = b1 * velocity + g
      w = w - (1 - b1) * rate * velocity
    rows.append((w.copy(), gamma, rate))
  switched = next(i for i, row in enumerate(rows) if row[2] is not None)
  assert 1 <= switched < 35, 'the toy must switch on the way'
  tx = optim.make_tx(lr, b1, b2, eps, name='swats', swats_tol=tol)
  params = {'a': jnp.array([1.0]), 'b': {'c': jnp.array([-2.0])}}
  state, update = tx.init(params), jax.jit(tx.update)
  for i, (want, gamma, _) in enumerate(rows):
    grads = {'a': params['a'], 'b': {'c': 4 * params['b']['c']}}
    step, state = update(grads, state, params)
    params = optax.apply_updates(params, step)
    got = [params['a'][0], params['b']['c'][0]]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.gamma, gamma, rtol=1e-3)
    assert int(state.switched) == (switched + 1 if i >= switched else 0)
  np.testing.assert_allclose(state.rate, rows[-1][2], rtol=1e-4)


def test_swats_needs_a_positive_rate_and_decays_it():
  tx = optim.make_tx(
    0.5, 0.5, name='swats', switch_at_step=1, schedule='linear', decay_steps=4,
  )
  state = tx.init(jnp.ones(1))
  _, state = tx.update(jnp.zeros(1), state)  # p.g = 0: no rate, no switch
  assert int(state.switched) == 0
  _, state = tx.update(jnp.ones(1), state)
  assert int(state.switched) == 2 and float(state.rate) > 0
  step, _ = tx.update(jnp.ones(1), state)
  # The schedule has fallen from 3/4 to 2/4 of its height since the switch.
  np.testing.assert_allclose(step, -0.5 * state.rate * (2 / 3), rtol=1e-5)
  assert optim.swats_metrics({'net': state})['swats/net_switched'] == 2
  with pytest.raises(ValueError, match='optim.name'):
    optim.make_tx(name='sgd')


# -- the method ---------------------------------------------------------------


def test_statistics_of_a_batch_move_and_serve_generation():
  method = make(norm='batch', width=4)
  batch = toy_batch()
  state = jax.jit(method.init)(jax.random.key(0), batch)
  new, metrics = jax.jit(method.train_step)(state, batch, jax.random.key(1))
  assert all(np.isfinite(v) for v in jax.device_get(metrics).values())
  old, moved = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.model_state)])
    for s in (state, new)
  )
  assert np.abs(old - moved).max() > 1e-3
  assert set(new.model_state['batch_stats']) == {
    'keypoint_detector', 'dense_motion', 'generator'
  }


def test_perceptual_loss_of_vgg_19_at_every_scale(monkeypatch):
  method = make(perceptual='vgg19', perceptual_scales=2)
  net = method.vgg19.clone(width=2)
  monkeypatch.setattr(type(method), 'vgg19', net)
  a, b = (toy_batch(32)['video'][:, t] for t in (0, 1))
  params = jax.jit(net.init)(jax.random.key(0), a)
  state = type('State', (), {'params': {'vgg19': params['params']}})
  loss = jax.jit(lambda a, b: method._perceptual(state, a, b))
  want = 0
  for level in (1, 2):
    maps = (net.apply(params, nets.shrink(x, level)) for x in (a, b))
    want += sum(np.abs(x - y).mean((1, 2, 3)) for x, y in zip(*maps))
  np.testing.assert_allclose(loss(a, b), want, rtol=1e-4)
  np.testing.assert_allclose(loss(a, a), 0, atol=1e-6)
  assert method.pretrained == {'vgg19': 'vgg19'} and make().pretrained == {}


@pytest.mark.parametrize('changes', [
  dict(
    detector='resnet', keypoint_blocks=3, jacobian=False, warp='image',
    heatmap_stride=2, lambda_features=3.0, discriminator_keypoints=True,
    remat=True, dtype='bfloat16', microbatches=2,
  ),
  dict(lambda_equivariance=0.0, lambda_equivariance_jacobian=0.0,
       lambda_gan=0.0, blend=False, deterministic=True),
], ids=['paper', 'bare'])
def test_variants_step(changes):
  method, batch = make(**changes), toy_batch()
  state = jax.jit(method.init)(jax.random.key(0), batch)
  assert ('discriminator' in state.params) == (method.lambda_gan > 0)
  new, metrics = jax.jit(method.train_step)(state, batch, jax.random.key(1))
  assert all(np.isfinite(v) for v in jax.device_get(metrics).values())
  for name in state.params:
    pairs = zip(*map(jax.tree.leaves, (state.params[name], new.params[name])))
    assert any(not np.array_equal(a, b) for a, b in pairs), name


def test_loss_is_the_weighted_sum_of_its_terms():
  method = make(
    lambda_perceptual=2.0, lambda_l1=3.0, lambda_gan=5.0, lambda_features=7.0,
    lambda_equivariance=11.0, lambda_equivariance_jacobian=13.0, jacobian=True,
  )
  batch = toy_batch()
  state = jax.jit(method.init)(jax.random.key(0), batch)
  _, m = jax.jit(method.train_step)(state, batch, jax.random.key(1))
  weights = dict(
    perceptual=2, l1=3, gan=5, features=7, equivariance=11,
    equivariance_jacobian=13,
  )
  want = sum(w * m[f'loss/{name}'] for name, w in weights.items())
  np.testing.assert_allclose(m['loss/generator'], want, rtol=1e-5)


@pytest.mark.parametrize('length', [5, 19, 32])
def test_animate_makes_any_length_in_chunks(length):
  method, batch = make(), toy_batch(frames=length, batch=1)
  state = jax.jit(method.init)(jax.random.key(0), batch)
  video = batch['video']
  inputs = {'image': video[:, 0], 'driving': video}
  frames = jax.jit(method.animate, static_argnums=3)(
    state, inputs, None, length
  )
  context = method.encode(state, inputs)
  late = method.decode(state, context, video[:, -2:])
  assert frames.shape == video.shape
  np.testing.assert_allclose(frames[:, -2:], late, atol=1e-4)


@pytest.mark.parametrize('changes, message', [
  (dict(detector='dlib'), 'model.detector'),
  (dict(warp='flow'), 'model.warp'),
  (dict(motion_blocks=6), 'model.motion_scale'),
  (dict(norm='layer'), 'batch, group'),
])
def test_wrong_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_presets_build():
  for preset in config.PRESETS:
    method = make(preset, 16 if preset == 'tiny' else 256)
    assert method.blend == (preset != 'reference')
  few = {k: v for k, v in method.tx.items() if k != 'generator'}
  with pytest.raises(ValueError, match='optim lacks a block for: generator'):
    dataclasses.replace(method, tx=few)
