"""Attention over the pixels of a frame and over the frames of a clip.

Arrays are [B, T, H, W, C]. Every attention has its norm and its projections
within, and adds to what it reads. Where two orders of the same products are
equal, the quicker one is taken; tests hold them equal.
"""

import functools
import math
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hatjax.nets import layers, lowerings, norms

BUCKETS, MAX_DISTANCE = 32, 32
THETA = 10_000.0  # slowest wavelength of positions over 2 pi
FEW_FRAMES = 24  # that attend without matrix products, on a CPU
PIECE = 8192  # tokens that attend at a time where memory is to be saved

# Uniform, variance 1 / (3 fan_in): how the released code's layers start.
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def per_sample(flags, ndim):
  """[B] -> [B, 1, ...], to be broadcast against `ndim` axes."""
  return flags.reshape(-1, *(1,) * (ndim - 1))


def _softmax(x, dtype, axis=-1):
  """Computed in float32, returned as `dtype`."""
  return jax.nn.softmax(x.astype(jnp.float32), axis).astype(dtype)


def _scores(equation, a, b):
  """Products, summed in and returned as float32."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


class Heads(nn.Module):
  """An attention with its norm and its projections.

  Attributes:
    attend: x [*, rows, tokens, C], the kernels of q, k and v
      [C, heads, head_dim], that of the output [heads, head_dim, C] -> the shape
      of x.
    bias: of the output.
    piece: tokens at a time, one piece after another, each computed again in
      the backward pass; 0 for all at once.
  """

  heads: int
  head_dim: int
  attend: Callable
  bias: bool = False
  dtype: jnp.dtype = jnp.float32
  piece: int = 0

  @nn.compact
  def __call__(self, x):
    """[*, rows, tokens, C] -> the same shape; rows do not see one another."""
    channels, width = x.shape[-1], self.heads * self.head_dim
    kernel = self.param('qkv', kernel_init, (channels, 3 * width))
    out = self.param('out', kernel_init, (width, channels))
    params = [kernel, out]
    norm = nn.LayerNorm(1e-5, self.dtype, use_bias=False)
    if self.bias:
      bias = self.param('bias', nn.initializers.zeros, (channels,))
      params.append(bias)
    return in_pieces(self._run, self.piece)(norm(x), *params)

  def _run(self, x, kernel, out, bias=None):
    channels = x.shape[-1]
    kernel = kernel.astype(self.dtype).reshape(channels, 3, self.heads, -1)
    out = out.astype(self.dtype).reshape(self.heads, -1, channels)
    y = self.attend(x, *jnp.unstack(kernel, axis=1), out)
    return y if bias is None else norms.add_bias(y, bias.astype(self.dtype))


def in_pieces(function, piece):
  """A function whose rows are computed some at a time.

  Args:
    function: (x [*, rows, tokens, C], params) -> the same shape, each row on
      its own.
    piece: tokens at a time; the rows must share them evenly. What lies between
      x and the result is computed again in the backward pass. 0: all at once,
      nothing again.
  """
  if not piece:
    return function
  function = jax.checkpoint(function)

  def run(x, *params):
    *_, rows, tokens, _ = x.shape
    count = next(
      n for n in range(1, rows + 1)
      if not rows % n and (rows // n * tokens <= piece or n == rows)
    )
    if count == 1:
      return function(x, *params)
    pieces = x.reshape(*x.shape[:-3], count, rows // count, *x.shape[-2:])
    y = jax.lax.map(
      lambda x: function(x, *params), jnp.moveaxis(pieces, -4, 0)
    )
    return jnp.moveaxis(y, 0, -4).reshape(x.shape)

  return run


def heads_first(attend):
  """Attention of q, k, v [heads, *, tokens, D] -> as `Heads.attend`.

  Each of them has a product of its own: on a CPU quicker than one that is split
  and transposed.
  """

  def run(x, q, k, v, out):
    q, k, v = (jnp.einsum('...nc,chd->h...nd', x, w) for w in (q, k, v))
    return jnp.einsum('h...nd,hdc->...nc', attend(q, k, v), out)

  return run


def attend_linearly(q, k, v):
  """softmax_d(q) (softmax_n(k)^T v) / sqrt(D): no tokens x tokens matrix.

  Shen et al. 2021; q, k, v are [..., n tokens, D].
  """
  context = jnp.einsum('...nd,...ne->...de', _softmax(k, v.dtype, -2), v)
  q = _softmax(q, v.dtype) * q.shape[-1] ** -0.5
  return jnp.einsum('...nd,...de->...ne', q, context)


def attend_linearly_to_many(x, q, k, v, out):
  """`attend_linearly` with its projections, values and heads never made.

  softmax(k)^T (x V) = (softmax(k)^T x) V, and what is to the right of the
  queries is one small matrix. Less work where tokens are more than channels,
  and products without heads: twice as fast on a CPU. As `Heads.attend`.
  """
  heads, size, channels = out.shape
  axis, order = -1, 'hd'
  if lowerings.rewrites():  # heads last, as in `attend_over_time`
    axis, order, q = -2, 'dh', q.swapaxes(-1, -2)
  project = lambda w: layers.project(x, w.reshape(channels, -1))
  q = project(q).reshape(*x.shape[:-1], *q.shape[1:])
  context = _summarize(project(k), x)
  context = context.reshape(*context.shape[:-2], heads, size, channels)
  context = jnp.einsum('...hdc,che->...hde', context, v)
  out = out * size**-0.5
  context = jnp.einsum(f'...hde,hec->...{order}c', context, out)
  return _read(q, context.reshape(*context.shape[:-3], -1, channels), axis)


def _weights(x, dtype, axis):
  """`_softmax` in one pass less: no quotient of what was written before."""
  x = x.astype(jnp.float32)
  return jnp.exp(x - jax.nn.logsumexp(x, axis, keepdims=True)).astype(dtype)


@jax.custom_vjp
def _summarize(k, x):
  """softmax_n(k)^T x of [..., n, K] and [..., n, C].

  What a softmax takes off the change of its logits, sum_n w dw, is here the
  product of the result and its change: no sum over n.
  """
  return _summarize_forward(k, x)[0]


def _summarize_forward(k, x):
  weights = _weights(k, x.dtype, -2)
  y = _outer(weights, x)
  return y.astype(x.dtype), (weights, x, y)


def _summarize_backward(saved, g):
  weights, x, y = saved
  change = jnp.einsum('...nc,...kc->...nk', x, g).astype(jnp.float32)
  change -= _scores('...kc,...kc->...k', y, g)[..., None, :]
  change = (weights * change).astype(x.dtype)
  return change, jnp.einsum('...nk,...kc->...nc', weights, g)


_summarize.defvjp(_summarize_forward, _summarize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _read(q, w, axis):
  """softmax(q) w of [..., n, a, b], along a or b, and [..., a * b, C]. Its
  gradients are products as written here; autodiff's come out transposed."""
  return _read_forward(q, w, axis)[0]


