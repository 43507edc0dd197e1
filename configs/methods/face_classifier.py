"""The judge's numbers, as presets.

default    minutes on a CPU
tiny       the smallest legal one: seconds on a CPU
"""

from configs import methods

PRESETS = ('default', 'tiny')


def get_stage(preset, image_size, data):
  """The four blocks of a stage.

  Args:
    preset: one of PRESETS; another method's is taken as default.
    image_size: side in pixels, a power of two.
    data: what the data set says of its block, such as the name.

  Returns:
    ConfigDict with method, model, optim, data and train.
  """
  preset = preset if preset in PRESETS else 'default'
  # The apex in every batch: from it the expression is learned.
  stage = methods.start_stage(
    'face_classifier', PRESETS, preset, image_size, include_last=True,
    batch_size=16, num_frames=4, pad=image_size // 16, jitter=0.2,
  )
  stage.model = dict(
    image_size=image_size,
    num_labels=-1,                # as many as the data have
    width=16,
    code_dim=128,                 # of the identity code
    num_people=512,               # as many as the data have, or more
    sharpness=16.0,               # of the softmax over people
    lambda_identity=1.0,
    microbatches=1,               # parts of a batch, one after another
    dtype='float32',              # of the computation; or bfloat16
  )
  stage.optim = dict(judge=dict(lr=1e-3, b1=0.9, schedule='cosine'))
  stage.train.update(
    num_steps=1000, ckpt_every=200, sample_every=1000, val_clips=24,
  )
  if preset == 'tiny':
    stage.model.update(width=4, code_dim=8, num_people=8)
    stage.train.update(num_steps=20, ckpt_every=10, sample_every=10)
  stage.data.update(data)
  return stage
