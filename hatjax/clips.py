"""Single frames out of videos, exactly, decoding no more than it takes.

A clip is a video file or a folder of pictures, which may well be named *.mp4.
`scan` goes through it once and tells the time of every frame; with those times
`read` finds any of them again. Frames are uint8 [H, W, 3].
"""

import pathlib

import av
import numpy as np

from hatjax import video

NEAR = 48  # frames: up to this far ahead decoding on beats seeking


def scan(path):
  """Yields (time, frame) of a whole clip; a folder's times are 0, 1, ...

  Raises:
    ValueError: it cannot be read, or two frames have one time.
  """
  if pathlib.Path(path).is_dir():
    yield from enumerate(map(video.read_image, video.list_images(path)))
    return
  last = None
  with _open(path) as container:
    for frame in _decode(container, path):
      if frame.pts is None or (last is not None and frame.pts <= last):
        raise ValueError(
          f'{path}: its frames have no rising times. Convert it once: ffmpeg '
          '-i IN -fps_mode cfr OUT.mp4'
        )
      last = frame.pts
      yield frame.pts, _to_array(frame)


def read(path, frames, times):
  """Yields the frames of the given numbers, in that order.

  Args:
    path: the clip.
    frames: numbers of frames; rising ones need no memory.
    times: of all its frames, as `scan` gave them.

  Raises:
    ValueError: the clip is gone, or is not the one that was scanned.
  """
  frames = [int(i) for i in frames]
  order = sorted(set(frames))
  found = _find(pathlib.Path(path), order, times)
  if order == frames:
    yield from found
    return
  kept = dict(zip(order, found))
  yield from (kept[i] for i in frames)


def _find(path, order, times):
  if not path.exists():
    raise ValueError(f'{path} is gone. Put it back, or prepare the data again.')
  if path.is_dir():
    images = video.list_images(path)
    if len(images) != len(times):
      raise ValueError(_changed(path))
    yield from (video.read_image(images[i]) for i in order)
    return
  with _open(path) as container:
    decoded, at = None, -1  # `at`: the last frame that was decoded
    for i in order:
      if decoded is None or not at < i <= at + NEAR:
        stream = container.streams.video[0]
        container.seek(int(times[i]), stream=stream)
        decoded = _decode(container, path)
      frame = next((f for f in decoded if f.pts >= times[i]), None)
      if frame is None or frame.pts != times[i]:
        raise ValueError(_changed(path))
      at = i
      yield _to_array(frame)


def _open(path):
  try:
    container = video.open_container(path)
  except (av.FFmpegError, OSError) as error:
    reason = error.strerror or error
    raise ValueError(f'Cannot read {path} as a video: {reason}.') from error
  if not container.streams.video:
    container.close()
    raise ValueError(f'{path} holds no video. Pass a video file.')
  container.streams.video[0].thread_type = 'NONE'
  return container


def _decode(container, path):
  try:
    yield from container.decode(container.streams.video[0])
  except av.FFmpegError as error:
    raise ValueError(f'{path} is damaged: {error.strerror}.') from error


def _to_array(frame):
  image = frame.to_ndarray(format='rgb24')
  return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def _changed(path):
  return f'{path} is not the clip that was prepared. Prepare the data again.'
