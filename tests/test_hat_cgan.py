"""HAT-cGAN's losses, forward pass and settings, against the released order."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import CONFIGS, make, perturbed, toy_batch

from configs.methods import hat_cgan as hat_config
from hatjax import intensity, lips, losses, methods, validation
from hatjax.nets import hat_cgan as nets


@pytest.fixture(scope='module')
def stage():
  return hat_config.get_stage('tiny', 16, {'name': 'none'}).to_dict()


@pytest.fixture(scope='module')
def batch(stage):
  return jax.tree.map(jnp.asarray, toy_batch(stage))


REFERENCE = dict(
  head='direct', affine='latent', alpha_rule='reference', alpha_clip=None,
  lambda_recon=10.0, lambda_code=0.0, lambda_lips=0.0, modulate=False,
  training_alpha='inferred', ema_decay=0.0,
)


def test_shared_forward_equals_the_twelve_passes(stage, batch):
  # The released code: f_0 and r from two passes of A, f_t and recon from one
  # pass of each B, fake from one pass of A per frame; noise and dropout off.
  method = make(
    stage, **REFERENCE, feature_noise=0.0, dropout=0.0, num_labels=0
  )
  state = perturbed(jax.jit(method.init)(jax.random.key(0), batch))
  params = state.params['generator']
  out = jax.jit(method._forward)(params, batch, jax.random.key(1))
  generator = method.generator
  apply = lambda name, *a: generator.apply({'params': params}, *a, method=name)

  @jax.jit
  def full_pass(image, b, alpha):
    base = apply('encode_base', image)
    residual = apply('encode_motion', image, None)['residual']
    code = [b * h + alpha * r for h, r in zip(base, residual)]
    return apply('decode', code), code[-1]

  video = batch['video']
  for n in range(2):
    image = video[n : n + 1, 0]
    f0, r = full_pass(image, 1, 0)[1], full_pass(image, 0, 1)[1]
    for k in range(1, video.shape[1]):
      recon, ft = full_pass(video[n : n + 1, k], 1, 0)
      alpha = jnp.abs(jnp.sum((ft - f0) * r)) / (
        jnp.sqrt(jnp.sum(r * r)) + 1e-6
      )
      fake, _ = full_pass(image, 1, alpha)
      close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
      close(out['alpha'][n, k - 1], alpha)
      close(out['recon'][n, k - 1], recon[0])
      close(out['fake'][n, k - 1], fake[0])


def test_image_losses_stop_at_alpha_and_the_alpha_loss_reaches_encoders(
  stage, batch
):
  method = make(stage)
  state = perturbed(jax.jit(method.init)(jax.random.key(0), batch))

  def grads(loss):
    def total(params):
      return loss(method._forward(params, batch, jax.random.key(1)))

    return jax.jit(jax.grad(total))(state.params['generator'])

  size = lambda tree: max(
    float(jnp.abs(x).max()) for x in jax.tree.leaves(tree)
  )
  from_alpha = grads(lambda out: out['alpha'].sum())
  assert size(from_alpha['base_encoder']) > 0
  assert size(from_alpha['residual_encoder']) > 0
  assert size(from_alpha['decoder']) == 0

  # The fake depends on alpha, yet no image loss moves it: gradients equal
  # those with alpha frozen beforehand.
  frozen = jax.jit(method._forward)(
    state.params['generator'], batch, jax.random.key(1)
  )['alpha']
  object.__setattr__(method, '_alpha', lambda codes, residual: frozen)
  image_loss = lambda out: losses.l1(out['fake'], batch['video'][:, 1:]).sum()
  with_constant = grads(image_loss)
  object.__delattr__(method, '_alpha')
  for a, b in zip(
    jax.tree.leaves(grads(image_loss)), jax.tree.leaves(with_constant)
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_generator_loss_is_the_weighted_sum_of_its_parts(stage, batch):
  method = make(
    stage, lambda_lips=20.0, lambda_recon=3.0, lambda_alpha=7.0,
    gan_loss='least_squares',
  )
  state = perturbed(jax.jit(method.init)(jax.random.key(0), batch))
  out = jax.jit(method._forward)(
    state.params['generator'], batch, jax.random.key(1)
  )
  loss, m = jax.jit(method.generator_loss)(out, state, batch)
  k = batch['video'].shape[1] - 1
  expected = (
    m['loss/gan'] + m['loss/patch'] + 100 * m['loss/l1']
    + 20 * m['loss/lips'] + 3 * m['loss/recon'] + 5 * m['loss/code']
    + 7 / k * m['loss/alpha']
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  scores = method._scores(
    state.params['discriminator'], 'discriminator', batch, out['fake']
  )
  np.testing.assert_allclose(
    m['loss/gan'], jnp.square(scores - 1).mean(), rtol=1e-5
  )


def test_frames_without_lips_do_not_count_in_the_patch_loss(stage, batch):
  method = make(stage)
  state = jax.jit(method.init)(jax.random.key(0), batch)
  blank = {**batch, 'lip_mask': jnp.zeros_like(batch['lip_mask'])}
  out = {'fake': batch['video'][:, 1:], 'alpha': jnp.zeros((2, 3))}
  loss, _ = method.discriminator_loss(
    state.params['patch_discriminator'], 'patch_discriminator', out, blank,
    None,
  )
  assert float(loss) == 0


def test_l1_inside_the_lips_by_hand():
  masks = np.zeros((2, 3, 4, 4, 1), np.float32)
  masks[0, 0, 1, 1] = masks[0, 1, 2, 2] = 1  # Clip 1: no lips known.
  fake, real = np.zeros((2, 2, 2, 4, 4, 3), np.float32)
  fake[0, 0, 1, 1] = 1.0  # where the lips were
  fake[0, 0, 2, 2] = (0.5, 0, 0)  # where they are
  fake[0, :, 3, 3] = fake[1] = 9.0  # outside
  # Frame 1 has two lip pixels, frame 2 one, without an error.
  expected = [(1.0 + 0.5 / 3) / 3, 0.0]
  np.testing.assert_allclose(lips.l1(fake, real, masks), expected, rtol=1e-6)


@pytest.mark.parametrize('net', ('unet_16', 'resnet_6'))
def test_labels_shape_the_decoder_in_proportion_to_alpha(stage, batch, net):
  method = make(stage, net=net)
  state = perturbed(jax.jit(method.init)(jax.random.key(0), batch))
  params = {'params': state.params['generator']}
  apply = jax.jit(method.generator.apply, static_argnames='method')
  image = batch['video'][:, 0]
  codes = apply(params, image, method='encode_base')
  frames = []
  for label in (0, 1):
    table = params['params']['embed']['embedding']
    motion = {'embedding': table[jnp.array([label] * 2)]}
    frames.append([
      apply(
        params, codes, image, method='decode',
        style=method.generator.style(motion, jnp.full((2, 1), alpha)),
      ) for alpha in (0.0, 1.0)
    ])
  plain = apply(params, codes, image, method='decode')
  for still, moved in frames:
    np.testing.assert_array_equal(still, plain)
    assert np.abs(moved - plain).max() > 1e-3
  assert np.abs(frames[0][1] - frames[1][1]).max() > 1e-3


def test_frames_are_made_with_the_visible_progress(stage, batch):
  method = make(stage)
  state = perturbed(jax.jit(method.init)(jax.random.key(0), batch))
  for source in intensity.SOURCES:
    method = make(stage, training_alpha=source)
    out = jax.jit(method._forward)(
      state.params['generator'], batch, jax.random.key(1)
    )
    alpha = {
      'visible': intensity.visible_progress(batch['video']),
      'inferred': out['alpha'],
    }
    np.testing.assert_allclose(out['shown'], alpha[source], rtol=1e-5)


def test_patch_crop_is_centred_on_the_lips(stage, batch):
  mask = np.zeros(batch['lip_mask'].shape, np.float32)
  mask[:, :, 9:13, 2:6] = 1
  frames = jnp.ones_like(batch['video'][:, 1:])
  _, frames = lips.pictures(batch['video'][:, 0], frames, mask, 6)
  assert frames.shape[2:4] == (6, 6)
  # 4x4 lips in a 6x6 cut: one blank row and column on every side.
  np.testing.assert_array_equal(
    frames[0, 0, ..., 0], np.pad(np.ones((4, 4)), 1)
  )
  places = np.arange(256.0).reshape(1, 1, 16, 16, 1)
  unknown = lips.cut(places, np.zeros((1, 2, 16, 16, 1)), 6)
  np.testing.assert_array_equal(unknown, places[:, :, 5:11, 5:11])


def test_adversarial_warm_up_ramps_from_zero(stage, batch):
  method = make(
    stage, adversarial_warmup=10, lambda_l1=0.0, lambda_code=0.0,
    lambda_alpha=0.0,
  )
  state = perturbed(jax.jit(method.init)(jax.random.key(0), batch))
  out = {'fake': batch['video'][:, 1:], 'alpha': jnp.zeros((2, 3))}
  loss = jax.jit(method.generator_loss)
  early, _ = loss(out, state.replace(step=jnp.array(0)), batch)
  late, _ = loss(out, state.replace(step=jnp.array(9)), batch)
  np.testing.assert_allclose(early, late / 10, rtol=1e-5)


def test_infer_reads_back_the_alpha_of_the_latent_path(stage, batch):
  method = make(stage)
  state = jax.jit(method.init)(jax.random.key(0), batch)
  video = batch['video']
  alpha = jax.jit(method.infer)(state, {
    'image': video[:, 0], 'driving': video, 'label': batch['label'],
  })
  np.testing.assert_allclose(alpha[:, 0], 0, atol=1e-5)  # itself
  assert np.isfinite(alpha).all()
  assert intensity.is_inferred(method)
  # Without a hidden residual all frames would seem neutral.
  assert not intensity.is_inferred(make(stage, affine='spatial'))


@pytest.mark.parametrize('changes', [
  dict(net='resnet_6', head='blend', width=2),
  dict(**REFERENCE, gan_loss='least_squares', num_labels=0),
  dict(
    affine='spatial', noise_dim=3, generator_steps=2, discriminator_steps=2,
    patch_crop=8, discriminator_layers=0, dtype='bfloat16', remat=True,
  ),
], ids=['resnet-blend', 'reference', 'everything-else'])
def test_variants_step_and_animate(stage, batch, changes):
  method = make(stage, **changes)
  state = jax.jit(method.init)(jax.random.key(0), batch)
  new, metrics = jax.jit(method.train_step)(state, batch, jax.random.key(1))
  assert all(np.isfinite(v) for v in jax.device_get(metrics).values())
  inputs = {'image': batch['video'][:, 0], 'label': batch['label']}
  frames = jax.jit(method.animate, static_argnums=3)(
    new, inputs, jax.random.key(0), 2
  )
  assert frames.shape == (2, 2, 16, 16, 3)
  assert 'label' in method.reads or method.num_labels == 0


@pytest.mark.parametrize('changes, message', [
  (dict(net='unet_15'), 'model.net'),
  (dict(net='unet_32'), 'unet_16'),
  (dict(head='tanh'), 'blend'),
  (dict(affine='all'), 'latent'),
  (dict(gan_loss='hinge'), 'least_squares'),
  (dict(alpha_rule='ls'), 'reference'),
  (dict(patch_crop=17), 'patch_crop'),
  (dict(widht=4), 'model.widht'),
])
def test_wrong_settings_are_named(stage, changes, message):
  with pytest.raises(ValueError, match=message):
    make(stage, **changes)


def test_unknown_method_and_optimizer_settings_are_named(stage):
  with pytest.raises(ValueError, match='Choose one of: .*hat_cgan'):
    methods.make({**stage, 'method': 'hat_gan'})
  optim = {**stage['optim'], 'generator': {'learning_rate': 1}}
  with pytest.raises(ValueError, match='optim.generator.learning_rate'):
    methods.make({**stage, 'optim': optim})
  few = {k: v for k, v in stage['optim'].items() if k == 'generator'}
  with pytest.raises(ValueError, match='alpha_discriminator'):
    methods.make({**stage, 'optim': few})


def test_methods_are_frozen_and_hold_no_arrays(stage):
  method = make(stage)
  with pytest.raises(dataclasses.FrozenInstanceError):
    method.width = 3
  for field in dataclasses.fields(method):
    assert not isinstance(getattr(method, field.name), jax.Array)


@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('preset', ['', 'paper', 'reference'])
def test_presets_build_and_survive_json(config, preset):
  module = importlib.import_module(f'configs.{config}')
  full = module.get_config(preset)
  stage = json.loads(full[full.stages[0]].to_json_best_effort())
  method = methods.make(stage, num_labels=7)
  size = stage['data']['image_size']
  assert method.image_size == size == (128 if True else 0)
  assert (method.head == 'direct') == (preset != '')
  assert (method.num_labels == 0) == (preset == 'reference')
  for block in stage['optim'].values():
    assert (block['lr'], block['b1'], block['b2']) == (2e-4, 0.5, 0.999)
  with pytest.raises(ValueError, match='Methods: .*hat_cgan'):
    module.get_config('hat_gan')


def test_validation_scores_know_a_perfect_copy(stage):
  method = make(stage)
  state = jax.jit(method.init)(jax.random.key(0), toy_batch(stage))
  rng = np.random.default_rng(0)
  still = rng.integers(0, 256, (1, 16, 16, 3), np.uint8).repeat(5, 0)
  noisy = still.copy()
  noisy[1:] = 255 - noisy[1:]
  scorer = validation.make_scorer(method)
  scores, pairs = validation.score_clips(scorer, state, [
    {'id': 'a', 'label': 0, 'video': still},
  ])
  assert scores['val/psnr_copy'] > 100 and scores['val/psnr_generated'] > 60
  assert pairs[0][1].shape == (5, 16, 16, 3)
  other, _ = validation.score_clips(scorer, state, [
    {'id': 'b', 'label': 1, 'video': noisy},
  ])
  a, b = still[0] / 127.5 - 1, noisy[1] / 127.5 - 1
  expected = 10 * np.log10(4 / np.mean((a - b) ** 2))
  np.testing.assert_allclose(other['val/psnr_copy'], expected, rtol=1e-4)


def test_every_net_name_is_buildable():
  assert {n.split('_')[0] for n in nets.NETS} == {'unet', 'resnet'}
