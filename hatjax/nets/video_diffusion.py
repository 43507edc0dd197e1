"""The denoiser of video diffusion: a 3-D U-Net factorised over space and time.

After Ho et al., "Video Diffusion Models" (2022). Convolutions see one frame at
a time and frames meet in temporal attention; conv = 'space_time' lets
convolutions see the frames beside, as HAT-cGAN-DIFF words it. Arrays are
[B, T, H, W, C]. `isolate` bool [B] marks samples whose frames must not meet
anywhere (stills among the videos of a batch); None marks none.
"""

import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hatjax.nets import attention, layers, norms
from hatjax.nets.attention import SpatialAttention, TemporalAttention

NORMS = ('group', 'rms')
CONVS = ('space', 'space_time')
GROUPS = 8


def _dense(features):
  return nn.Dense(features, kernel_init=attention.kernel_init)


def embed_time(t, features):
  """[sin, cos] of t at features/2 rates from 1 to 1e-4; [B] -> [B, D]."""
  half = features // 2
  rates = np.exp(-math.log(10_000) * np.arange(half) / (half - 1))
  angles = t.astype(jnp.float32)[:, None] * rates.astype(np.float32)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class Pointwise(nn.Module):
  """A linear layer at every pixel: [..., C] -> [..., features]."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    shape = (x.shape[-1], self.features)
    kernel = self.param('kernel', attention.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, shape[1:])
    x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
    return norms.add_bias(layers.project(x, kernel), bias)


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
        alone = attention.per_sample(isolate, x.ndim)
        before, after = (jnp.where(alone, 0, y) for y in (before, after))
      x = jnp.concatenate([before, x, after], -1)
    x = layers.Conv(
      self.features, self.kernel, self.stride, self.kernel // 2,
      kernel_init=attention.kernel_init, dtype=self.dtype,
    )(einops.rearrange(x, 'b t h w c -> (b t) h w c'))
    return einops.rearrange(x, '(b t) h w c -> b t h w c', b=b)


class Norm(nn.Module):
  """'group': 8 groups over all frames and pixels; 'rms': over channels.

  The released code's group statistics run over the frames too, so that frames
  meet in them: isolated samples get statistics of each frame. In float32.
  """

  kind: str = 'group'

  @nn.compact
  def __call__(self, x, isolate=None, words=None):
    """`words`: gain and shift of what is normalized, [B, C] each; or None."""
    shape = (x.shape[-1],)
    gain = self.param('scale', nn.initializers.ones, shape)[None]
    shift = jnp.zeros_like(gain)
    if self.kind == 'group':
      shift = self.param('bias', nn.initializers.zeros, shape)[None]
    if words is not None:
      gain, shift = gain * words[0], shift * words[0] + words[1]
    if self.kind == 'group':
      size = x.shape[-1] // GROUPS
      return norms.group_norm(x, gain, shift, isolate, size)
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).mean(-1, keepdims=True)
    gain, shift = (a[:, None, None, None] for a in (gain, shift))
    return (wide * jax.lax.rsqrt(square + 1e-12) * gain + shift).astype(x.dtype)


class Words(nn.Module):
  """Two halves of a linear layer, float32: [B, D] -> two of [B, C].

  Split before the bias is added: XLA:CPU computes what sees a slice of a sum
  without vectors.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, cond):
    shape = (cond.shape[-1], 2 * self.features)
    kernel = self.param('kernel', attention.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, shape[1:])
    product = cond.astype(self.dtype) @ kernel.astype(self.dtype)
    halves = zip(jnp.split(product, 2, -1), jnp.split(bias, 2))
    return [(a + b.astype(a.dtype)).astype(jnp.float32) for a, b in halves]


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
      words = None
      if first and cond is not None:
        # Named as in the checkpoints that there are.
        change = Words(self.features, self.dtype, name='Dense_0')
        scale, shift = change(jax.nn.silu(cond))
        words = scale + 1, shift
      h = jax.nn.silu(Norm(self.norm)(h, isolate, words))
    if x.shape[-1] != self.features:
      name = 'Dense_0' if cond is None else 'Dense_1'
      x = Pointwise(self.features, self.dtype, name=name)(x)
    return h + x


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
    piece = attention.PIECE if self.remat else 0
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
    piece = attention.PIECE if self.remat else 0
    x = in_time(
      self.heads, self.head_dim, self.dtype, piece, name='attention_in'
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
    cond = _dense(features)(cond)
    # torch's GELU is the exact one.
    cond = jax.nn.gelu(cond, approximate=False)
    cond = _dense(features)(cond)
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
      'frame_bias', nn.initializers.normal(1.0), (attention.BUCKETS, self.heads)
    )
    bias = layers.pick_rows(table, attention.bucket_distances(num_frames))
    return bias.transpose(2, 0, 1)
