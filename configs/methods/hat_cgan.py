"""HAT-cGAN's numbers, as presets.

default    residual head on the warped input, latent and spatial affine
           transformation, label-conditional, all adversarial terms
paper      Hung et al.: direct head, one affine map, weights 1 and 10
reference  the released AffineGAN code: latent only, no label, L1 100
tiny       the smallest legal one: seconds on a CPU
"""

from configs import methods

PRESETS = ('default', 'paper', 'reference', 'tiny')
NETS = (
  'generator', 'discriminator', 'patch_discriminator', 'alpha_discriminator',
)


def get_stage(preset, image_size, data):
  """The four blocks of a stage.

  Args:
    preset: one of PRESETS.
    image_size: side in pixels, a power of two.
    data: what the data set says of its block, such as the name.

  Returns:
    ConfigDict with method, model, optim, data and train.
  """
  # The apex in every batch is alpha's yardstick.
  stage = methods.start_stage(
    'hat_cgan', PRESETS, preset, image_size, include_last=True
  )
  stage.model = _model(preset, image_size)
  adam = dict(lr=2e-4, b1=0.5, b2=0.999)
  if preset == 'reference':
    # Counted in epochs: constant, then linearly to 0.
    adam |= dict(schedule='epochs', constant_steps=10_000, decay_steps=100)
  stage.optim = {net: dict(adam) for net in NETS}
  if preset in ('paper', 'reference'):
    size = image_size
    stage.data.update(
      num_frames=5, include_last=False, load_size=size * 286 // 256,
    )
    stage.train.num_steps = 200_000
  if preset == 'reference':
    # 286 -> 256 has offsets 0..29: the released code never draws the last.
    stage.data.crop_offsets = stage.data.load_size - image_size
  stage.data.update(data)
  return stage


def _model(preset, image_size):
  wide = 64 if image_size > 128 else 32
  model = dict(
    image_size=image_size,
    num_labels=-1,                # as many as the data have; 0: no label
    net=f'unet_{image_size}',     # or resnet_6, resnet_9
    width=wide,
    discriminator_width=wide,
    discriminator_layers=3,       # 0: the 1x1 'pixel' variant
    head='residual',              # direct, blend, residual
    affine='both',                # latent, spatial, both
    num_parts=4,                  # 1: one map for the whole face (eq. 2)
    warp_sizes=(8, 64),           # sides of the levels that are warped
    modulate=True,                # the label also scales the decoder
    embedding_dim=64,
    noise_dim=0,                  # length of the noise vector c (eqs 5-6)
    dropout=0.5,
    feature_noise=0.01,
    gan_loss='bce',               # or least_squares
    alpha_rule='least_squares',   # or reference
    alpha_clip=(-0.5, 2.0),
    alpha_noise=True,             # infer alpha from noised codes
    training_alpha='visible',     # of the fakes; or inferred from the codes
    lambda_gan=1.0,
    lambda_patch=1.0,
    lambda_alpha=1.0,             # over K, as the released code has it
    lambda_l1=100.0,
    lambda_lips=0.0,              # L1 inside the lips
    lambda_recon=0.0,
    lambda_code=5.0,              # straightens the hidden path
    adversarial_warmup=0,         # steps
    patch_crop=0,                 # side of a cut around the lips; 0: none
    generator_steps=1,            # K_g and K_d of HAT-cGAN-DIFF's Algorithm 1
    discriminator_steps=1,
    ema_decay=0.999,              # of the generator, warmed up; 0: none
    remat=False,                  # less memory, a third more work
    microbatches=1,               # parts of a batch, one after another
    dtype='float32',              # of the computation; or bfloat16
  )
  if preset == 'tiny':
    model |= dict(
      width=4, discriminator_width=4, discriminator_layers=1,
      embedding_dim=4, num_parts=2,
    )
  if preset in ('paper', 'reference'):
    model |= dict(
      width=64, discriminator_width=64, head='direct', num_parts=1,
      alpha_rule='reference', alpha_clip=None, lambda_l1=10.0,
      training_alpha='inferred', modulate=False,
      lambda_recon=10.0, lambda_code=0.0, lambda_alpha=100.0, ema_decay=0.0,
    )
  if preset == 'reference':
    model |= dict(affine='latent', num_labels=0, lambda_l1=100.0)
  return model
