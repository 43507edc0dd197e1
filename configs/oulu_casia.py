"""FEV-GAN on Oulu-CASIA NIR&VIS (visible camera, strong light), 64x64.

  python -m hatjax.prepare oulu_casia --raw <folder with OriginalImg>
  python -m hatjax.train --config configs/oulu_casia.py

Six expressions, 32 frames evenly spaced from neutral to apex. Without
arguments: our recipe and, first, the stand-in for VGG-Face, trained on the
training subjects.
The paper's run (Bouzid & Ballihi: 40 h on a Titan V, PSNR 25.61, SSIM 0.89),
black background, 80/20 by subject:

  python -m hatjax.prepare oulu_casia --raw <folder> --background black
  python -m hatjax.train --config configs/oulu_casia.py:fev_gan,paper \\
    --config.init_from.vgg_face=<converted VGG-Face>
"""

from configs import common


def get_config(arg=''):
  """Records cropped to the face; 400 epochs of 64 subjects in the paper."""

  def data(preset, size):
    paper = preset.startswith('paper')
    return dict(
      name=f'oulu_casia/face-256{"-black" if paper else ""}', split='train',
    )

  config = common.parse(arg, 128, data, ('identity_encoder', 'fev_gan'))
  if 'fev_gan' in config.stages and config.fev_gan.model.head == 'direct':
    # 384 clips in batches of 8, 400 times.
    config.fev_gan.train.num_steps = 19_200
  return config
