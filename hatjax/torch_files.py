"""Reads the arrays of PyTorch checkpoints without PyTorch and without trust.

A checkpoint is a pickle, which can run any code. Here the pickle may name
nothing but tensors, their storages and plain containers; anything else is a
ValueError. Both of PyTorch's formats are read: the zip archive (since 1.6) and
the older stream of pickles.
"""

import collections
import io
import itertools
import math
import os
import pickle
import stat
import zipfile

import numpy as np

_TYPES = {
  'FloatStorage': 'f4', 'DoubleStorage': 'f8', 'HalfStorage': 'f2',
  'LongStorage': 'i8', 'IntStorage': 'i4', 'ShortStorage': 'i2',
  'CharStorage': 'i1', 'ByteStorage': 'u1', 'BoolStorage': '?',
}
MOST = 1_000_000  # tensors and dicts in a file
_MAGIC = 0x1950A86A20F9469CFC6C  # of the older format


def read(path):
  """The tensors of a checkpoint.

  Args:
    path: a file that torch.save wrote: a state dict, or dicts around one.

  Returns:
    {dotted name: np.ndarray}, in the file's order.

  Raises:
    ValueError: not such a file, damaged, or with more in it than tensors.
  """
  try:
    with open(path, 'rb') as file:
      if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ValueError('it is no file, and may have no end')
      is_zip = zipfile.is_zipfile(file)
      file.seek(0)
      tree = _read_zip(file) if is_zip else _read_stream(file)
    arrays = {}
    _flatten(tree, '', arrays)
  except OSError as error:
    raise ValueError(f'Cannot read {path}: {error.strerror}.') from error
  except Exception as error:  # pickles of hostile bytes raise anything
    raise ValueError(
      f'{path} is not a PyTorch file of plain tensors ({error}).'
    ) from error
  if not arrays:
    raise ValueError(f'{path} holds no tensors.')
  return arrays


class _Storage:
  """A flat array, filled before or after the tensors that view it."""

  def __init__(self, dtype, count):
    self.dtype, self.count, self.data = np.dtype(dtype), count, None


class _Tensor:
  """A view of a storage."""

  def __init__(self, storage, offset, shape, strides, *others):
    del others  # requires_grad, hooks
    self.storage, self.offset = storage, offset
    self.shape, self.strides = tuple(shape), tuple(strides)

  def array(self):
    data, shape = self.storage.data, self.shape
    last = self.offset + sum(
      (n - 1) * s for n, s in zip(shape, self.strides)
    )
    if min((*shape, *self.strides, self.offset, 0)) < 0 or (
      math.prod(shape) and last >= len(data)
    ):
      raise ValueError('a tensor reaches beyond its storage')
    if math.prod(shape) > len(data):
      raise ValueError('a tensor is larger than its storage')
    view = np.lib.stride_tricks.as_strided(
      data[self.offset :], shape, [s * data.itemsize for s in self.strides],
      writeable=False,
    )
    return np.array(view)


class _Unpickler(pickle.Unpickler):
  """Knows tensors, storages and ordered dicts; nothing that runs code."""

  def __init__(self, file, storage):
    super().__init__(file, encoding='utf-8')
    self._storage = storage

  def find_class(self, module, name):
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
      return _Tensor
    if (module, name) == ('torch._utils', '_rebuild_parameter'):
      return lambda tensor, *others: tensor
    if module == 'torch' and name in _TYPES:
      return name
    raise ValueError(f'it asks for {module}.{name}')

  def persistent_load(self, saved):
    kind, type_name, key, _, count, *_ = saved
    if kind != 'storage':
      raise ValueError(f'it asks for a {kind}')
    return self._storage(_TYPES[type_name], str(key), int(count))


def _read_zip(file):
  with zipfile.ZipFile(file) as archive:
    if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
      raise ValueError('it is compressed, which PyTorch never does')
    (index,) = [n for n in archive.namelist() if n.endswith('/data.pkl')]
    root = index.removesuffix('data.pkl')

    def storage(dtype, key, count):
      found = _Storage(dtype, count)
      found.data = np.frombuffer(archive.read(f'{root}data/{key}'), dtype)
      return found

    return _Unpickler(io.BytesIO(archive.read(index)), storage).load()


def _read_stream(file):
  storages = {}

  def storage(dtype, key, count):
    return storages.setdefault(key, _Storage(dtype, count))

  plain = lambda: _Unpickler(file, storage).load()
  if plain() != _MAGIC:
    raise ValueError('it does not begin as one')
  plain()  # version
  plain()  # of the machine that wrote it
  tree = plain()
  for key in plain():
    found = storages[str(key)]
    (count,) = np.frombuffer(file.read(8), '<i8')
    if count != found.count:
      raise ValueError('a storage has another size')
    data = file.read(count * found.dtype.itemsize)
    found.data = np.frombuffer(data, found.dtype)
  return tree


def _flatten(tree, prefix, arrays, seen=None):
  seen = itertools.count() if seen is None else seen
  if next(seen) > MOST:  # Few dicts, in one another, may have many leaves.
    raise ValueError('it holds too many tensors')
  if isinstance(tree, _Tensor):
    arrays[prefix] = tree.array()
  elif isinstance(tree, dict):
    for key, value in tree.items():
      _flatten(value, f'{prefix}.{key}' if prefix else str(key), arrays, seen)
