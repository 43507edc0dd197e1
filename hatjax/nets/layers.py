"""Blocks that two or more nets share, and how convolutions are lowered.

Arrays are [N, *spatial, C] with one, two or three spatial axes; parameters are
float32 in the standard HWIO shape whatever the lowering, so checkpoints do not
depend on the platform. `dtype` is the compute type.
"""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from hatjax.nets import winograd
from hatjax.nets.lowerings import form, rewrites
from hatjax.nets.norms import add_bias

# Up to this side of the smaller picture every tap has its own matrix product,
# unless minimal filtering pays: the kernel is used as it lies. (XLA takes
# picture and kernel for each other on their way to cuDNN where both are as
# large.)
SMALL = {'plain': 0, 'aligned': 4, 'rewritten': 8}
FEW = 16  # channels; on a CPU up to so many of them likewise
ALIGNED = 8  # channels, what tensor cores take at a time; fewer are gathered


def _dimension_numbers(nd):
  axes = 'DHW'[3 - nd :]
  return f'N{axes}C', f'{axes}IO', f'N{axes}C'


def _convolve(x, kernel, strides, padding, double=False):
  """The primitive; with `double` by the kernel turned over, x spread out."""
  nd, features = kernel.ndim - 2, kernel.shape[-1]
  if form() == 'aligned':
    more = [(0, -channels % ALIGNED) for channels in kernel.shape[-2:]]
    kernel = jnp.pad(kernel, [(0, 0)] * nd + more)
    x = jnp.pad(x, [(0, 0)] * (1 + nd) + more[:1])
  y = lax.conv_general_dilated(
    x, jnp.flip(kernel, range(nd)) if double else kernel, strides, padding,
    lhs_dilation=(2,) * nd if double else None,
    dimension_numbers=_dimension_numbers(nd),
  )
  return y[..., :features]


def _pad_kernel_to_even(kernel):
  """k3 s2 p1 is k4 s2 p1 whose last tap is zero (even sizes); k7 is k8."""
  nd = kernel.ndim - 2
  pads = [(0, k % 2) for k in kernel.shape[:nd]]
  return jnp.pad(kernel, [*pads, (0, 0), (0, 0)])


