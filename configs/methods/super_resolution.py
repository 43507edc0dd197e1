"""Super-resolution's numbers, as presets.

default    the paper's U-Net, half as wide, restores at the same size
paper      five blocks down and up, 64 channels at first
double     as default, but twice as large as the stage before
tiny       the smallest: seconds on a CPU
"""

from configs import methods

PRESETS = ('default', 'paper', 'double', 'tiny')


def get_stage(preset, image_size, data):
  """The four blocks of a stage.

  Args:
    preset: one of PRESETS.
    image_size: side of the result in pixels, a multiple of 32 (double: 64).
    data: what the data set says of its block, such as the name.

  Returns:
    ConfigDict with method, model, optim, data and train.
  """
  if preset == 'tiny':
    image_size = max(image_size, 32)
  stage = methods.start_stage(
    'super_resolution', PRESETS, preset, image_size, num_frames=3,
    frames='any', batch_size=2,
  )
  stage.model = dict(
    image_size=image_size,        # of the result
    scale=2 if preset == 'double' else 1,
    width=dict(paper=64, tiny=2).get(preset, 32),
    mode='degraded',              # or drafts: of the stage before
    shrink=4,                     # what degraded frames have lost
    jpeg_quality=(40, 90),
    microbatches=1,               # parts of a batch, one after another
    dtype='float32',              # of the computation; or bfloat16
  )
  lr = 5e-3 if preset == 'tiny' else 2e-4
  stage.optim = dict(generator=dict(lr=lr, b1=0.9, b2=0.999))
  stage.data.update(data)
  stage.data.image_size = image_size
  return stage
