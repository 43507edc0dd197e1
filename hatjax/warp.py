"""Coordinate grids and bilinear warps, differentiable in image and motion.

Images are float [B, H, W, C]; coordinates are normalized, x to the right and
y down, -1 and 1 being the centres of the outermost pixels. A map says, for
each output place, where to look in the input; outside the image the nearest
edge pixel answers, unless told otherwise. Everything is jittable and made of
static shapes.
"""

import jax
import jax.numpy as jnp

# Up to this side the matrix form is faster on CPU; it has no scatter in its
# backward pass, so it is deterministic on a GPU as well.
MATRIX_MAX_SIDE = 32
OUTSIDE = ('edge', 'zero', 'reflect')


def grid(height, width):
  """Normalized coordinates (x, y) of every pixel, float32 [H, W, 2]."""
  ys = jnp.linspace(-1.0, 1.0, height) if height > 1 else jnp.zeros(1)
  xs = jnp.linspace(-1.0, 1.0, width) if width > 1 else jnp.zeros(1)
  return jnp.stack(jnp.meshgrid(xs, ys), -1)


def identity_affine():
  """The 2x3 map [I | 0]."""
  return jnp.eye(2, 3)


def affine_grid(theta, height, width):
  """Where each output place looks: x' = A x + b (HAT-cGAN-DIFF eq. 2).

  Args:
    theta: [..., 2, 3], rows (a0 a1 a2) and (b0 b1 b2).
    height: output rows.
    width: output columns.

  Returns:
    [..., H, W, 2] normalized input coordinates.
  """
  xy = grid(height, width)
  linear = jnp.einsum('...ij,hwj->...hwi', theta[..., :2], xy)
  return linear + theta[..., None, None, :, 2]


def _to_pixels(where, height, width, outside='edge', corners=True):
  """Pixel coordinates (x, y); for 'zero' up to two pixels outside."""
  pixels = []
  for axis, size in enumerate((width, height)):
    position = where[..., axis]
    if corners:
      position = (position + 1) * (0.5 * (size - 1))
    else:
      position = (position + 1) * (0.5 * size) - 0.5
    if outside == 'reflect':
      low, span = (0, size - 1) if corners else (-0.5, size)
      span = max(span, 1)
      folded = jnp.mod(position - low, 2 * span)
      position = low + jnp.minimum(folded, 2 * span - folded)
    reach = 2 if outside == 'zero' else 0
    pixels.append(jnp.clip(position, -reach, size - 1 + reach))
  return pixels


def _tent(position, size):
  """Bilinear weights max(0, 1 - |position - i|), [..., size]."""
  away = jnp.abs(position[..., None] - jnp.arange(size))
  return jnp.maximum(0.0, 1.0 - away)


def warp_matrix(where, height, width, outside='edge', corners=True):
  """The bilinear warp as separable tent weights.

  Args:
    where: [..., Q, 2] normalized input coordinates of Q output places.
    height: input rows.
    width: input columns.
    outside: see `warp_frames`.
    corners: see `warp_frames`.

  Returns:
    (rows [..., Q, H], columns [..., Q, W]); output q is
    sum_ij rows[q, i] columns[q, j] image[i, j].
  """
  x, y = _to_pixels(where, height, width, outside, corners)
  return _tent(y, height), _tent(x, width)


def warp_frames(image, where, form='auto', outside='edge', corners=True):
  """Samples `image` bilinearly.

  Args:
    image: [B, H, W, C].
    where: [B, H', W', 2] normalized input coordinates.
    form: 'gather' (four corners), 'matrix' (tent weights, deterministic
      backward pass everywhere), or 'auto' by size.
    outside: what is outside the image: the nearest 'edge' pixel, 'zero', or
      its mirror image ('reflect').
    corners: -1 and 1 are the centres of the outermost pixels (PyTorch's
      align_corners=True); if False their outer edges.

  Returns:
    [B, H', W', C].
  """
  if outside not in OUTSIDE:
    raise ValueError(f'outside is {outside!r}. Choose one of: {OUTSIDE}.')
  _, height, width, _ = image.shape
  if form == 'auto':
    small = max(height, width) <= MATRIX_MAX_SIDE
    form = 'matrix' if small else 'gather'
  if form == 'matrix':
    rows, columns = warp_matrix(where, height, width, outside, corners)
    rows, columns = rows.astype(image.dtype), columns.astype(image.dtype)
    mixed = jnp.einsum('bpqi,bijc->bpqjc', rows, image)
    return jnp.einsum('bpqj,bpqjc->bpqc', columns, mixed)
  if form != 'gather':
    raise ValueError(f"Unknown warp form {form!r}: 'auto', 'gather', 'matrix'.")
  if outside != 'zero':
    return _gather(image, where, outside, corners)
  # A frame of zeros, so that what is outside fades out.
  _, height, width, _ = image.shape
  framed = jnp.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)))
  x, y = _to_pixels(where, height, width, outside, corners)
  return _sample(framed, x + 2, y + 2)


def _gather(image, where, outside='edge', corners=True):
  _, height, width, _ = image.shape
  return _sample(image, *_to_pixels(where, height, width, outside, corners))


