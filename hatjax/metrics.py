"""Scores of generated frames. Float images in [-1, 1] with a leading axis B;
each function returns float32 [B], one value per image."""

import jax.numpy as jnp
import numpy as np
from jax import lax


def psnr(a, b):
  """Peak signal-to-noise ratio in dB over the [-1, 1] range (peak 2).

  Args:
    a: [B, ...].
    b: same shape.

  Returns:
    [B]; 120 dB at most, which is what equal images get.
  """
  error = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
  error = error.reshape(error.shape[0], -1).mean(-1)
  return 10 * jnp.log10(4 / jnp.maximum(error, 4e-12))


def ssim(a, b, window='gaussian'):
  """Structural similarity (Wang et al. 2004), of each channel, then the mean.

  K1 = 0.01, K2 = 0.03, windows that lie inside the image ('valid').

  Args:
    a: [B, H, W, C] in [-1, 1].
    b: same shape.
    window: 'gaussian', 11x11 with sigma 1.5 and biased variances; or
      'uniform7', 7x7 with unbiased ones, scikit-image's default.

  Returns:
    [B], 1 for equal images.

  Raises:
    ValueError: unknown window, images smaller than it.
  """
  if window not in WINDOWS:
    raise ValueError(
      f'Unknown window {window!r}. Choose one of: {", ".join(WINDOWS)}.'
    )
  weights, unbiased = WINDOWS[window]()
  side = len(weights)
  if min(a.shape[1:3]) < side:
    raise ValueError(f'SSIM needs images of side {side} or more.')
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)

  def mean(x):
    for axis in (1, 2):
      n = x.shape[axis] - side + 1
      x = sum(
        w * lax.slice_in_dim(x, i, i + n, axis=axis)
        for i, w in enumerate(weights)
      )
    return x

  mean_a, mean_b = mean(a), mean(b)
  var_a = unbiased * (mean(a * a) - mean_a**2)
  var_b = unbiased * (mean(b * b) - mean_b**2)
  covariance = unbiased * (mean(a * b) - mean_a * mean_b)
  c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
  score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  score /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
  return score.mean((1, 2, 3))


def _gaussian():
  x = np.arange(-5, 6)
  weights = np.exp(-(x**2) / (2 * 1.5**2))
  return weights / weights.sum(), 1.0


WINDOWS = {
  'gaussian': _gaussian, 'uniform7': lambda: (np.full(7, 1 / 7), 49 / 48),
}


def flicker(video):
  """Mean absolute second difference in time: 0 for steady motion.

  Args:
    video: [B, T, H, W, C] in [-1, 1], T of 3 or more.

  Returns:
    [B].
  """
  bend = video[:, 2:] - 2 * video[:, 1:-1] + video[:, :-2]
  return jnp.abs(bend).mean((1, 2, 3, 4))


def gradient_energy(images):
  """Mean squared difference of neighbouring pixels: what blur takes away.

  Args:
    images: [B, ..., H, W, C] in [-1, 1].

  Returns:
    [B].
  """
  down = jnp.diff(images, axis=-3).reshape(images.shape[0], -1)
  right = jnp.diff(images, axis=-2).reshape(images.shape[0], -1)
  return jnp.square(down).mean(-1) + jnp.square(right).mean(-1)
