"""What the methods' configs share: the blocks data and train of a stage."""

import ml_collections


def start_stage(method, presets, preset, image_size, **data):
  """A stage without model and optim.

  Args:
    method: its name.
    presets: those it has.
    preset: one of them.
    image_size: side in pixels.
    **data: where the method differs in the data block.

  Returns:
    ConfigDict with method, data and train.
  """
  if preset not in presets:
    raise ValueError(
      f'{method} has no preset {preset!r}. Choose one of: '
      f'{", ".join(presets)}.'
    )
  stage = ml_collections.ConfigDict()
  stage.method = method
  stage.data = dict(
    image_size=image_size,
    batch_size=1,                 # clips
    num_frames=12,                # K, besides the neutral one
    frames='random',              # even or blend over the clip, or a window
    include_last=False,           # the K-th is the apex
    load_size=0,                  # side before the random crop; 0: image_size
    pad=0,                        # edge pixels added before the crop
    crop_offsets=0,               # crop positions per axis; 0: all
    flip=0.5,
    jitter=0.0,                   # of colours
    resize='auto',                # 'cubic': without anti-aliasing
    resident='auto',              # frames on the device: yes, no
    labels=(),                    # use only these
  )
  stage.data.update(data)
  stage.train = dict(
    num_steps=20_000,
    start_from='',                # a run whose nets it begins with
    steps_per_dispatch=10,
    dispatch='auto',              # scan or loop over those
    log_every=50,
    ckpt_every=500,
    sample_every=500,
    keep=3,                       # checkpoints, besides the best
    val_split='val',
    val_clips=8,
    on_nan='stop',                # or skip: drop a step that is not finite
  )
  if preset == 'tiny':
    stage.data.update(num_frames=3, batch_size=2, pad=1)
    stage.train.update(
      num_steps=20, log_every=5, ckpt_every=10, sample_every=10,
      steps_per_dispatch=1,
    )
  return stage
