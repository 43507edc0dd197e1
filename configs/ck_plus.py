"""HAT-cGAN on CK+ (Extended Cohn-Kanade), seven expressions.

  python -m hatjax.prepare ck_plus --raw <folder with cohn-kanade-images>
  python -m hatjax.train --config configs/ck_plus.py

Arguments: configs/ck_plus.py:hat_cgan,paper,256 (method, preset, image side);
hat_cgan_diff adds the second stage.
"""

from configs import common


def get_config(arg=''):
  """Records cropped to the face, 128x128 by default."""
  return common.parse(arg, 128, lambda preset, size: dict(
    name='ck_plus/face-256', split='train',
  ))
