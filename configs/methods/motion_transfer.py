"""Motion transfer's numbers, as presets.

default    hourglass keypoints with Jacobians, warped features blended with the
           warped picture, no adversarial term
paper      Karim and Saleh: ResNet-18 U-Net, no Jacobians, the warped picture
           refined and blended (eqs 1-2), least-squares GAN, SWATS
reference  the released first-order code on VoxCeleb (vox-adv's discriminator is
           there; lambda_gan=1, lambda_features=10 turn it on)
tiny       the smallest: seconds on a CPU
"""

from configs import methods

PRESETS = ('default', 'paper', 'reference', 'tiny')
INIT_FROM = ('vgg19',)  # a converted file; '' for the one fetched
NETS = ('keypoint_detector', 'dense_motion', 'generator', 'discriminator')


def get_stage(preset, image_size, data):
  """The four blocks of a stage.

  Args:
    preset: one of PRESETS.
    image_size: side in pixels, a multiple of 64 (tiny: 16).
    data: what the data set says of its block, such as the name.

  Returns:
    ConfigDict with method, model, optim, data and train.
  """
  # Two frames of a clip, any two: a source and a driving frame.
  stage = methods.start_stage(
    'motion_transfer', PRESETS, preset, image_size, num_frames=1,
    frames='any', batch_size=8, jitter=0.1,
  )
  stage.model = _model(preset, image_size)
  adam = dict(lr=2e-4, b1=0.5, b2=0.999)
  if preset == 'tiny':
    adam['lr'] = 2e-3
  stage.optim = {net: dict(adam) for net in NETS}
  if preset == 'paper':
    for net in NETS[:3]:
      stage.optim[net].name = 'swats'
  if preset == 'reference':
    # 100 epochs of 75 x 19 550 clips at 40 a step, a tenth from 60 and 90 on.
    stage.data.batch_size = 40
    stage.train.num_steps = 3_600_000
  if preset == 'tiny':
    stage.data.batch_size = 2
  stage.data.update(data)
  return stage


def _model(preset, image_size):
  scale = max(1, image_size // 64)  # motion is found at 64x64
  blocks = 5 if image_size % (32 * scale) == 0 else 4
  model = dict(
    image_size=image_size,
    detector='hourglass',         # or resnet
    num_keypoints=10,
    jacobian=True,
    keypoint_scale=scale,         # pictures are shrunk by this for keypoints
    keypoint_width=32,
    keypoint_blocks=blocks,       # halvings
    heatmap_stride=1,             # of resnet: 1, 2, 4
    temperature=0.1,
    motion_scale=scale,           # and by this for dense motion
    motion_width=32,
    motion_blocks=blocks,
    max_width=512,
    warp='features',              # or image (eq. 1)
    blend=True,                   # eq. 2
    width=32,
    num_down=2,
    num_residual=6,
    norm='batch',                 # or group
    discriminator_width=32,
    discriminator_blocks=4,
    discriminator_keypoints=False,
    # Or vgg19: python -m hatjax.convert weights fetch vgg19
    perceptual='pyramid',
    perceptual_scales=4,
    lambda_perceptual=10.0,
    lambda_l1=10.0,
    lambda_gan=0.0,
    lambda_features=0.0,          # of the discriminator
    lambda_equivariance=10.0,
    lambda_equivariance_jacobian=10.0,
    affine_std=0.05,              # of the equivariance loss's maps
    plate_std=0.005,
    remat=False,                  # less memory, a third more work
    microbatches=1,               # parts of a batch, one after another
    dtype='float32',              # of the computation; or bfloat16
  )
  if preset in ('paper', 'reference'):
    model |= dict(
      motion_width=64, max_width=1024, width=64, perceptual='vgg19',
      lambda_l1=0.0,
    )
  if preset == 'paper':
    model |= dict(
      detector='resnet', jacobian=False, keypoint_scale=1, keypoint_width=64,
      keypoint_blocks=5, warp='image', lambda_perceptual=1.0, lambda_gan=1.0,
    )
  if preset == 'reference':
    model |= dict(blend=False)
  if preset == 'tiny':
    model |= dict(
      num_keypoints=3, jacobian=False, keypoint_width=4,
      keypoint_blocks=2, motion_width=4, motion_blocks=2, width=4,
      num_down=1, num_residual=1, norm='group',
      discriminator_width=4, discriminator_blocks=2, perceptual_scales=2,
      lambda_gan=1.0,
    )
  return model
