"""Strange input: a right result or one clear line, quickly, in little memory.

HATJAX_FUZZ=10 tries ten times as many cases.
"""

import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import resource
import struct
import time
import zipfile
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from hatjax import (
  clips,
  config_flag,
  convert,
  generate,
  prepare,
  provenance,
  records,
  settings,
  torch_files,
  video,
  watermark,
  weights,
  workdir,
)

TIMES = float(os.environ.get('HATJAX_FUZZ', '1'))
SEEDS = st.integers(0, 2**32 - 1)
MOST_MEMORY = 600 << 20  # bytes that a module of cases may add
NAMES = (
  'a b', '-rf', '--out', 'ü', '日本', "it's", 'a\nb', '{label}', '%s', '$(x)',
  '.hidden', 'a' * 200, '🙂', '~', 'x;y', '-',
)


def cases(count):
  """Settings of hypothesis: so many cases, the same ones every time."""
  return hypothesis.settings(
    max_examples=max(1, int(count * TIMES)), deadline=None, database=None,
    derandomize=TIMES == 1,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


@pytest.fixture(scope='module', autouse=True)
def bounded():
  """No case may hang, and all together need little memory."""
  before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
  begin = time.monotonic()
  yield
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown * 1024 < MOST_MEMORY
  assert time.monotonic() - begin < 300 * max(1, TIMES)


def one_line(error, *names):
  text = str(error)
  assert text and '\n' not in text.strip() and len(text) < 1500, text
  for name in names:
    assert name in text, (name, text)


def mutate(data, rng):
  """Cuts, flips, doubles or replaces some of the bytes."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    kind, at = rng.randrange(6), rng.randrange(len(data) + 1)
    if kind == 0:
      data = data[:at]
    elif kind == 1:
      for _ in range(min(len(data), 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
      data[at:at] = rng.randbytes(rng.randint(1, 40))
    elif kind == 3:
      data = data[at:]
    elif kind == 4:
      data += data[:at]
    else:
      data[at : at + 4] = b'\xff\xff\xff\x7f'
  return bytes(data)


# -- pictures -----------------------------------------------------------------

MODES = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16')
FORMATS = {
  'PNG': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'),
  'JPEG': ('L', 'RGB', 'CMYK'), 'WEBP': ('RGB', 'RGBA'), 'GIF': ('L', 'P'),
  'BMP': ('1', 'L', 'P', 'RGB'), 'TIFF': MODES, 'JPEG2000': ('L', 'RGB'),
}


def make_picture(rng):
  """(bytes, array as it should look or None, format)."""
  form = rng.choice(list(FORMATS))
  mode = rng.choice(FORMATS[form])
  height, width = rng.randint(1, 40), rng.randint(1, 40)
  grain = np.random.default_rng(rng.getrandbits(32))
  if mode == 'I;16':
    value = grain.integers(0, 65536, (height, width), np.uint16)
    image = Image.fromarray(value)
    wanted = np.rint(value / 257)[..., None].repeat(3, -1)
  else:
    value = grain.integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(value).convert(mode)
    wanted = np.asarray(image.convert('RGB')) if mode != 'CMYK' else None
  options, turn = {}, 1
  if form in ('JPEG', 'PNG', 'WEBP', 'TIFF'):
    turn = rng.randint(1, 8)
    exif = Image.Exif()
    exif[0x0112] = turn
    options['exif'] = exif
  if form == 'WEBP':
    options['lossless'] = True
  file = io.BytesIO()
  image.save(file, form, **options)
  if form in ('JPEG', 'GIF', 'JPEG2000') and mode != 'L' or wanted is None:
    return file.getvalue(), (height, width, turn), None
  if form in ('JPEG', 'JPEG2000'):
    return file.getvalue(), (height, width, turn), None
  return file.getvalue(), (height, width, turn), wanted.astype(np.uint8)


def turned(image, turn):
  """What EXIF's orientation asks for."""
  image = image[:, ::-1] if turn in (2, 4 + 1, 7) and turn != 5 else image
  steps = {3: 2, 4: 2, 5: 3, 6: 3, 7: 3, 8: 1}
  if turn == 4:
    return image[::-1]
  if turn == 5:
    return image.swapaxes(0, 1)
  if turn == 7:
    return np.rot90(image[:, ::-1], 2)[:, ::-1].swapaxes(0, 1)[::-1, ::-1]
  return np.rot90(image, steps.get(turn, 0))


@cases(500)
@hypothesis.given(SEEDS)
def test_pictures_look_as_they_should(seed):
  data, (height, width, turn), wanted = make_picture(random.Random(seed))
  image = video.decode_image(data, 'x.png')
  size = (height, width) if turn < 5 else (width, height)
  assert image.dtype == np.uint8 and image.shape == (*size, 3)
  if wanted is not None and turn in (1, 2, 3, 4, 5, 6, 8):
    np.testing.assert_array_equal(image, turned(wanted, turn))


@cases(500)
@hypothesis.given(SEEDS)
def test_damaged_pictures(seed):
  rng = random.Random(seed)
  data = mutate(make_picture(rng)[0], rng)
  try:
    image = video.decode_image(data, 'my face.png', max_pixels=10**6)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert 0 < image.size <= 3 * 10**6
  except ValueError as error:
    one_line(error, 'my face.png')


@cases(150)
@hypothesis.given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), SEEDS)
def test_bombs_do_not_go_off(width, height, seed):
  hypothesis.assume(width * height > 10**8)
  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  chunk = lambda kind, body: (
    struct.pack('>I', len(body)) + kind + body
    + struct.pack('>I', zlib.crc32(kind + body))
  )
  data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(
    b'IDAT', zlib.compress(bytes(1000))
  )
  gif = b'GIF89a' + struct.pack('<HH', width % 65536, height % 65536)
  for bomb in (data, gif + b'\0\0\0' + random.Random(seed).randbytes(30)):
    with pytest.raises(ValueError) as error:
      video.decode_image(bomb, 'bomb')
    one_line(error.value, 'bomb')


