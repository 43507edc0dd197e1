"""Pictures and videos as arrays: value ranges, reading, writing, laying out.

Layout is T H W C for a video and H W C for an image (N in front for several),
colour is RGB. On disk and in every function here but `to_float`, values are
uint8 0..255 in NumPy; inside the program they are float32 [-1, 1]. `to_float`
and `to_uint8` are the only two range changes of the program.

What cannot be read or cannot be asked for is a ValueError, what cannot be
written an OSError; both carry one line that names the file and the cure.
"""

import contextlib
import fractions
import io
import itertools
import math
import os
import pathlib
import re
import secrets
import shutil
import warnings

import av
import cv2
import einops
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from hatjax import encoders

IMAGE_ENDINGS = (
  '.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.avif',
)
VIDEO_ENDINGS = ('.mp4', '.gif', '.webp')  # what write_video writes
MAX_PIXELS = 100_000_000
# Neither PostScript nor any other format that runs code or opens other files.
_IMAGE_FORMATS = (
  'PNG', 'JPEG', 'MPO', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF', 'PPM', 'JPEG2000',
)
# Neither playlists, which open other files, nor text, which FFmpeg would draw.
_UNREADABLE = (
  av.FFmpegError, OSError, SyntaxError, EOFError, Image.DecompressionBombError,
)
_VIDEO_FORMATS = 'mov,mp4,m4a,3gp,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg'


def to_float(video):
  """uint8 0..255 -> float32 [-1, 1]. NumPy or JAX, any shape."""
  return video.astype('float32') / 127.5 - 1


def to_uint8(video):
  """Float [-1, 1] -> uint8, clipped, halves to even. NumPy or JAX, any shape.

  Exact inverse of `to_float` for all 256 values.
  """
  video = (video.astype('float32') + 1) * 127.5
  return video.round().clip(0, 255).astype('uint8')


def read_image(path, max_pixels=MAX_PIXELS):
  """The picture in a file, uint8 [H, W, 3]; see `decode_image`."""
  try:
    with open(path, 'rb') as file:
      data = file.read(8 * max_pixels + 2**20)  # 16 bits RGBA fit in
  except OSError as error:
    raise ValueError(
      f'Cannot read {path}: {error.strerror}. Check the path and its rights.'
    ) from error
  return decode_image(data, path, max_pixels)


def decode_image(data, name, max_pixels=MAX_PIXELS):
  """The picture in `data` (a file's bytes) as it should look, uint8 [H, W, 3].

  The type is read from the bytes, not from a name. EXIF rotation is applied;
  what is transparent is laid over white; grey becomes three equal channels; 16
  bits become 8 by scaling; of an animation the first frame counts. `name` is
  for messages. More than `max_pixels` fail before anything is decoded.
  """
  if not data:
    raise ValueError(f'{name} is empty (0 bytes). Export the picture again.')
  Image.init()  # fills OPEN
  formats = [f for f in _IMAGE_FORMATS if f in Image.OPEN]
  try:
    with warnings.catch_warnings(action='ignore'):  # of size: checked below
      image = Image.open(io.BytesIO(data), formats=formats)
    num_pixels = math.prod(image.size)
  except Image.DecompressionBombError:
    num_pixels = math.inf
  except Exception:  # decoders of hostile bytes raise anything
    raise ValueError(_say_what_it_is(data, name)) from None
  if num_pixels > max_pixels:
    raise ValueError(
      f'{name} has more than {max_pixels} pixels. Make it smaller.'
    )
  if image.mode in ('I', 'F'):
    raise ValueError(
      f'{name} holds 32-bit values of unknown range. Save it with 8 or 16 bits.'
    )
  try:
    return _to_rgb(ImageOps.exif_transpose(image))
  except Exception as error:
    raise ValueError(
      f'{name} is damaged or cut off ({error}). Copy or export it again.'
    ) from error


