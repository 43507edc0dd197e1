"""HAT-cGAN's nets: counts, codes, heads."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_numerics import normal

from hatjax.nets import hat_cgan as nets

# -- nets ---------------------------------------------------------------------


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(module, size, **kwargs):
  image, label = jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32)
  return jax.eval_shape(
    lambda: module.init(jax.random.key(0), image, label, jnp.zeros((1, 1)))
  )['params']


@pytest.mark.parametrize('net, size, expected', [
  ('unet_256', 256, 73_945_411), ('unet_128', 128, 57_166_659),
  ('unet_64', 64, 40_387_907), ('resnet_6', 64, 15_297_155),
  ('resnet_9', 64, 22_378_115),
])
def test_parameters_of_the_reference_generators(net, size, expected):
  params = shapes(nets.Generator(net=net), size)
  assert count(params) == expected
  if net == 'unet_256':
    assert count(params['base_encoder']) == 19_535_808
    assert count(params['residual_encoder']) == 19_535_808
    assert count(params['decoder']) == 34_873_795


def test_parameters_of_the_discriminators():
  image = jnp.zeros((1, 256, 256, 3))
  init = lambda module, *a: jax.eval_shape(module.init, jax.random.key(0), *a)
  patch = nets.PatchDiscriminator()
  assert count(init(patch, image, image)) == 2_767_809
  logits = jax.eval_shape(
    lambda p: patch.apply(p, image, image), init(patch, image, image)
  )
  assert logits.shape == (1, 30, 30)
  assert count(init(nets.AlphaDiscriminator(), jnp.zeros((1, 5)))) == 66
  # 6*64 + 64, 64*128 + 128, 128 + 1.
  pixel = nets.PatchDiscriminator(num_layers=0)
  assert count(init(pixel, image, image)) == 448 + 8320 + 129


def test_unet_levels():
  encoder = nets.UNetEncoder(num_downs=8)
  image = jnp.zeros((2, 256, 256, 3))
  levels = jax.eval_shape(
    lambda: encoder.init_with_output(jax.random.key(0), image)[0]
  )
  assert [x.shape for x in levels] == [
    (2, 256 >> n, 256 >> n, c) for n, c in
    zip(range(1, 9), (64, 128, 256, 512, 512, 512, 512, 512))
  ]


def small_generator(**kwargs):
  settings = dict(net='unet_16', width=4, num_labels=3, embedding_dim=4,
                  num_parts=2, warp_sizes=(4, 16))
  module = nets.Generator(**settings | kwargs)
  image, label = np.tanh(normal(0, 2, 16, 16, 3)), jnp.array([0, 2])
  init = jax.jit(module.init)
  params = init(jax.random.key(0), image, label, jnp.zeros((2, 1)))
  return module, params, image, label


def perturbed(params, scale=0.1):
  """All parameters moved, so that nothing that starts at zero stays there."""
  rng = np.random.default_rng(0)
  move = lambda p: p + rng.normal(0, scale, p.shape).astype(p.dtype)
  return jax.tree.map(move, params)


def jitted(module):
  return jax.jit(module.apply, static_argnames='method')


def codes_at(module, params, image, label, alpha):
  apply = jitted(module)
  base = apply(params, image, method='encode_base')
  motion = apply(params, image, label, method='encode_motion')
  alpha = jnp.asarray(alpha, jnp.float32)
  return base, motion, apply(params, base, motion, alpha, method='transform')


def test_transformation_starts_as_the_latent_path():
  both, params, image, label = small_generator(affine='both')
  base, motion, codes = codes_at(both, params, image, label, [[0.7], [0.7]])
  for z, h, r in zip(codes, base, motion['residual']):
    np.testing.assert_allclose(z, h + 0.7 * r, atol=1e-5)


def test_latent_code_is_affine_in_alpha_and_base_at_zero():
  module, params, image, label = small_generator(affine='latent')
  alphas = [[0.0, 0.5, 1.0]] * 2
  base, _, codes = codes_at(module, perturbed(params), image, label, alphas)
  for z, h in zip(codes, base):
    z = z.reshape(2, 3, *z.shape[1:])
    np.testing.assert_allclose(z[:, 0], h, atol=1e-6)
    np.testing.assert_allclose(2 * z[:, 1], z[:, 0] + z[:, 2], atol=1e-5)


def test_spatial_only_has_no_residual_and_no_motion_at_alpha_zero():
  module, params, image, label = small_generator(affine='spatial')
  params = perturbed(params)
  base, motion, codes = codes_at(
    module, params, image, label, [[0.0, 1.0]] * 2
  )
  assert all(not r.any() for r in motion['residual'])
  for z, h in zip(codes, base):
    z = z.reshape(2, 2, *z.shape[1:])
    np.testing.assert_allclose(z[:, 0], h, atol=1e-4)
  assert np.abs(codes[1][1] - codes[1][0]).max() > 1e-3


@pytest.mark.parametrize('affine', nets.AFFINES)
@pytest.mark.parametrize('head', ['residual', 'blend'])
def test_heads_start_near_the_copy(head, affine):
  module, params, image, label = small_generator(head=head, affine=affine)
  frame = jitted(module)(params, image, label, jnp.ones((2, 1)))
  if head == 'residual':
    np.testing.assert_allclose(frame, image, atol=1e-5)
  else:  # m = sigmoid(-2) = 0.12 of something near tanh(0) = 0.
    np.testing.assert_allclose(frame, 0.88 * image, atol=0.1)


def test_labels_change_the_residual_once_trained():
  module, params, image, _ = small_generator()
  params = perturbed(params)
  make = lambda n: jitted(module)(
    params, image, jnp.array([n, n]), method='encode_motion'
  )['residual'][-1]
  assert np.abs(make(0) - make(1)).max() > 1e-3


def test_noise_vector_reaches_the_bottleneck():
  module, params, image, label = small_generator(noise_dim=3)
  base, motion, _ = codes_at(module, params, image, label, [[1.0]] * 2)
  codes = lambda noise: jitted(module)(
    params, base, motion, jnp.ones((2, 1)), noise, method='transform'
  )
  a, b = codes(jnp.zeros((2, 3))), codes(jnp.ones((2, 3)))
  assert np.abs(a[-1] - b[-1]).max() > 1e-3
  np.testing.assert_array_equal(a[0], b[0])


def test_remat_and_bfloat16_give_the_same_frames():
  module, params, image, label = small_generator()
  params = perturbed(params, 0.02)
  alpha = jnp.full((2, 1), 0.5)
  plain = jitted(module)(params, image, label, alpha)
  again = jitted(module.clone(remat=True))(params, image, label, alpha)
  np.testing.assert_allclose(plain, again, atol=1e-5)
  half = jitted(module.clone(dtype=jnp.bfloat16))(
    params, image, label, alpha
  )
  assert half.dtype == jnp.float32
  assert np.abs(plain - half).mean() < 0.02
