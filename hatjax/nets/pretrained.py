"""Frozen nets that other projects released: FID's Inception, video ResNeXt.

Only the forward pass. Batch normalization is folded into the convolutions when
the weights are read, so every layer is a convolution with a bias; parameters
are flat, {'<layer>/kernel', '<layer>/bias'}, named as in the released file.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

INCEPTION_EPS, RESNEXT_EPS = 1e-3, 1e-5
VIDEO_FRAMES, VIDEO_SIDE = 16, 112
VIDEO_MEAN = (114.7748, 107.7354, 99.4750)  # RGB, 0..255


class Inception(nn.Module):
  """The Inception-v3 of TensorFlow's 2015-12-05 graph, which FID is made of.

  It differs from torchvision's: average pools leave the padding out of the
  mean, the last block has a max pool, and there are 1008 classes.
  """

  @nn.compact
  def __call__(self, x):
    """Features of images, enlarged to 299x299 as pytorch-fid does.

    Args:
      x: float [B, H, W, 3] in [-1, 1].

    Returns:
      (float32 [B, 2048], 'pool3'; [B, 1008], logits without their bias, as the
      Inception score takes them).
    """
    shape = (len(x), 299, 299, 3)
    x = jax.image.resize(x.astype(jnp.float32), shape, 'bilinear', False)
    x = _conv('Conv2d_1a_3x3', 32, 3, 2)(x)
    x = _conv('Conv2d_2a_3x3', 32, 3)(x)
    x = _conv('Conv2d_2b_3x3', 64, 3, pad='SAME')(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = _conv('Conv2d_3b_1x1', 80)(x)
    x = _conv('Conv2d_4a_3x3', 192, 3)(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    for name, features in (('b', 32), ('c', 64), ('d', 64)):
      x = _block_a(f'Mixed_5{name}', x, features)
    x = _block_b('Mixed_6a', x)
    for name, features in (('b', 128), ('c', 160), ('d', 160), ('e', 192)):
      x = _block_c(f'Mixed_6{name}', x, features)
    x = _block_d('Mixed_7a', x)
    x = _block_e('Mixed_7b', x, _mean_pool)
    x = _block_e('Mixed_7c', x, _largest)
    x = x.mean((1, 2))
    return x, nn.Dense(1008, use_bias=False, name='fc')(x)


def _conv(name, features, kernel=1, stride=1, pad='VALID'):
  kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
  conv = nn.Conv(features, kernel, stride, pad, name=name)
  return lambda x: nn.relu(conv(x))


def _branch(block, branch, x, *layers):
  """Convolutions of a branch: (suffix, features, kernel), padded 'SAME'."""
  for suffix, features, kernel in layers:
    x = _conv(f'{block}.{branch}{suffix}', features, kernel, pad='SAME')(x)
  return x


def _mean_pool(x):
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _largest(x):
  return nn.max_pool(x, (3, 3), padding='SAME')


def _join(*branches):
  return jnp.concatenate(branches, -1)


def _block_a(name, x, features):
  return _join(
    _branch(name, 'branch1x1', x, ('', 64, 1)),
    _branch(name, 'branch5x5', x, ('_1', 48, 1), ('_2', 64, 5)),
    _branch(
      name, 'branch3x3dbl', x, ('_1', 64, 1), ('_2', 96, 3), ('_3', 96, 3)
    ),
    _branch(name, 'branch_pool', _mean_pool(x), ('', features, 1)),
  )


def _block_b(name, x):
  double = _branch(name, 'branch3x3dbl', x, ('_1', 64, 1), ('_2', 96, 3))
  return _join(
    _conv(f'{name}.branch3x3', 384, 3, 2)(x),
    _conv(f'{name}.branch3x3dbl_3', 96, 3, 2)(double),
    nn.max_pool(x, (3, 3), (2, 2)),
  )


def _block_c(name, x, c):
  wide, tall = (1, 7), (7, 1)
  return _join(
    _branch(name, 'branch1x1', x, ('', 192, 1)),
    _branch(
      name, 'branch7x7', x, ('_1', c, 1), ('_2', c, wide), ('_3', 192, tall)
    ),
    _branch(
      name, 'branch7x7dbl', x, ('_1', c, 1), ('_2', c, tall), ('_3', c, wide),
      ('_4', c, tall), ('_5', 192, wide),
    ),
    _branch(name, 'branch_pool', _mean_pool(x), ('', 192, 1)),
  )


def _block_d(name, x):
  short = _branch(name, 'branch3x3', x, ('_1', 192, 1))
  long = _branch(
    name, 'branch7x7x3', x, ('_1', 192, 1), ('_2', 192, (1, 7)),
    ('_3', 192, (7, 1)),
  )
  return _join(
    _conv(f'{name}.branch3x3_2', 320, 3, 2)(short),
    _conv(f'{name}.branch7x7x3_4', 192, 3, 2)(long),
    nn.max_pool(x, (3, 3), (2, 2)),
  )


def _block_e(name, x, pool):
  wide, tall = (1, 3), (3, 1)
  single = _branch(name, 'branch3x3', x, ('_1', 384, 1))
  double = _branch(name, 'branch3x3dbl', x, ('_1', 448, 1), ('_2', 384, 3))
  return _join(
    _branch(name, 'branch1x1', x, ('', 320, 1)),
    _branch(name, 'branch3x3', single, ('_2a', 384, wide)),
    _branch(name, 'branch3x3', single, ('_2b', 384, tall)),
    _branch(name, 'branch3x3dbl', double, ('_3a', 384, wide)),
    _branch(name, 'branch3x3dbl', double, ('_3b', 384, tall)),
    _branch(name, 'branch_pool', pool(x), ('', 192, 1)),
  )


class VideoResNeXt(nn.Module):
  """3-D ResNeXt-101 (Hara et al. 2018), Kinetics-400; for video FID.

  Attributes:
    blocks: of each stage.
    groups: of the 3x3x3 convolutions.
    width: channels of the first layer.
  """

  blocks: tuple[int, ...] = (3, 4, 23, 3)
  groups: int = 32
  width: int = 64

  @nn.compact
  def __call__(self, x):
    """Features of clips.

    Args:
      x: float [B, 16, 112, 112, 3] in [-1, 1].

    Returns:
      float32 [B, 2048].
    """
    x = (x.astype(jnp.float32) + 1) * 127.5 - jnp.array(VIDEO_MEAN)
    x = _conv3d('conv1', self.width, 7, (1, 2, 2), 3)(x)
    x = nn.max_pool(
      nn.relu(x), (3, 3, 3), (2, 2, 2), padding=((1, 1),) * 3
    )
    for stage, count in enumerate(self.blocks):
      for block in range(count):
        stride = 2 if stage and not block else 1
        x = self._bottleneck(f'layer{stage + 1}.{block}', x, stage, stride)
    return x.mean((1, 2, 3))

  def _bottleneck(self, name, x, stage, stride):
    middle = 2 * self.width * 2**stage
    y = nn.relu(_conv3d(f'{name}.conv1', middle)(x))
    y = nn.relu(
      _conv3d(f'{name}.conv2', middle, 3, (stride,) * 3, 1, self.groups)(y)
    )
    y = _conv3d(f'{name}.conv3', 2 * middle)(y)
    if stride != 1 or x.shape[-1] != y.shape[-1]:
      x = _conv3d(f'{name}.downsample.0', 2 * middle, 1, (stride,) * 3)(x)
    return nn.relu(x + y)


def _conv3d(name, features, kernel=1, strides=1, pad=0, groups=1):
  return nn.Conv(
    features, (kernel,) * 3, strides, ((pad, pad),) * 3, name=name,
    feature_group_count=groups,
  )


# -- released files -----------------------------------------------------------


def inception_from_torch(state):
  """Converts pytorch-fid's file, {name: array} -> flat arrays.

  Raises:
    ValueError: not that file; what it lacks.
  """
  arrays = _folded(state, 'conv', 'bn', INCEPTION_EPS)
  arrays['fc/kernel'] = _get(state, 'fc.weight').T
  return _checked(arrays, Inception(), (1, 299, 299, 3))


def resnext_from_torch(state, net=None):
  """Converts Hara's Kinetics file, {name: array} -> flat arrays.

  Args:
    state: 'state_dict.module.' or 'module.' may stand before the names.
    net: VideoResNeXt, if not the released one.
  """
  cut = lambda name: name.removeprefix('state_dict.').removeprefix('module.')
  state = {cut(name): value for name, value in state.items()}
  renamed = {}
  for name, value in state.items():
    # conv1 and bn1 -> conv1.conv, conv1.bn; downsample.0 and .1 alike.
    *rest, layer, leaf = name.split('.')
    if layer.startswith('bn'):
      rest, layer, kind = rest, f'conv{layer[2:]}', 'bn'
    elif rest[-1:] == ['downsample']:
      layer, kind = '0', 'conv' if layer == '0' else 'bn'
    else:
      kind = 'conv'
    renamed['.'.join([*rest, layer, kind, leaf])] = value
  arrays = _folded(renamed, 'conv', 'bn', RESNEXT_EPS)
  shape = (1, VIDEO_FRAMES, VIDEO_SIDE, VIDEO_SIDE, 3)
  return _checked(arrays, net or VideoResNeXt(), shape)


def _folded(state, conv, norm, eps):
  """Convolutions with their batch normalization inside, flat."""
  arrays = {}
  for name in state:
    if not name.endswith(f'.{conv}.weight'):
      continue
    layer = name.removesuffix(f'.{conv}.weight')
    get = lambda leaf, at=layer: np.float64(_get(state, f'{at}.{norm}.{leaf}'))
    scale = get('weight') / np.sqrt(get('running_var') + eps)
    kernel = np.float64(_get(state, name))  # O I k.. -> k.. I O
    kernel = np.moveaxis(kernel, (0, 1), (-1, -2)) * scale
    arrays[f'{layer}/kernel'] = kernel.astype(np.float32)
    bias = get('bias') - get('running_mean') * scale
    arrays[f'{layer}/bias'] = bias.astype(np.float32)
  return arrays


def _get(state, name):
  if name not in state:
    raise ValueError(f'The file is another net: it has no {name}.')
  return state[name]


def _checked(arrays, net, shape):
  """Those of `arrays` that the net has; ValueError if one lacks or differs."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  wanted = jax.eval_shape(net.init, jax.random.key(0), x)['params']
  found = {}
  for layer, leaves in wanted.items():
    for leaf, value in leaves.items():
      array = np.asarray(_get(arrays, f'{layer}/{leaf}'), np.float32)
      if array.shape != value.shape:
        raise ValueError(
          f'The file is another net: {layer}/{leaf} has shape {array.shape}, '
          f'not {value.shape}.'
        )
      found[f'{layer}/{leaf}'] = array
  return found


def unflatten(arrays):
  """Flat arrays -> parameters {layer: {leaf: array}}."""
  params = {}
  for name, value in arrays.items():
    layer, _, leaf = name.rpartition('/')
    params.setdefault(layer, {})[leaf] = value
  return params
