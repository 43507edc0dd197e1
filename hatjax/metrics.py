"""Scores of generated frames. Float images in [-1, 1] with a leading axis B;
each function returns float32 [B], one value per image."""

import jax.numpy as jnp


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