# -- videos -------------------------------------------------------------------


@pytest.fixture(scope='module')
def small_videos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('videos')
  clip = np.random.default_rng(0).integers(0, 256, (4, 18, 22, 3), np.uint8)
  found = {}
  for ending in video.VIDEO_ENDINGS:
    video.write_video(folder / f'a{ending}', clip, 20, 'made by hatjax 1')
    found[ending] = (folder / f'a{ending}').read_bytes()
  return folder, found


def take(frames, most):
  return [frame for frame, _ in zip(frames, range(most))]


@cases(300)
@hypothesis.given(SEEDS)
def test_damaged_videos(small_videos, seed):
  rng, (folder, found) = random.Random(seed), small_videos
  ending = rng.choice(list(found))
  path = folder / f'broken{ending}'
  path.write_bytes(mutate(found[ending], rng))
  for read in (
    lambda: take(video.iter_video(path), 50), lambda: video.read_fps(path),
    lambda: video.read_comment(path),
    lambda: take(clips.scan(path), 50),
  ):
    try:
      read()
    except ValueError as error:
      one_line(error, path.name)
  with contextlib.redirect_stderr(io.StringIO()) as err, (
    contextlib.redirect_stdout(io.StringIO())
  ) as out:
    code = provenance.main([str(path)])
  assert (code == 2) == (not out.getvalue())
  assert code != 2 or err.getvalue().count('\n') == 1


@cases(60)
@hypothesis.given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 4),
                  st.sampled_from([*video.VIDEO_ENDINGS, '/']), SEEDS)
def test_videos_of_any_size_come_back(
  small_videos, height, width, count, ending, seed
):
  folder, _ = small_videos
  rng = random.Random(seed)
  name = rng.choice(NAMES)
  clip = np.zeros((count, height, width, 3), np.uint8)
  clip += np.uint8(60) * np.arange(count, dtype=np.uint8)[:, None, None, None]
  path = f'{folder}/{seed}/{name}{ending}'
  try:
    video.write_video(path, watermark.mark(clip), 25, 'made by hatjax 1')
  except OSError as error:
    one_line(error)
    assert len(name) > 150  # of all names only this may be refused
    return
  frames, _ = video.read_video(path)
  if ending == '.webp' and count > 1 and max(height, width) == 1:
    return  # FFmpeg joins frames that look the same
  even = ending == '.mp4'
  assert frames.shape == (
    count, height + even * (height % 2), width + even * (width % 2), 3
  )
  assert 'made by hatjax 1' in video.read_comment(path)


