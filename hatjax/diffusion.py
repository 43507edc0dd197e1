"""Gaussian diffusion: schedules, targets, samplers, windows, patches.

x_t = signal_t x_0 + sigma_t noise, t = 0..T, where t = 0 is the clean video
(signal 1, sigma 0). A variance preserving schedule has signal^2 = alpha_bar
and sigma^2 = 1 - alpha_bar; the additive one has signal 1. Every formula here
holds for both. Arrays are float32 [B, ...]; t is int32 [B] or [].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

PREDICTIONS = ('eps', 'x0', 'v')


class Schedule(NamedTuple):
  """Noise levels, float64 NumPy [T + 1], so that differences keep digits.

  Attributes:
    signal: what multiplies x_0.
    sigma: what multiplies the noise.
  """

  signal: np.ndarray
  sigma: np.ndarray

  @property
  def num_steps(self):
    """T."""
    return len(self.sigma) - 1


def _from_betas(betas):
  """Variance preserving: alpha_bar_t = prod_(i <= t) (1 - beta_i)."""
  log_alpha_bar = np.concatenate([[0.0], np.log1p(-betas).cumsum()])
  return Schedule(np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar)))


def cosine_schedule(num_steps, offset=0.008):
  """alpha_bar = cos^2((t/T + offset) / (1 + offset) pi/2) / (same at 0).

  Nichol & Dhariwal 2021; beta is clipped to 0.9999.
  """
  t = np.arange(num_steps + 1) / num_steps
  alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
  return _from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.9999))


def linear_schedule(num_steps):
  """beta from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020), scaled to T."""
  scale = 1000 / num_steps
  betas = np.linspace(scale * 1e-4, scale * 0.02, num_steps)
  return _from_betas(np.minimum(betas, 0.9999))


def additive_schedule(num_steps, sigma_min=0.01, sigma_max=50.0):
  """f_t = f_(t-1) + noise_t (eq. 3 of HAT-cGAN-DIFF): variance exploding.

  The paper leaves the size of noise_t open. Its variance is chosen such that
  the summed noise grows geometrically (Song & Ermon 2019), sigma_1 = sigma_min
  to sigma_T = sigma_max: equal steps would leave no fine noise levels.
  """
  sigma = np.geomspace(sigma_min, sigma_max, num_steps)
  return Schedule(np.ones(num_steps + 1), np.concatenate([[0.0], sigma]))


SCHEDULES = {
  'cosine': cosine_schedule, 'linear': linear_schedule,
  'additive': additive_schedule,
}


def _levels(schedule, t, ndim):
  """signal_t, sigma_t as float32, broadcastable against rank `ndim`."""
  shape = jnp.shape(t) + (1,) * (ndim - 1 if jnp.ndim(t) else 0)
  return tuple(
    jnp.asarray(table.astype(np.float32))[t].reshape(shape)
    for table in schedule
  )


def add_noise(schedule, x0, noise, t):
  """x_t = signal_t x_0 + sigma_t noise."""
  signal, sigma = _levels(schedule, t, x0.ndim)
  return signal * x0 + sigma * noise


def scale_input(schedule, xt, t):
  """x_t / sqrt(signal^2 + sigma^2): itself where variance is preserved."""
  signal, sigma = _levels(schedule, t, xt.ndim)
  return xt * jax.lax.rsqrt(signal**2 + sigma**2)


def make_target(prediction, schedule, x0, noise, t):
  """What the net learns to predict.

  'eps' (the noise), 'x0', or v = (signal noise - sigma x_0) / norm, where
  norm^2 = signal^2 + sigma^2:
  Salimans & Ho 2022 where variance is preserved; with signal 1 the
  preconditioned output of Karras et al. 2022 for data of deviation 1.
  """
  if prediction == 'eps':
    return noise
  if prediction == 'x0':
    return x0
  signal, sigma = _levels(schedule, t, x0.ndim)
  norm = jnp.sqrt(signal**2 + sigma**2)
  return (signal * noise - sigma * x0) / norm


def to_x0_and_noise(prediction, schedule, value, xt, t):
  """The x_0 and the noise that a predicted value means; inverts make_target.

  Args:
    prediction: one of PREDICTIONS.
    schedule: Schedule.
    value: what the net said.
    xt: what it was asked about.
    t: 1..T.

  Returns:
    (x0, noise), such that signal x0 + sigma noise = xt.
  """
  signal, sigma = _levels(schedule, t, xt.ndim)
  if prediction == 'eps':
    return (xt - sigma * value) / signal, value
  if prediction == 'x0':
    return value, (xt - signal * value) / sigma
  square = signal**2 + sigma**2
  v = value * jnp.sqrt(square)
  return (signal * xt - sigma * v) / square, (sigma * xt + signal * v) / square


def min_snr_weight(prediction, schedule, t, gamma):
  """Weight [B] of a squared error so that in x_0 it is min(SNR, gamma).

  Hang et al. 2023. SNR = signal^2 / sigma^2; an error of the noise is
  1 / SNR, one of v 1 / (SNR + 1) of the same error in x_0.
  """
  signal, sigma = _levels(schedule, t, 1)
  snr = (signal / sigma) ** 2
  capped = jnp.minimum(snr, gamma)
  return {
    'eps': capped / snr, 'x0': capped, 'v': capped / (snr + 1),
  }[prediction]


def limit(x0, quantile=0.0):
  """Keeps x_0 in [-1, 1].

  Args:
    x0: [B, ...].
    quantile: 0 clips. Above 0 (Imagen's dynamic threshold) a sample whose
      quantile s of |x_0| exceeds 1 is clipped to [-s, s] and divided by s.
  """
  if not quantile:
    return jnp.clip(x0, -1, 1)
  flat = jnp.abs(x0).reshape(x0.shape[0], -1)
  s = jnp.maximum(jnp.quantile(flat, quantile, axis=1), 1.0)
  s = s.reshape(-1, *(1,) * (x0.ndim - 1))
  return jnp.clip(x0, -s, s) / s


def step_coefficients(schedule, t, s, eta):
  """x_s = a x_0 + b x_t + std z, a step from level t down to level s < t.

  The variance of q(x_s | x_t, x_0) is sigma_s^2 r / sigma_t^2 with
  r = sigma_t^2 - (signal_t / signal_s)^2 sigma_s^2. With eta = 1 the step
  draws from that posterior (ancestral sampling, also when levels are left
  out); with eta = 0 it is DDIM's (Song et al. 2021), without noise.

  Args:
    schedule: Schedule.
    t: NumPy int [N], 1..T.
    s: NumPy int [N], 0..t-1.
    eta: 0 to 1.

  Returns:
    float64 NumPy (a, b, std), each [N].
  """
  signal_t, sigma_t = schedule.signal[t], schedule.sigma[t]
  signal_s, sigma_s = schedule.signal[s], schedule.sigma[s]
  rest = sigma_t**2 - (signal_t / signal_s * sigma_s) ** 2
  std = eta * np.sqrt(rest) * sigma_s / sigma_t
  to_xt = np.sqrt(np.maximum(sigma_s**2 - std**2, 0)) / sigma_t
  return signal_s - to_xt * signal_t, to_xt, std


def sample_times(start, count):
  """Levels from `start` to 0 in at most `count` even steps, int [<= N + 1]."""
  count = min(max(count, 1), start)
  return np.linspace(start, 0, count + 1).round().astype(np.int32)


def sample(predict_x0, schedule, xt, times, rng, eta=0.0):
  """Walks down the levels, as one `lax.scan`.

  Args:
    predict_x0: (x_t, t) -> x_0 of the same shape, t an int32 scalar.
    schedule: Schedule.
    xt: the start, at level times[0].
    times: NumPy int [N + 1], falling to 0.
    rng: key of the noise; without effect if eta is 0.
    eta: 0 for DDIM, 1 for ancestral sampling.

  Returns:
    x_0 as predicted in the last step.
  """
  coefficients = step_coefficients(schedule, times[:-1], times[1:], eta)
  coefficients = np.stack(coefficients, 1).astype(np.float32)
  keys = jax.random.split(rng, len(coefficients))

  def step(x, inputs):
    t, (to_x0, to_xt, std), key = inputs
    # Where x_0 was limited, b x_t carries the noise that fits the limited x_0.
    x0 = predict_x0(x, t)
    x = to_x0 * x0 + to_xt * x
    if eta:
      x += std * jax.random.normal(key, x.shape, x.dtype)
    return x, None

  return jax.lax.scan(step, xt, (times[:-1], coefficients, keys))[0]


def average_windows(function, arrays, window, stride):
  """Applies a function of `window` frames to longer videos.

  Windows start every `stride` frames, the last one at the end; frames seen
  several times are averaged. One window is in memory at a time.

  Args:
    function: pytree of [B, window, ...] -> [B, window, ...].
    arrays: pytree of [B, T, ...].
    window: frames the function takes; 0 for all.
    stride: frames, at most `window`.

  Returns:
    [B, T, ...].
  """
  length = jax.tree.leaves(arrays)[0].shape[1]
  if not 0 < window < length:
    return function(arrays)
  starts = np.array([*range(0, length - window, stride), length - window])
  frames = starts[:, None] + np.arange(window)
  cut = jax.tree.map(lambda x: jnp.moveaxis(x[:, frames], 1, 0), arrays)
  parts = rearrange(jax.lax.map(function, cut), 'n b t ... -> b (n t) ...')
  # Gathers, not a scatter: floating-point sums in a fixed order everywhere.
  depth = np.bincount(frames.ravel()).max()
  index = np.zeros((depth, length), np.int32)
  weight = np.zeros((depth, length), np.float32)
  for t in range(length):
    seen = np.flatnonzero(frames.ravel() == t)
    index[: len(seen), t] = seen
    weight[: len(seen), t] = 1 / len(seen)
  shape = (length,) + (1,) * (parts.ndim - 2)
  return sum(
    parts[:, i] * w.reshape(shape) for i, w in zip(index, weight)
  )


def cross_fade(frames, function, window):
  """Applies a function of `window` frames to a stream of them.

  Windows start every window / 2 frames, the last one ends with the stream;
  where they overlap, one is faded into the next. At most 1.5 windows of
  frames are held.

  Args:
    frames: iterable of arrays [B, ...].
    function: (list of `window` frames, position of the first) -> float
      [B, window, ...]. All frames, if there are fewer.
    window: frames.

  Yields:
    Arrays [B, ...], one for each frame.
  """
  stride = max(window // 2, 1)
  held, start, total, weight = [], 0, None, None

  def advance(shift):
    """Moves the window on by `shift`; yields the frames it leaves behind."""
    nonlocal start, total, weight
    clip = held[shift : shift + window]
    part = np.moveaxis(function(clip, start + shift), 1, 0)
    n = len(part)
    tent = np.minimum(1 + np.arange(n), n - np.arange(n)).astype(np.float32)
    tent = tent.reshape(n, *(1,) * (part.ndim - 1))
    if total is None:
      total, weight = tent * part, tent
      return
    yield from total[:shift] / weight[:shift]
    pad = lambda x: np.concatenate([x[shift:], np.zeros_like(x[:shift])])
    total, weight = pad(total) + tent * part, pad(weight) + tent
    del held[:shift]
    start += shift

  for frame in frames:
    held.append(frame)
    # The next window must be full before what it overlaps may go.
    if len(held) == window + (0 if total is None else stride):
      yield from advance(0 if total is None else stride)
  if total is None and held:
    yield from advance(0)
  elif len(held) > window:
    yield from advance(len(held) - window)
  if held:
    yield from total / weight
