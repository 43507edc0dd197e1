"""Released weights: found, fetched, verified, read without PyTorch."""

import collections
import hashlib
import http.server
import io
import pickle
import threading
import zipfile

import numpy as np
import pytest

from hatjax import torch_files, weights

BODY = np.random.default_rng(0).bytes(3 * weights.CHUNK + 17)


class Files(http.server.BaseHTTPRequestHandler):
  """Serves BODY; /cut breaks off, /whole knows no ranges."""

  asked = []

  def log_message(self, *args):
    pass

  def do_GET(self):
    begin, ranged = 0, self.headers.get('Range')
    self.asked.append((self.path, ranged))
    if self.path == '/gone':
      self.send_error(404)
      return
    if ranged and self.path != '/whole':
      begin = int(ranged.removeprefix('bytes=').rstrip('-'))
      if begin >= len(BODY):
        self.send_error(416)
        return
    self.send_response(206 if begin else 200)
    self.send_header('Content-Length', len(BODY) - begin)
    self.end_headers()
    end = weights.CHUNK + 5 if self.path == '/cut' else len(BODY)
    self.wfile.write(BODY[begin:end])


@pytest.fixture(scope='module')
def server():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Files)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{server.server_port}'
  server.shutdown()


@pytest.fixture
def entry(tmp_path, monkeypatch):
  """Registers weights 'toy' whose released file is BODY."""
  monkeypatch.setenv('HATJAX_WEIGHTS', str(tmp_path))

  def register(**changes):
    known = dict(
      name='toy', use='a test', licence='none', file='toy.bin',
      sha256=hashlib.sha256(BODY).hexdigest(), size=len(BODY),
    )
    toy = weights.Entry(**{**known, **changes})
    monkeypatch.setitem(weights.REGISTRY, 'toy', toy)
    return toy

  register()
  return register


def test_absent_weights_say_what_to_type(entry):
  entry(address='https://example.org/toy.bin')
  with pytest.raises(ValueError, match='hatjax.convert weights fetch toy'):
    weights.find('toy')
  with pytest.raises(ValueError, match='Choose one of: openface'):
    weights.find('nothing')
  entry(note='by hand: a page')
  with pytest.raises(ValueError, match='by hand: a page.*--source <file>'):
    weights.find('toy')


def test_fetch_shows_progress_and_verifies(entry, server, tmp_path):
  shown = []
  path = weights.fetch('toy', lambda *n: shown.append(n), f'{server}/file')
  assert path.read_bytes() == BODY and weights.find('toy') == path
  assert shown[-1] == (len(BODY), len(BODY)) and len(shown) >= 4
  assert [p.name for p in tmp_path.iterdir()] == ['toy.bin']
  assert weights.fetch('toy') == path  # there already: asks nobody
  path.write_bytes(BODY[:-1] + b'x')
  with pytest.raises(ValueError, match='not the released file'):
    weights.find('toy')


@pytest.mark.parametrize('page', ('file', 'whole'))
def test_fetch_resumes(entry, server, page):
  with pytest.raises(ValueError, match='(broke off|Cannot fetch).*again'):
    weights.fetch('toy', source=f'{server}/cut')
  part = weights.released('toy').with_name('toy.bin.part')
  have = part.stat().st_size
  assert 0 < have < len(BODY)
  path = weights.fetch('toy', source=f'{server}/{page}')
  assert Files.asked[-1] == (f'/{page}', f'bytes={have}-')
  assert path.read_bytes() == BODY and not part.exists()


def test_fetch_that_fails_leaves_nothing_to_use(entry, server, tmp_path):
  entry(sha256='0' * 64)
  with pytest.raises(ValueError, match='another file than the released toy'):
    weights.fetch('toy', source=f'{server}/file')
  assert list(tmp_path.iterdir()) == []
  for source, message in (
    (f'{server}/gone', '404'), ('http://127.0.0.1:9/x', 'Cannot fetch'),
    (None, 'no address'), ('/no/such.bin', 'no file'),
  ):
    with pytest.raises(ValueError, match=message):
      weights.fetch('toy', source=source)


def test_a_file_of_unknown_checksum_must_not_change(entry, tmp_path):
  entry(sha256='')
  (tmp_path / 'mine.bin').write_bytes(BODY)
  weights.fetch('toy', source=tmp_path / 'mine.bin')
  found = hashlib.sha256(BODY).hexdigest()
  assert weights.checksum('toy') == f'sha256:{found}'
  weights.released('toy').write_bytes(b'other')
  with pytest.raises(ValueError, match='not the released file'):
    weights.find('toy')