# -- files of a run -----------------------------------------------------------


@cases(300)
@hypothesis.given(st.one_of(
  st.binary(max_size=80),
  st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=6,
  ).map(lambda x: json.dumps(x).encode()),
))
def test_a_runs_small_files_may_hold_anything(small_videos, data):
  folder = small_videos[0] / 'run'
  folder.mkdir(exist_ok=True)
  for name in ('config.json', 'checksums.json', 'metrics.jsonl',
               'starts.jsonl'):
    (folder / name).write_bytes(data)
  try:
    assert 'stages' in workdir.read_config(folder)
  except ValueError as error:
    one_line(error, 'config.json')
  sums = workdir.read_checksums(folder)
  assert all(isinstance(step, int) for step in sums)
  assert all(isinstance(row, dict) for row in workdir.read_starts(folder))


@cases(150)
@hypothesis.given(
  st.lists(st.one_of(
    st.sampled_from([
      '--config', '--config=', 'configs/ck_plus.py', 'configs/mug.py:tiny',
      '--config=configs/frame_folders.py:hat_cgan,tiny', 'configs/none.py',
      '--config.hat_cgan.train.num_steps=3', '--config.seed', '--config.x=1',
      '--config.hat_cgan.train.num_steps.more=1', '/etc/passwd', 'configs',
    ]), st.text(max_size=12).filter(lambda x: '\0' not in x),
  ), max_size=4),
)
def test_config_words(words):
  try:
    config_flag._check(['train', *words])
  except (ValueError, AttributeError, KeyError, TypeError, OSError) as error:
    assert str(error)
  except SyntaxError:  # A config is a program; this one is none.
    assert any('passwd' in w for w in words)


@cases(100)
@hypothesis.given(st.one_of(st.none(), st.integers(), st.floats(), st.text()))
def test_settings_are_named(value):
  with pytest.raises(ValueError) as error:
    settings.check_choices(train__on_nan=(value, ('only',)))
  one_line(error.value.args[0].replace('\\n', ''), 'train.on_nan')


# -- command lines ------------------------------------------------------------

WORDS = (
  '--workdir', '--image', '--label', '--out', '--video', '--driving', '--fps',
  '--num_frames', '--refine', '--split', 'x.mp4', 'out/', '0', '-1', 'nan',
  'inf', '1e400', 'happy', 'all', '', ' ', '--crop', 'none', '--watermark',
  '--step', '9' * 30, '--raw', '--data_dir', 'frame_folders', 'mug', 'fetch',
  'weights', 'fomm', '--list', 'loop', 'folder', 'face.png', '--source',
  '../../etc', '/dev/null', '/dev/zero',
)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with a loop of links, to run commands in."""
  folder = tmp_path_factory.mktemp('place')
  (folder / 'loop').symlink_to(folder / 'loop')
  (folder / 'folder').mkdir()
  (folder / 'folder' / 'inside').symlink_to(folder)
  video.write_image(folder / 'face.png', np.full((9, 9, 3), 90, np.uint8))
  before = os.getcwd()
  os.chdir(folder)
  yield folder
  os.chdir(before)


@cases(400)
@hypothesis.given(
  st.sampled_from([generate, prepare, convert, provenance]),
  st.lists(st.one_of(
    st.sampled_from(WORDS + NAMES),
    st.text(max_size=8).filter(lambda x: '\0' not in x and '/' not in x),
  ), max_size=7),
)
def test_command_lines(place, command, words):
  if 'fetch' in words:  # downloads
    words = [w for w in words if w != 'fetch']
  before = sorted(place.rglob('*'))
  with contextlib.redirect_stderr(io.StringIO()) as err, (
    contextlib.redirect_stdout(err)
  ):
    try:
      code = command.main([w for w in words if w != '/dev/zero'])
    except SystemExit as stop:
      code = stop.code
  assert code in (0, 1, 2), code
  assert 'Traceback' not in err.getvalue()
  assert code == 0 or err.getvalue()
  assert sorted(place.rglob('*')) == before


def test_endless_files_end(place):
  for path in ('/dev/zero', '/dev/null', 'loop', 'folder/inside/loop'):
    for read in (
      lambda p: video.read_image(p, 10**5), video.read_fps,
      video.read_comment, torch_files.read, lambda p: take(clips.scan(p), 5),
    ):
      if read is video.read_comment and path.startswith('/dev'):
        assert read(path) == ''
        continue
      with pytest.raises(ValueError) as error:
        read(path)
      one_line(error.value, path)


# -- records, checkpoints of strangers ----------------------------------------


@cases(80)
@hypothesis.given(SEEDS)
def test_damaged_records(toy_records, small_videos, seed):
  import shutil

  rng = random.Random(seed)
  copy = small_videos[0] / 'records'
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(toy_records, copy)
  path = rng.choice(sorted(p for p in copy.rglob('*') if p.is_file()))
  path.write_bytes(mutate(path.read_bytes(), rng))
  try:
    found = records.Records('frame_folders/none-16', copy)
    for clip in found.split('everything'):
      for frame, mask in found.frames(clip, range(clip.num_frames)):
        assert frame.dtype == mask.dtype == np.uint8
  except ValueError as error:
    one_line(error)


def torch_zip(tree, storages):
  """A .pth in the zip format, without PyTorch."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('a/data.pkl', tree)
    for key, data in storages.items():
      archive.writestr(f'a/data/{key}', data)
  return file.getvalue()


