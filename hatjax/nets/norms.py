"""Norms over space and what scales and shifts them.

Arrays are [B, *spatial, C]; of a video, time is the first of the spatial axes.
Sums over space are where a CPU loses time: XLA computes them again and again
with all that leads to them, channel by channel. Here they are matrix products,
before which their input is written once, and gradients take each sum once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from hatjax.nets.lowerings import rewrites

ROWS = 512  # of a product; more of them keep all cores at work


def sum_space(x):
  """float32 [B, *spatial, C] -> [B, C]."""
  batch, *space, channels = x.shape
  if not rewrites():
    return x.sum(tuple(range(1, x.ndim - 1)))
  count = math.prod(space)
  rows = math.gcd(count, ROWS)
  rows = rows if rows >= ROWS // 4 else count
  x = x.reshape(-1, rows, channels)
  ones = jnp.ones((x.shape[0], 1, rows), x.dtype)
  sums = jnp.matmul(ones, x, precision='highest')
  return sums.reshape(batch, -1, channels).sum(1)


@jax.custom_vjp
def add_bias(x, bias):
  """x [B, *spatial, C] + bias [C]."""
  return x + bias


def _add_bias_backward(_, g):
  wide = g.astype(jnp.float32)
  # In blocks, each picture by itself: the next may be on another device.
  if not rewrites():
    wide = wide.reshape(1, -1, g.shape[-1])
  return g, sum_space(wide).sum(0).astype(g.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, None), _add_bias_backward)


@jax.custom_vjp
def modulate(x, gain, shift):
  """gain x + shift of x [B, *spatial, C], both float32 [B, C]."""
  return _modulate(x, gain, shift)[0]


def _modulate(x, gain, shift):
  y = x * _spread(gain, x) + _spread(shift, x)
  return y.astype(x.dtype), (x, gain)


def _modulate_backward(saved, g):
  x, gain = saved
  wide = g.astype(jnp.float32)
  sums = sum_space(wide * x.astype(jnp.float32)), sum_space(wide)
  change = (g * _spread(gain, x)).astype(x.dtype)
  return change, *(s.astype(gain.dtype) for s in sums)


modulate.defvjp(_modulate, _modulate_backward)


def instance_norm(x, eps=1e-5):
  """(x - mean) / sqrt(var + eps) of each channel, biased variance.

  No affine parameters and no running statistics. Computed in float32.

  Args:
    x: [N, *spatial, C]; the result has its shape and dtype.
    eps: added to the variance.
  """
  return group_norm(x, None, None, None, 1, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def group_norm(x, gain, shift, isolate, size, eps=1e-5):
  """gain (x - mean) / sqrt(var + eps) + shift, in float32.

  Args:
    x: [B, *spatial, C]; the result has its shape and dtype.
    gain: float32 [B, C] or [1, C]; None for 1.
    shift: likewise; None for 0. Both or neither.
    isolate: bool [B], or None for none of them. Moments are of a sample, over
      all of space and the channels of a group; where isolated, of each of its
      frames, which are the first spatial axis.
    size: channels in a group.
    eps: added to the variance, which is the biased one.
  """
  return _group_norm(x, gain, shift, isolate, size, eps)[0]


def _spread(v, x):
  """[B, C], or [B, T, C] of frames, against x [B, T, ..., C]."""
  return jnp.expand_dims(v, tuple(range(v.ndim - 1, x.ndim - 1)))


def _sums(x, isolate):
  """[B, C], or [B, T, C] where some samples are isolated."""
  if isolate is None:
    return sum_space(x)
  return sum_space(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], -1)


def _of_groups(sums, x, isolate, size):
  """Means that the elements of x see, of sums over space."""
  count = math.prod(x.shape[1:-1])
  if isolate is not None:
    of_clip = sums.mean(1, keepdims=True)
    sums = jnp.where(isolate[:, None, None], sums, of_clip)
    count = math.prod(x.shape[2:-1])
  means = sums / count
  if size == 1:
    return means
  groups = means.reshape(*means.shape[:-1], -1, size).mean(-1, keepdims=True)
  return jnp.repeat(groups, size, -1).reshape(means.shape)


def _group_norm(x, gain, shift, isolate, size, eps):
  wide = x.astype(jnp.float32)
  average = lambda v: _of_groups(_sums(v, isolate), x, isolate, size)
  mean = average(wide)
  centred = wide - _spread(mean, x)
  if x.dtype == jnp.bfloat16 and not rewrites():
    # Both sums in one pass over x; what cancels is below the rounding of a
    # bfloat16 while |mean| < 100 std. Long rows of products are less exact.
    variance = average(jnp.square(wide)) - jnp.square(mean)
    variance = jnp.maximum(variance, 0)
  else:
    variance = average(jnp.square(centred))
  rate = lax.rsqrt(variance + eps)
  y = centred * _spread(rate, x)
  if gain is not None:
    y = y * _spread(gain, x) + _spread(shift, x)
  return y.astype(x.dtype), (x, mean, rate, gain, isolate)


def _group_norm_backward(size, eps, saved, g):
  """From sums of g and of g y, for the parameters and for x alike."""
  del eps
  x, mean, rate, gain, isolate = saved
  y = (x.astype(jnp.float32) - _spread(mean, x)) * _spread(rate, x)
  wide = g.astype(jnp.float32)
  sums = [_sums(wide, isolate), _sums(wide * y, isolate)]
  seen, of_parameters = sums, (None, None)
  if gain is not None:
    weight = gain if isolate is None else gain[:, None]
    seen, wide = [weight * s for s in sums], wide * _spread(gain, x)
    if isolate is not None:
      sums = [s.sum(1) for s in sums]
    if len(gain) == 1:
      sums = [s.sum(0, keepdims=True) for s in sums]
    of_parameters = [s.astype(gain.dtype) for s in sums[::-1]]
  pull, tilt = (
    _spread(_of_groups(s, x, isolate, size), x) for s in seen
  )
  change = _spread(rate, x) * (wide - pull - y * tilt)
  return change.astype(x.dtype), *of_parameters, None


group_norm.defvjp(_group_norm, _group_norm_backward)