def _read_forward(q, w, axis):
  weights = _weights(q, w.dtype, axis)
  flat = weights.reshape(*weights.shape[:-2], -1)
  return flat @ w, (weights, w)


def _read_backward(axis, saved, g):
  weights, w = saved
  change = jnp.einsum('...nc,...kc->...nk', g, w).astype(jnp.float32)
  change = change.reshape(weights.shape)
  change -= (weights * change).sum(axis, keepdims=True)
  flat = weights.reshape(*weights.shape[:-2], -1)
  return (weights * change).astype(g.dtype), _outer(flat, g).astype(g.dtype)


_read.defvjp(_read_forward, _read_backward)


def _outer(a, b):
  """a^T b of [..., n, K] and [..., n, C], in float32; the narrower one first:
  on a CPU up to a third quicker."""
  if a.shape[-1] <= b.shape[-1]:
    return _scores('...nk,...nc->...kc', a, b)
  return _scores('...nc,...nk->...ck', b, a).swapaxes(-1, -2)


def attend_fully(q, k, v, bias=0.0, barred=None):
  """softmax(q k^T / sqrt(D) + bias) v.

  Args:
    q: [..., n, D].
    k: same shape.
    v: same shape.
    bias: float32, broadcast against the scores [..., n, n].
    barred: bool, likewise; True where the key must not be seen.
  """
  scores = _scores('...nd,...md->...nm', q * q.shape[-1] ** -0.5, k) + bias
  if barred is not None:
    scores = jnp.where(barred, -jnp.inf, scores)
  return jnp.einsum('...nm,...md->...nd', _softmax(scores, v.dtype), v)


def attend_over_time(bias, barred=None):
  """Full attention over few frames, positions turned in; as `Heads.attend`.

  On a CPU the heads come last, where they fill the lanes of a vector: products
  as small as these take longer to call than to compute.

  Args:
    bias: [heads, T, T].
    barred: bool, broadcast against [B, rows, T, T].
  """
  frames = np.arange(bias.shape[-1])

  def attend(q, k, v):
    q, k = rotate(q, frames), rotate(k, frames)
    return attend_fully(q, k, v, bias[:, None, None], barred)

  def run(x, *kernels):
    few = len(frames) <= FEW_FRAMES and x.dtype == jnp.float32
    if few and lowerings.rewrites():
      return _attend_in_lanes(x, *kernels, bias, barred)
    return heads_first(attend)(x, *kernels)

  return run