def _to_rgb(image):
  if image.mode.startswith('I;16'):
    # Pillow would clip 16 bits at 255. 65535 / 257 = 255.
    grey = np.rint(np.asarray(image, np.float32) / 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    under = Image.new('RGBA', image.size, (255,) * 4)
    image = Image.alpha_composite(under, image)
  return np.array(image.convert('RGB'))


def _say_what_it_is(data, name):
  kind = 'not a picture of a known type, or damaged'
  if data[4:8] == b'ftyp' and data[8:11] in (b'hei', b'hev', b'mif', b'msf'):
    kind = 'a HEIC photo'
  elif data[4:8] == b'ftyp' or data[:4] == b'\x1aE\xdf\xa3':
    kind = 'a video, not a picture'
  elif data[:64].isascii() and b'\0' not in data[:64]:
    kind = 'a text file, not a picture'
  return f'{name} is {kind}. Pass a JPEG, PNG or WebP picture.'


def encode_png(image):
  """uint8 [H, W, 3] -> the bytes of a PNG file."""
  image = next(_checked([image]))
  return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


def write_image(path, image):
  """Writes uint8 [H, W, 3] as a PNG, whole or not at all."""
  data = encode_png(image)
  with _replacing(path) as temporary:
    temporary.write_bytes(data)


def resize(video, size, interpolation='auto'):
  """Resizes uint8 [T, H, W, 3], [H, W, 3] or [H, W] to `size`, (H, W) or one.

  'auto' averages areas along an axis that shrinks, then is bicubic along one
  that grows. 'area' and 'cubic' are OpenCV's; 'cubic' has no anti-aliasing:
  shrinking with it samples few source pixels.
  """
  if video.ndim == 4:
    return np.stack([resize(frame, size, interpolation) for frame in video])
  height, width = (size, size) if np.ndim(size) == 0 else size
  if interpolation == 'auto':
    smaller = min(height, video.shape[0]), min(width, video.shape[1])
    return resize(resize(video, smaller, 'area'), size, 'cubic')
  flags = {'area': cv2.INTER_AREA, 'cubic': cv2.INTER_CUBIC}
  if interpolation not in flags:
    raise ValueError(
      f'Unknown interpolation {interpolation!r}. '
      'Choose one of: area, auto, cubic.'
    )
  if video.shape[:2] == (height, width):
    return video
  flag = flags[interpolation]
  return cv2.resize(video, (int(width), int(height)), interpolation=flag)


def write_video(path, frames, fps=25, comment=''):
  """Writes a video in the form that the ending of `path` names.

  .mp4: H.264, yuv420p, BT.709, index first (plays in a browser); an odd side
  gains a copy of its last row or column. .gif: one palette, all frames kept in
  memory. .webp: animated. None, or a '/': a folder of 0000.png, 0001.png, ...

  The video appears whole or not at all: it is written beside under another
  name, then renamed, so that a failure leaves an earlier one as it was. Folders
  above are created. A folder is replaced only if it holds nothing but frames.

  Args:
    path: its ending decides.
    frames: uint8 [T, H, W, 3], or any iterable of uint8 [H, W, 3] of one size.
    fps: frames per second; 50 at most for .gif (a limit of players).
    comment: a line of ASCII for the file's metadata; see `read_comment`.
  """
  write = _writer(path)
  if not 0.1 <= fps <= (50 if write is encoders.to_gif else 1000):
    raise ValueError(
      f'{path} cannot play {fps} frames per second. '
      'Pass at least 0.1, and at most 50 for a .gif.'
    )
  check_writable(path)
  frames = np.asarray(frames) if hasattr(frames, 'ndim') else frames
  with _replacing(path) as temporary:
    fps = fractions.Fraction(float(fps))
    write(temporary, _checked(frames), fps, comment)


def check_writable(path):
  """Raises now what would make `write_video` fail on `path`; writes nothing."""
  to_folder = _writer(path) is _write_folder
  target = pathlib.Path(os.path.abspath(path))
  parent = next(p for p in target.parents if os.path.lexists(p))
  names = [p.name for p in target.iterdir()] if target.is_dir() else []
  others = [n for n in names if not re.fullmatch(r'[0-9]{4,}\.png', n)]
  problem = None
  if target.is_dir() and not to_folder:
    problem = 'it is a folder'
  elif others:
    problem = f'the folder holds other files than frames ({others[0]})'
  elif target.is_file() and to_folder:
    problem = 'it is a file, and without an ending means a folder of frames'
  elif not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
    problem = f'{parent} is not a folder that you may write to'
  if problem:
    raise OSError(f'Cannot write {path}: {problem}. Pass another name.')


def _writer(path):
  writers = {
    '.mp4': encoders.to_mp4, '.gif': encoders.to_gif,
    '.webp': encoders.to_webp, '': _write_folder,
  }
  ending = pathlib.Path(path).suffix.lower()
  ending = '' if str(path).endswith(('/', os.sep)) else ending
  if ending not in writers:
    raise ValueError(
      f'{path}: cannot write {ending!r}. Choose one of: '
      f'{", ".join(VIDEO_ENDINGS)}, or a folder of frames (a name ending in /).'
    )
  return writers[ending]


@contextlib.contextmanager
def _replacing(path):
  """A path beside `path`; what is written there takes its place at the end."""
  target = pathlib.Path(os.path.abspath(path))
  temporary = target.with_name(f'.hatjax-{secrets.token_hex(6)}.part')
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    if target.is_dir():
      shutil.rmtree(target)  # no rename replaces a folder that holds files
    temporary.replace(target)
  except OSError as error:
    raise OSError(
      f'Cannot write {path}: {error.strerror or error}. '
      'Free some space, or pass another path.'
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.unlink(missing_ok=True)


def _checked(frames):
  shape = None
  for t, frame in enumerate(frames):
    frame = np.ascontiguousarray(frame)
    if frame.dtype != np.uint8 or frame.shape[2:] != (3,) or not frame.size:
      raise ValueError(
        f'Frame {t} is {frame.dtype} {list(frame.shape)}, expected uint8 '
        '[H, W, 3]. From [-1, 1], call video.to_uint8 first.'
      )
    shape = shape or frame.shape
    if frame.shape != shape:
      raise ValueError(
        f'Frame {t} has shape {list(frame.shape)}, the first {list(shape)}. '
        'Resize them to one size.'
      )
    yield frame
  if shape is None:
    raise ValueError('No frames to write.')


def _write_folder(path, frames, _, comment):
  path.mkdir()
  for t, frame in enumerate(frames):
    data = encode_png(frame)
    data = encoders.comment_png(data, comment) if comment else data
    (path / f'{t:04d}.png').write_bytes(data)


def read_video(path):
  """The frames uint8 [T, H, W, 3] and the frames per second of a video.

  Reads what FFmpeg decodes (mp4, mov, webm, avi, ...), animated GIF and WebP
  (a frame shown longer is repeated), and folders of pictures in natural order
  (25 frames per second).
  """
  fps, *frames = _read(path)
  if not frames:
    raise ValueError(f'{path} holds no frames. Pass another video.')
  return np.stack(frames), fps


def iter_video(path):
  """The frames of `read_video` one by one, uint8 [H, W, 3]."""
  return itertools.islice(_read(path), 1, None)


def read_comment(path):
  """The comment that `write_video` put into a file, or ''.

  Raises:
    ValueError: the file cannot be read.
  """
  path = pathlib.Path(path)
  path = list_images(path)[0] if path.is_dir() else path
  try:
    with path.open('rb') as file:
      data = file.read(12)
    if data[4:8] == b'ftyp' or data[:4] == b'\x1aE\xdf\xa3':
      with open_container(path) as container:
        return container.metadata.get('comment', '')
    with Image.open(path, formats=['GIF', 'WEBP', 'PNG']) as image:
      names = 'Comment', 'comment', 'xmp'
      found = next((image.info[n] for n in names if n in image.info), '')
    return found.decode(errors='replace') if type(found) is bytes else found
  except Image.UnidentifiedImageError:
    return ''  # a kind that carries none
  except _UNREADABLE as error:
    raise ValueError(_cannot_read(path, error)) from error


def read_fps(path):
  """The frames per second of `read_video`."""
  return next(_read(path))


def _read(path):
  """Yields the frames per second, then frame after frame."""
  path = pathlib.Path(path)
  try:
    if path.is_dir():
      yield 25.0
      yield from _checked(map(read_image, list_images(path)))
      return
    with path.open('rb') as file:
      head = file.read(12)
    animated = head[:4] == b'GIF8' or head[8:] == b'WEBP'
    yield from _read_animation(path) if animated else _read_container(path)
  except _UNREADABLE as error:
    raise ValueError(_cannot_read(path, error)) from error


def _cannot_read(path, error):
  reason = getattr(error, 'strerror', None) or error
  return (
    f'Cannot read {path} as a video: {reason}. '
    'Pass an mp4, mov, webm, gif or webp file, or a folder of pictures.'
  )


def _read_animation(path):
  delays = []
  with Image.open(path, formats=['GIF', 'WEBP']) as image:
    for i in range(image.n_frames):
      image.seek(i)
      image.load()  # WebP knows the duration only now
      delay = image.info.get('duration', 0)
      delays.append(delay if delay > 10 else 100)  # as browsers do
    repeats = [round(delay / min(delays)) for delay in delays]
    yield 1000 * sum(repeats) / sum(delays)
    for i, repeat in enumerate(repeats):
      image.seek(i)
      yield from itertools.repeat(_to_rgb(image), repeat)


def open_container(path):
  """PyAV's container of a video file; of no format that opens other files."""
  options = {'format_whitelist': _VIDEO_FORMATS}
  return av.open(str(path), options=options, metadata_errors='replace')


def _read_container(path):
  with open_container(path) as container:
    if not container.streams.video:
      raise ValueError(f'{path} holds no video. Pass a video file.')
    stream = container.streams.video[0]
    stream.thread_type = 'AUTO'
    yield float(stream.average_rate or stream.guessed_rate or 25)
    for frame in container.decode(stream):
      image = frame.to_ndarray(format='rgb24')
      yield np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def list_images(folder):
  """Paths of the pictures in a folder, by ending, in natural order (2 < 10)."""
  files = [
    path for path in pathlib.Path(folder).iterdir()
    if path.suffix.lower() in IMAGE_ENDINGS and path.name[0] != '.'
  ]
  if not files:
    raise ValueError(
      f'No pictures in {folder}. Names must end in {", ".join(IMAGE_ENDINGS)}.'
    )
  numbers = lambda path: [
    int(part) if i % 2 else part
    for i, part in enumerate(re.split('([0-9]+)', path.name))
  ]
  return sorted(files, key=numbers)


def tile(videos, columns=None, pad=2):
  """Lays clips [N, T, H, W, 3] out in a grid on white, row by row.

  There are `pad` pixels between cells, none around the grid. By default the
  grid has as many columns as rows, or one more.
  """
  columns = columns or math.ceil(math.sqrt(len(videos)))
  cells = np.pad(
    videos, ((0, -len(videos) % columns), (0, 0), (0, pad), (0, pad), (0, 0)),
    constant_values=255,
  )
  grid = einops.rearrange(
    cells, '(row column) t h w c -> t (row h) (column w) c', column=columns
  )
  return grid[:, :grid.shape[1] - pad, :grid.shape[2] - pad]


def strip(video, num_frames=8, pad=2):
  """A row of evenly spaced frames of [T, H, W, 3], first and last included."""
  num_frames = min(num_frames, len(video))
  picked = np.rint(np.linspace(0, len(video) - 1, num_frames)).astype(int)
  return tile(np.asarray(video)[picked, None], columns=num_frames, pad=pad)[0]


def stack_rows(images, pad=2):
  """Stacks uint8 [H, W, 3] images downwards on white, left edges aligned."""
  width = max(image.shape[1] for image in images)
  rows = []
  for image in images:
    pads = ((0, pad), (0, width - image.shape[1]), (0, 0))
    rows.append(np.pad(image, pads, constant_values=255))
  return np.concatenate(rows)[:-pad or None]


def grid_with_labels(videos, labels, columns=None):
  """Like `tile`, with `labels` (N strings) written above the cells."""
  videos = np.asarray(videos)
  width = videos.shape[3]
  captions = np.stack([_caption(label, width) for label in labels])
  captions = np.repeat(captions[:, None], videos.shape[1], axis=1)
  cells = np.concatenate([captions, videos], axis=2)
  return tile(cells, columns, pad=max(2, width // 32))


def _caption(text, width):
  """A white bar [h, width, 3] with `text`, shrunk or cut to fit."""
  size = min(max(width // 9, 11), 26)
  bar = Image.new('RGB', (width, round(1.5 * size)), (255,) * 3)
  draw = ImageDraw.Draw(bar)
  font = ImageFont.load_default(size)
  while draw.textlength(text, font=font) > width and len(text) > 1:
    size -= 1
    font = ImageFont.load_default(max(size, 9))
    text = text if size >= 9 else f'{text[:-2]}…'
  draw.text(
    (width / 2, bar.height / 2), text, (32, 32, 32), font, anchor='mm'
  )
  return np.array(bar)