def test_converted_weights_come_back_and_damage_is_seen(entry):
  toy = entry(converted=True)
  arrays = {'a/kernel': np.arange(6.0).reshape(2, 3), 'b': np.float32(2)}
  path = weights.store('toy', arrays, toy.sha256)
  back = weights.load('toy')
  assert back.keys() == arrays.keys()
  np.testing.assert_array_equal(back['a/kernel'], arrays['a/kernel'])
  weights.store('toy', arrays, '1' * 64)
  with pytest.raises(ValueError, match='another file than the released'):
    weights.load('toy')
  weights.store('toy', arrays, toy.sha256)
  whole = bytearray(path.read_bytes())
  at = whole.find(np.float64(3).tobytes())
  whole[at] ^= 1
  path.write_bytes(whole)
  with pytest.raises(ValueError, match='damaged'):
    weights.load('toy')


# -- PyTorch's files ----------------------------------------------------------


class _Ask:
  """Pickles as a call of a named function."""

  def __init__(self, module, name, *args):
    self.target, self.args = (module, name), args


class _Pickler(pickle._Pickler):
  """Writes what torch.save would, with names of modules we do not have."""

  dispatch = pickle._Pickler.dispatch.copy()

  def save_ask(self, ask):
    module, name = ask.target
    self.write(b'c' + f'{module}\n{name}\n'.encode())
    if ask.args:
      self.save(ask.args)
      self.write(pickle.REDUCE)

  dispatch[_Ask] = save_ask

  def persistent_id(self, value):
    if isinstance(value, tuple) and value[:1] == ('storage',):
      return value
    return None


def tensor(key, array, count=None):
  kind = {'f': 'FloatStorage', 'l': 'LongStorage'}[array.dtype.char]
  strides = tuple(s // array.itemsize for s in array.strides)
  storage = (
    'storage', _Ask('torch', kind), key, 'cpu', count or array.size,
  )
  return _Ask(
    'torch._utils', '_rebuild_tensor_v2', storage, 0, array.shape, strides,
    False, collections.OrderedDict(),
  )


def save(path, tree, storages):
  """The zip format."""
  data = io.BytesIO()
  _Pickler(data, 2).dump(tree)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('x/data.pkl', data.getvalue())
    for key, array in storages.items():
      archive.writestr(f'x/data/{key}', array.tobytes(order='A'))


def test_tensors_are_read_as_they_were(tmp_path):
  a = np.arange(6, dtype=np.float32).reshape(2, 3)
  b = np.arange(4).reshape(2, 2).T
  tree = {'state_dict': {'a.w': tensor('0', a), 'b': tensor('1', b)}, 'n': 3}
  save(tmp_path / 'x.pth', tree, {'0': a, '1': b})
  found = torch_files.read(tmp_path / 'x.pth')
  assert list(found) == ['state_dict.a.w', 'state_dict.b']
  np.testing.assert_array_equal(found['state_dict.a.w'], a)
  np.testing.assert_array_equal(found['state_dict.b'], b)


@pytest.mark.parametrize('tree', (
  {'a': _Ask('os', 'system', 'true')},
  {'a': _Ask('builtins', 'eval', '1')},
  {'a': tensor('0', np.zeros(3, np.float32), count=2)},
  {'n': 3},
), ids=('system', 'eval', 'beyond', 'empty'))
def test_what_is_not_plain_tensors_is_refused(tmp_path, tree):
  save(tmp_path / 'x.pth', tree, {'0': np.zeros(2, np.float32)})
  with pytest.raises(ValueError, match='x.pth'):
    torch_files.read(tmp_path / 'x.pth')


def test_files_of_torch_itself(tmp_path):
  torch = pytest.importorskip('torch')
  tree = {'a': torch.randn(3, 4).t(), 'b': {'c': torch.arange(5)}}
  for new in (True, False):
    path = tmp_path / f'{new}.pth'
    torch.save(tree, path, _use_new_zipfile_serialization=new)
    found = torch_files.read(path)
    np.testing.assert_array_equal(found['a'], tree['a'])
    np.testing.assert_array_equal(found['b.c'], tree['b']['c'])
