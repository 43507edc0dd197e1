"""Video diffusion's numbers, as presets.

default    3-D U-Net of the released code; learns v with L2 and min-SNR
           weights, labels, stills among the clips
paired     default, also shown a draft and the photo: for a second stage, which
           it is by default
paper      HAT-cGAN-DIFF as worded: convolutions over space and time, additive
           noise (eq. 3); its unstated numbers from the authors' code
paper_1x1  the same, down to 1x1 in space
reference  the authors' script on the released library: cosine schedule, 300
           levels, L1 on the noise, no label
tiny       the smallest legal one: seconds on a CPU
"""

from configs import methods

PRESETS = ('default', 'paired', 'paper', 'paper_1x1', 'reference', 'tiny')
# Better than its drafts so, with little noise; 'noise' is not: see README.
PAIRED = dict(mode='paired', strength=0.03)


def get_stage(preset, image_size, data):
  """The four blocks of a stage.

  Args:
    preset: one of PRESETS.
    image_size: side in pixels, a power of two.
    data: what the data set says of its block, such as the name.

  Returns:
    ConfigDict with method, model, optim, data and train.
  """
  # A video is refined 10 consecutive frames at a time: a short one as a whole,
  # a long one in windows, with less motion from frame to frame. So the 10 are
  # spread over a random part of a clip, from consecutive ones to all of it.
  stage = methods.start_stage(
    'video_diffusion', PRESETS, preset, image_size, num_frames=10,
    frames='window',
  )
  stage.model = _model(preset, image_size)
  adam = dict(lr=2e-4, b1=0.5, b2=0.999)
  if preset == 'reference':
    adam = dict(lr=1e-4, b1=0.9, b2=0.999)
  if preset == 'tiny':
    adam['lr'] = 2e-3
  stage.optim = dict(denoiser=adam)
  stage.train.draft_alpha = 'inferred'  # mode paired; or profile, linear
  if preset == 'reference':
    stage.train.num_steps = 10_000
  stage.data.update(data)
  return stage


def _model(preset, image_size):
  patch = max(1, image_size // 64)
  model = dict(
    image_size=image_size,
    num_labels=-1,                # as many as the data have; 0: no label
    mode='noise',                 # paired: also shown the draft and the photo
    dim=64,
    dim_mults=(1, 2, 4, 8),       # the side halves between them
    heads=8,
    head_dim=32,
    norm='group',                 # or rms
    conv='space',                 # or space_time
    patch=patch,                  # pixels per side that become channels
    schedule='cosine',            # linear, additive
    num_noise_steps=300,
    prediction='v',               # eps, x0
    loss='l2',                    # or l1
    min_snr_gamma=5.0,            # 0: none
    label_dropout=0.1,            # share of clips that see the null label
    image_fraction=0.2,           # share of clips seen as stills
    draft_error=0.05,             # drafts' deviation; the unit of paired
    mean_fraction=0.75,           # paired: share of clips for the mean alone
    strength=0.15,                # share of the levels a draft is noised by
    sampler='ddim',               # or ancestral
    num_sample_steps=64,          # from pure noise; a draft needs its share
    guidance=1.0,                 # towards the label; 1: none
    dynamic_threshold=0.0,        # quantile; 0: clip
    window=10,                    # frames the net sees at a time; 0: all
    ema_decay=0.999,
    ema_every=1,                  # steps from one update of it to the next
    remat=False,                  # less memory, a third more work
    microbatches=1,               # parts of a batch, one after another
    dtype='float32',              # of the computation; or bfloat16
  )
  if preset == 'paired':
    model |= PAIRED
  if preset in ('paper', 'paper_1x1'):
    model |= dict(
      # At 0.37 the noise has deviation 0.23, as the cosine's at 0.15.
      conv='space_time', schedule='additive', prediction='eps', loss='l1',
      min_snr_gamma=0.0, mean_fraction=0.0, strength=0.37,
    )
  if preset == 'paper_1x1':
    halvings = (image_size // patch).bit_length() - 1
    model['dim_mults'] = tuple(min(2**i, 8) for i in range(halvings + 1))
  if preset == 'reference':
    model |= dict(
      num_labels=0, prediction='eps', loss='l1', min_snr_gamma=0.0,
      mean_fraction=0.0,
      label_dropout=0.0, image_fraction=0.0, sampler='ancestral',
      num_sample_steps=300, window=0,
      ema_decay=0.995, ema_every=10,
    )
  if preset == 'tiny':
    model |= dict(
      dim=8, dim_mults=(1,), heads=2, head_dim=4, num_noise_steps=20,
      num_sample_steps=4, window=3,
    )
  return model


def shrink(stage):
  """Makes our recipe one for minutes on a CPU, eleven times as fast."""
  model = stage.model
  if model.prediction != 'v' or model.image_size > 64 or model.dim < 32:
    return
  # Many faces a step: frames of one clip have much the same errors.
  stage.data.update(batch_size=5, num_frames=5)
  model.update(
    window=5, dim=min(32, model.dim), dim_mults=model.dim_mults[:3],
    heads=min(4, model.heads), head_dim=min(16, model.head_dim),
  )
  if model.image_size == 64:
    model.patch = 2
