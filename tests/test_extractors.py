"""Released nets against PyTorch's, on files of random numbers; face finding."""

import dataclasses
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hatjax import extractors, face_embedding, synthetic_faces, weights
from hatjax.nets import pretrained


def random_state(names_and_shapes, seed=0):
  """Random tensors under the names of a released file."""
  rng = np.random.default_rng(seed)
  state = {}
  for name, shape in names_and_shapes:
    if name.endswith('num_batches_tracked'):
      state[name] = np.int64(0)
    elif name.endswith('running_var'):
      state[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    else:
      fan = max(1, int(np.prod(shape[1:])))
      scale = np.sqrt(2 / fan) if len(shape) > 1 else 0.1
      noise = rng.normal(0, scale, shape) + ('bn.weight' in name)
      state[name] = noise.astype(np.float32)
  return state


def torch_names(net, shape):
  """Names and shapes of the file that a net is read from."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  params = jax.eval_shape(net.init, jax.random.key(0), x)['params']
  for layer, leaves in params.items():
    kernel = leaves['kernel'].shape
    moved = (kernel[-1], kernel[-2], *kernel[:-2])
    if 'bias' not in leaves:
      yield f'{layer}.weight', moved
      continue
    yield f'{layer}.conv.weight', moved
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      yield f'{layer}.bn.{leaf}', kernel[-1:]


def test_inception_has_the_released_size():
  names = list(torch_names(pretrained.Inception(), (1, 32, 32, 3)))
  count = sum(
    int(np.prod(shape)) for name, shape in names if 'running' not in name
  )
  # torchvision's inception_v3 has 27 161 264 parameters, 3 326 696 of them in
  # the auxiliary head; here are 8 classes more, and fc.bias is not read.
  assert count == 27_161_264 - 3_326_696 + 8 * 2049 - 1008
  assert len([n for n, _ in names if n.endswith('conv.weight')]) == 94


def fid_inception():
  """torchvision's net with the three changes of the 2015-12-05 graph."""
  torch = pytest.importorskip('torch')
  torchvision = pytest.importorskip('torchvision')
  functional = torch.nn.functional
  net = torchvision.models.inception_v3(
    num_classes=1008, aux_logits=False, init_weights=False
  ).eval()
  mean = lambda x, **_: functional.avg_pool2d(
    x, 3, 1, 1, count_include_pad=False
  )
  largest = lambda x, **_: functional.max_pool2d(x, 3, 1, 1)
  inception = torchvision.models.inception
  real = inception.F

  def swap(block, pool):
    forward = block.forward

    def swapped(x):
      inception.F = types.SimpleNamespace(
        **{n: getattr(real, n) for n in ('relu', 'max_pool2d')},
        avg_pool2d=pool,
      )
      try:
        return forward(x)
      finally:
        inception.F = real

    block.forward = swapped

  for name, block in net.named_children():
    if name.startswith(('Mixed_5', 'Mixed_6')) or name == 'Mixed_7b':
      swap(block, mean)
  swap(net.Mixed_7c, largest)
  return torch, net


def test_inception_equals_pytorch():
  torch, net = fid_inception()
  shapes = [(k, tuple(v.shape)) for k, v in net.state_dict().items()]
  state = random_state(shapes)
  net.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  arrays = pretrained.inception_from_torch(state)
  x = np.random.default_rng(1).uniform(-1, 1, (2, 40, 48, 3)).astype('f4')
  with torch.no_grad():
    y = torch.nn.functional.interpolate(
      torch.tensor(x).permute(0, 3, 1, 2), (299, 299), mode='bilinear',
      align_corners=False,
    )
    pool = []
    net.avgpool.register_forward_hook(lambda *a: pool.append(a[-1]))
    logits = net(y) - net.fc.bias
  params = {'params': pretrained.unflatten(arrays)}
  found = jax.jit(pretrained.Inception().apply)(params, x)
  expected = pool[0].flatten(1).numpy()
  np.testing.assert_allclose(found[0], expected, atol=1e-3 * expected.max())
  size = np.abs(logits.numpy()).max()
  np.testing.assert_allclose(found[1], logits.numpy(), atol=1e-3 * size)


SMALL = pretrained.VideoResNeXt(blocks=(1, 2, 1, 1), groups=4, width=8)


def small_resnext(torch):
  """Hara's definition, written with PyTorch's modules."""
  nn = torch.nn

  class Bottleneck(nn.Module):
    def __init__(self, inside, middle, stride):
      super().__init__()
      conv = lambda i, o, k=1, s=1, p=0, g=1: nn.Conv3d(
        i, o, k, s, p, groups=g, bias=False
      )
      self.conv1, self.bn1 = conv(inside, middle), nn.BatchNorm3d(middle)
      self.conv2 = conv(middle, middle, 3, stride, 1, SMALL.groups)
      self.bn2 = nn.BatchNorm3d(middle)
      self.conv3 = conv(middle, 2 * middle)
      self.bn3 = nn.BatchNorm3d(2 * middle)
      self.downsample = None
      if stride != 1 or inside != 2 * middle:
        self.downsample = nn.Sequential(
          conv(inside, 2 * middle, 1, stride), nn.BatchNorm3d(2 * middle)
        )

    def forward(self, x):
      y = self.bn1(self.conv1(x)).relu()
      y = self.bn2(self.conv2(y)).relu()
      y = self.bn3(self.conv3(y))
      return (y + (self.downsample(x) if self.downsample else x)).relu()

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      w = SMALL.width
      self.conv1 = nn.Conv3d(3, w, 7, (1, 2, 2), 3, bias=False)
      self.bn1, inside = nn.BatchNorm3d(w), w
      for stage, count in enumerate(SMALL.blocks):
        middle, blocks = 2 * w * 2**stage, []
        for i in range(count):
          blocks.append(
            Bottleneck(inside, middle, 2 if stage and not i else 1)
          )
          inside = 2 * middle
        setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))

    def forward(self, x):
      x = nn.functional.max_pool3d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
      for stage in range(4):
        x = getattr(self, f'layer{stage + 1}')(x)
      return x.mean((2, 3, 4))

  return Net().eval()


