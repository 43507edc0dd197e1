"""Videos, strips and grids: written, read back, looked at."""

import io
import os
import pathlib
import resource
import struct

import av
import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hatjax import video

ENDINGS = ('.mp4', '.gif', '.webp', '/')


def make_clip(num_frames=5, height=48, width=64):
  """A smooth clip: red grows downwards, green to the right, blue with time."""
  t, y, x = np.meshgrid(
    *(np.linspace(0, 1, n) for n in (num_frames, height, width)),
    indexing='ij',
  )
  clip = np.stack([200 * y, 50 + 150 * x, 128 + 100 * t], axis=-1)
  return clip.round().astype(np.uint8)


def encode(array, form, mode=None, **options):
  """`array`, or a Pillow image, as the bytes of a picture file."""
  image = Image.fromarray(array) if isinstance(array, np.ndarray) else array
  buffer = io.BytesIO()
  image.convert(mode or image.mode).save(buffer, form, **options)
  return buffer.getvalue()


def psnr(a, b):
  return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


@pytest.mark.parametrize(
  'height, width', [(48, 64), (33, 47), (70, 66), (16, 15), (1, 1)]
)
def test_mp4(tmp_path, height, width):
  clip = make_clip(7, height, width)
  path = tmp_path / 'a' / 'b.mp4'
  video.write_video(path, clip, fps=25)
  even = (height + height % 2, width + width % 2)
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    context = stream.codec_context
    assert context.name == 'h264'
    assert stream.pix_fmt == 'yuv420p'
    assert (stream.height, stream.width) == even
    assert (stream.average_rate, stream.frames) == (25, 7)
    assert float(stream.duration * stream.time_base) == pytest.approx(7 / 25)
    # BT.709, limited range
    assert (int(context.colorspace), int(context.color_range)) == (1, 1)
  frames, fps = video.read_video(path)
  assert fps == 25
  assert frames.shape == (7, *even, 3)
  padded = np.pad(
    clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), 'edge'
  )
  difference = np.abs(frames.astype(int) - padded)
  # Colour has half the resolution, which a small steep ramp shows.
  assert difference.mean() < (2.5 if width > 16 else 5)
  assert difference.max() < (14 if width > 16 else 20)
  data = path.read_bytes()
  assert data.index(b'moov') < data.index(b'mdat')  # starts before it is loaded


def test_mp4_keeps_colours_apart_from_their_order(tmp_path):
  colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (224, 172, 150)]
  clip = np.stack([np.full((32, 32, 3), c, np.uint8) for c in colours])
  video.write_video(tmp_path / 'a.mp4', clip)
  frames, _ = video.read_video(tmp_path / 'a.mp4')
  assert np.abs(frames.astype(int) - clip).max() <= 4
  # Another decoder, which must find the same colour matrix.
  _, frame = cv2.VideoCapture(str(tmp_path / 'a.mp4')).read()
  assert np.abs(frame[..., ::-1].astype(int) - clip[0]).max() <= 4


@pytest.mark.parametrize(
  'fps, read', [(30000 / 1001, 30000 / 1001), (29.97, 29.97), (12.5, 12.5)]
)
def test_mp4_frame_rates(tmp_path, fps, read):
  video.write_video(tmp_path / 'a.mp4', make_clip(10), fps)
  assert video.read_fps(tmp_path / 'a.mp4') == pytest.approx(read, rel=1e-6)


