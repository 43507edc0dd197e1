"""VGG (Simonyan & Zisserman 2015), as a source of named features.

Configuration D is VGG-16 and VGG-Face (Parkhi et al. 2015), E is VGG-19; a
smaller `width` and fewer `depths` make a stand-in. Images come in [-1, 1], RGB,
of any size; the net moves them to the range its weights were trained for.

Weights are flat {'conv1_1/kernel': HWIO, 'conv1_1/bias': O, ...}, read from
other projects' files by `from_torch`.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from hatjax.nets import layers

D, E = (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)
FC = ('fc6', 'fc7', 'fc8')
# In units of 0..255, RGB: x255 -> (x255 - mean) / std.
RANGES = {
  'face': ((129.1863, 104.7624, 93.594), (1.0, 1.0, 1.0)),
  'imagenet': ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
  'unit': ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
}


class VGG(nn.Module):
  """3x3 convolutions with ReLU in blocks, each followed by a max pool.

  Attributes:
    taps: which features to return: 'conv5_3' (before its ReLU), 'relu5_3',
      'pool5', 'fc6', 'fc7' (after ReLU; 224x224 images only), 'fc8'. Nothing
      beyond the deepest one is computed, or has parameters.
    depths: convolutions of each block.
    width: channels of the first block; they double up to 8 times that.
    fc: features of fc6 and fc7, and of fc8.
    range: one of RANGES, what the weights expect.
    dtype: compute type.
  """

  taps: tuple[str, ...] = ('relu5_3',)
  depths: tuple[int, ...] = D
  width: int = 64
  fc: tuple[int, int] = (4096, 2622)
  range: str = 'face'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """float [B, H, W, 3] -> tuple of features [B, h, w, C], in taps' order."""
    missing, found = set(self.taps), {}
    mean, std = (jnp.array(v) for v in RANGES[self.range])
    x = ((x.astype(jnp.float32) + 1) * 127.5 - mean) / std
    x = x.astype(self.dtype)
    for name in self._order():
      if not missing:
        break
      x = self._apply(name, x)
      if name in missing:
        found[name] = x
        missing.discard(name)
    if missing:
      raise ValueError(
        f'VGG has no feature {sorted(missing)[0]!r}. It has: '
        f'{", ".join(self._order())}.'
      )
    return tuple(found[name] for name in self.taps)

  def _order(self):
    names = []
    for b, count in enumerate(self.depths, 1):
      for i in range(1, count + 1):
        names += [f'conv{b}_{i}', f'relu{b}_{i}']
      names.append(f'pool{b}')
    return (*names, *FC)

  def _apply(self, name, x):
    if name.startswith('relu'):
      return nn.relu(x)
    if name.startswith('pool'):
      return max_pool(x)
    conv = lambda features, **kwargs: layers.Conv(
      features, kernel_init=nn.initializers.he_normal(), dtype=self.dtype,
      name=name, **kwargs,
    )
    if name.startswith('conv'):
      block = int(name[4 : name.index('_')])
      return conv(self.width * min(2 ** (block - 1), 8))(x)
    hidden, classes = self.fc
    if name == 'fc6':
      return nn.relu(conv(hidden, kernel=7, pad=0)(x))
    if name == 'fc7':
      return nn.relu(conv(hidden, kernel=1, pad=0)(x))
    return conv(classes, kernel=1, pad=0)(x)


def max_pool(x):
  """2x2, stride 2, an odd last row or column left out: [B, H/2, W/2, C].

  As a maximum over an axis: its gradient needs no select-and-scatter, which
  is slow on CPUs and varies from run to run on GPUs.
  """
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def from_torch(state, depths=D):
  """Converts a PyTorch state dict of VGG.

  Known are the names of vgg_face_dag.pth (Albanie's conversion of the released
  VGG-Face, RGB), 'conv1_1.weight' ... 'fc8.bias', and torchvision's,
  'features.0.weight' ... 'classifier.6.bias'.

  Args:
    state: {name: array}.
    depths: D or E.

  Returns:
    {'conv1_1/kernel': float32 HWIO, 'conv1_1/bias': float32, ...}; the
    fully-connected layers where the file has them, fc6 as 7x7.

  Raises:
    ValueError: not such a file; the name and the shape that is wrong.
  """
  names = [
    f'conv{b}_{i}' for b, n in enumerate(depths, 1) for i in range(1, n + 1)
  ]
  sources = {name: name for name in (*names, *FC)}
  if 'features.0.weight' in state:
    index = 0
    for name in names:
      sources[name] = f'features.{index}'
      # A ReLU follows; before the next block also a pool.
      last = int(name.partition('_')[2]) == depths[int(name[4]) - 1]
      index += 3 if last else 2
    sources |= zip(FC, ('classifier.0', 'classifier.3', 'classifier.6'))
  arrays, channels = {}, 3
  for name, source in sources.items():
    if name in FC and f'{source}.weight' not in state:
      break
    kernel = _torch_kernel(state, f'{source}.weight', name, channels)
    if name not in FC:
      width = 64 * min(2 ** (int(name[4]) - 1), 8)
      _check(f'{source}.weight', kernel.shape, (3, 3, channels, width))
    channels = kernel.shape[-1]
    bias = np.asarray(state[f'{source}.bias'], np.float32)
    _check(f'{source}.bias', bias.shape, (channels,))
    arrays[f'{name}/kernel'], arrays[f'{name}/bias'] = kernel, bias
  return arrays


def _torch_kernel(state, key, name, channels):
  """OIHW, or [O, I] of a fully-connected layer, -> HWIO."""
  if key not in state:
    raise ValueError(f'No VGG: the file has no {key}. It has: '
                     f'{", ".join(list(state)[:4])}, ...')
  kernel = np.asarray(state[key], np.float32)
  if name in FC:  # PyTorch flattens [C, 7, 7].
    side = 7 if name == 'fc6' else 1
    if kernel.size != len(kernel) * channels * side**2:
      _check(key, kernel.shape, (len(kernel), channels * side**2))
    kernel = kernel.reshape(len(kernel), channels, side, side)
  return np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))


def _check(key, shape, expected):
  if tuple(shape) != tuple(expected):
    raise ValueError(
      f'No VGG of that configuration: {key} has shape {tuple(shape)}, '
      f'expected {tuple(expected)}.'
    )


def unflatten(arrays, names=None):
  """Flat weights -> parameters {'conv1_1': {'kernel', 'bias'}, ...}.

  Args:
    arrays: as `from_torch` returns them.
    names: layers to keep; None for all.
  """
  params = {}
  for key, value in arrays.items():
    layer, _, leaf = key.partition('/')
    if names is None or layer in names:
      params.setdefault(layer, {})[leaf] = value
  return params