def test_video_resnext_equals_pytorch():
  torch = pytest.importorskip('torch')
  net = small_resnext(torch)
  state = random_state(
    (k, tuple(v.shape)) for k, v in net.state_dict().items()
  )
  net.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  released = {f'state_dict.module.{k}': v for k, v in state.items()}
  arrays = pretrained.resnext_from_torch(released, SMALL)
  levels = np.random.default_rng(1).integers(0, 256, (1, 16, 112, 112, 3))
  with torch.no_grad():
    y = torch.tensor(levels - np.array(pretrained.VIDEO_MEAN)).float()
    expected = net(y.permute(0, 4, 1, 2, 3)).numpy()
  params = {'params': pretrained.unflatten(arrays)}
  found = jax.jit(SMALL.apply)(params, levels.astype('f4') / 127.5 - 1)
  size = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-3 * size)


def test_folded_normalization_by_hand():
  state = {
    'a.conv.weight': np.full((1, 2, 1, 1), 3.0), 'a.bn.weight': np.array([4.0]),
    'a.bn.bias': np.array([5.0]), 'a.bn.running_mean': np.array([7.0]),
    'a.bn.running_var': np.array([3.0]),
  }
  found = pretrained._folded(state, 'conv', 'bn', 1.0)
  # 4 / sqrt(3 + 1) = 2: kernel 3 * 2, bias 5 - 7 * 2.
  np.testing.assert_allclose(found['a/kernel'], np.full((1, 1, 2, 1), 6.0))
  np.testing.assert_allclose(found['a/bias'], [-9.0])


def test_another_net_is_refused():
  with pytest.raises(ValueError, match='another net: it has no fc.weight'):
    pretrained.inception_from_torch({})
  x = 'conv1.weight'
  with pytest.raises(ValueError, match='another net'):
    pretrained.resnext_from_torch({x: np.zeros((8, 3, 7, 7, 7))})


