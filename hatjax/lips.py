"""The region of the lips: what the patch discriminator sees of a clip.

Masks are float32 [B, 1 + K, H, W, 1] in {0, 1}, the neutral frame first, all
zero where the lips are unknown.
"""

import jax
import jax.numpy as jnp


def known(masks):
  """1 for later frames whose lips, and the neutral ones, are known, else 0.

  Returns:
    float32 [B * K].
  """
  seen = masks.any((2, 3, 4))
  return (seen[:, 1:] & seen[:, :1]).astype(jnp.float32).reshape(-1)


def l1(fake, real, masks):
  """Mean absolute difference inside the lips, 0 where they are unknown.

  Args:
    fake: [B, K, H, W, 3].
    real: the same.
    masks: see the module; the lips of a frame are its own and the neutral
      ones together, since what opens must also leave its old place.

  Returns:
    float32 [B].
  """
  inside = jnp.maximum(masks[:, :1], masks[:, 1:])
  axes = (1, 2, 3, 4)
  total = (jnp.abs(fake - real).mean(-1, keepdims=True) * inside).sum(axes)
  return total / jnp.maximum(inside.sum(axes), 1)


def pictures(image, frames, masks, crop=0):
  """The neutral picture and every frame behind their masks.

  The mask of the real frame serves the generated one as well.

  Args:
    image: [B, H, W, 3], the neutral frame.
    frames: [B, K, H, W, 3], or several such side by side along their time.
    masks: see the module.
    crop: side of a cut centred on the lips of the clip; 0 for none.

  Returns:
    (neutral pictures, frames), both as many as there are frames,
    [B, K, H or crop, W or crop, 3].
  """
  images = jnp.repeat((image * masks[:, 0])[:, None], frames.shape[1], 1)
  times = frames.shape[1] // (masks.shape[1] - 1)
  frames = frames * jnp.tile(masks[:, 1:], (1, times, 1, 1, 1))
  if not crop:
    return images, frames
  return cut(images, masks, crop), cut(frames, masks, crop)


def cut(frames, masks, size):
  """A square of every frame, centred on the lips of the clip.

  Where these are unknown it is the middle of the frames.

  Args:
    frames: [B, K, H, W, C].
    masks: see the module.
    size: its side in pixels.

  Returns:
    [B, K, size, size, C].
  """
  weight = masks.max(1)[..., 0]
  rows, columns = (_cut_start(weight.sum(axis), size) for axis in (2, 1))
  return jax.vmap(
    lambda x, i, j: jax.lax.dynamic_slice(
      x, (0, i, j, 0), (x.shape[0], size, size, x.shape[3])
    )
  )(frames, rows, columns)


def _cut_start(weight, size):
  """First row (or column) of a cut of `size` centred on the mass [B, N]."""
  n = weight.shape[1]
  weight = jnp.where(weight.sum(1, keepdims=True) > 0, weight, 1)
  centre = (weight * jnp.arange(n)).sum(1) / weight.sum(1)
  start = jnp.round(centre - (size - 1) / 2).astype(jnp.int32)
  return jnp.clip(start, 0, n - size)
