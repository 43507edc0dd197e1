"""The denoiser of video diffusion: a 3-D U-Net factorised over space and time.

After Ho et al., "Video Diffusion Models" (2022). Convolutions see one frame at
a time and frames meet in temporal attention; conv = 'space_time' lets
convolutions see the frames beside, as HAT-cGAN-DIFF words it. Arrays are
[B, T, H, W, C]. `isolate` bool [B] marks samples whose frames must not meet
anywhere (stills among the videos of a batch); None marks none.
"""

import math
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hatjax.nets import layers

NORMS = ('group', 'rms')
CONVS = ('space', 'space_time')
GROUPS = 8
BUCKETS, MAX_DISTANCE = 32, 32
PIECE = 8192  # tokens that attend at a time where memory is to be saved

# Uniform, variance 1 / (3 fan_in): how the released code's layers start.
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def _dense(features, dtype, bias=True, init=kernel_init):
  return nn.Dense(features, bias, dtype, kernel_init=init)


def _per_sample(flags, ndim):
  return flags.reshape(-1, *(1,) * (ndim - 1))


def embed_time(t, features):
  """[sin, cos] of t at features/2 rates from 1 to 1e-4; [B] -> [B, D]."""
  half = features // 2
  rates = np.exp(-math.log(10_000) * np.arange(half) / (half - 1))
  angles = t.astype(jnp.float32)[:, None] * rates.astype(np.float32)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class Conv(nn.Module):
  """3x3 (or `kernel`) over each frame, or 3x3x3 over the clip as well.

  The time taps lie side by side in the kernel's input axis, (tap, channel):
  one 2-D convolution, whose outer taps see zeros in isolated samples.
  """

  features: int
  kernel: int = 3
  stride: int = 1
  over_time: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, isolate=None):
    b = x.shape[0]
    if self.over_time:
      zero = jnp.zeros_like(x[:, :1])
      before = jnp.concatenate([zero, x[:, :-1]], 1)
      after = jnp.concatenate([x[:, 1:], zero], 1)
      if isolate is not None:
        alone = _per_sample(isolate, x.ndim)
        before, after = (jnp.where(alone, 0, y) for y in (before, after))
      x = jnp.concatenate([before, x, after], -1)
    x = layers.Conv(
      self.features, self.kernel, self.stride, self.kernel // 2,
      kernel_init=kernel_init, dtype=self.dtype,
    )(einops.rearrange(x, 'b t h w c -> (b t) h w c'))
    return einops.rearrange(x, '(b t) h w c -> b t h w c', b=b)


class Norm(nn.Module):
  """'group': 8 groups over all frames and pixels; 'rms': over channels.

  The released code's group statistics run over the frames too, so that frames
  meet in them: isolated samples get statistics of each frame. In float32.
  """

  kind: str = 'group'

  @nn.compact
  def __call__(self, x, isolate=None):
    dtype, shape = x.dtype, (x.shape[-1],)
    scale = self.param('scale', nn.initializers.ones, shape)
    x = x.astype(jnp.float32)
    if self.kind == 'rms':
      square = jnp.square(x).mean(-1, keepdims=True)
      return (x * jax.lax.rsqrt(square + 1e-12) * scale).astype(dtype)
    bias = self.param('bias', nn.initializers.zeros, shape)

    def mean(y):
      """Over pixels and channels of a group, and over frames that may meet."""
      of_frame = y.mean((2, 3, 5), keepdims=True)
      of_clip = of_frame.mean(1, keepdims=True)
      if isolate is None:
        return of_clip
      return jnp.where(_per_sample(isolate, y.ndim), of_frame, of_clip)

    y = x.reshape(*x.shape[:-1], GROUPS, -1)
    y = y - mean(y)
    y = y * jax.lax.rsqrt(mean(jnp.square(y)) + 1e-5)
    return (y.reshape(x.shape) * scale + bias).astype(dtype)


class ResBlock(nn.Module):
  """Two of (conv, norm, SiLU); `cond` [B, D] scales and shifts in the first."""

  features: int
  norm: str = 'group'
  conv: str = 'space'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, cond=None, isolate=None):
    over_time = self.conv == 'space_time'
    h = x
    for first in (True, False):
      h = Conv(self.features, over_time=over_time, dtype=self.dtype)(h, isolate)
      h = Norm(self.norm)(h, isolate)
      if first and cond is not None:
        change = _dense(2 * self.features, self.dtype)(jax.nn.silu(cond))
        scale, shift = jnp.split(change[:, None, None, None], 2, -1)
        h = h * (scale + 1) + shift
      h = jax.nn.silu(h)
    if x.shape[-1] != self.features:
      x = _dense(self.features, self.dtype)(x)
    return h + x


