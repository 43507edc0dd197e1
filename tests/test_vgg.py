"""VGG's shapes, numbers by hand, and weights of other projects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hatjax.nets import vgg

SMALL = vgg.VGG(
  ('conv1_1', 'relu1_1', 'pool1', 'relu2_1'), depths=(1, 1), width=4,
  range='face',
)


def shapes(net, size=224):
  """(shapes of the features, number of parameters), without work."""
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  key = jax.random.key(0)
  out, variables = jax.eval_shape(net.init_with_output, key, image)
  count = sum(x.size for x in jax.tree.leaves(variables))
  return [x.shape[1:] for x in out], count


@pytest.mark.parametrize('net, size, features, count', [
  (vgg.VGG(('pool4', 'relu5_3')), 224, [(14, 14, 512)] * 2, 14_714_688),
  (vgg.VGG(('relu5_3',)), 64, [(4, 4, 512)], 14_714_688),
  (vgg.VGG(('fc8',)), 224, [(1, 1, 2622)], 145_002_878),
  (vgg.VGG(('pool5',), depths=vgg.E), 224, [(7, 7, 512)], 20_024_384),
  (vgg.VGG(('relu1_1',), depths=vgg.E), 60, [(60, 60, 64)], 1792),
])
def test_shapes_and_counts_are_the_published_ones(net, size, features, count):
  assert shapes(net, size) == (features, count)


def test_features_by_hand():
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (1, 7, 6, 3)).astype(np.float32)
  params = jax.jit(SMALL.init)(jax.random.key(0), image)
  conv1, relu1, pool1, relu2 = SMALL.apply(params, image)
  kernel = np.asarray(params['params']['conv1_1']['kernel'])
  # The released means, in RGB.
  x = (image + 1) * 127.5 - np.array([129.1863, 104.7624, 93.594])
  x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])[0]
  expected = np.stack([
    [np.tensordot(x[i : i + 3, j : j + 3], kernel, 3) for j in range(6)]
    for i in range(7)
  ])
  np.testing.assert_allclose(conv1[0], expected, rtol=1e-3, atol=1e-2)
  np.testing.assert_array_equal(relu1, np.maximum(conv1, 0))
  assert pool1.shape == (1, 3, 3, 4) and relu2.shape == (1, 3, 3, 8)
  for i in range(3):
    for j in range(3):
      cell = np.asarray(relu1)[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
      np.testing.assert_array_equal(pool1[0, i, j], cell.max((0, 1)))


def test_unknown_feature_is_named():
  with pytest.raises(ValueError, match="'relu9_1'. It has: conv1_1, relu1_1"):
    shapes(vgg.VGG(('relu9_1',), depths=(1,), width=2), 8)


def torch_state(depths, torchvision, fc=False):
  """A state dict in PyTorch's shapes, every array with its own numbers."""
  state, channels, index, rng = {}, 3, 0, np.random.default_rng(0)
  for block, count in enumerate(depths, 1):
    for i in range(1, count + 1):
      name = f'features.{index}' if torchvision else f'conv{block}_{i}'
      width = 64 * min(2 ** (block - 1), 8)
      state[f'{name}.weight'] = rng.standard_normal(
        (width, channels, 3, 3), np.float32
      )
      state[f'{name}.bias'] = rng.standard_normal(width, np.float32)
      index, channels = index + 2, width
    index += 1
  if fc:
    state['fc6.weight'] = rng.standard_normal((5, 512 * 49), np.float32)
    state['fc6.bias'] = np.arange(5.0)
  return state


def test_both_torch_namings_convert_to_the_same():
  # torchvision's VGG-19: features 0 2 5 7 10 12 14 16 19 ...
  named = vgg.from_torch(torch_state(vgg.E, False), vgg.E)
  other = vgg.from_torch(torch_state(vgg.E, True), vgg.E)
  assert list(named) == list(other) and len(named) == 32
  for key in named:
    np.testing.assert_array_equal(named[key], other[key])
  kernel = torch_state(vgg.E, True)['features.19.weight']  # conv4_1
  np.testing.assert_array_equal(
    named['conv4_1/kernel'][0, 2], kernel[:, :, 0, 2].T
  )


def test_fully_connected_weights_become_a_7x7_convolution():
  state = torch_state(vgg.D, False, fc=True)
  arrays = vgg.from_torch(state)
  x = np.random.default_rng(1).standard_normal((7, 7, 512), np.float32)
  # PyTorch flattens channels first.
  expected = state['fc6.weight'] @ x.transpose(2, 0, 1).ravel()
  got = np.tensordot(x, arrays['fc6/kernel'], 3)
  np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-2)
  params = vgg.unflatten(arrays, {'conv1_1', 'fc6'})
  assert set(params) == {'conv1_1', 'fc6'}
  assert params['fc6']['kernel'].shape == (7, 7, 512, 5)


def test_other_files_are_refused_by_name():
  state = torch_state(vgg.D, False)
  with pytest.raises(ValueError, match='the file has no conv3_4.weight'):
    vgg.from_torch(state, vgg.E)
  state['conv2_1.weight'] = state['conv2_1.weight'][:3]
  with pytest.raises(ValueError, match='conv2_1.weight has shape'):
    vgg.from_torch(state)
