"""Nets of motion transfer: keypoints, dense motion, generator, discriminator.

Karim and Saleh, "Face Image Animation with Adversarial Learning and Motion
Transfer" (iJIM 16(10), 2022), and the first-order motion model (Siarohin et
al., NeurIPS 2019) whose released code fills its gaps.

Pictures at the doors are [N, H, W, 3] in [-1, 1]; inside they are [0, 1] as in
the released code. Keypoints are a dict: value [N, K, 2], normalized (x, y), and
jacobian [N, K, 2, 2], float32; flow is [N, h, w, 2], where each place looks in
the source. `train` chooses between the statistics of the batch and the stored
ones where `norm` is 'batch'.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hatjax import warp
from hatjax.nets import layers, norms

NORMS = ('batch', 'group')
WARPS = ('features', 'image')
# PyTorch's default for a convolution: U(-1, 1) / sqrt(fan in).
torch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def to_unit(x):
  """[-1, 1] -> [0, 1]."""
  return 0.5 * (x + 1)


def shrink(x, scale):
  """Down-sampling with a Gaussian against aliasing, as the released code.

  Args:
    x: [N, H, W, C].
    scale: s; the deviation is (s - 1) / 2 pixels, zeros are outside.

  Returns:
    [N, H / s, W / s, C]; its pixel i is centred on pixel s i.
  """
  if scale == 1:
    return x
  rows, columns = (
    jnp.asarray(_blur(n, scale), x.dtype) for n in x.shape[1:3]
  )
  return jnp.einsum('ih,nhwc,jw->nijc', rows, x, columns)


def _blur(size, scale):
  """float64 [size / scale, size]: each row a Gaussian's weights."""
  sigma = (scale - 1) / 2
  reach = round(4 * sigma)
  places = np.arange(-reach, reach + 1)
  weights = np.exp(-(places**2) / (2 * sigma**2))
  away = np.arange(size) - scale * np.arange(size // scale)[:, None]
  kernel = np.where(
    abs(away) <= reach, np.exp(-(away**2) / (2 * sigma**2)), 0
  )
  return kernel / weights.sum()


def gaussians(points, height, width, variance=0.01):
  """exp(-|z - p|^2 / (2 variance)) of points [N, K, 2]: [N, H, W, K]."""
  away = warp.grid(height, width)[None, :, :, None] - points[:, None, None]
  return jnp.exp(-0.5 * jnp.square(away).sum(-1) / variance)


def inverse_2x2(m):
  """Inverses of [..., 2, 2]."""
  a, b, c, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 0], m[..., 1, 1]
  rows = [jnp.stack([d, -b], -1), jnp.stack([-c, a], -1)]
  return jnp.stack(rows, -2) / (a * d - b * c)[..., None, None]