def _softmax(x, dtype, axis=-1):
  """Computed in float32, returned as `dtype`."""
  return jax.nn.softmax(x.astype(jnp.float32), axis).astype(dtype)


def _scores(equation, q, k):
  """Products of queries and keys, summed in float32."""
  return jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)


class Heads(nn.Module):
  """Runs an attention between its projections.

  Queries, keys and values come out heads first, each from its own product: on
  a CPU 1.5 times as fast as one product that is split and transposed.

  Attributes:
    attend: q, k, v [heads, *, tokens, head_dim] -> the same shape.
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
    q, k, v = (
      jnp.einsum('...nc,chd->h...nd', x, kernel[:, i]) for i in range(3)
    )
    y = self.attend(q, k, v)
    out = out.astype(self.dtype).reshape(self.heads, -1, channels)
    y = jnp.einsum('h...nd,hdc->...nc', y, out)
    return y if bias is None else y + bias.astype(self.dtype)


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


def attend_linearly(q, k, v):
  """softmax_d(q) (softmax_n(k)^T v) / sqrt(D): no tokens x tokens matrix.

  Shen et al. 2021; q, k, v are [..., n tokens, D].
  """
  context = jnp.einsum('...nd,...ne->...de', _softmax(k, v.dtype, -2), v)
  q = _softmax(q, v.dtype) * q.shape[-1] ** -0.5
  return jnp.einsum('...nd,...de->...ne', q, context)


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


class SpatialAttention(nn.Module):
  """x + attention over the pixels of each frame, linear or full."""

  heads: int = 8
  head_dim: int = 32
  linear: bool = True
  dtype: jnp.dtype = jnp.float32
  piece: int = 0

  @nn.compact
  def __call__(self, x):
    attend = attend_linearly if self.linear else attend_fully
    y = einops.rearrange(x, 'b t h w c -> b t (h w) c')
    y = Heads(
      self.heads, self.head_dim, attend, self.linear, self.dtype, self.piece
    )(y)
    return x + y.reshape(x.shape)


def rotate(x, positions, theta=10_000.0):
  """Rotary position embedding: turns pairs (i, i + D/2) of the features.

  Pair i turns by position * theta^(-2 i / D), so that products of two turned
  vectors depend on the difference of their positions only. The released code
  pairs neighbours: the same up to the order of the kernel's columns.

  Args:
    x: [..., T, D].
    positions: [T].
    theta: slowest wavelength over 2 pi.
  """
  rates = theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
  angles = jnp.asarray(positions, jnp.float32)[:, None] * rates
  cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
  first, second = jnp.split(x, 2, -1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )


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
    frames = np.arange(x.shape[1])
    barred = None
    if isolate is not None:
      barred = _per_sample(isolate, 4) & (frames[:, None] != frames)

    def attend(q, k, v):
      """On [heads, B, H * W, T, D]."""
      return attend_fully(
        rotate(q, frames), rotate(k, frames), v, bias[:, None, None], barred
      )

    y = einops.rearrange(x, 'b t h w c -> b (h w) t c')
    y = Heads(
      self.heads, self.head_dim, attend, False, self.dtype, self.piece
    )(y)
    y = einops.rearrange(y, 'b (h w) t c -> b t h w c', h=x.shape[2])
    return x + y


def _keeping_inputs(module, remat):
  """The module, which in a backward pass recomputes all but its inputs.

  It needs a name then: checkpoints are the same with and without.
  """
  return nn.remat(module) if remat else module


class Level(nn.Module):
  """Two residual blocks, linear attention in space, attention in time."""

  features: int
  heads: int = 8
  head_dim: int = 32
  norm: str = 'group'
  conv: str = 'space'
  remat: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, cond, bias, isolate=None):
    block, in_space, in_time = (
      _keeping_inputs(m, self.remat)
      for m in (ResBlock, SpatialAttention, TemporalAttention)
    )
    piece = PIECE if self.remat else 0
    for n in range(2):
      x = block(
        self.features, self.norm, self.conv, self.dtype, name=f'ResBlock_{n}'
      )(x, cond, isolate)
    x = in_space(
      self.heads, self.head_dim, True, self.dtype, piece,
      name='SpatialAttention_0',
    )(x)
    return in_time(
      self.heads, self.head_dim, self.dtype, piece, name='TemporalAttention_0'
    )(x, bias, isolate)


class Middle(nn.Module):
  """Block, full attention in space, attention in time, block."""

  heads: int = 8
  head_dim: int = 32
  norm: str = 'group'
  conv: str = 'space'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, cond, bias, isolate=None):
    block = lambda: ResBlock(x.shape[-1], self.norm, self.conv, self.dtype)
    x = block()(x, cond, isolate)
    x = SpatialAttention(self.heads, self.head_dim, False, self.dtype)(x)
    x = TemporalAttention(self.heads, self.head_dim, self.dtype)(
      x, bias, isolate
    )
    return block()(x, cond, isolate)


class UNet3D(nn.Module):
  """Predicts noise, x_0 or v of a noised video.

  Attributes:
    dim: channels at full size.
    dim_mults: channels of each level over `dim`; the side halves between
      levels, the number of frames stays.
    out_channels: of the prediction.
    num_labels: 0 for none. Label `num_labels` is the null label.
    heads: of every attention.
    head_dim: features per head.
    norm: see NORMS.
    conv: see CONVS.
    remat: recompute every block in the backward pass.
    dtype: compute type; parameters and the output are float32.
  """

  dim: int = 64
  dim_mults: tuple[int, ...] = (1, 2, 4, 8)
  out_channels: int = 3
  num_labels: int = 0
  heads: int = 8
  head_dim: int = 32
  norm: str = 'group'
  conv: str = 'space'
  remat: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, t, label=None, isolate=None):
    """x [B, T, H, W, C], t [B], label int [B] -> [B, T, H, W, out_channels]."""
    cond = self._condition(t, label)
    bias = self._frame_bias(x.shape[1])
    common = (self.heads, self.head_dim, self.norm, self.conv)
    level = lambda width, name: Level(
      width, *common, self.remat, self.dtype, name=name
    )
    middle, in_time, block = (
      _keeping_inputs(m, self.remat)
      for m in (Middle, TemporalAttention, ResBlock)
    )
    widths = [self.dim * m for m in self.dim_mults]
    # One width finer: what the level hands on when going up.
    narrow = [self.dim, *widths[:-1]]
    last = len(widths) - 1

    x = x.astype(self.dtype)
    x = Conv(self.dim, 7, dtype=self.dtype, name='conv_in')(x)
    x = in_time(
      self.heads, self.head_dim, self.dtype, PIECE if self.remat else 0,
      name='attention_in',
    )(x, bias, isolate)
    stem, skips = x, []
    for i, width in enumerate(widths):
      x = level(width, f'down_{i}')(x, cond, bias, isolate)
      skips.append(x)
      if i < last:
        x = Conv(width, 4, 2, dtype=self.dtype, name=f'halve_{i}')(x)
    x = middle(*common, self.dtype, name='middle')(x, cond, bias, isolate)
    for i in range(last, -1, -1):
      x = jnp.concatenate([x, skips[i]], -1)
      x = level(narrow[i], f'up_{i}')(x, cond, bias, isolate)
      if i:
        x = Conv(narrow[i], 4, -2, dtype=self.dtype, name=f'double_{i}')(x)
    x = jnp.concatenate([x, stem], -1)
    x = block(self.dim, self.norm, self.conv, self.dtype, name='block_out')(
      x, None, isolate
    )
    # Starts at zero, where the loss is that of the mean; the released code
    # starts at random.
    zeros = nn.initializers.zeros
    out = nn.Dense(self.out_channels, kernel_init=zeros, name='conv_out')
    return out(x.astype(jnp.float32))

  def _condition(self, t, label):
    """Embedded noise level and label, joined: [B, D]."""
    features = 4 * self.dim
    cond = embed_time(t, self.dim)
    cond = _dense(features, jnp.float32)(cond)
    # torch's GELU is the exact one.
    cond = jax.nn.gelu(cond, approximate=False)
    cond = _dense(features, jnp.float32)(cond)
    if self.num_labels:
      table = layers.Embed(
        self.num_labels + 1, self.dim,
        embedding_init=nn.initializers.normal(1.0), name='labels',
      )
      cond = jnp.concatenate([cond, table(label)], -1)
    return cond

  def _frame_bias(self, num_frames):
    """[heads, T, T], one table for all temporal attentions."""
    table = self.param(
      'frame_bias', nn.initializers.normal(1.0), (BUCKETS, self.heads)
    )
    bias = layers.pick_rows(table, bucket_distances(num_frames))
    return bias.transpose(2, 0, 1)
