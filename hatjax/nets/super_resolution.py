"""The face super-resolution U-Net of the motion-transfer paper (fig. 3).

Karim and Saleh (iJIM 16(10), 2022), section 3.2: five 3x3 convolutions that
halve, five transposed ones that double, skips between mirrored levels. Widths,
activations and the way around the net are not given there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hatjax.nets import layers

WIDTHS = (1, 2, 4, 8, 8)  # of the halvings, in units of `width`
LEVELS = len(WIDTHS)
_init = nn.initializers.he_normal()


class SuperResolution(nn.Module):
  """bicubic(x) + net(x); starts as the bicubic enlargement itself.

  Attributes:
    width: channels of the first level.
    scale: 1 restores at the same size, 2 doubles it with one more block.
    dtype: of the computation.
  """

  width: int = 64
  scale: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[N, H, W, 3] in [-1, 1], sides multiples of 32 -> [N, s H, s W, 3]."""
    skips = [x.astype(self.dtype)]
    conv = lambda features, name, **options: layers.Conv(
      features, 3, dtype=self.dtype, name=name, **options
    )
    for i, factor in enumerate(WIDTHS):
      down = conv(factor * self.width, f'down_{i}', stride=2, kernel_init=_init)
      skips.append(layers.leaky_relu(down(skips[-1])))
    h = skips.pop()
    for i in reversed(range(LEVELS)):
      features = WIDTHS[max(i - 1, 0)] * self.width
      up = conv(features, f'up_{i}', stride=-2, kernel_init=_init)
      h = jnp.concatenate([nn.relu(up(h)), skips.pop()], -1)
    if self.scale == 2:
      up = conv(self.width, 'enlarge', stride=-2, kernel_init=_init)
      h = nn.relu(up(h))
    change = conv(3, 'last', kernel_init=nn.initializers.zeros)(h)
    return enlarge(x, self.scale) + change.astype(jnp.float32)


def enlarge(x, scale):
  """[N, H, W, C] -> [N, scale H, scale W, C], bicubic."""
  if scale == 1:
    return x
  n, h, w, c = x.shape
  return jax.image.resize(x, (n, scale * h, scale * w, c), 'cubic')