def test_absent_weights_are_told_with_their_cure(tmp_path, monkeypatch):
  monkeypatch.setenv('HATJAX_WEIGHTS', str(tmp_path))
  parts = extractors.gather()
  assert set(parts.absent) == {
    'lpips', 'fid', 'kid', 'inception_score', 'video_fid', 'recognised'
  }
  for score, why in parts.absent.items():
    assert why.startswith('not computed: needs '), score
  assert 'weights fetch inception_fid' in parts.absent['fid']
  assert 'built-in descriptor' in parts.described['ACD']['about']
  with pytest.raises(ValueError, match='weights fetch yunet'):
    face_embedding.make('openface')
  with pytest.raises(ValueError, match='Choose one of: auto, openface'):
    face_embedding.make('dlib')


def test_lpips_reads_what_convert_wrote(tmp_path, monkeypatch):
  monkeypatch.setenv('HATJAX_WEIGHTS', str(tmp_path))
  rng = np.random.default_rng(0)
  arrays, channels = {}, 3
  for block, count in enumerate((2, 2, 3, 3, 3), 1):
    width = 64 * min(2 ** (block - 1), 8)
    for i in range(1, count + 1):
      shape = (3, 3, channels, width)
      kernel = rng.normal(0, np.sqrt(2 / (9 * channels)), shape)
      arrays[f'conv{block}_{i}/kernel'] = kernel.astype(np.float32)
      arrays[f'conv{block}_{i}/bias'] = np.zeros(width, np.float32)
      channels = width
  widths = (64, 128, 256, 512, 512)
  lin = {f'lin{i}': np.ones(w, np.float32) for i, w in enumerate(widths)}
  for name, value in (('vgg16', arrays), ('lpips_vgg', lin)):
    weights.store(name, value, weights.REGISTRY[name].sha256)
  net = extractors.Lpips()
  a = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
  b = a.copy()
  b[1] = 255 - b[1]
  found = np.asarray(net.distance(a, b))
  assert found[0] == 0 and found[1] > 0.1
  assert net.checksum.startswith('sha256:a78928a0af1e5f0f')


# -- faces --------------------------------------------------------------------


def test_aligned_points_lie_on_the_template():
  # A frame whose only bright pixels are the five points, turned and scaled.
  turn = np.array([[0.9, -0.3], [0.3, 0.9]]) * 60
  points = face_embedding.TEMPLATE @ turn.T + (40, 30)
  frame = np.zeros((120, 140, 3), np.uint8)
  for x, y in np.rint(points).astype(int):
    frame[y - 1 : y + 2, x - 1 : x + 2] = 255
  out = face_embedding.align(frame, points, 96)
  for x, y in np.rint(96 * face_embedding.TEMPLATE).astype(int):
    assert out[y - 1 : y + 2, x - 1 : x + 2].max() > 200


def test_openface_and_sface_see_aligned_rgb_and_count_misses(monkeypatch):
  seen = []

  class Net:
    def setInput(self, blob):
      seen.append(blob)

    def forward(self):
      return np.array([[3.0, 4.0]])

  embedder = object.__new__(face_embedding.OpenFace)
  points = (96 * face_embedding.TEMPLATE).astype(np.float32).ravel()
  row = np.concatenate([[0, 0, 96, 96], points, [1]]).astype(np.float32)
  answers = iter([row, None])
  embedder._net = Net()
  embedder._detector = types.SimpleNamespace(detect=lambda f: next(answers))
  frames = np.zeros((2, 128, 128, 3), np.uint8)
  frames[..., 0] = 255
  vectors, found = embedder.embed(frames)
  np.testing.assert_allclose(vectors, [[0.6, 0.8], [0, 0]])
  assert found.tolist() == [True, False]
  (blob,) = seen
  assert blob.shape == (1, 3, 96, 96)
  np.testing.assert_allclose(blob[0, :, 48, 48], [1, 0, 0], atol=1e-6)


