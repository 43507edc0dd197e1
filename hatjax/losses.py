"""Losses. Each takes arrays with a leading batch axis B and returns float32
[B]: the mean over all other axes. The caller takes the mean over B."""

import jax
import jax.numpy as jnp
import optax


def _mean_per_sample(x):
  return x.astype(jnp.float32).reshape(x.shape[0], -1).mean(-1)


def bce(logits, target):
  """Binary cross-entropy of sigmoid(logits) against a constant 0 or 1."""
  labels = jnp.full_like(logits, target)
  return _mean_per_sample(optax.sigmoid_binary_cross_entropy(logits, labels))


def least_squares(logits, target):
  """(logits - target)^2, LSGAN with labels 0 and 1."""
  return _mean_per_sample(jnp.square(logits - target))


GAN_LOSSES = {'bce': bce, 'least_squares': least_squares}


def l1(a, b):
  """Mean absolute difference."""
  return _mean_per_sample(jnp.abs(a - b))


def l2(a, b):
  """Mean squared difference."""
  return _mean_per_sample(jnp.square(a - b))


def pyramid(a, b, levels=4):
  """L1 of pixels and of neighbours' differences, at 1, 1/2, 1/4 ... the size.

  What stands in for a perceptual loss where no weights of VGG-19 are at hand.

  Args:
    a: [B, H, W, C].
    b: [B, H, W, C].
    levels: how many sizes; the mean over them is returned.
  """
  error, total = a - b, 0
  for level in range(levels):
    if level:
      n, h, w, c = error.shape
      error = error[:, : h // 2 * 2, : w // 2 * 2]
      error = error.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    total += _mean_per_sample(jnp.abs(error))
    for axis in (1, 2):
      if error.shape[axis] > 1:
        total += _mean_per_sample(jnp.abs(jnp.diff(error, axis=axis)))
  return total / levels


def features(a, b):
  """Sum of the mean absolute differences of lists of feature maps."""
  return sum(l1(x, y) for x, y in zip(a, b, strict=True))


def stop(tree):
  """`lax.stop_gradient` of every leaf."""
  return jax.tree.map(jax.lax.stop_gradient, tree)
