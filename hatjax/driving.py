"""A face driven by a clip of any length, a few frames in memory at a time.

    run = hatjax.load('runs/a')
    frames = driving.tracked('clip.mp4', run.image_size)
    for frame in driving.drive(run, image, frames):   # uint8 [S, S, 3]
      ...

Keypoints are dicts of float NumPy arrays: value [..., K, 2], normalized (x, y),
and jacobian [..., K, 2, 2]. The functions on them are the host's half of
`methods.motion_transfer`; the driving frames come as uint8 [S, S, 3].
"""

import functools
import itertools
import math
import pathlib
import sys
import time

import cv2
import numpy as np
import tqdm

from hatjax import faces, sound, video

MOTIONS = ('relative', 'absolute')
SPEED = 30.0  # Hz that the cut-off rises by, per unit of keypoint speed
FASTEST = 1.0  # Hz, cut-off of the speed itself


# -- keypoints ----------------------------------------------------------------


def hull_area(points):
  """Area of the convex hull of points [K, 2]."""
  hull = cv2.convexHull(np.ascontiguousarray(points, np.float32))
  return float(cv2.contourArea(hull))


def face_scale(source, first):
  """How much larger the source's face is: sqrt of the hulls' areas' ratio."""
  area = hull_area(first['value'])
  return math.sqrt(hull_area(source['value']) / area) if area > 0 else 1.0


def relative(source, driving, first, scale=1.0):
  """The source's keypoints, moved as the driver moved since its first frame.

  p = p_source + s (p_driving - p_first), J = J_driving J_first^-1 J_source
  (first-order model, section 3.3); the source itself where nothing moved.

  Args:
    source: keypoints [K, ...].
    driving: keypoints [..., K, ...].
    first: keypoints [K, ...] of the frame that looks like the source.
    scale: s.
  """
  moved = scale * (driving['value'] - first['value'])
  turn = driving['jacobian'] @ np.linalg.inv(first['jacobian'])
  return {
    'value': source['value'] + moved, 'jacobian': turn @ source['jacobian'],
  }


def unlikeness(points, others):
  """Distance of poses [K, 2] and [..., K, 2], wherever and however large."""
  def pose(points):
    points = points - points.mean(0)
    return points / max(math.sqrt(hull_area(points)), 1e-6)

  shape = others.shape[:-2]
  each = [pose(p) for p in others.reshape(-1, *points.shape)]
  return np.square(np.stack(each) - pose(points)).sum((1, 2)).reshape(shape)


class Smoother:
  """The One Euro filter (Casiez et al., CHI 2012) on a stream of arrays.

  What rests is smoothed, what moves fast is followed: the cut-off rises with
  the speed.

  Args:
    strength: share of the last value that a resting one keeps, 0 to 1; 0
      changes nothing.
    fps: values per second.
  """

  def __init__(self, strength, fps):
    self._strength, self._fps = strength, fps
    rest = (1 - strength) / strength if strength else math.inf
    self._cutoff = rest * fps / (2 * math.pi)
    self._value = self._speed = None

  def __call__(self, value):
    """The smoothed value, of the same shape."""
    if self._value is None or not self._strength:
      self._value, self._speed = value, np.zeros_like(value)
      return value
    speed = (value - self._value) * self._fps
    self._speed += self._share(FASTEST) * (speed - self._speed)
    share = self._share(self._cutoff + SPEED * np.abs(self._speed))
    self._value = self._value + share * (value - self._value)
    return self._value

  def _share(self, cutoff):
    """Weight of the new value for a cut-off in Hz."""
    step = 2 * np.pi * cutoff / self._fps
    return step / (1 + step)


# -- frames -------------------------------------------------------------------