class Torch7:
  """Writes what Lua Torch would: modules with fields, tensors, numbers."""

  def __init__(self):
    self.data, self._index = b'', 0

  def _int(self, *values):
    self.data += struct.pack(f'<{len(values)}i', *values)

  def _long(self, *values):
    self.data += struct.pack(f'<{len(values)}q', *values)

  def _string(self, text):
    self._int(len(text))
    self.data += text.encode()

  def _torch(self, name):
    self._index += 1
    self._int(4, self._index)
    self._string('V 1')
    self._string(name)

  def _table(self, fields):
    self._index += 1
    self._int(3, self._index, len(fields))
    for key, value in fields.items():
      self.write(key)
      self.write(value)

  def write(self, value):
    if isinstance(value, bool):
      self._int(5, value)
    elif isinstance(value, int | float):
      self._int(1)
      self.data += struct.pack('<d', value)
    elif isinstance(value, str):
      self._int(2)
      self._string(value)
    elif isinstance(value, np.ndarray):
      self._torch('torch.FloatTensor')
      self._int(value.ndim)
      self._long(*value.shape, *(s // 4 for s in value.strides), 1)
      self._torch('torch.FloatStorage')
      self._long(value.size)
      self.data += value.tobytes()
    elif isinstance(value, list):
      self._torch('nn.Sequential')
      modules = {i + 1: module for i, module in enumerate(value)}
      self._table({'train': False, 'modules': modules})
    elif isinstance(value, tuple):
      self._torch(f'nn.{value[0]}')
      self._table({'train': False, **value[1]})
    else:
      self._table(value)
    return self


def test_openface_file_is_read_and_sees_what_it_should(tmp_path, monkeypatch):
  # Not the whole net: a convolution over all of the aligned face and a ReLU,
  # in the released file's format.
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(6, 3, 96, 96)).astype(np.float32)
  bias = rng.normal(size=6).astype(np.float32)
  size = dict(kW=96, kH=96, dW=1, dH=1, padW=0, padH=0)
  net = [
    ('SpatialConvolution', dict(
      nInputPlane=3, nOutputPlane=6, weight=kernel, bias=bias, **size
    )),
    ('ReLU', dict(inplace=False)),
  ]
  path = tmp_path / 'nn4.small2.v1.t7'
  path.write_bytes(Torch7().write(net).data)
  monkeypatch.setenv('HATJAX_WEIGHTS', str(tmp_path))
  entry = dataclasses.replace(
    weights.REGISTRY['openface'], sha256=weights.sha256(path)
  )
  monkeypatch.setitem(weights.REGISTRY, 'openface', entry)
  face = np.concatenate([
    [0, 0, 96, 96], (96 * face_embedding.TEMPLATE).ravel(), [1]
  ]).astype(np.float32)
  detector = types.SimpleNamespace(detect=lambda frame: face)
  monkeypatch.setattr(face_embedding, 'YuNet', lambda: detector)
  embedder = face_embedding.make('openface')
  assert embedder.checksum == f'sha256:{weights.sha256(path)}'
  frames = rng.integers(0, 256, (2, 128, 128, 3), np.uint8)
  vectors, found = embedder.embed(frames)
  # The points lie on the template already: the corner of the frame, in RGB.
  seen = frames[:, :96, :96].astype(np.float64) / 255
  expected = np.maximum(np.einsum('bhwc,ochw->bo', seen, kernel) + bias, 0)
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(vectors, expected, atol=1e-4)
  assert found.all()


def test_builtin_descriptor_finds_faces_and_knows_itself():
  embedder = face_embedding.BuiltIn()
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (1, 96, 96, 3), np.uint8)
  frames = np.concatenate([people_frames(0), people_frames(1), noise])
  vectors, found = embedder.embed(frames[[0, 0, 1, -1]])
  assert found.tolist() == [True, True, True, False]
  np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1, 1e-5)
  assert not vectors[3].any()
  np.testing.assert_array_equal(vectors[0], vectors[1])
  again, _ = face_embedding.BuiltIn().embed(frames[[0, 0, 1, -1]])
  np.testing.assert_array_equal(vectors, again)
  other, _ = embedder.embed(frames[[2]])
  same = np.linalg.norm(vectors[0] - vectors[2])
  assert same < np.linalg.norm(vectors[0] - other[0])


def people_frames(number):
  return synthetic_faces.render_clip(number, 'happy', 3, 96)['video'][:2]