def pool(x):
  """Means of 2x2 cells; an odd last row or column is left out."""
  n, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def conv(features, kernel=3, dtype=jnp.float32, **options):
  """A convolution that keeps the size, started as PyTorch starts it."""
  options = {'pad': kernel // 2, 'kernel_init': torch_init} | options
  return layers.Conv(features, kernel, dtype=dtype, **options)


class Normalize(nn.Module):
  """Batch or group norm; the statistics of a batch are float32."""

  norm: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    if self.norm == 'group':
      groups = np.gcd(min(32, x.shape[-1] // 2), x.shape[-1])
      return nn.GroupNorm(int(groups), epsilon=1e-5, dtype=self.dtype)(x)
    axis = None if self.is_initializing() else self.axis_name
    return nn.BatchNorm(
      not train, momentum=0.9, epsilon=1e-5, axis_name=axis, dtype=self.dtype
    )(x)


class Block(nn.Module):
  """Convolution, norm, ReLU; `resize` 'up' doubles before, 'down' halves
  after."""

  features: int
  kernel: int = 3
  resize: str = ''
  norm: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    up = dict(stride=-2, nearest=True) if self.resize == 'up' else {}
    x = conv(self.features, self.kernel, self.dtype, name='conv', **up)(x)
    x = Normalize(self.norm, self.axis_name, self.dtype, name='norm')(x, train)
    x = nn.relu(x)
    return pool(x) if self.resize == 'down' else x


class ResidualBlock(nn.Module):
  """x plus twice (norm, ReLU, convolution)."""

  features: int
  norm: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    h = x
    for i in (1, 2):
      norm = Normalize(self.norm, self.axis_name, self.dtype, name=f'norm_{i}')
      h = nn.relu(norm(h, train))
      h = conv(self.features, 3, self.dtype, name=f'conv_{i}')(h)
    return x + h


class Hourglass(nn.Module):
  """Halves `num_blocks` times, doubles as often; every level has a skip."""

  width: int = 32
  num_blocks: int = 5
  max_width: int = 1024
  norm: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    """[N, h, w, C] -> [N, h, w, width + C]."""
    common = dict(
      norm=self.norm, axis_name=self.axis_name, dtype=self.dtype
    )
    width = lambda i: min(self.max_width, self.width * 2**i)
    skips = [x.astype(self.dtype)]
    for i in range(self.num_blocks):
      down = Block(width(i + 1), resize='down', name=f'down_{i}', **common)
      skips.append(down(skips[-1], train))
    h = skips.pop()
    for i in reversed(range(self.num_blocks)):
      h = Block(width(i), resize='up', name=f'up_{i}', **common)(h, train)
      h = jnp.concatenate([h, skips.pop()], -1)
    return h


class KeypointDetector(nn.Module):
  """K soft-argmax maps and, optionally, a Jacobian at each keypoint.

  Attributes:
    features: module (x, train) -> [N, h, w, C] on the picture in [0, 1].
    num_keypoints: K.
    jacobian: the first-order model's; without, they are the identity.
    kernel: of the maps.
    pad: zero padding of the maps.
    scale: the picture is shrunk by this first.
    temperature: of the softmax.
  """

  features: nn.Module
  num_keypoints: int = 10
  jacobian: bool = True
  kernel: int = 7
  pad: int = 0
  scale: int = 4
  temperature: float = 0.1

  @nn.compact
  def __call__(self, image, train=False):
    k = self.num_keypoints
    h = self.features(shrink(to_unit(image), self.scale), train)
    h = h.astype(jnp.float32)
    logits = conv(k, self.kernel, pad=self.pad, name='maps')(h)
    n, height, width, _ = logits.shape
    heat = jax.nn.softmax(logits.reshape(n, -1, k) / self.temperature, 1)
    places = warp.grid(height, width).reshape(-1, 2)
    value = jnp.einsum('npk,pc->nkc', heat, places)
    if not self.jacobian:
      eye = jnp.broadcast_to(jnp.eye(2), (n, k, 2, 2))
      return {'value': value, 'jacobian': eye}
    maps = conv(
      4 * k, self.kernel, pad=self.pad, kernel_init=nn.initializers.zeros,
      bias_init=lambda *_: jnp.tile(jnp.eye(2).ravel(), k), name='jacobians',
    )(h)
    maps = maps.reshape(n, -1, k, 4)
    jacobian = jnp.einsum('npk,npkj->nkj', heat, maps)
    return {'value': value, 'jacobian': jacobian.reshape(n, k, 2, 2)}


def motions(source, driving, height, width):
  """Where each place looks in the source, by each keypoint: T_k and identity.

  T_k(z) = p_source + J_source J_driving^-1 (z - p_driving), eq. 4 of the
  first-order model.

  Args:
    source: keypoints [N, K, ...].
    driving: keypoints [N, K, ...].
    height: rows of places.
    width: columns of places.

  Returns:
    [N, 1 + K, H, W, 2], the background's identity first.
  """
  places = warp.grid(height, width)
  turn = source['jacobian'] @ inverse_2x2(driving['jacobian'])
  away = places - driving['value'][:, :, None, None]
  moved = jnp.einsum('nkij,nkhwj->nkhwi', turn, away)
  moved += source['value'][:, :, None, None]
  still = jnp.broadcast_to(places, (moved.shape[0], 1, height, width, 2))
  return jnp.concatenate([still, moved], 1)


class DenseMotion(nn.Module):
  """One flow out of the motions of all keypoints, and what it cannot show."""

  width: int = 64
  num_blocks: int = 5
  max_width: int = 1024
  scale: int = 4
  variance: float = 0.01
  warp_form: str = 'auto'
  norm: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, source, driving, train=False):
    """
    Args:
      image: source pictures [B, H, W, 3].
      source: their keypoints [B, K, ...].
      driving: keypoints [B T, K, ...], T for each source.
      train: see the module.

    Returns:
      flow [B T, H / scale, W / scale, 2] and visible [..., 1], 1 where the
      warped source may stay, 0 where it is occluded.
    """
    small = shrink(to_unit(image), self.scale)
    b, height, width, _ = small.shape
    n = driving['value'].shape[0]
    source = jax.tree.map(lambda x: jnp.repeat(x, n // b, 0), source)
    where = motions(source, driving, height, width)
    warped = warp.warp_frames(
      small, where.reshape(b, -1, width, 2), self.warp_form, 'zero'
    ).reshape(*where.shape[:4], 3)
    heat = gaussians(driving['value'], height, width, self.variance)
    heat -= gaussians(source['value'], height, width, self.variance)
    heat = jnp.pad(heat, [(0, 0)] * 3 + [(1, 0)])  # none for the background
    pairs = jnp.concatenate([heat[..., None], jnp.moveaxis(warped, 1, 3)], -1)
    h = Hourglass(
      self.width, self.num_blocks, self.max_width, self.norm, self.axis_name,
      self.dtype, name='hourglass',
    )(pairs.reshape(n, height, width, -1), train)
    both = jnp.float32(
      conv(where.shape[1] + 1, 7, self.dtype, name='masks')(h)
    )
    shares = jax.nn.softmax(both[..., :-1], -1)
    flow = jnp.einsum('nhwk,nkhwc->nhwc', shares, where)
    return flow, jax.nn.sigmoid(both[..., -1:])


class Generator(nn.Module):
  """Warps the source and draws what the warp cannot.

  Attributes:
    warp: 'features', the first-order model's: the encoded source is warped and
      occluded; or 'image', the paper's (eq. 1): the warped picture and its flow
      go through the whole net.
    blend: eq. 2, I = E (1 - M) + R M with a mask M beside the picture R that
      the net draws, E being the warped picture. Without, I = R.
    width: channels at full size.
    num_down: halvings.
    num_residual: residual blocks at the bottom.
  """

  warp: str = 'features'
  blend: bool = False
  width: int = 64
  max_width: int = 512
  num_down: int = 2
  num_residual: int = 6
  warp_form: str = 'auto'
  norm: str = 'batch'
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    common = dict(
      norm=self.norm, axis_name=self.axis_name, dtype=self.dtype
    )
    width = lambda i: min(self.max_width, self.width * 2**i)
    levels = range(self.num_down)
    self.first = Block(self.width, 7, **common)
    self.down = [Block(width(i + 1), resize='down', **common) for i in levels]
    self.residual = [
      ResidualBlock(width(self.num_down), **common)
      for _ in range(self.num_residual)
    ]
    self.up = [
      Block(width(i), resize='up', **common) for i in reversed(levels)
    ]
    self.last = conv(3 + self.blend, 7, self.dtype)

  def encode(self, image, train=False):
    """What depends on the source alone: its picture and features."""
    image = to_unit(image)
    code = {'image': image} if self.blend or self.warp == 'image' else {}
    if self.warp == 'features':
      code['features'] = self._shrink(image, train)
    return code

  def move(self, code, flow, visible):
    """The source where the flow has taken it: what frames are drawn from.

    Args:
      code: from `encode`, [B, ...].
      flow: [B T, h, w, 2], where each place comes from; see `warp.grid`.
      visible: [B T, h, w, 1] in [0, 1].

    Returns:
      dict of [B T, ...]: `image` in [0, 1] and `flow`, of the picture's size;
      `features`, occluded; where the generator draws from them.
    """
    moved = {}
    if 'image' in code:
      height, width = code['image'].shape[1:3]
      whole = resize_flow(flow, height, width)
      moved['image'] = self._warp(code['image'], whole)
    if self.warp == 'image':
      return moved | {'flow': whole}
    height, width = code['features'].shape[1:3]
    h = self._warp(code['features'], resize_flow(flow, height, width))
    h *= _resize(visible, height, width).astype(h.dtype)
    return moved | {'features': h}

  def draw(self, moved, train=False):
    """Frames [N, H, W, 3] in [-1, 1] of what `move` returns, [N, ...]."""
    if self.warp == 'image':
      seen = jnp.concatenate([moved['image'], moved['flow']], -1)
      h = self._shrink(seen, train)
    else:
      h = moved['features']
    for block in (*self.residual, *self.up):
      h = block(h, train)
    drawn = jax.nn.sigmoid(jnp.float32(self.last(h)))
    if self.blend:
      mask = drawn[..., 3:]
      drawn = moved['image'] * (1 - mask) + drawn[..., :3] * mask
    return 2 * drawn - 1

  def __call__(self, image, flow, visible, train=False):
    moved = self.move(self.encode(image, train), flow, visible)
    return self.draw(moved, train)

  def _shrink(self, x, train):
    for block in (self.first, *self.down):
      x = block(x, train)
    return x

  def _warp(self, x, flow):
    """Each of x [B, ...] by its T flows of [B T, h, w, 2]."""
    height, width = flow.shape[1:3]
    out = warp.warp_frames(
      x, flow.reshape(x.shape[0], -1, width, 2), self.warp_form, 'zero'
    )
    return out.reshape(-1, height, width, x.shape[-1])


def _resize(x, height, width):
  shape = (x.shape[0], height, width, x.shape[-1])
  return jax.image.resize(x, shape, 'linear', antialias=False)


def resize_flow(flow, height, width):
  """Interpolates how far each place moves, so that what is still stays so."""
  if flow.shape[1:3] == (height, width):
    return flow
  away = flow - warp.grid(*flow.shape[1:3])
  return _resize(away, height, width) + warp.grid(height, width)


class Discriminator(nn.Module):
  """PatchGAN of the released code: unpadded 4x4 convolutions and pooling.

  Returns the maps of all blocks and the logits [N, h, w, 1].
  """

  width: int = 32
  num_blocks: int = 4
  max_width: int = 512
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, heat=None) -> tuple[Sequence[jax.Array], jax.Array]:
    """`heat` [N, H, W, K]: keypoints that the net sees as well."""
    x = to_unit(image)
    x = x if heat is None else jnp.concatenate([x, heat], -1)
    maps, x = [], x.astype(self.dtype)
    for i in range(self.num_blocks):
      width = min(self.max_width, self.width * 2 ** (i + 1))
      x = conv(width, 4, self.dtype, pad=0, name=f'conv_{i}')(x)
      if i:
        gain = self.param(f'scale_{i}', nn.initializers.ones, (width,))
        shift = self.param(f'shift_{i}', nn.initializers.zeros, (width,))
        x = norms.group_norm(x, gain[None], shift[None], None, 1)
      x = layers.leaky_relu(x)
      x = x if i == self.num_blocks - 1 else pool(x)
      maps.append(x)
    return maps, conv(1, 1, self.dtype, pad=0, name='logits')(x)