@jax.custom_vjp
def _attend_in_lanes(x, q, k, v, out, bias, barred):
  # What is not kept for a gradient XLA computes again for every pair of frames:
  # without one, nothing may come between products and scores.
  # The batch, which an exported program leaves open, does not count.
  rows = math.prod(n for n in x.shape[:-2] if isinstance(n, int))
  form = _frames_first if rows >= x.shape[-1] else _rows_first
  return form(x, q, k, v, out, bias, barred)


def _attend_in_lanes_forward(*args):
  return jax.vjp(lambda *some: _rows_first(*some, args[-1]), *args[:-1])


_attend_in_lanes.defvjp(
  _attend_in_lanes_forward, lambda pull, g: (*pull(g), None)
)


def _lanes_last(w):
  """[C, heads, head_dim] -> [C, head_dim * heads]."""
  return w.swapaxes(-1, -2).reshape(len(w), -1)


def _rows_first(x, q, k, v, out, bias, barred):
  """Arrays [*, rows, T, head_dim, heads]: the quicker one with its gradient."""
  rows = x.reshape(-1, x.shape[-1])
  q, k, v = (
    _product(rows, _lanes_last(w)).reshape(*x.shape[:-1], *w.shape[:0:-1])
    for w in (q * q.shape[-1] ** -0.5, k, v)
  )
  bias = bias.transpose(1, 2, 0)
  y = _mix(_rotate_lanes(q), _rotate_lanes(k), v, bias, barred)
  out = out.swapaxes(0, 1).reshape(-1, x.shape[-1])
  return _product(y.reshape(-1, len(out)), out).reshape(x.shape)


@jax.custom_vjp
def _product(x, w):
  """[N, K] @ [K, M], whose gradient takes x and g in two shapes each: [N, .]
  and [2, N / 2, .]. What all products take in one XLA:CPU computes in that one,
  where the heads are not the last axis: four times slower, without vectors."""
  return x @ w


def _product_backward(saved, g):
  x, w = saved
  halves = math.gcd(len(x), 2)
  parts = (y.reshape(halves, -1, y.shape[-1]) for y in (x, g))
  return g @ w.T, jnp.einsum('hnk,hnm->hkm', *parts).sum(0)


_product.defvjp(lambda x, w: (x @ w, (x, w)), _product_backward)


@jax.custom_vjp
def _mix(q, k, v, bias, barred):
  """softmax(q k^T + bias) v; arrays [*, T, head_dim, heads], q scaled. Bias
  [T, T, heads] of query and key, as is `barred` bool [*, T, T]."""
  return _mix_forward(q, k, v, bias, barred)[0]


def _mix_forward(q, k, v, bias, barred):
  # [*, T, T, heads]
  scores = (_queries(q) * _keys(k)).sum(-2) + bias
  if barred is not None:
    scores = jnp.where(barred[..., None], -jnp.inf, scores)
  weights = jax.nn.softmax(scores, -2)
  y = (weights[..., None, :] * _keys(v)).sum(-3)
  return y, (q, k, v, weights, y)


def _mix_backward(saved, g):
  q, k, v, weights, y = saved
  change = (_queries(g) * _keys(v)).sum(-2) - (g * y).sum(-2)[..., None, :]
  change = (weights * change)[..., None, :]
  return (
    (change * _keys(k)).sum(-3), (change * _queries(q)).sum(-4),
    (weights[..., None, :] * _queries(g)).sum(-4),
    change[..., 0, :].sum(range(weights.ndim - 3)), None,
  )


_mix.defvjp(_mix_forward, _mix_backward)


def _queries(x):
  return x[..., None, :, :]


def _keys(x):
  return x[..., None, :, :, :]


