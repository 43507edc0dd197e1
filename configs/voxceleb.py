"""Motion transfer on VoxCeleb, or on any folder of clips of faces.

  python -m hatjax.prepare voxceleb --raw <folder of the preprocessed clips>
  python -m hatjax.train --config configs/voxceleb.py
  python -m hatjax.generate --workdir runs/voxceleb --image me.jpg \\
    --driving clip.mp4

The layout is that of the first-order model's video-preprocessing; datasets/
voxceleb.py says more. Arguments: configs/voxceleb.py:paper,128 (preset, image
side). The word `clips` is for a handful of your own clips, cropped by hatjax
(--crop face): trained on the first four fifths of each, scored on the last.
"""

from configs import common


def get_config(arg=''):
  """256x256 by default; `clips`: 64x64, minutes to hours on a CPU."""
  words = [w.strip() for w in arg.split(',') if w.strip()]
  few = 'clips' in words
  words = [word for word in words if word != 'clips']
  data = dict(name='voxceleb/given-256', split='train')
  if few:
    data.update(name='voxceleb/face-256', split='everything/early')
  config = common.parse(
    ','.join(words), 64 if few else 256, lambda preset, size: dict(data),
    ('motion_transfer',),
  )
  for name in config.stages:
    if few:
      config[name].train.val_split = 'everything/late'
      config[name].data.batch_size = 4
    if few and name == 'motion_transfer' and config[name].data.image_size == 64:
      # Motion is found at 32x32.
      config[name].model.update(
        keypoint_scale=2, motion_scale=2, keypoint_blocks=4, motion_blocks=4,
      )
  return config
