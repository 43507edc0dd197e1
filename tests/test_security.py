"""Files of strangers run no code and lead nowhere else."""

import ast
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import types
import zipfile

import numpy as np
import pytest
from test_pipeline import tiny_config

from hatjax import (
  clips,
  convert,
  generate,
  init_from,
  records,
  runs,
  torch_files,
  train,
  video,
  weights,
  workdir,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Evil:
  """Runs a command when it is unpickled."""

  def __init__(self, marker, call=os.system):
    self.marker, self.call = marker, call

  def __reduce__(self):
    return self.call, (f'touch {self.marker}',)


def evil_pickles(marker):
  """Pickles that would make the file `marker`, in several ways."""
  touch = f'touch {marker}'.encode()
  yield pickle.dumps(Evil(marker), 2)
  yield pickle.dumps(Evil(marker), 4)
  yield pickle.dumps({'state_dict': {'w': Evil(marker)}}, 2)
  yield pickle.dumps([Evil(marker)] * 2, 0)
  yield b"cos\nsystem\n(S'" + touch + b"'\ntR."
  yield b"c__builtin__\neval\n(S'__import__(\"os\").system(\"" + touch + (
    b"\")'\ntR."
  )
  # Asks for a harmless name first, then takes the builtins out of it.
  yield (
    b'ccollections\nOrderedDict.__reduce__.__globals__\n.'
  )
  yield b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c' + bytes([len(touch)]) + (
    touch + b'\x85R.'
  )
  yield b'ctorch\n_utils\n.'
  yield b"(S'" + touch + b"'\nios\nsystem\n."


def files(marker):
  """Those pickles as bare files, in PyTorch's zip and behind its old head."""
  for data in evil_pickles(marker):
    yield data
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as file:
      file.writestr('a/data.pkl', data)
      file.writestr('a/data/0', bytes(24))
    yield archive.getvalue()
    head = [torch_files._MAGIC, 1001, {}]
    yield b''.join(pickle.dumps(part, 2) for part in head) + data


def assert_harmless(call, marker):
  """One clear error, and nothing ran."""
  with pytest.raises((ValueError, OSError)) as error:
    call()
  assert not marker.exists()
  assert str(error.value)


def test_the_attacks_would_work(tmp_path):
  marker = tmp_path / 'marker'
  pickle.loads(next(evil_pickles(marker)))
  assert marker.exists()


def test_checkpoints_of_strangers_run_nothing(tmp_path, capsys):
  marker, path = tmp_path / 'marker', tmp_path / 'evil.pth'
  count = 0
  for data in files(marker):
    path.write_bytes(data)
    assert_harmless(lambda: torch_files.read(path), marker)
    count += 1
  assert count == 30
  for kind in convert.KINDS:
    code = convert.main([kind, str(path), '--workdir', str(tmp_path / 'run')])
    err = capsys.readouterr().err
    assert code == 1 and err.startswith('error: ') and err.count('\n') == 1
    assert not (tmp_path / 'run').exists() and not marker.exists()


def test_weights_of_strangers_run_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('HATJAX_WEIGHTS', str(tmp_path / 'weights'))
  marker, path = tmp_path / 'marker', tmp_path / 'evil.pth'
  path.write_bytes(next(files(marker)))
  read = []
  monkeypatch.setitem(
    convert.CONVERTERS, 'inception_fid', lambda path: read.append(path)
  )
  code = convert.main(
    ['weights', 'fetch', 'inception_fid', '--source', str(path)]
  )
  # Its checksum is known: the file is not even opened for conversion.
  assert code == 1 and not read and not marker.exists()
  assert 'inception_fid' in capsys.readouterr().err
  assert not weights.is_there('inception_fid')
  np.savez(tmp_path / 'evil.npz', w=np.array([Evil(marker)], object))
  for load in (
    lambda: init_from.load(
      {'init_from': {'vgg_face': str(tmp_path / 'evil.npz')}, 'info': {}},
      types.SimpleNamespace(pretrained={'vgg_face': 'vgg_face'}),
    ),
  ):
    with pytest.raises(Exception) as error:
      load()
    assert not marker.exists() and str(error.value)


@pytest.fixture(scope='module')
def run_folder(toy_records, tmp_path_factory):
  """An honest run of four steps."""
  folder = tmp_path_factory.mktemp('run') / 'a'
  config = tiny_config(train__num_steps=4, train__val_clips=1)
  train.train(config, folder, toy_records, keep=True)
  return folder


def test_orbax_folders_of_strangers_run_nothing(run_folder, tmp_path):
  """Every file of a checkpoint in turn is replaced by a pickle."""
  marker = tmp_path / 'marker'
  stage = pathlib.Path('hat_cgan') / 'checkpoints' / '4'
  evil = list(evil_pickles(marker))
  for n, path in enumerate(sorted((run_folder / stage).rglob('*'))):
    if not path.is_file() or path.parent.name == 'd' and n % 4:
      continue
    copy = shutil.copytree(run_folder, tmp_path / str(n))
    (copy / path.relative_to(run_folder)).write_bytes(evil[n % len(evil)])
    try:
      found = runs.load(copy)
      assert found.step == 4
    except ValueError as error:
      assert 'checkpoints/4' in str(error)
    assert not marker.exists()
    shutil.rmtree(copy)