def _frames_first(x, q, k, v, out, bias, barred):
  """Arrays [T, N, head_dim, heads], N all rows; each frame has kernels of its
  own, which turn it to its position."""
  (heads, size, channels), shape = out.shape, x.shape
  frames = shape[-2]
  x = jnp.moveaxis(x, -2, 0).reshape(frames, -1, channels)
  split = lambda y: y.reshape(*y.shape[:2], size, heads)

  def turned(w):
    w = _lanes_last(w).reshape(channels, 1, size, heads)
    w = _rotate_lanes(jnp.repeat(w, frames, 1))
    return w.swapaxes(0, 1).reshape(frames, channels, -1)

  q, k = split(x @ turned(q * size**-0.5)), split(x @ turned(k))
  v = split(layers.project(x, _lanes_last(v)))
  # [T, T, N, heads]
  scores = (q[:, None] * k).sum(-2) + bias.transpose(1, 2, 0)[:, :, None]
  if barred is not None:
    barred = jnp.broadcast_to(barred, (*shape[:-1], frames))
    barred = jnp.moveaxis(barred, (-2, -1), (0, 1))
    scores = jnp.where(barred.reshape(*scores.shape[:3], 1), -jnp.inf, scores)
  weights = _softmax(scores, x.dtype, 1)[..., None, :]
  y = (weights * v).sum(1).reshape(-1, size * heads)
  y = y @ out.swapaxes(0, 1).reshape(-1, channels)
  return jnp.moveaxis(y.reshape(frames, *shape[:-2], channels), 0, -2)


class SpatialAttention(nn.Module):
  """x + attention over the pixels of each frame, linear or full."""

  heads: int = 8
  head_dim: int = 32
  linear: bool = True
  dtype: jnp.dtype = jnp.float32
  piece: int = 0

  @nn.compact
  def __call__(self, x):
    attend = heads_first(attend_linearly if self.linear else attend_fully)
    if self.linear and math.prod(x.shape[2:4]) >= x.shape[-1]:
      attend = attend_linearly_to_many
    y = einops.rearrange(x, 'b t h w c -> b t (h w) c')
    y = Heads(
      self.heads, self.head_dim, attend, self.linear, self.dtype, self.piece
    )(y)
    return x + y.reshape(x.shape)


def rotate(x, positions):
  """Rotary position embedding: turns pairs (i, i + D/2) of the features.

  Pair i turns by position * THETA^(-2 i / D), so that products of two turned
  vectors depend on the difference of their positions only. The released code
  pairs neighbours: the same up to the order of the kernel's columns.

  Args:
    x: [..., T, D].
    positions: [T].
  """
  cos, sin = _turns(positions, x.shape[-1], x.dtype)
  first, second = jnp.split(x, 2, -1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )


def _rotate_lanes(x):
  """`rotate` of [..., T, D, heads], positions 0, 1, ... A sum, since XLA:CPU
  computes a concatenation by branches; of few axes: with seven it crashes
  where a product is fused with it."""
  frames, size, heads = x.shape[-3:]
  cos, sin = _turns(np.arange(frames), size, x.dtype)
  turn = jnp.stack([cos, -sin, sin, cos], 1).repeat(heads, -1)
  pairs = x.reshape(-1, frames, 1, 2, size // 2 * heads)
  return (turn.reshape(frames, 2, 2, -1) * pairs).sum(-2).reshape(x.shape)


def _turns(positions, size, dtype):
  """Cosines and sines of every pair's turn, [T, size / 2] each."""
  rates = THETA ** (-np.arange(0, size, 2) / size)
  angles = jnp.asarray(positions, jnp.float32)[:, None] * rates
  return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def bucket_distances(num_frames):
  """T5 buckets of d = query - key for all frame pairs, NumPy int [T, T].

  16 per direction (the upper 16 where the key is later): |d| < 8 exactly,
  then logarithmically up to distance 32, beyond which all share the last.
  """
  frames = np.arange(num_frames)
  d = frames[:, None] - frames
  half, exact = BUCKETS // 2, BUCKETS // 4
  ratio = np.log(np.maximum(np.abs(d), 1) / exact)
  ratio /= math.log(MAX_DISTANCE / exact)
  # The released code floors a float32 quotient; 1e-6 guards |d| = 16.
  far = exact + np.floor(ratio * (half - exact) + 1e-6).astype(int)
  bucket = np.where(np.abs(d) < exact, np.abs(d), np.minimum(far, half - 1))
  return bucket + half * (d < 0)


class TemporalAttention(nn.Module):
  """x + attention over the frames at each pixel.

  Rotary positions, plus a bias per frame pair, float32 [heads, T, T]. An
  isolated sample's frames see themselves only.
  """

  heads: int = 8
  head_dim: int = 32
  dtype: jnp.dtype = jnp.float32
  piece: int = 0

  @nn.compact
  def __call__(self, x, bias, isolate=None):
    barred = None
    if isolate is not None:
      barred = per_sample(isolate, 4) & ~np.eye(x.shape[1], dtype=bool)
    y = einops.rearrange(x, 'b t h w c -> b (h w) t c')
    y = Heads(
      self.heads, self.head_dim, attend_over_time(bias, barred), False,
      self.dtype, self.piece,
    )(y)
    y = einops.rearrange(y, 'b (h w) t c -> b t h w c', h=x.shape[2])
    return x + y
