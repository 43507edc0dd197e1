"""Minimal filtering: convolutions by fewer products (Winograd 1980).

Pictures are [N, H, W, C]. Pixels are summed by small constants before and
after, so the products that are left are those of matrices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Side of a kernel -> of the tiles of minimal filtering: up to 4 times fewer
# products, errors 3e-6 instead of 1e-6. Larger ones cost more accuracy.
TILES = {2: 4, 3: 4, 4: 3}
# From this side on a transpose of one or two pictures is a convolution of
# padded ones: one more row of tiles, but none that overlap where their outputs
# are added up. (A step of HAT-cGAN, five pictures, is 3 % slower by it.)
PADDED = 64


def adjoints(forward, backward):
  """Two linear maps, each the gradient of the other: what autodiff makes of
  slices, a sum of padded pieces, is slow on XLA:CPU."""
  there, back = jax.custom_vjp(forward), jax.custom_vjp(backward)
  there.defvjp(lambda x: (forward(x), None), lambda _, g: (back(g),))
  back.defvjp(lambda x: (backward(x), None), lambda _, g: (there(g),))
  return there, back


@jax.custom_vjp
def product(x, kernel):
  """x [*, N, C] @ kernel [*, C, O]. Of a kernel's gradient autodiff makes
  [*, O, C] and turns it: over several devices only after their sum, where XLA
  can no longer swap the factors, so that all of Adam reads it across."""
  return x @ kernel


def _product_backward(saved, g):
  x, kernel = saved
  return (
    jnp.einsum('...no,...co->...nc', g, kernel),
    jnp.einsum('...nc,...no->...co', x, g),
  )


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


@functools.cache
def minimal_filter(m, r):
  """Toom and Cook's F(m, r): m outputs of r taps by n = m + r - 1 products.

  y = a ((g k) * (b x)), Winograd 1980, by interpolation at n - 1 small points
  and infinity.

  Returns:
    float32 a [m, n], g [n, r], b [n, n].
  """
  points = np.array([0, 1, -1, 0.5, -2][: m + r - 2])
  a, g, b = (np.zeros((m + r - 1, k)) for k in (m, r, m + r - 1))
  for i, point in enumerate(points):
    others = np.delete(points, i)
    a[i] = point ** np.arange(m)
    g[i] = point ** np.arange(r) / np.prod(point - others)
    b[i, :-1] = np.poly(others)[::-1]
  a[-1, -1] = g[-1, -1] = 1
  b[-1] = np.poly(points)[::-1]
  return tuple(matrix.astype(np.float32) for matrix in (a.T, g, b))


def correlate(x, kernel, transposed=False, tile=None):
  """Convolution without padding [N, H, W, C] -> [N, H-r+1, W-r+1, O], or its
  transpose the other way; kernel [r, r, C, O]. `tile`: default TILES[r]."""
  r = len(kernel)
  few = x.shape[0] in (1, 2)  # False where an exported program leaves it open
  if transposed and min(x.shape[1:3]) >= PADDED and few:
    x = jnp.pad(x, [(0, 0), (r - 1, r - 1), (r - 1, r - 1), (0, 0)])
    return correlate(x, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), tile=tile)
  change = -1 if transposed else 1
  m = tile or TILES[r]
  a, g, b = minimal_filter(m, r)
  other = [side - change * (r - 1) for side in x.shape[1:3]]
  large, small = (x.shape[1:3], other)[::change]
  tiles = [-(-side // m) for side in small]
  cut, add = _tiling(b, m, large, tiles), _tiling(a.T, m, small, tiles)
  taps = np.einsum('ip,jq->jipq', g, g).reshape(-1, r * r)
  taps = (taps @ kernel.reshape(r * r, -1)).reshape(-1, *kernel.shape[2:])
  if transposed:
    return cut[1](jnp.einsum('kpo,kco->kpc', add[0](x), taps))
  return add[1](product(cut[0](x), taps))


def _tiling(weights, step, sides, tiles):
  """Weighted sums over the pixels of each tile, and the way back.

  Args:
    weights: [n, w], of the w pixels of a tile in each row and column.
    step: from tile to tile, w <= 2 step.
    sides: of the picture.
    tiles: in each direction.

  Returns:
    Two functions: [N, *sides, C] -> [n * n, N * tiles, C] and its adjoint.
  """
  n, w = weights.shape
  more = [(t - 1) * step + w - side for t, side in zip(tiles, sides)]

  def spread(x, axis, t):
    parts = [
      lax.slice_in_dim(x, j, j + (t - 1) * step + 1, step, axis)
      for j in range(w)
    ]
    return jnp.stack([_weigh(row, parts) for row in weights])

  def gather(y, axis):
    x = total(weights[:, :step], y, axis)
    if w > step:  # A tile's last pixels are the first of the next.
      last = np.pad(weights[:, step:], ((0, 0), (0, 2 * step - w)))
      pad = lambda a, *edges: jnp.pad(
        a, [edges if k == axis else (0, 0) for k in range(a.ndim)]
      )
      x = pad(x, 0, 1) + pad(total(last, y, axis), 1, 0)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def total(weights, y, axis):
    """A sum: what is stacked XLA:CPU computes by branches in what reads it."""
    shape = [1] * (y.ndim + 1)
    shape[0], shape[axis + 2] = weights.shape
    y = jnp.expand_dims(y, axis + 2)
    return (y * weights.reshape(shape).astype(y.dtype)).sum(0)

  def forward(x):
    x = jnp.pad(x, [(0, 0), *((0, k) for k in more), (0, 0)])
    y = spread(spread(x, 1, tiles[0]), 3, tiles[1])
    return y.reshape(n * n, -1, x.shape[-1])

  def backward(y):
    y = gather(y.reshape(n, n, -1, *tiles, y.shape[-1]), 3)
    return gather(y, 1)[:, : sides[0], : sides[1]]

  return adjoints(forward, backward)


def _weigh(weights, parts):
  # By lax: a step has thousands of these, and jnp takes its time to trace them.
  scale = lambda x, k: x if k == 1 else lax.mul(x, x.dtype.type(k))
  terms = [scale(x, k) for k, x in zip(weights, parts) if k]
  return functools.reduce(lax.add, terms)