def test_metadata_of_strangers_names_no_code(run_folder, tmp_path):
  """Names of types in orbax's json become calls of os.system."""
  copy = shutil.copytree(run_folder, tmp_path / 'a')
  marker = tmp_path / 'marker'
  changed = 0
  for path in (copy / 'hat_cgan/checkpoints/4').rglob('*'):
    if path.is_file() and path.read_bytes()[:1] == b'{':
      text = path.read_text()
      for word in ('jax.Array', 'StandardCheckpointHandler', 'np.ndarray'):
        changed += word in text
        text = text.replace(word, f"os.system('touch {marker}')")
      path.write_text(text)
  assert changed
  try:
    runs.load(copy)
  except ValueError as error:
    assert str(error)
  assert not marker.exists()


@pytest.mark.parametrize('stages', [
  ['../../a/hat_cgan'], ['/etc'], ['hat_cgan', '..'], [], 'x/y', [None],
])
def test_stages_stay_in_their_run(run_folder, tmp_path, stages):
  copy = shutil.copytree(run_folder, tmp_path / 'a')
  config = json.loads((copy / 'config.json').read_text())
  (copy / 'config.json').write_text(json.dumps(config | {'stages': stages}))
  with pytest.raises(ValueError, match='config.json cannot be read'):
    workdir.read_config(copy)


@pytest.mark.parametrize('name', [
  '../../etc', '/etc', 'a/../../b', 'mug/../../../etc:1.0.0',
])
def test_names_of_records_stay_in_their_folder(tmp_path, name):
  with pytest.raises(ValueError, match='leads out of'):
    records.Records(name, tmp_path)


@pytest.mark.parametrize('path', ['../secret.mp4', '/etc/x', 'a/../../b'])
def test_clips_of_records_stay_in_their_folder(tmp_path, path):
  (tmp_path / 'raw').mkdir()
  video.write_video(
    tmp_path / 'secret.mp4', np.zeros((2, 16, 16, 3), np.uint8)
  )
  stub = types.SimpleNamespace(
    name='voxceleb', metadata={'raw': str(tmp_path / 'raw'), 'options': {}}
  )
  example = {'path': path, 'boxes': [], 'times': [0, 1]}
  with pytest.raises(ValueError, match='leads out of its folder'):
    next(records.Records._frames_elsewhere(stub, example, [0]))


def test_labels_of_strangers_write_where_they_are_told():
  outs = generate._outs('clips/{label}/', ['../../me'], ['..', '/etc/x'])
  for path in outs[0].values():
    parts = pathlib.PurePath(path).parts
    assert parts[0] == 'clips' and '..' not in parts, path


def test_videos_open_no_other_files(tmp_path):
  """Playlists and lists of files are refused, whatever they are called."""
  inner = tmp_path / 'inner.mp4'
  video.write_video(inner, np.zeros((2, 16, 16, 3), np.uint8))
  for n, text in enumerate((
    f"ffconcat version 1.0\nfile '{inner}'\n",
    f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{inner}\n#EXT-X-ENDLIST\n',
    f'<MPD><Period><BaseURL>file://{inner}</BaseURL></Period></MPD>',
  )):
    path = tmp_path / f'{n}.mp4'
    path.write_text(text)
    for read in (
      lambda p: list(video.iter_video(p)), lambda p: list(clips.scan(p)),
    ):
      with pytest.raises(ValueError, match=path.name):
        read(path)


def test_nothing_in_the_program_unpickles_or_evaluates():
  allowed = {('torch_files.py', 'pickle')}
  for path in [*(ROOT / 'hatjax').rglob('*.py'),
               *(ROOT / 'datasets').rglob('*.py')]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = {a.name.split('.')[0] for a in node.names}
        bad = names & {'pickle', 'dill', 'cloudpickle', 'marshal', 'shelve',
                       'joblib', 'torch', 'yaml'}
        assert {(path.name, n) for n in bad} <= allowed, path
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id not in ('eval', 'exec', 'compile'), path
      if isinstance(node, ast.keyword) and node.arg in (
        'allow_pickle', 'shell'
      ):
        assert getattr(node.value, 'value', True) is False, path


def test_what_was_fetched_is_checked_before_use(tmp_path, monkeypatch):
  monkeypatch.setenv('HATJAX_WEIGHTS', str(tmp_path))
  body = b'right' * 100
  entry = weights.Entry(
    name='toy', use='a test', licence='none', file='toy.bin',
    sha256=hashlib.sha256(body).hexdigest(), size=len(body),
  )
  monkeypatch.setitem(weights.REGISTRY, 'toy', entry)
  source = tmp_path / 'mine.bin'
  source.write_bytes(body[:-1] + b'!')
  with pytest.raises(ValueError):
    weights.fetch('toy', None, str(source))
  assert not weights.is_there('toy')
  source.write_bytes(body)
  assert weights.fetch('toy', None, str(source)).read_bytes() == body