class Driver:
  """The compiled half: finds keypoints and renders, a batch at a time.

  Args:
    run: a loaded run whose first stage reads 'driving'; see `hatjax.load`.
    image: the face, uint8 [S, S, 3].
    batch_size: frames per call; 0 for 8.

  Raises:
    ValueError: a run that is not driven, an image of another size.
  """

  def __init__(self, run, image, batch_size=0):
    import jax

    name, method, self._state = run.stages[0]
    if 'driving' not in method.reads:
      raise ValueError(
        f'This run is not driven by a clip: {name} reads '
        f'{", ".join(method.reads)}. Leave --driving out, or train one: '
        '--config configs/voxceleb.py'
      )
    self.size = method.image_size
    self.batch_size = batch_size or 8
    image = self._check(image)
    encode, self._find, self._render = _programs(method)
    self._context = encode(self._state, image[None])
    points = jax.device_get(self._context['keypoints'])
    self.source = {key: value[0] for key, value in points.items()}

  def _check(self, frame):
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.shape != (self.size, self.size, 3):
      raise ValueError(
        f'Frames must be uint8 [{self.size}, {self.size}, 3], not '
        f'{frame.dtype} {list(frame.shape)}.'
      )
    return frame

  def keypoints(self, frames):
    """Yields (frames, keypoints) of up to `batch_size` frames at a time."""
    frames = map(self._check, frames)
    while batch := list(itertools.islice(frames, self.batch_size)):
      found = self._find(self._state, self._fill(np.stack(batch)))
      yield batch, {
        key: np.asarray(value)[: len(batch)] for key, value in found.items()
      }

  def render(self, points):
    """uint8 [N, S, S, 3] of the face at keypoints [N, K, ...]."""
    n = len(points['value'])
    points = {
      key: self._fill(np.float32(value))[None] for key, value in points.items()
    }
    return np.asarray(self._render(self._state, self._context, points))[:n]

  def _fill(self, batch):
    """A smaller last batch would be another shape and compile again."""
    missing = self.batch_size - len(batch)
    return np.concatenate([batch, batch[-1:].repeat(missing, 0)])


@functools.lru_cache(maxsize=4)
def _programs(method):
  """Encode a face, find keypoints, render: compiled once for a method."""
  from hatjax import parallel

  to_float = video.to_float
  jit = functools.partial(parallel.jit, method=method)
  return (
    jit(lambda state, image: method.encode(
      state, {'image': to_float(image)}
    )),
    jit(lambda state, frames: method.keypoints(state, to_float(frames))),
    jit(lambda state, context, points: video.to_uint8(
      method.render(state, context, points)[0]
    )),
  )


def best_frame(driver, frames):
  """The keypoints of the driving frame whose pose is most like the source's.

  Returns:
    (index, keypoints [K, ...]).

  Raises:
    ValueError: no frames.
  """
  best, count = None, 0
  for batch, found in driver.keypoints(frames):
    away = unlikeness(driver.source['value'], found['value'])
    i = int(away.argmin())
    if best is None or away[i] < best[0]:
      points = {key: value[i] for key, value in found.items()}
      best = (away[i], count + i, points)
    count += len(batch)
  if best is None:
    raise ValueError('The driving clip holds no frames.')
  return best[1:]


def drive(
  run, image, frames, *, motion='relative', adapt_scale=True, first=None,
  smooth=0.0, fps=25.0, batch_size=0, beside=False, driver=None,
):
  """Yields a frame uint8 [S, S, 3] for every driving frame.

  Args:
    run: see `Driver`.
    image: the face, uint8 [S, S, 3].
    frames: iterable of driving frames uint8 [S, S, 3].
    motion: 'relative' moves the face as the driver moves, from its `first`
      frame on; 'absolute' puts it where the driver is.
    adapt_scale: relative motion is scaled by the sizes of the faces.
    first: keypoints, from `best_frame`, of the frame that counts as the
      start; default: the clip's first.
    smooth: strength of the smoothing against jitter; see `Smoother`.
    fps: of the clip, for the smoothing.
    batch_size: see `Driver`.
    beside: yield [S, 3 S, 3]: the face, the driving frame, the result.
    driver: a Driver of the run and image to use again.

  Raises:
    ValueError: unknown motion; see `Driver`.
  """
  if motion not in MOTIONS:
    raise ValueError(
      f'Unknown motion {motion!r}. Choose one of: {", ".join(MOTIONS)}.'
    )
  driver = driver or Driver(run, image, batch_size)
  smoothers = {key: Smoother(smooth, fps) for key in driver.source}
  scale = None
  for batch, found in driver.keypoints(frames):
    found = {
      key: np.stack([smoothers[key](x) for x in value])
      for key, value in found.items()
    }
    if motion == 'relative':
      first = first or {key: value[0] for key, value in found.items()}
      if scale is None:
        scale = face_scale(driver.source, first) if adapt_scale else 1.0
      found = relative(driver.source, found, first, scale)
    made = driver.render(found)
    if hasattr(run, 'sharpen'):
      made = run.sharpen(made)
    for real, fake in zip(batch, made):
      if beside:
        shown = (video.resize(x, len(fake)) for x in (image, real))
        fake = np.concatenate([*shown, fake], 1)
      yield fake


