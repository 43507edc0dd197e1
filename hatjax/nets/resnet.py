"""ResNet-18 as the encoder of a U-Net (He et al., CVPR 2016).

Its parameters and statistics have torchvision's shapes (in HWIO) and structure,
so that weights learned on ImageNet fit; the convolutions' biases, which
torchvision lacks, are then zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hatjax.nets import layers

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
WIDTHS = (1, 1, 2, 4, 8)  # of the halvings, in units of `width`
_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class _Step(nn.Module):
  """Convolution and batch norm."""

  features: int
  kernel: int = 3
  stride: int = 1
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    stride = self.stride
    if self.kernel == 1:
      x, stride = x[:, ::stride, ::stride], 1
    if stride == -2:
      options = dict(nearest=True)
    else:
      options = dict(pad=self.kernel // 2)
    x = layers.Conv(
      self.features, self.kernel, stride, kernel_init=_init, dtype=self.dtype,
      name='conv', **options,
    )(x)
    axis = None if self.is_initializing() else self.axis_name
    return nn.BatchNorm(
      not train, momentum=0.9, epsilon=1e-5, axis_name=axis, dtype=self.dtype,
      name='norm',
    )(x)


class _Basic(nn.Module):
  """The two-convolution block of ResNet-18."""

  features: int
  stride: int = 1
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    common = dict(axis_name=self.axis_name, dtype=self.dtype)
    h = _Step(self.features, 3, self.stride, name='step_1', **common)(x, train)
    h = _Step(self.features, name='step_2', **common)(nn.relu(h), train)
    if x.shape != h.shape:
      x = _Step(
        self.features, 1, self.stride, name='shortcut', **common
      )(x, train)
    return nn.relu(x + h)


class ResNetUNet(nn.Module):
  """Encoder ResNet-18, decoder of doublings with a skip at every size.

  Attributes:
    width: channels of the first stage; 64 is ResNet-18.
    num_halvings: up to 5, as ResNet-18; fewer for small pictures.
    stop: doublings that are left out at the end, so that the side of the
      result is the picture's over 2^stop.
    axis_name: see `motion_transfer.Normalize`.
    dtype: of the computation.
  """

  width: int = 64
  num_halvings: int = 5
  stop: int = 0
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image, train):
    """Picture in [0, 1] -> features [N, H / 2^stop, W / 2^stop, C]."""
    common = dict(axis_name=self.axis_name, dtype=self.dtype)
    x = (image - jnp.asarray(MEAN)) / jnp.asarray(STD)
    skips = [x.astype(self.dtype)]
    h = nn.relu(_Step(self.width, 7, 2, name='stem', **common)(skips[0], train))
    skips.append(h)
    for stage in range(1, self.num_halvings):
      width, stride = self.width * WIDTHS[stage], 2
      if stage == 1:
        h, stride = max_pool(h), 1
      for i in range(2):
        h = _Basic(
          width, 1 if i else stride, name=f'stage_{stage}_{i}', **common
        )(h, train)
      skips.append(h)
    h = skips.pop()
    for level in reversed(range(self.stop, self.num_halvings)):
      width = self.width * WIDTHS[max(level - 1, 0)] // (1 if level else 2)
      h = nn.relu(_Step(width, 3, -2, name=f'up_{level}', **common)(h, train))
      h = jnp.concatenate([h, skips.pop()], -1)
    return h


def max_pool(x):
  """Maxima of 3x3 windows, stride 2, padding 1; even sizes."""
  pads = [(0, 0), (1, 1), (1, 1), (0, 0)]
  x = jnp.pad(x, pads, constant_values=-jnp.inf)
  for axis in (1, 2):  # Slices: the primitive's gradient is slow on a CPU.
    n = x.shape[axis]
    parts = [
      jax.lax.slice_in_dim(x, k, n - 2 + k, 2, axis) for k in range(3)
    ]
    x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
  return x
