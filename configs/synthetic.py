"""HAT-cGAN on the built-in synthetic faces, six expressions.

  python -m hatjax.train --config configs/synthetic.py

The records are made on first use. 64x64, minutes on 2 cores; for a GPU:
configs/synthetic.py:128 (the records' full size, batches of 16).
"""

from configs import common


def get_config(arg=''):
  """64x64 by default; from 128 on, sized for a GPU."""
  config = common.parse(arg, 64, lambda preset, size: dict(
    name='synthetic/default', split='train',
  ))
  for name in config.stages:
    stage = config[name]
    if stage.data.image_size <= 64:
      stage.data.update(batch_size=3, num_frames=4)  # many faces a step
      stage.train.update(num_steps=2000, ckpt_every=200, sample_every=200)
    else:
      stage.data.update(batch_size=16, num_frames=5)
      stage.train.num_steps = 50_000
  return config