def test_mp4_rotation_of_a_phone(tmp_path):
  clip = make_clip(3, 32, 64)
  path = tmp_path / 'phone.mp4'
  video.write_video(path, clip)
  upright, _ = video.read_video(path)
  data = path.read_bytes()
  at = data.index(b'tkhd') + 44  # the track's display matrix, 16.16 fixed point
  one = 1 << 16
  turn = struct.pack('>9i', 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # clockwise
  path.write_bytes(data[:at] + turn + data[at + 36 :])
  frames, _ = video.read_video(path)
  np.testing.assert_array_equal(frames, np.rot90(upright, -1, axes=(1, 2)))


def durations(path):
  with Image.open(path) as image:
    found = []
    for i in range(image.n_frames):
      image.seek(i)
      image.load()
      found.append(image.info['duration'])
    return found, image.info.get('loop'), image.size


@pytest.mark.parametrize(
  'fps, delays',
  [
    (25, [40] * 6), (10, [100] * 6), (50, [20] * 6),
    (30, [30, 40, 30, 30, 40, 30]),  # 1 / 30 s is no whole number of 1 / 100 s
  ],
)
def test_gif_delays(tmp_path, fps, delays):
  path = tmp_path / 'a.gif'
  video.write_video(path, make_clip(6, 33, 47), fps)
  assert durations(path) == (delays, 0, (47, 33))
  frames, read = video.read_video(path)
  assert frames.shape == (6, 33, 47, 3)
  assert read == pytest.approx(fps)


def test_gif_colours(tmp_path):
  clip = make_clip(6, 48, 64)
  video.write_video(tmp_path / 'a.gif', clip)
  assert psnr(video.read_video(tmp_path / 'a.gif')[0], clip) > 28
  # 200 greys fit in one palette.
  grey = np.arange(200, dtype=np.uint8)[:, None]
  grey = np.broadcast_to(grey, (4, 9, 200, 3))
  video.write_video(tmp_path / 'b.gif', grey)
  frames, _ = video.read_video(tmp_path / 'b.gif')
  assert np.abs(frames.astype(int) - grey).max() <= 1  # the dither's step


def test_webp(tmp_path):
  clip = make_clip(6, 33, 47)
  video.write_video(tmp_path / 'a.webp', clip, 20)
  assert durations(tmp_path / 'a.webp') == ([50] * 6, 0, (47, 33))
  frames, fps = video.read_video(tmp_path / 'a.webp')
  assert fps == pytest.approx(20)
  assert psnr(frames, clip) > 32


@pytest.mark.parametrize('ending', ENDINGS)
def test_frames_that_repeat_are_kept(tmp_path, ending):
  clip = np.concatenate([make_clip(3)] * 2)[[0, 0, 1, 2, 2, 2]]
  path = f'{tmp_path}/a{ending}'
  video.write_video(path, clip)
  frames, fps = video.read_video(path)
  assert len(frames) == 6
  assert fps == pytest.approx(25)
  assert np.abs(frames.astype(int) - clip).mean() < 5


@pytest.mark.parametrize('ending', ENDINGS)
def test_a_single_frame(tmp_path, ending):
  path = f'{tmp_path}/a{ending}'
  video.write_video(path, make_clip(1))
  assert video.read_video(path)[0].shape == (1, 48, 64, 3)


def test_folder_of_frames_is_exact_and_replaced_whole(tmp_path):
  clip = make_clip(12, 15, 17)
  for path in (tmp_path / 'plain', f'{tmp_path}/dotted.v2/'):
    video.write_video(path, clip)
    assert sorted(os.listdir(path)) == [f'{t:04d}.png' for t in range(12)]
    np.testing.assert_array_equal(video.read_video(path)[0], clip)
    video.write_video(path, clip[:4][::-1])
    np.testing.assert_array_equal(video.read_video(path)[0], clip[:4][::-1])
  assert sorted(os.listdir(tmp_path)) == ['dotted.v2', 'plain']


def test_a_folder_with_other_files_is_not_touched(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  with pytest.raises(OSError, match='other files than frames .thesis.tex'):
    video.write_video(tmp_path, make_clip(2))
  assert os.listdir(tmp_path) == ['thesis.tex']


def test_folders_are_read_in_natural_order(tmp_path):
  clip = make_clip(3)
  for name, frame in zip(('f2.png', 'f10.png', 'f100.png'), clip):
    video.write_image(tmp_path / name, frame)
  (tmp_path / '.hidden.png').write_text('')
  (tmp_path / 'notes.txt').write_text('')
  frames, fps = video.read_video(tmp_path)
  assert fps == 25
  np.testing.assert_array_equal(frames, clip)
  video.write_image(tmp_path / 'f101.png', clip[0, :9])
  with pytest.raises(ValueError, match='Frame 3 has shape .9, 64, 3.'):
    video.read_video(tmp_path)


def test_jax_arrays_and_streams(tmp_path):
  clip = make_clip(4)
  for name, frames in (('a/', jnp.asarray(clip)), ('b/', iter(clip))):
    video.write_video(f'{tmp_path}/{name}', frames)
    np.testing.assert_array_equal(
      video.read_video(f'{tmp_path}/{name}')[0], clip
    )


def test_iter_video_reads_only_what_is_asked(tmp_path):
  video.write_video(tmp_path / 'a', make_clip(3))
  (tmp_path / 'a' / '0002.png').write_bytes(b'broken')
  frames = video.iter_video(tmp_path / 'a')
  assert next(frames).shape == next(frames).shape == (48, 64, 3)
  with pytest.raises(ValueError, match='0002.png is a text file'):
    next(frames)


def failing(clip):
  yield from clip[:3]
  raise RuntimeError('the net blew up')


@pytest.mark.parametrize('ending', ENDINGS)
def test_a_failure_leaves_the_earlier_video(tmp_path, ending):
  clip = make_clip(6)
  path = pathlib.Path(f'{tmp_path}/a{ending}')
  video.write_video(f'{tmp_path}/a{ending}', clip)
  files = [path] if path.is_file() else sorted(path.iterdir())
  before = [file.read_bytes() for file in files]
  with pytest.raises(RuntimeError, match='the net blew up'):
    video.write_video(f'{tmp_path}/a{ending}', failing(clip))
  assert [file.read_bytes() for file in files] == before
  assert os.listdir(tmp_path) == [path.name]
  with pytest.raises(RuntimeError):
    video.write_video(f'{tmp_path}/new{ending}', failing(clip))
  assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize('ending', ENDINGS)
def test_a_full_disk_is_one_clear_line(tmp_path, ending):
  noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
  try:
    with pytest.raises(OSError, match='Cannot write .*Free some space') as e:
      video.write_video(f'{tmp_path}/a{ending}', noise)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert '\n' not in str(e.value)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
  'name, frames, fps, message',
  [
    ('a.avi', make_clip(2), 25, "cannot write '.avi'. Choose one of: .mp4"),
    ('a.mp4', make_clip(2), 0, 'cannot play 0 frames per second'),
    ('a.mp4', make_clip(2), float('nan'), 'cannot play nan'),
    ('a.gif', make_clip(2), 60, 'at most 50 for a .gif'),
    ('a.mp4', [], 25, 'No frames'),
    ('a.gif', make_clip(2)[:0], 25, 'No frames'),
    ('a.mp4', make_clip(2)[0], 25, r'Frame 0 is uint8 .64, 3., expected'),
    ('a.mp4', make_clip(2) / 255, 25, 'call video.to_uint8 first'),
    ('a.mp4', [np.zeros((8, s, 3), np.uint8) for s in (8, 6)], 25,
     r'Frame 1 has shape .8, 6, 3., the first .8, 8, 3.'),
  ],
)
def test_what_cannot_be_written_is_named(tmp_path, name, frames, fps, message):
  with pytest.raises(ValueError, match=message):
    video.write_video(tmp_path / name, frames, fps)
  assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('keep')
  (tmp_path / 'dir.mp4').mkdir()
  for path, message in (
    ('file/a.mp4', 'file is not a folder that you may write to'),
    ('file/new/a.mp4', 'file is not a folder that you may write to'),
    ('dir.mp4', 'it is a folder'),
    ('file', 'it is a file, and without an ending means a folder'),
  ):
    with pytest.raises(OSError, match=f'Cannot write .*{message}'):
      video.write_video(tmp_path / path, make_clip(2))
  assert (tmp_path / 'file').read_text() == 'keep'
  if os.geteuid():
    (tmp_path / 'dir.mp4').chmod(0o500)
    with pytest.raises(OSError, match='may write to'):
      video.write_video(tmp_path / 'dir.mp4' / 'a.mp4', make_clip(2))


def test_what_is_no_video_is_named(tmp_path):
  clip = make_clip(9)
  for ending in ('.mp4', '.gif', '.webp'):
    video.write_video(tmp_path / f'ok{ending}', clip)
    data = (tmp_path / f'ok{ending}').read_bytes()
    cut = len(data) // 3
    (tmp_path / f'cut{ending}').write_bytes(data[:cut])
  (tmp_path / 'text.mp4').write_text('hello\n' * 99)
  # FFmpeg would open the other file, or draw the text.
  (tmp_path / 'list.mp4').write_text('ffconcat version 1.0\nfile ok.mp4\n')
  (tmp_path / 'notes.txt').write_text('hello\n' * 99)
  (tmp_path / 'empty.mp4').write_text('')
  (tmp_path / 'folder').mkdir()
  for name in (
    'cut.mp4', 'cut.gif', 'cut.webp', 'text.mp4', 'list.mp4', 'notes.txt',
    'empty.mp4', 'folder', 'none.mp4',
  ):
    with pytest.raises(ValueError, match=name) as caught:
      video.read_video(tmp_path / name)
    assert '\n' not in str(caught.value), name


def flat(colours, num_frames=2, height=4, width=6):
  colours = np.uint8(colours)[:, None, None, None]
  return np.broadcast_to(colours, (len(colours), num_frames, height, width, 3))


def test_tile_places_every_clip():
  clips = flat([(i, i, i) for i in range(1, 6)])
  grid = video.tile(clips, columns=2, pad=3)
  assert grid.shape == (2, 3 * 7 - 3, 2 * 9 - 3, 3)
  expected = np.full((18, 15), 255)
  expected[0:4, 0:6], expected[0:4, 9:15] = 1, 2
  expected[7:11, 0:6], expected[7:11, 9:15] = 3, 4
  expected[14:18, 0:6] = 5
  np.testing.assert_array_equal(grid[1, ..., 0], expected)


@pytest.mark.parametrize(
  'num, shape', [(1, (4, 6)), (3, (8, 12)), (5, (8, 18))]
)
def test_tile_is_nearly_square(num, shape):
  grid = video.tile(flat([(9, 9, 9)] * num), pad=0)
  assert grid.shape == (2, *shape, 3)


def test_strip_takes_evenly_spaced_frames():
  clip = np.broadcast_to(np.arange(15)[:, None, None, None], (15, 2, 3, 3))
  row = video.strip(clip.astype(np.uint8), num_frames=8, pad=1)
  assert row.shape == (2, 8 * 4 - 1, 3)
  assert row[0, ::4, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
  assert row[0, 3::4, 0].tolist() == [255] * 7
  assert video.strip(clip[:3].astype(np.uint8), 8, pad=0).shape == (2, 9, 3)


def test_stack_rows_fills_with_white():
  wide, narrow = flat([(1, 1, 1), (2, 2, 2)])[:, 0]
  rows = video.stack_rows([wide, narrow[:, :2]])
  expected = np.full((10, 6), 255)
  expected[:4], expected[6:, :2] = 1, 2
  np.testing.assert_array_equal(rows[..., 0], expected)
  assert video.stack_rows([rows, rows], pad=0).shape == (20, 6, 3)


@pytest.mark.parametrize('size', [48, 64, 256])
def test_grid_with_labels(size):
  labels = ['happy', 'sad', 'a name too long for so small a cell']
  clips = flat([(0, 0, 250), (0, 250, 0), (250, 0, 0)], 2, size, size)
  grid = video.grid_with_labels(clips, labels, columns=3)
  bar, pad = grid.shape[1] - size, max(2, size // 32)
  assert grid.shape == (2, size + bar, 3 * size + 2 * pad, 3)
  captions = []
  for i, clip in enumerate(clips):
    cell = grid[:, :, i * (size + pad) : i * (size + pad) + size]
    np.testing.assert_array_equal(cell[:, bar:], clip)
    dark = (cell[0, :bar] < 128).all(-1)
    assert 0.02 < dark.mean() < 0.4
    assert not dark[0].any() and not dark[-1].any()  # not cut off
    captions.append(dark)
  assert (captions[0] != captions[1]).any()
  middle = np.nonzero(captions[0].any(0))[0]
  assert abs(middle.mean() - (size - 1) / 2) < size / 10
  assert len(middle) and middle[0] > 0 and middle[-1] < size - 1


def test_sample_frames_are_grey_pngs_named_jpg(sample_data):
  path = sample_data / 'affinegan_sample/happy/train/img/vid_0001'
  frames, _ = video.read_video(path)
  assert len(frames) == len(list(path.iterdir())) > 5
  assert frames.shape[1:] in ((490, 640, 3), (480, 640, 3))
  np.testing.assert_array_equal(frames[..., 0], frames[..., 2])


def test_every_sample_portrait_is_read(sample_data):
  paths = video.list_images(sample_data / 'portrait_images')
  assert len(paths) > 5
  for path in paths[::4]:
    image = video.read_image(path)
    with Image.open(path) as opened:
      assert sorted(image.shape[:2]) == sorted(opened.size)
    assert 10 < image.std() < 120


def test_real_faces_keep_their_look(sample_data, tmp_path):
  """Measured at 256 pixels, d0: mp4 39.4 dB, gif 42.9, webp 40.8."""
  path = sample_data / 'portrait_clips' / 'd0.mp4'
  frames = video.iter_video(path)
  clip = np.stack([video.resize(next(frames), 256) for _ in range(8)])
  assert video.read_fps(path) == 25
  for name, least in (('a.mp4', 37), ('a.gif', 38), ('a.webp', 38)):
    video.write_video(tmp_path / name, clip)
    assert psnr(video.read_video(tmp_path / name)[0], clip) > least, name