def downsample_conv(x, kernel):
  """Convolution with stride 2.

  Args:
    x: [N, *spatial, C].
    kernel: [k, ..., C, O], k = 3 or 4 (padding 1) or 7 (padding 3).

  Returns:
    [N, *spatial / 2, O], odd sizes rounded as k and the padding have it.
  """
  nd = kernel.ndim - 2
  pads = [((kernel.shape[0] - 1) // 2,) * 2] * nd
  if any(side % 2 for side in x.shape[1:-1]):  # Nothing else fits those.
    return _convolve(x, kernel, (2,) * nd, pads)
  channels, features = kernel.shape[-2:]
  gathered = form() == 'aligned' and channels < ALIGNED
  if rewrites() or gathered:
    kernel = _pad_kernel_to_even(kernel)
  filtered = _filter_pays(x, _count(x) // 4, 4 * channels, features)
  small = max(x.shape[1:-1]) <= 2 * SMALL[form()] and not filtered
  if small and kernel.shape[0] == 4:
    return project(_taps(nd)[0](x), kernel.reshape(-1, features))
  if not rewrites() and not gathered:
    return _convolve(x, kernel, (2,) * nd, pads)
  # Zero-pad, move each 2x..x2 cell into channels, then a dense convolution.
  cells = (kernel.shape[0] // 2,) * nd
  x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
  x = _cells_to_channels(x, nd)
  kernel = _split_axes(kernel, nd)
  return correlate(
    x, kernel.reshape(*cells, 2**nd * channels, features)
  )


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
  inputs, features = kernel.shape[-2:]
  filtered = _filter_pays(x, _count(x), 4 * features, inputs)
  small = max(x.shape[1:-1]) <= SMALL[form()] and not filtered
  if small or (rewrites() and features <= FEW):
    kernel = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)
    return _taps(nd)[1](project(x, kernel))
  if not rewrites():
    return _double(x, kernel)
  if filtered:
    # The transpose of `downsample_conv`.
    kernel = _split_axes(kernel.swapaxes(-1, -2), nd)
    y = winograd.correlate(
      x, kernel.reshape(2, 2, 4 * features, inputs), transposed=True
    )
    n, height, width, _ = y.shape
    y = _interleave(y.reshape(n, height, width, 4, features), nd)
    return y[:, 1:-1, 1:-1]
  return _by_phases(x, kernel)


def _by_phases(x, kernel):
  """`upsample_conv`: each output parity sees two inputs per axis. One 2x..x2
  convolution makes all parities at once, then they are shifted and interleaved.
  """
  nd, features = kernel.ndim - 2, kernel.shape[-1]
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


@jax.custom_vjp
def _double(x, kernel):
  """`upsample_conv`, kernel 4, by the primitive; to few features by phases."""
  nd = kernel.ndim - 2
  if form() == 'aligned' and kernel.shape[-1] < ALIGNED:
    return _by_phases(x, kernel)
  return _convolve(x, kernel, (1,) * nd, [(2, 2)] * nd, double=True)


def _double_backward(saved, g):
  """Gradients as those of a strided convolution: in autodiff's cuDNN sees a
  kernel as large as the picture, and the samples as channels."""
  x, kernel = saved
  halve = lambda kernel: downsample_conv(g, kernel.swapaxes(-1, -2))
  change, pull = jax.vjp(halve, kernel)
  return change, *pull(x)


_double.defvjp(lambda x, kernel: (_double(x, kernel), (x, kernel)),
               _double_backward)


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
  if max(x.shape[1:-1]) <= SMALL['rewritten']:  # Adding taps costs more.
    for axis in range(1, 1 + nd):
      x = jnp.repeat(x, 2, axis)
    return correlate(x, kernel, 1)
  # Row k: which taps a transposed convolution's tap k is the sum of.
  merged = jnp.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], x.dtype)
  for axis in range(nd):
    kernel = jnp.moveaxis(jnp.tensordot(merged, kernel, (1, axis)), 0, axis)
  return upsample_conv(x, kernel)


def _taps(nd, k=4, stride=2):
  """What each of k x..x k taps sees, side by side, and the way back; padding 1.

  Returns:
    Two functions: [N, *spatial, C] -> [N, *spatial / stride, k**nd * C], and
    its adjoint, which adds up what falls on the same pixel.
  """

  def see(x):
    sides, x = x.shape[1:-1], jnp.pad(x, [(0, 0), *[(1, 1)] * nd, (0, 0)])
    return jnp.concatenate([
      x[(slice(None), *(slice(t, t + n - stride + 1, stride)
                        for t, n in zip(tap, sides)))]
      for tap in itertools.product(range(k), repeat=nd)
    ], -1)

  def add(y):
    y = y.reshape(*y.shape[:-1], *(k,) * nd, -1)
    for axis in range(1, 1 + nd):
      first, *middle, last = jnp.unstack(y, axis=1 + nd)
      if stride == 1:
        y = _shift(first, axis, -1) + middle[0] + _shift(last, axis, 1)
        continue
      even = middle[0] + _shift(last, axis, 1)
      odd = middle[1] + _shift(first, axis, -1)
      y = jnp.stack([even, odd], axis + 1)
      y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    return y

  return winograd.adjoints(see, add)


def _shift(x, axis, by):
  """x[i - by] along an axis, zeros from outside."""
  zero = jnp.zeros((), x.dtype)
  return lax.pad(x, zero, [
    (by, -by, 0) if n == axis else (0, 0, 0) for n in range(x.ndim)
  ])


def _interleave(x, nd):
  """[N, *spatial, 2**nd, C] -> [N, 2 * spatial, C]."""
  n, *spatial, _, channels = x.shape
  x = x.reshape(n, *spatial, *(2,) * nd, channels)
  order = [0]
  for axis in range(nd):
    order += [1 + axis, 1 + nd + axis]
  x = x.transpose(*order, 2 * nd + 1)
  return x.reshape(n, *[2 * s for s in spatial], channels)


def correlate(x, kernel, pad=0):
  """Convolution with stride 1, `pad` zeros on each side.

  Args:
    x: [N, *spatial, C].
    kernel: [k, ..., C, O].
    pad: zeros on each side.

  Returns:
    [N, *spatial + 2 pad - k + 1, O].
  """
  nd = kernel.ndim - 2
  inputs, features = kernel.shape[-2:]
  square = nd == 2 and kernel.shape[0] == kernel.shape[1]
  few = features <= {'rewritten': FEW, 'aligned': ALIGNED // 2}.get(form(), 0)
  if square and few and 4 * features <= inputs and len(kernel) > 1:
    return _by_columns(x, kernel, pad)
  if rewrites() and square:
    if len(kernel) == 3 and pad == 1 and _is_large(kernel, x):
      kernel = kernel.reshape(-1, features)
      return project(_taps(nd, 3, 1)[0](x), kernel)
    padded = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    tile = _tile(x, _count(padded), len(kernel), inputs, features)
    if tile:
      return winograd.correlate(padded, kernel, tile=tile)
  return _convolve(x, kernel, (1,) * nd, [(pad, pad)] * nd)


def _by_columns(x, kernel, pad):
  """`correlate` to few features: those of all columns of the kernel from one
  convolution down, then shifted and added; its products are k times as wide.

  Four times as fast as the plain form with its gradient, seven for 7x7 (on an
  H100 three and five times).
  """
  k, _, inputs, features = kernel.shape
  tall = kernel.swapaxes(1, 2).reshape(k, 1, inputs, k * features)
  y = _convolve(x, tall, (1, 1), [(pad, pad), (0, 0)])
  y = jnp.pad(y, [(0, 0), (0, 0), (pad, pad), (0, 0)])
  width = y.shape[2] - k + 1
  return sum(
    y[:, :, i : i + width, i * features : (i + 1) * features] for i in range(k)
  )


def _count(x):
  """Pixels in all; one picture where, in an exported program, none is said."""
  number = x.shape[0] if isinstance(x.shape[0], int) else 1
  return number * math.prod(x.shape[1:-1])


def _is_large(kernel, x):
  """More channels than pixels: turning it over costs more than its products."""
  return min(kernel.shape[-2:]) >= max(64, _count(x))


def _filter_pays(x, pixels, *channels):
  """Measured: with fewer pixels or channels the transforms cost more."""
  wide = x.ndim == 4 and x.dtype == jnp.float32 and min(channels) >= 64
  return rewrites() and wide and pixels >= 1000


def _tile(x, pixels, k, *channels):
  """Side of the tiles of minimal filtering, 0 where it does not pay. Measured:
  small ones, which transform a kernel less, do for half as many pixels if the
  kernel is large."""
  if _filter_pays(x, pixels, *channels):
    return winograd.TILES.get(k, 0)
  large = k == 3 and math.prod(channels) >= 2**16
  return 2 if large and _filter_pays(x, 2 * pixels, *channels) else 0


def project(x, kernel):
  """x [..., C] @ kernel [C, O]. As one matrix: the gradient of a product with
  more axes turns over one of its sides."""
  y = winograd.product(x.reshape(-1, x.shape[-1]), kernel)
  return y.reshape(*x.shape[:-1], y.shape[-1])


def normal_init(std=0.02):
  """Weights ~ N(0, std), as DCGAN's."""
  return nn.initializers.normal(std)


def space_to_depth(video, patch):
  """[B, T, H, W, C] -> [B, T, H/p, W/p, p*p*C]: each patch one pixel."""
  return rearrange(
    video, 'b t (h p) (w q) c -> b t h w (p q c)', p=patch, q=patch
  )


def depth_to_space(video, patch):
  """Inverts space_to_depth."""
  return rearrange(
    video, 'b t h w (p q c) -> b t (h p) (w q) c', p=patch, q=patch
  )


class Conv(nn.Module):
  """Convolution with bias; `stride` 1 ('same' by `pad`), 2, or -2 (doubling).

  Attributes:
    features: output channels.
    kernel: its side.
    stride: 1, 2 (kernel 3 or 4, padding 1; 7, padding 3), -2 (transposed).
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
      return add_bias(downsample_conv(x, kernel), bias)
    if self.stride == -2:
      up = nearest_conv if self.nearest else upsample_conv
      return add_bias(up(x, kernel), bias)
    if self.reflect:
      padding = [(0, 0), *[(self.pad, self.pad)] * self.nd, (0, 0)]
      return add_bias(
        correlate(jnp.pad(x, padding, mode='reflect'), kernel), bias
      )
    return add_bias(correlate(x, kernel, self.pad), bias)


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


def leaky_relu(x):
  """Slope 0.2 below zero."""
  return jax.nn.leaky_relu(x, 0.2)


def num_halvings(size):
  """log2 of a side, which must be a power of two."""
  levels = int(math.log2(size)) if size > 0 else 0
  if 2**levels != size:
    raise ValueError(f'A U-Net side must be a power of two, not {size}.')
  return levels
