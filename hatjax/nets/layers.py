"""Blocks that two or more nets share, and how convolutions are lowered.

Arrays are [N, *spatial, C] with one, two or three spatial axes; parameters are
float32 in the standard HWIO shape whatever the lowering, so checkpoints do not
depend on the platform. `dtype` is the compute type.
"""

import contextlib
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# Up to this side of the smaller picture, moving a kernel about costs more than
# the convolution: deep levels hold most parameters and few pixels.
SMALL = 4
LOWERINGS = ('auto', 'plain', 'rewritten')
_lowering = ['auto']


@contextlib.contextmanager
def lowering(name):
  """Chooses how strided convolutions traced inside are lowered.

  Args:
    name: 'plain' (the primitive), 'rewritten' (an exact stride-1 form), or
      'auto': rewritten on CPU, where XLA's strided form is 6x slower.
  """
  if name not in LOWERINGS:
    raise ValueError(f'Unknown lowering {name!r}. Choose one of: {LOWERINGS}.')
  before, _lowering[0] = _lowering[0], name
  try:
    yield
  finally:
    _lowering[0] = before


def _rewrite():
  if _lowering[0] == 'auto':
    return jax.default_backend() == 'cpu'
  return _lowering[0] == 'rewritten'


def _dimension_numbers(nd):
  axes = 'DHW'[3 - nd :]
  return f'N{axes}C', f'{axes}IO', f'N{axes}C'


def _convolve(x, kernel, strides, padding, lhs_dilation=None):
  nd = kernel.ndim - 2
  return lax.conv_general_dilated(
    x, kernel, strides, padding, lhs_dilation=lhs_dilation,
    dimension_numbers=_dimension_numbers(nd),
  )


def _pad_kernel_to_even(kernel):
  """k3 s2 p1 is k4 s2 p1 whose last tap is zero (even sizes); k7 is k8."""
  nd = kernel.ndim - 2
  pads = [(0, k % 2) for k in kernel.shape[:nd]]
  return jnp.pad(kernel, [*pads, (0, 0), (0, 0)])


