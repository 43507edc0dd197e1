"""HAT-cGAN-DIFF on MUG, seven expressions, 256x256, on a 4 GB card.

  python -m hatjax.prepare mug --raw <folder with MUG's subject folders>
  python -m hatjax.train --config configs/mug.py

Without arguments: both stages, our recipe, split by subject; mug.py:hat_cgan
and mug.py:video_diffusion train one of them. configs/mug.py:paper is the
paper's run (Hung et al.): direct head, weights 1 and 10, K = 5, 10 test videos
and all others for training, so subjects are in both. The profile 4gb keeps
either within 4 GB; on a larger card leave it out with --config.profile=

mug.py:identity_encoder,fev_gan is FEV-GAN, 64x64, and its stand-in for
VGG-Face; mug.py:fev_gan,paper the run of its paper (70 h on a GTX 1650, PSNR
27.10, SSIM 0.91): six expressions, 80/20 by subject, --background black.
"""

from configs import common


def get_config(arg=''):
  """Records cropped to the face, 256x256 by default."""
  config = common.parse(arg, 256, lambda preset, size: dict(
    name='mug/face-256',
    split='by_video_train' if preset.startswith('paper') else 'train',
  ), common.ALIASES['hat_cgan_diff'])
  for name in config.stages:
    stage = config[name]
    if name == 'fev_gan':
      if stage.data.split == 'by_video_train':
        stage.data.update(name='mug/face-256-black', split='subjects_80')
        stage.train.val_split = 'subjects_20'
      continue
    if stage.data.split == 'by_video_train':
      stage.train.val_split = 'by_video_test'
    if stage.data.image_size >= 128:
      config.profile = '4gb'
      if name == 'hat_cgan':
        stage.data.num_frames = 5
  return config