def tracked(path, size):
  """Yields a video's frames cropped to the head, uint8 [size, size, 3].

  How often no face was found is said on stderr at the end.
  """
  track = faces.Track()
  for frame in video.iter_video(path):
    yield faces.crop(frame, track(frame), size)
  if track.misses:
    rate = 100 * track.misses / track.count
    print(
      f'note: no face in {track.misses} of {track.count} frames of {path} '
      f'({rate:.1f} %); the last box was kept.', file=sys.stderr,
    )


def crops_of(path, run, mode, find):
  """Yields the frames of a video as the run wants them, [S, S, 3].

  Args:
    path: of the video.
    run: its size and how its data were cropped count.
    mode: 'auto' crops to the face in the first frame, unless the frames have
      the run's size; 'track' follows it; 'none' squeezes whole frames.
    find: (image, its name) -> Viola-Jones box of its face.
  """
  size, box = run.image_size, None
  if mode == 'track':
    yield from tracked(path, size)
    return
  for t, frame in enumerate(video.iter_video(path)):
    if t == 0 and frame.shape[:2] != (size, size):
      if mode == 'none' or run.crop == 'none':
        print(f'note: whole frames are squeezed to {size}x{size} pixels.',
              file=sys.stderr)
      else:
        face = find(frame, f'the first frame of {path}')
        box = faces.square_crop_box(face, frame.shape)
    if box is not None:
      frame = faces.crop(frame, box, size)
    yield video.resize(frame, size)


# -- the command's part -------------------------------------------------------


def add_options(parser):
  """The options of hatjax.generate that only --driving has."""
  group = parser.add_argument_group('with --driving')
  add = group.add_argument
  add('--driving', metavar='VIDEO',
      help='a clip (or folder of pictures) whose motion the faces of --image '
      'take on; of any length, with its frame rate and sound')
  add('--motion', choices=MOTIONS, default='relative',
      help='relative: each face moves as the driver moves, from the first '
      'frame on (default); absolute: it goes where the driver is')
  add('--best_start', action='store_true',
      help='relative to the frame most like the face, not the first one; reads '
      'the clip twice')
  add('--keep_scale', action='store_true',
      help='do not scale relative motion by the sizes of the two faces')
  add('--smooth', type=float, default=0.0, metavar='S',
      help='against jitter: the share of its last place that a resting '
      'keypoint keeps, 0 to below 1; default: 0')
  add('--side_by_side', action='store_true',
      help='show the face, the driving frame and the result')


def write(run, image, path, args, crops):
  """Writes one driven face; returns how many frames.

  Args:
    run: see `Driver`.
    image: uint8 [S, S, 3].
    path: where to.
    args: parsed options of hatjax.generate, and the run's signature.
    crops: () -> iterator of the driving frames, uint8 [S, S, 3].
  """
  for name in ('label', 'num_frames', 'boomerang', 'strip'):
    if getattr(args, name):
      raise ValueError(f'--{name} does not go with --driving. Leave it out.')
  if not 0 <= args.smooth < 1:
    raise ValueError(f'--smooth is {args.smooth}. Give 0, or up to below 1.')
  video.check_writable(path)
  fps = video.read_fps(args.driving) if args.fps is None else args.fps
  driver, first = Driver(run, image, args.batch_size), None
  if args.best_start and args.motion == 'relative':
    index, first = best_frame(driver, crops())
    print(f'relative to frame {index}', file=sys.stderr)
  made = drive(
    run, image, crops(), motion=args.motion, first=first, fps=fps,
    adapt_scale=not args.keep_scale, smooth=args.smooth, driver=driver,
    beside=args.side_by_side,
  )
  count, begin = itertools.count(), time.perf_counter()
  with tqdm.tqdm(made, unit='frame', disable=None, leave=False) as bar:
    frames = (frame for frame, _ in zip(bar, count))
    args.signature.write_video(path, frames, fps)
  count, seconds = next(count), time.perf_counter() - begin
  kept = args.fps is None and pathlib.Path(path).suffix.lower() == '.mp4'
  if kept and sound.copy(args.driving, path):
    print(f'with the sound of {args.driving}', file=sys.stderr)
  tqdm.tqdm.write(path)
  tqdm.tqdm.write(
    f'{count} frames in {seconds:.1f} s, {count / seconds:.1f} frames/s '
    'compilation included', file=sys.stderr
  )
  return count