def downsample_conv(x, kernel):
  """Convolution with stride 2; even sizes.

  Args:
    x: [N, *spatial, C].
    kernel: [k, ..., C, O], k = 3 or 4 (padding 1) or 7 (padding 3).

  Returns:
    [N, *spatial / 2, O].
  """
  nd = kernel.ndim - 2
  pads = [((kernel.shape[0] - 1) // 2,) * 2] * nd
  if not _rewrite():
    return _convolve(x, kernel, (2,) * nd, pads)
  kernel = _pad_kernel_to_even(kernel)
  if max(x.shape[1:-1]) <= 2 * SMALL and kernel.shape[0] == 4:
    return _downsample_small(x, kernel)
  # Zero-pad, move each 2x..x2 cell into channels, then a 2x..x2 convolution.
  channels, features = kernel.shape[-2:]
  cells = (kernel.shape[0] // 2,) * nd
  x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
  return _convolve(
    _cells_to_channels(x, nd),
    _split_axes(kernel, nd).reshape(*cells, 2**nd * channels, features),
    (1,) * nd,
    'VALID',
  )


def _downsample_small(x, kernel):
  """Every tap's pixels side by side, times the kernel as it lies in memory."""
  nd = kernel.ndim - 2
  x = jnp.pad(x, [(0, 0), *[(1, 1)] * nd, (0, 0)])
  taps = [
    lax.slice(
      x, (0, *tap, 0),
      (len(x), *(t + n - 3 for t, n in zip(tap, x.shape[1:])), x.shape[-1]),
      (1, *(2,) * nd, 1),
    ) for tap in itertools.product(range(4), repeat=nd)
  ]
  flat = kernel.reshape(-1, kernel.shape[-1])
  return jnp.concatenate(taps, -1) @ flat


def _upsample_small(x, kernel):
  """Every tap's product, then each output pixel adds up its 2x..x2 of them."""
  nd = kernel.ndim - 2
  products = jnp.einsum(
    'n...i,tio->tn...o', x, kernel.reshape(-1, *kernel.shape[-2:])
  )
  edge = [(0, 0), (0, 0), *[(1, 1)] * nd, (0, 0)]
  products = jnp.pad(products, edge)
  # Parity -> the two taps it sees per axis, and how far away their input is.
  seen = {0: ((1, 0), (3, -1)), 1: ((2, 0), (0, 1))}
  parts = []
  for parity in itertools.product((0, 1), repeat=nd):
    total = 0
    for choice in itertools.product(*(seen[p] for p in parity)):
      tap = sum(t * 4**axis for axis, (t, _) in enumerate(reversed(choice)))
      window = (
        slice(1 + away, 1 + away + n)
        for (_, away), n in zip(choice, x.shape[1:])
      )
      total += products[(tap, slice(None), *window)]
    parts.append(total)
  return _interleave(jnp.stack(parts, axis=-2), nd)


def _cells_to_channels(x, nd):
  shape = [x.shape[0]]
  for size in x.shape[1:-1]:
    shape += [size // 2, 2]
  order = [0, *range(1, 2 * nd, 2), *range(2, 2 * nd + 1, 2), 2 * nd + 1]
  x = x.reshape(*shape, x.shape[-1]).transpose(order)
  return x.reshape(*x.shape[: nd + 1], -1)


def _split_axes(kernel, nd):
  """[4, .., I, O] -> [2, .., 2, .., I, O]: which cell, which place in it."""
  cells = kernel.shape[0] // 2
  kernel = kernel.reshape(*(cells, 2) * nd, *kernel.shape[-2:])
  order = [*range(0, 2 * nd, 2), *range(1, 2 * nd, 2), 2 * nd, 2 * nd + 1]
  return kernel.transpose(order)


def upsample_conv(x, kernel):
  """Transposed convolution that doubles the size.

  Output o collects input i through tap k where o = 2 i - 1 + k: kernel 4,
  stride 2, padding 1, or kernel 3 with one row of output padding.

  Args:
    x: [N, *spatial, C].
    kernel: [k, ..., C, O], k = 3 or 4.

  Returns:
    [N, 2 * spatial, O].
  """
  nd = kernel.ndim - 2
  kernel = _pad_kernel_to_even(kernel)
  if not _rewrite():
    flipped = jnp.flip(kernel, range(nd))
    return _convolve(
      x, flipped, (1,) * nd, [(2, 2)] * nd, lhs_dilation=(2,) * nd
    )
  if max(x.shape[1:-1]) <= SMALL:
    return _upsample_small(x, kernel)
  # Each output parity sees two inputs per axis: one 2x..x2 convolution makes
  # all parities at once, then they are shifted and interleaved.
  features = kernel.shape[-1]
  phases = []
  for parity in itertools.product((0, 1), repeat=nd):
    phase = kernel
    for axis, p in enumerate(parity):
      # Taps of x[i-1], x[i]: 3, 1 for the even outputs, 2, 0 for the odd.
      taps = lax.slice_in_dim(phase, 1 - p, 4, 2, axis)
      phase = jnp.flip(taps, axis)
    phases.append(phase)
  x = jnp.pad(x, [(0, 0), *[(1, 1)] * nd, (0, 0)])
  y = _convolve(x, jnp.concatenate(phases, -1), (1,) * nd, 'VALID')
  parts = []
  for i, parity in enumerate(itertools.product((0, 1), repeat=nd)):
    window = tuple(
      slice(p, p + n - 1) for p, n in zip(parity, y.shape[1:-1])
    )
    part = y[(slice(None), *window, slice(i * features, (i + 1) * features))]
    parts.append(part)
  return _interleave(jnp.stack(parts, axis=-2), nd)


def nearest_conv(x, kernel):
  """Doubles by repeating pixels, then convolves with kernel 3, padding 1.

  The repeated pixels are never made: taps that meet the same input add up,
  which leaves 4 / 9 of the products of each spatial pair.

  Args:
    x: [N, *spatial, C].
    kernel: [3, ..., C, O].

  Returns:
    [N, 2 * spatial, O].
  """
  nd = kernel.ndim - 2
  if max(x.shape[1:-1]) <= 2 * SMALL:  # Adding up the taps would cost more.
    for axis in range(1, 1 + nd):
      x = jnp.repeat(x, 2, axis)
    return _convolve(x, kernel, (1,) * nd, [(1, 1)] * nd)
  # Row k: which taps a transposed convolution's tap k is the sum of.
  merged = jnp.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], x.dtype)
  for axis in range(nd):
    kernel = jnp.moveaxis(jnp.tensordot(merged, kernel, (1, axis)), 0, axis)
  return upsample_conv(x, kernel)


# Winograd's F(4x4, 3x3): kernel, input and output transforms along one axis
# (Lavin & Gray, CVPR 2016).
_KERNEL_TO_6 = (
  (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
  (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)


def _tile_to_6(r):
  a, b, c, d, e, f = r
  return [
    4 * a - 5 * c + e, d + e - 4 * (b + c), 4 * (b - c) - d + e,
    2 * (d - b) - c + e, 2 * (b - d) - c + e, 4 * b - 5 * d + f,
  ]


def _6_to_tile(m):
  a, b, c, d, e, f = m
  p, q, u, v = b + c, b - c, d + e, d - e
  return [a + p + u, q + 2 * v, p + 4 * u, q + 8 * v + f]


def winograd_kernel(kernel):
  """[3, 3, C, O] -> [36, C, O], for `winograd_conv`."""
  turn = jnp.array(_KERNEL_TO_6, kernel.dtype)
  wide = jnp.einsum('ai,bj,ijco->abco', turn, turn, kernel)
  return wide.reshape(36, *kernel.shape[2:])


def winograd_conv(x, kernel):
  """3x3 convolution, padding 1, with a quarter of the products.

  Pays where the kernel is turned once for many pictures and channels are many.

  Args:
    x: [N, H, W, C], sides multiples of 4.
    kernel: from `winograd_kernel`.

  Returns:
    [N, H, W, O], to about 1e-5 of its largest value.
  """
  n, height, width, channels = x.shape
  rows, columns, features = height // 4, width // 4, kernel.shape[-1]
  cut = lambda x, axis, count: _tile_to_6([
    lax.slice_in_dim(x, i, i + 4 * count - 3, 4, axis) for i in range(6)
  ])
  # The barriers keep XLA from computing each part anew for each user of it.
  parts = lax.optimization_barrier(
    cut(jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]), 1, rows)
  )
  tiles = [t.reshape(-1, channels) for p in parts for t in cut(p, 2, columns)]
  tiles = lax.optimization_barrier(jnp.stack(tiles))
  y = lax.optimization_barrier(jnp.einsum('kpc,kco->kpo', tiles, kernel))
  y = y.reshape(6, 6, n, rows, columns, features)
  parts = lax.optimization_barrier(_6_to_tile(list(y)))
  lines = [jnp.stack(_6_to_tile(list(p)), 3) for p in parts]
  return jnp.stack(lines, 2).reshape(n, height, width, features)


def winograd_kernels(params, least=128):
  """The turned kernels of a net's 3x3 convolutions with many channels.

  Args:
    params: nested parameters.
    least: channels, in and out, from which it pays.

  Returns:
    The same tree with those kernels alone: the collection 'winograd' that
    `Conv` looks into.
  """
  found = {}
  for name, value in params.items():
    if isinstance(value, dict):
      inner = winograd_kernels(value, least)
      found |= {name: inner} if inner else {}
    elif name == 'kernel' and value.shape[:2] == (3, 3) and value.ndim == 4:
      if min(value.shape[2:]) >= least:
        found[name] = winograd_kernel(value)
  return found


def _interleave(x, nd):
  """[N, *spatial, 2**nd, C] -> [N, 2 * spatial, C]."""
  n, *spatial, _, channels = x.shape
  x = x.reshape(n, *spatial, *(2,) * nd, channels)
  order = [0]
  for axis in range(nd):
    order += [1 + axis, 1 + nd + axis]
  x = x.transpose(*order, 2 * nd + 1)
  return x.reshape(n, *[2 * s for s in spatial], channels)


def normal_init(std=0.02):
  """Weights ~ N(0, std), as DCGAN and its descendants start."""
  return nn.initializers.normal(std)


class Conv(nn.Module):
  """Convolution with bias; `stride` 1 ('same' by `pad`), 2, or -2 (doubling).

  Attributes:
    features: output channels.
    kernel: side of the kernel.
    stride: 1, 2 (kernel 3 or 4, padding 1, or 7, padding 3), or -2
      (transposed).
    pad: zero padding on each side, for stride 1.
    reflect: pad by reflection instead of zeros, for stride 1.
    nd: number of spatial axes.
    nearest: stride -2 repeats pixels, then convolves (kernel 3).
    dtype: compute type; parameters are float32.
  """

  features: int
  kernel: int = 3
  stride: int = 1
  pad: int = 1
  reflect: bool = False
  nd: int = 2
  nearest: bool = False
  kernel_init: nn.initializers.Initializer = normal_init()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    shape = (self.kernel,) * self.nd + (x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', self.bias_init, (self.features,))
    x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
    if self.stride == 2:
      return downsample_conv(x, kernel) + bias
    if self.stride == -2:
      up = nearest_conv if self.nearest else upsample_conv
      return up(x, kernel) + bias
    fits = all(side >= 32 and side % 4 == 0 for side in x.shape[1:-1])
    if self.has_variable('winograd', 'kernel') and fits and self.pad == 1:
      kernel = self.get_variable('winograd', 'kernel')
      return winograd_conv(x, jnp.asarray(kernel, self.dtype)) + bias
    padding = [(self.pad, self.pad)] * self.nd
    if self.reflect:
      x = jnp.pad(x, [(0, 0), *padding, (0, 0)], mode='reflect')
      padding = 'VALID'
    return _convolve(x, kernel, (1,) * self.nd, padding) + bias


class Dense(nn.Module):
  """Linear layer, weights ~ N(0, 0.02) unless told otherwise."""

  features: int
  kernel_init: nn.initializers.Initializer = normal_init()
  dtype: jnp.dtype = jnp.float32
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    return nn.Dense(
      self.features, self.use_bias, kernel_init=self.kernel_init,
      dtype=self.dtype,
    )(x)


class Embed(nn.Embed):
  """Rows of a table as a product: its gradient has no scatter, whose order
  of summing varies from run to run on a GPU. Few rows only."""

  def __call__(self, index):
    """int [...] -> [..., features]."""
    return pick_rows(self.embedding, index)


def pick_rows(table, index):
  """table[index], exactly, by a product with ones and zeros."""
  rows = jax.nn.one_hot(index, len(table), dtype=table.dtype)
  return jnp.einsum('...n,nd->...d', rows, table, precision='highest')


def instance_norm(x, eps=1e-5):
  """(x - mean) / sqrt(var + eps) over the spatial axes, biased variance.

  No affine parameters and no running statistics. Computed in float32.

  Args:
    x: [N, *spatial, C].
    eps: added to the variance.

  Returns:
    Same shape and dtype as `x`.
  """
  axes = tuple(range(1, x.ndim - 1))
  wide = x.astype(jnp.float32)
  mean = wide.mean(axes, keepdims=True)
  centred = wide - mean
  var = jnp.square(centred).mean(axes, keepdims=True)
  return (centred * lax.rsqrt(var + eps)).astype(x.dtype)


def leaky_relu(x):
  """Slope 0.2 below zero."""
  return jax.nn.leaky_relu(x, 0.2)


def num_halvings(size):
  """log2 of a side, which must be a power of two."""
  levels = int(math.log2(size)) if size > 0 else 0
  if 2**levels != size:
    raise ValueError(f'A U-Net side must be a power of two, not {size}.')
  return levels
