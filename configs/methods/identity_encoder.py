"""The stand-in for VGG-Face: its numbers, as presets.

default    a VGG of four blocks, a quarter as wide, for 112x112
tiny       the smallest legal one: seconds on a CPU
"""

from configs import methods

PRESETS = ('default', 'tiny')


def get_stage(preset, image_size, data):
  """The four blocks of a stage.

  Args:
    preset: one of PRESETS; another method's is taken as default.
    image_size: side in pixels.
    data: what the data set says of its block, such as the name.

  Returns:
    ConfigDict with method, model, optim, data and train.
  """
  preset = preset if preset in PRESETS else 'default'
  stage = methods.start_stage(
    'identity_encoder', PRESETS, preset, image_size, batch_size=16,
    num_frames=1,
  )
  stage.model = dict(
    image_size=image_size, temperature=0.1, dtype='float32', **net(preset)
  )
  stage.optim = dict(identity_encoder=dict(lr=1e-3, b1=0.9, b2=0.999))
  stage.train.update(num_steps=300 if preset == 'default' else 20)
  stage.data.update(data)
  return stage


def net(preset):
  """The net, which FEV-GAN's stand-in shares."""
  if preset == 'tiny':
    return dict(input_size=12, taps=('relu2_1',), depths=(1, 1), width=2)
  return dict(
    input_size=112, taps=('relu4_2',), depths=(1, 1, 2, 2), width=16
  )