def pickled_tensor(shape=b'(K\x02K\x03t', strides=b'(K\x03K\x01t'):
  """The opcodes of {'w': tensor of storage 0}."""
  return (
    b'\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n('
    b'(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu'
    b'K\x06tQK\0' + shape + strides + b'\x89}tRs.'
  )


@cases(300)
@hypothesis.given(SEEDS)
def test_damaged_checkpoints_of_strangers(small_videos, seed):
  rng = random.Random(seed)
  data = np.arange(6, dtype='f4').tobytes()
  plain = torch_zip(pickled_tensor(), {'0': data})
  path = small_videos[0] / 'a.pth'
  path.write_bytes(plain)
  whole = torch_files.read(path)['w']
  np.testing.assert_array_equal(whole, np.arange(6).reshape(2, 3))
  if rng.random() < 0.5:
    path.write_bytes(mutate(plain, rng))
  else:
    path.write_bytes(torch_zip(mutate(pickled_tensor(), rng), {'0': data}))
  try:
    for array in torch_files.read(path).values():
      assert isinstance(array, np.ndarray)
  except ValueError as error:
    one_line(str(error).replace('\n', ' '), 'a.pth')


def test_small_files_do_not_make_large_arrays(tmp_path):
  huge = b'(J\xff\xff\xff\x7ft'  # 2 ** 31 - 1 numbers, all the same one
  path = tmp_path / 'a.pth'
  path.write_bytes(torch_zip(pickled_tensor(huge, b'(K\0t'), {'0': bytes(24)}))
  with pytest.raises(ValueError, match='larger than its storage'):
    torch_files.read(path)
  tree = {}
  for _ in range(40):
    tree = {'a': tree, 'b': tree}  # 2 ** 40 leaves in 40 dicts
  path.write_bytes(torch_zip(pickle.dumps(tree, 2), {}))
  with pytest.raises(ValueError, match='too many'):
    torch_files.read(path)
  bomb = io.BytesIO()
  with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a/data.pkl', pickled_tensor())
    archive.writestr('a/data/0', bytes(10**7))
  path.write_bytes(bomb.getvalue())
  with pytest.raises(ValueError, match='compressed'):
    torch_files.read(path)


@cases(60)
@hypothesis.given(st.text(max_size=20))
def test_unknown_weights_are_named(name):
  hypothesis.assume(name not in weights.REGISTRY)
  with pytest.raises(ValueError):
    weights.entry_of(name)
  assert pathlib.Path(weights.folder())
