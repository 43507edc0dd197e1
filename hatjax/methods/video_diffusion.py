"""Video diffusion: refines a draft video, or makes one from noise.

The DIFF of HAT-cGAN-DIFF (Hung, Duy, Huy), Algorithm 1: add Gaussian noise to
the GAN's video, denoise it with a 3-D U-Net. mode 'noise' is that, as partial
noising and sampling down from there (SDEdit, Meng et al. 2022): the net learns
real clips alone and can only pull a draft towards them. mode 'paired', an
extension (after SR3, Saharia et al. 2021), learns what drafts get wrong: shown
the draft and the photo it was made from, it diffuses
(real - draft) / draft_error, which has deviation 1, and adds to the draft what
it samples. It first predicts the mean of what is missing (as CorrDiff does,
Mardani et al. 2023), then noises that and samples down from there: a sample of
its own has twice the squared error of the mean.
"""

import dataclasses
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import optax

from hatjax import diffusion, losses, optim, settings
from hatjax import metrics as metrics_lib
from hatjax import state as state_lib
from hatjax.nets import layers
from hatjax.nets import video_diffusion as nets

MODES = ('noise', 'paired')
LOSSES = {'l1': losses.l1, 'l2': losses.l2}
# Frames count by their PSNR, as they are scored: else those near the apex, a
# hundred times as wrong, are all that is learned. Less than this, in units of
# draft_error, is rounding to 8 bits.
MISSED = 0.01
SAMPLERS = {'ddim': 0.0, 'ancestral': 1.0}  # eta of each


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VideoDiffusion:
  """Hyperparameters and steps of video diffusion.

  Levels of noise run from 0 to num_noise_steps. A draft starts at level
  strength * num_noise_steps; a walk from the top takes num_sample_steps, one
  from further down its share of them.
  """

  tx: Mapping[str, optax.GradientTransformation]
  image_size: int = 64
  num_labels: int = 0
  mode: str = 'noise'
  dim: int = 64
  dim_mults: tuple[int, ...] = (1, 2, 4, 8)
  heads: int = 8
  head_dim: int = 32
  norm: str = 'group'
  conv: str = 'space'
  patch: int = 1
  schedule: str = 'cosine'
  num_noise_steps: int = 300
  prediction: str = 'eps'
  loss: str = 'l1'
  min_snr_gamma: float = 0.0
  label_dropout: float = 0.1
  image_fraction: float = 0.2
  draft_error: float = 0.05
  mean_fraction: float = 0.0
  strength: float = 0.15
  sampler: str = 'ddim'
  num_sample_steps: int = 64
  guidance: float = 1.0
  dynamic_threshold: float = 0.0
  window: int = 0
  ema_decay: float = 0.999
  ema_every: int = 1
  remat: bool = False
  microbatches: int = 1
  dtype: str = 'float32'
  axis_name: str | None = None

  def __post_init__(self):
    settings.check_model(
      self, mode=MODES, norm=nets.NORMS, conv=nets.CONVS,
      schedule=diffusion.SCHEDULES, loss=LOSSES,
      prediction=diffusion.PREDICTIONS, sampler=SAMPLERS,
    )
    settings.check_shares(
      model__strength=self.strength, model__label_dropout=self.label_dropout,
      model__image_fraction=self.image_fraction,
      model__mean_fraction=self.mean_fraction,
      model__dynamic_threshold=self.dynamic_threshold,
    )
    step = self.patch * 2 ** (len(self.dim_mults) - 1)
    if self.image_size % step:
      raise ValueError(
        f'model.image_size {self.image_size} is not a multiple of {step}: '
        'patch, doubled for each of dim_mults but one. Leave some out.'
      )
    if self.norm == 'group' and self.dim % nets.GROUPS:
      raise ValueError(
        f'model.dim {self.dim} is not a multiple of {nets.GROUPS}, as norm '
        "'group' needs. Use norm 'rms' or another dim."
      )
    if self.head_dim % 2:
      raise ValueError(
        f'model.head_dim {self.head_dim} is odd. Positions turn pairs of '
        'features: use an even one.'
      )
    if self.ema_every < 1:
      raise ValueError(
        f'model.ema_every is {self.ema_every}. It is the number of steps from '
        'one update of the average to the next: 1 or more.'
      )
    if self.draft_error <= 0:
      raise ValueError(
        f'model.draft_error is {self.draft_error}. It must be above 0: the '
        'usual distance of drafts from real frames, which span -1 to 1.'
      )
    if self.mean_fraction and self.prediction == 'eps':
      raise ValueError(
        "model.mean_fraction is above 0 and model.prediction is 'eps': without "
        "noise there is none to predict. Use 'v' or 'x0', or mean_fraction 0."
      )
    if 'denoiser' not in self.tx:
      raise ValueError('optim lacks a block for: denoiser.')

  @property
  def reads(self):
    """Keys of `inputs` that animate takes; without them it makes a video up."""
    keys = ('draft', 'image') if self.mode == 'paired' else ('draft',)
    return (*keys, 'label') if self.num_labels else keys

  @property
  def needs_draft(self):
    """Whether `train_step` reads batch['draft']."""
    return self.mode == 'paired'

  @property
  def denoiser(self):
    """The network."""
    return nets.UNet3D(
      dim=self.dim, dim_mults=self.dim_mults, out_channels=3 * self.patch**2,
      num_labels=self.num_labels, heads=self.heads, head_dim=self.head_dim,
      norm=self.norm, conv=self.conv, remat=self.remat,
      dtype=jnp.dtype(self.dtype),
    )

  @property
  def noise_schedule(self):
    """Levels 0..num_noise_steps."""
    return diffusion.SCHEDULES[self.schedule](self.num_noise_steps)

  def init(self, rng, batch):
    """State at step 0 from one batch (only its shapes matter)."""
    size = self.image_size
    chex.assert_shape(batch['video'], (None, None, size, size, 3))
    channels = 9 if self.mode == 'paired' else 3
    video = jnp.zeros((1, 2, size, size, channels))
    params = self.denoiser.init(
      rng, layers.space_to_depth(video, self.patch),
      jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32),
    )['params']
    return state_lib.create(
      {'denoiser': params}, {'denoiser': self.tx['denoiser']},
      ema=('denoiser',) if self.ema_decay else (),
    )

  # -- training ------------------------------------------------------------

  def train_step(self, state, batch, rng):
    """One update of the denoiser, at a random level of noise per clip.

    Args:
      state: TrainState.
      batch: video float32 [B, 1 + K, H, W, 3] in [-1, 1], of which the later
        frames are learned, sorted by time [B, 1 + K]; label int32 [B]; in mode
        'paired' draft, like video.
      rng: the key of this step.

    Returns:
      The new state and a dict of scalar metrics.
    """
    chex.assert_rank(batch['video'], 5)
    grad = lambda task: (
      jax.grad(self.denoiser_loss, has_aux=True)(
        state.params['denoiser'], task
      ), ()
    )
    task = self.draw_task(batch, rng)
    if self.microbatches == 1:
      (grads, metrics), _ = grad(task)
    else:
      tasks = state_lib.split_batch(task, self.microbatches)
      (grads, metrics), _ = state_lib.accumulate(grad, tasks)
    grads = state_lib.pmean(grads, self.axis_name)
    state = state.apply_gradients(self.tx, denoiser=grads)
    if self.ema_decay:
      average = optim.update_ema(
        state.ema['denoiser'], state.params['denoiser'], self.ema_decay,
        state.step, self.ema_every,
      )
      state = state.replace(ema={'denoiser': average})
    return state, state_lib.pmean(metrics, self.axis_name)

  def draw_task(self, batch, rng):
    """What is random in a step, drawn for the whole batch.

    Returns:
      dict: x0 and noise [B, K, H, W, 3], t and label int32 [B] (the null label
      where it was dropped), and where they are used draft, like x0, image
      [B, H, W, 3], and isolate and blank bool [B].
    """
    x0, draft = self._sorted_clip(batch)
    b = x0.shape[0]
    keys = jax.random.split(rng, 4)
    task = {
      'x0': x0,
      't': jax.random.randint(keys[0], (b,), 1, self.num_noise_steps + 1),
      'noise': jax.random.normal(keys[1], x0.shape),
      'label': jnp.where(
        jax.random.bernoulli(keys[2], self.label_dropout, (b,)),
        self.num_labels, batch['label'],
      ),
    }
    if draft is not None:
      task |= {'draft': draft, 'image': batch['video'][:, 0]}
    if self.mean_fraction and draft is not None:
      blank = jax.random.bernoulli(
        jax.random.fold_in(rng, 4), self.mean_fraction, (b,)
      )
      task['t'] = jnp.where(blank, self.num_noise_steps, task['t'])
      task['blank'] = blank
    if self.image_fraction:
      task['isolate'] = jax.random.bernoulli(
        keys[3], self.image_fraction, (b,)
      )
    return task

  def denoiser_loss(self, params, task):
    """Weighted error of the predicted noise, x_0 or v; and its metrics."""
    real, t, noise = (task[k] for k in ('x0', 't', 'noise'))
    draft, schedule = task.get('draft'), self.noise_schedule
    x0 = self._to_data(real, draft)
    blank = task.get('blank', jnp.zeros(len(x0), bool))
    # The mean is predicted from nothing, where a walk starts from noise.
    keep = 1.0 - blank[:, None, None, None, None]
    noise *= keep
    xt = keep * diffusion.add_noise(schedule, x0, noise, t)
    value = self._predict(
      params, xt, t, task['label'], self._shown(draft, task.get('image')),
      task.get('isolate'),
    )
    target = diffusion.make_target(self.prediction, schedule, x0, noise, t)
    error = LOSSES[self.loss](value, target)
    loss = error
    if self.min_snr_gamma:
      loss = error * diffusion.min_snr_weight(
        self.prediction, schedule, t, self.min_snr_gamma
      )
    if 'blank' in task:
      missed = jnp.square(value - target).mean((2, 3, 4))
      loss = jnp.where(blank, jnp.log(missed + MISSED).mean(1), loss)
    guess, _ = diffusion.to_x0_and_noise(
      self.prediction, schedule, value, xt, t
    )
    scores = {
      'loss/denoise': error, 'loss/denoiser': loss,
      'psnr/train': metrics_lib.psnr(
        diffusion.limit(self._to_video(guess, draft)), real
      ),
    }
    if draft is not None:
      scores['psnr/draft'] = metrics_lib.psnr(draft, real)
    return loss.mean(), jax.tree.map(jnp.mean, scores)

  def _sorted_clip(self, batch):
    """(video, draft or None), the later frames in the order of time.

    The first one is the face that drafts are made from: in the middle of a
    video, where most windows lie, it is not to be seen.
    """
    order = jnp.argsort(batch['time'][:, 1:], 1)[..., None, None, None]
    sort = lambda x: jnp.take_along_axis(x[:, 1:], order, 1)
    if self.mode != 'paired':
      return sort(batch['video']), None
    if 'draft' not in batch:
      raise ValueError(
        "model.mode 'paired' learns from drafts, which the batch lacks. Train "
        "it after a stage that makes them, or use mode 'noise'."
      )
    chex.assert_equal_shape([batch['draft'], batch['video']])
    return sort(batch['video']), sort(batch['draft'])

  def _shown(self, draft, image):
    """What the net sees beside x_t: [B, T, H, W, 6] in mode 'paired'."""
    if draft is None:
      return None
    image = jnp.broadcast_to(image[:, None], draft.shape)
    return jnp.concatenate([draft, image], -1)

  def _predict(self, params, xt, t, label, shown=None, isolate=None):
    """What the net says of x_t [B, T, H, W, 3] at levels t [B]."""
    x = diffusion.scale_input(self.noise_schedule, xt, t)
    if shown is not None:
      x = jnp.concatenate([x, shown], -1)
    # The released code counts its levels from 0.
    value = self.denoiser.apply(
      {'params': params}, layers.space_to_depth(x, self.patch), t - 1,
      label, isolate,
    )
    return layers.depth_to_space(value, self.patch)

  def _to_data(self, video, draft):
    """What is diffused: videos, or how they differ from their drafts."""
    return video if draft is None else (video - draft) / self.draft_error

  def _to_video(self, x0, draft):
    """Inverts _to_data."""
    return x0 if draft is None else draft + self.draft_error * x0

  # -- generation ----------------------------------------------------------

  def animate(self, state, inputs, rng, num_frames):
    """[B, T, H, W, 3] in [-1, 1]: a refined draft, or a video from noise.

    Args:
      state: TrainState; its averaged parameters are used.
      inputs: draft float32 [B, T, H, W, 3] in [-1, 1], T = num_frames; where
        it is missing (mode 'noise' only) the video comes from pure noise.
        image float32 [B, H, W, 3], the photo, read in mode 'paired'; where
        missing, the draft's first frame.
        label int32 [B]; where missing, the null label. noise float32 like
        the video, of deviation 1, that it starts from; where missing, drawn.
      rng: key.
      num_frames: T.

    Returns:
      The video; the draft itself, bit for bit, at a strength of 0.
    """
    draft = inputs.get('draft')
    if draft is None and self.mode == 'paired':
      raise ValueError(
        "video_diffusion in mode 'paired' reads 'draft', which inputs lack. "
        'Run it after a stage that makes one.'
      )
    rng_start, rng_walk = jax.random.split(rng)
    schedule = self.noise_schedule
    start = self._start(draft)
    known = [inputs[k] for k in ('draft', 'noise', 'label') if k in inputs]
    b = known[0].shape[0] if known else 1
    shape = (b, num_frames, self.image_size, self.image_size, 3)
    if draft is not None:
      chex.assert_shape(draft, shape)
    if not start:
      return draft
    noise = inputs.get('noise')
    if noise is None:
      noise = jax.random.normal(rng_start, shape)
    label, shown = inputs.get('label'), None
    if self.mode == 'paired':
      shown = self._shown(draft, inputs.get('image', draft[:, 0]))
    params = state.inference_params('denoiser')
    # As in denoiser_loss, the range is that of draft + draft_error x_0.
    base = draft if self.mode == 'paired' else None
    predict = lambda xt, t: self._guess(params, xt, t, label, base, shown)
    if self.mode == 'paired' and self.mean_fraction:
      mean = predict(jnp.zeros_like(draft), schedule.num_steps)
      xt = diffusion.add_noise(schedule, mean, noise, start)
    else:
      xt = self.add_noise(draft, noise)
    count = round(self.num_sample_steps * start / schedule.num_steps)
    times = diffusion.sample_times(start, count)
    eta = SAMPLERS[self.sampler]
    x0 = diffusion.sample(predict, schedule, xt, times, rng_walk, eta)
    return jnp.clip(self._to_video(x0, base), -1, 1)

  def _start(self, draft):
    """The level of noise that a walk starts from."""
    top = self.noise_schedule.num_steps
    return top if draft is None else round(self.strength * top)

  def add_noise(self, draft, noise):
    """What a walk starts from: the draft, or that it lacks nothing, noised;
    without a draft, noise alone."""
    schedule, start = self.noise_schedule, self._start(draft)
    if start == schedule.num_steps or self.mode == 'paired':
      return noise * schedule.sigma[start]
    return diffusion.add_noise(schedule, draft, noise, start)

  def _guess(self, params, xt, t, label, draft, shown):
    """x_0 as the net sees it, guided, in windows, kept in range.

    Guidance (Ho & Salimans 2022): null + guidance (labelled - null).
    """
    b = xt.shape[0]
    guided = label is not None and self.num_labels and self.guidance != 1
    null = jnp.full((b,), self.num_labels, jnp.int32)
    labels = null if label is None else label
    if guided:
      labels = jnp.concatenate([labels, null])

    def predict(arrays):
      if guided:
        arrays = jax.tree.map(lambda x: jnp.concatenate([x, x]), arrays)
      levels = jnp.full(labels.shape, t)
      value = self._predict(
        params, arrays['xt'], levels, labels, arrays.get('shown')
      )
      if guided:
        labelled, other = jnp.split(value, 2)
        value = other + self.guidance * (labelled - other)
      return value

    arrays = {'xt': xt} if shown is None else {'xt': xt, 'shown': shown}
    value = diffusion.average_windows(
      predict, arrays, self.window, max(self.window // 2, 1)
    )
    x0, _ = diffusion.to_x0_and_noise(
      self.prediction, self.noise_schedule, value, xt, t
    )
    video = self._to_video(x0, draft)
    return self._to_data(diffusion.limit(video, self.dynamic_threshold), draft)