def _sample(image, x, y):
  """Bilinear samples at pixel coordinates [B, ...] inside the image."""
  b, height, width, channels = image.shape
  x0 = jnp.clip(jnp.floor(x), 0, max(width - 2, 0))
  y0 = jnp.clip(jnp.floor(y), 0, max(height - 2, 0))
  fx, fy = (x - x0)[..., None], (y - y0)[..., None]
  x0, y0 = x0.astype(jnp.int32), y0.astype(jnp.int32)
  x1, y1 = jnp.minimum(x0 + 1, width - 1), jnp.minimum(y0 + 1, height - 1)
  flat = image.reshape(b, height * width, channels)

  def corner(yy, xx):
    index = (yy * width + xx).reshape(b, -1, 1)
    return jnp.take_along_axis(flat, index, axis=1).reshape(
      *x.shape, channels
    )

  fx, fy = fx.astype(image.dtype), fy.astype(image.dtype)
  top = corner(y0, x0) * (1 - fx) + corner(y0, x1) * fx
  bottom = corner(y1, x0) * (1 - fx) + corner(y1, x1) * fx
  return top * (1 - fy) + bottom * fy


def warp_parts(image, theta, maps, form='auto'):
  """Each part of an image moves by its own affine map.

  w(t) = M_0 * image + sum_p M_p * warp(image, theta_{t,p}).

  Args:
    image: [B, H, W, C].
    theta: [B, T, P, 2, 3].
    maps: [B, H, W, 1 + P], summing to 1 over the last axis; M_0 stays still.
    form: as in `warp_frames`; the matrix form merges all parts into one
      product.

  Returns:
    [B, T, H, W, C].
  """
  b, height, width, channels = image.shape
  t, parts = theta.shape[1:3]
  if form == 'auto':
    small = max(height, width) <= MATRIX_MAX_SIDE
    form = 'matrix' if small else 'gather'
  still = (maps[..., :1] * image)[:, None]
  where = affine_grid(theta, height, width)  # [B, T, P, H, W, 2]
  moving = maps[..., 1:]
  if form == 'gather':
    flat = where.transpose(0, 1, 3, 2, 4, 5).reshape(
      b, t * height * parts, width, 2
    )
    warped = _gather(image, flat)
    warped = warped.reshape(b, t, height, parts, width, channels)
    moved = jnp.einsum('bthpwc,bhwp->bthwc', warped, moving)
    return still + moved
  rows, columns = warp_matrix(
    where.reshape(b, t, parts, height * width, 2), height, width
  )
  rows = rows * moving.reshape(b, 1, -1, parts).transpose(0, 1, 3, 2)[..., None]
  weights = jnp.einsum('btpqi,btpqj->btqij', rows, columns)
  weights = weights.reshape(b, t * height * width, height * width)
  flat = image.reshape(b, height * width, channels)
  moved = jnp.einsum('bqk,bkc->bqc', weights.astype(image.dtype), flat)
  return still + moved.reshape(b, t, height, width, channels)


# -- thin plates -------------------------------------------------------------


def random_thin_plate(
  rng, batch, affine_std=0.05, plate_std=0.005, plate_points=5
):
  """Random smooth maps, one per sample, near the identity.

  An affine map with noise N(0, affine_std), and, added to both coordinates,
  sum_c w_c r_c^2 log(r_c + 1e-6) over a grid of control points c, with w ~
  N(0, plate_std) and r the L1 distance, as the released first-order code has
  it.

  Returns:
    dict: theta [B, 2, 3], weights [B, plate_points^2].
  """
  rng_affine, rng_plate = jax.random.split(rng)
  noise = jax.random.normal(rng_affine, (batch, 2, 3))
  weights = jax.random.normal(rng_plate, (batch, plate_points**2))
  return {
    'theta': identity_affine() + affine_std * noise,
    'weights': plate_std * weights,
  }


def thin_plate_points(plate, points):
  """Points [B, N, 2] under the maps of `random_thin_plate`."""
  side = round(plate['weights'].shape[-1] ** 0.5)
  control = grid(side, side).reshape(-1, 2)
  theta = plate['theta']
  linear = jnp.einsum('bij,bnj->bni', theta[..., :2], points)
  r = jnp.abs(points[:, :, None] - control).sum(-1)
  bend = jnp.square(r) * jnp.log(r + 1e-6)
  bend = jnp.einsum('bnc,bc->bn', bend, plate['weights'])
  return linear + theta[:, None, :, 2] + bend[..., None]


def thin_plate_jacobian(plate, points):
  """Derivatives [B, N, 2, 2] of the maps at points [B, N, 2]."""
  one = lambda plate, point: thin_plate_points(
    jax.tree.map(lambda x: x[None], plate), point[None, None]
  )[0, 0]
  return jax.vmap(jax.vmap(jax.jacfwd(one, 1), (None, 0)))(plate, points)


def thin_plate_frames(plate, image, form='auto'):
  """`image` [B, H, W, C] looked at through the maps, mirrored outside."""
  b, height, width, _ = image.shape
  points = grid(height, width).reshape(1, -1, 2).repeat(b, 0)
  where = thin_plate_points(plate, points).reshape(b, height, width, 2)
  return warp_frames(image, where, form, 'reflect')


def blend_frames(video, num_frames):
  """[B, T, H, W, C] with another number of frames, evenly spread over time.

  Each is blended from the two that are nearest; T frames stay as they are.
  """
  count = video.shape[1]
  if num_frames == count:
    return video
  at = jnp.linspace(0, count - 1, num_frames)
  weights = jnp.maximum(0, 1 - jnp.abs(at[:, None] - jnp.arange(count)))
  return jnp.einsum('nt,bthwc->bnhwc', weights, video)
