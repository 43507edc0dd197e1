"""HAT-cGAN on your own clips, in AffineGAN's folder layout.

  python -m hatjax.prepare frame_folders --raw <folder with expressions>
  python -m hatjax.train --config configs/frame_folders.py

Arguments: configs/frame_folders.py:hat_cgan,paper,256 (method, preset, image
side); hat_cgan_diff adds the second stage. The word `sample` is the setting in
which the released code's learning curve was measured: the six grey sequences
of AffineGAN's sample folder, whole frames squeezed to 64x64 without
anti-aliasing, trained and scored on all six.

  python -m hatjax.prepare frame_folders --raw affinegan_sample --crop none \\
    --image_size 0
  python -m hatjax.train --config configs/frame_folders.py:sample

With fev_gan it is the four clips of drumcheeks, happy and surprise, 32 frames
each: configs/frame_folders.py:sample,identity_encoder,fev_gan
"""

from configs import common
from configs.methods import fev_gan, video_diffusion


def get_config(arg=''):
  """Records cropped to the face, 128x128 by default."""
  words = arg.split(',')
  if 'sample' not in words:
    return common.parse(arg, 128, lambda preset, size: dict(
      name='frame_folders/face-256', split='train',
    ))
  words.remove('sample')

  def data(preset, size):
    block = dict(
      name='frame_folders/none-native', split='everything', resize='cubic',
      labels=('anger', 'contempt', 'happy', 'surprise'),
    )
    if preset == 'reference':
      block |= dict(load_size=size * 9 // 8, crop_offsets=size // 8)
    return block

  config = common.parse(','.join(words), 64, data)
  for name in config.stages:
    train = config[name].train
    train.update(
      num_steps=500, log_every=20, ckpt_every=100, sample_every=100,
      val_split='everything', val_clips=6,
    )
    if name == 'video_diffusion':
      video_diffusion.shrink(config[name])
    if name in ('fev_gan', 'identity_encoder'):
      config[name].data.labels = ('drumcheeks', 'happy', 'surprise')
      config[name].data.batch_size = 4
      train.val_clips = 0
    if name == 'fev_gan':
      fev_gan.shrink(config[name])
      config[name].model.eid_dropout = 0.0  # to be known by heart
    if name == 'identity_encoder':
      train.num_steps = 50
  return config
