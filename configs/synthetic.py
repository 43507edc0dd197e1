"""HAT-cGAN on the built-in synthetic faces, six expressions.

  python -m hatjax.train --config configs/synthetic.py

The records are made on first use. 64x64, minutes on 2 cores; for a GPU:
configs/synthetic.py:128 (the records' full size, batches of 16). hat_cgan_diff
adds the second stage.
"""

from configs import common
from configs.methods import fev_gan, video_diffusion


def get_config(arg=''):
  """64x64 by default; from 128 on, sized for a GPU."""
  config = common.parse(arg, 64, lambda preset, size: dict(
    name='synthetic/default', split='train',
  ))
  for name in config.stages:
    if name in _SIZED:
      _SIZED[name](config[name])
  return config


def _size_hat_cgan(stage):
  if stage.data.image_size > 64:
    stage.data.update(batch_size=16, num_frames=5)
    stage.train.num_steps = 50_000
    return
  # Many faces a step, two frames of each: the middle of the way and the apex.
  stage.data.update(batch_size=6, num_frames=2)
  stage.train.update(num_steps=2000, ckpt_every=200, sample_every=200)
  if stage.model.head == 'residual':
    # Half the time of a step goes without being missed in the first minutes.
    stage.model.update(
      warp_sizes=(8, 16), patch_crop=stage.data.image_size // 2,
      discriminator_width=min(16, stage.model.discriminator_width),
      lambda_gan=0.25, lambda_patch=0.25, lambda_lips=20.0,
    )


def _size_video_diffusion(stage):
  if stage.data.image_size > 64:
    stage.data.batch_size = 8
    stage.train.num_steps = 50_000
    return
  stage.data.batch_size = 2
  stage.train.update(num_steps=1000, ckpt_every=200, sample_every=200)
  video_diffusion.shrink(stage)


def _size_fev_gan(stage):
  if stage.data.image_size > 64 or stage.model.head != 'warp':
    stage.data.batch_size = 16
    stage.train.num_steps = 50_000
    return
  fev_gan.shrink(stage)
  stage.model.lambda_lips = 20.0
  stage.train.update(num_steps=600, ckpt_every=100, sample_every=100)


_SIZED = {
  'hat_cgan': _size_hat_cgan, 'video_diffusion': _size_video_diffusion,
  'fev_gan': _size_fev_gan,
}
