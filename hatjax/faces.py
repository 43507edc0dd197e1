"""Finding a face in a picture, cropping around it, and masks of the lips.

Images are uint8 NumPy arrays [H, W, 3] (RGB), masks uint8 [H, W] with values
0 and 255. A box is (x0, y0, x1, y1), integers in pixels, x1 and y1 excluded;
it may reach beyond the image. Points are float [68, 2], (x, y) in pixels,
whole numbers being pixel centres, in the order of the 68-point scheme of
dlib and CK+ (48-59 is the outer contour of the lips).

Everything is deterministic and keeps no state but loaded Viola-Jones
cascades, one set per thread.
"""

import functools
import threading

import cv2
import numpy as np

from hatjax import video

# A Viola-Jones box runs from the middle of the forehead to below the lips.
# Grown by this part of its side on every side it holds the head.
MARGIN = 0.25
MAX_SIDE = 640  # Detection shrinks larger images to this.
OUTER_LIPS = slice(48, 60)
# Cascade, votes needed, smallest face as a part of the image's short side.
ATTEMPTS = (
  ('haarcascade_frontalface_default.xml', 5, 0.1),
  ('haarcascade_frontalface_alt2.xml', 3, 0.05),
  ('haarcascade_frontalface_default.xml', 2, 0.05),
)


def detect_face(image):
  """The box of the largest, most central face, or None where none is found.

  Args:
    image: uint8 [H, W, 3].

  Returns:
    A square box inside the image, as Viola-Jones gives it.
  """
  grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  scale = max(1.0, max(grey.shape) / MAX_SIDE)
  size = [max(1, round(side / scale)) for side in grey.shape]
  grey = cv2.equalizeHist(video.resize(grey, size))
  for name, votes, smallest in ATTEMPTS:
    side = max(24, int(min(grey.shape) * smallest))
    found = _cascade(name, threading.get_ident()).detectMultiScale(
      grey, scaleFactor=1.1, minNeighbors=votes, minSize=(side, side)
    )
    if len(found):
      x, y, w, h = max(found, key=lambda face: _prominence(face, grey.shape))
      return tuple(round(v * scale) for v in (x, y, x + w, y + h))
  return None


def square_crop_box(face_box, image_shape, margin=MARGIN):
  """The square box of the whole head around a Viola-Jones box.

  The box is moved into the image where it fits there; where it is larger than
  the image it stays centred on that axis, and `crop` repeats the edge.

  Args:
    face_box: what `detect_face` found.
    image_shape: (H, W, ...) of the image it was found in.
    margin: growth on each side, as a part of the face box's larger side.
  """
  x0, y0, x1, y1 = face_box
  side = round(max(x1 - x0, y1 - y0) * (1 + 2 * margin))
  start = []
  for low, high, length in ((x0, x1, image_shape[1]), (y0, y1, image_shape[0])):
    first = round((low + high - side) / 2)
    if side <= length:
      first = min(max(first, 0), length - side)
    else:
      first = min(max(first, length - side), 0)
    start.append(first)
  return (start[0], start[1], start[0] + side, start[1] + side)


class Track:
  """The box of a head from frame to frame of a video, called on each in turn.

  Every frame is searched (Viola-Jones); boxes are smoothed over time, and the
  last one is kept where no face is found.

  Args:
    margin: see `square_crop_box`.
    smoothing: share of the last box that a new one keeps.
    fixed: the first box found serves all frames; nothing is searched after.

  Attributes:
    count: frames seen.
    misses: those of them without a face.
  """

  def __init__(self, margin=0.35, smoothing=0.7, fixed=False):
    self.count = self.misses = 0
    self._margin, self._smoothing, self._fixed = margin, smoothing, fixed
    self._box = None

  def __call__(self, image):
    """The box in this frame.

    Raises:
      ValueError: no face in it, nor in any before.
    """
    self.count += 1
    if self._fixed and self._box is not None:
      return self._square(image)
    face = detect_face(image)
    if face is None:
      self.misses += 1
      if self._box is None:
        raise ValueError(
          'no face found in the first frame. Cut the clip, or crop it to the '
          'face yourself.'
        )
      return self._square(image)
    face = np.array(face, float)
    last = face if self._box is None else self._box
    self._box = self._smoothing * last + (1 - self._smoothing) * face
    return self._square(image)

  def _square(self, image):
    return square_crop_box(self._box, image.shape, self._margin)


def crop(image, box, size=None):
  """The part of `image` in `box`, resized to (size, size) if given.

  Outside the image an image repeats its edge and a mask is 0. A resized mask
  comes back as grey levels: `binarize` it.

  Args:
    image: uint8 [H, W, 3], or a mask [H, W].
    box: may reach beyond the image.
    size: side of the result; None keeps the box's own size.
  """
  height, width = image.shape[:2]
  x0, y0, x1, y1 = box
  pads = [max(0, -y0), max(0, y1 - height), max(0, -x0), max(0, x1 - width)]
  if any(pads):
    border = cv2.BORDER_REPLICATE if image.ndim == 3 else cv2.BORDER_CONSTANT
    image = cv2.copyMakeBorder(image, *pads, border, value=0)
  top, left = pads[0], pads[2]
  part = image[y0 + top : y1 + top, x0 + left : x1 + left]
  return part if size is None else video.resize(part, size)


def binarize(mask):
  """Grey levels to 0 and 255, as AffineGAN: 255 from 191.25 upward."""
  return np.where(mask >= 191.25, 255, 0).astype(np.uint8)


def move_points(points, box, out_shape):
  """Where points of an image lie after `crop` of `box` to `out_shape`.

  A pixel is a unit square around its centre, as in `cv2.resize`.
  """
  x0, y0, x1, y1 = box
  scale = np.array([out_shape[1] / (x1 - x0), out_shape[0] / (y1 - y0)])
  return (np.asarray(points) - (x0, y0) + 0.5) * scale - 0.5


def lip_mask_from_landmarks(points, shape):
  """The filled outer lip contour, points 48-59, as a mask of (H, W)."""
  mask = np.zeros(shape[:2], np.uint8)
  # Sub-pixel corners: 4 fractional bits, so that small faces keep their shape.
  contour = np.round(np.asarray(points)[OUTER_LIPS] * 16).astype(np.int32)
  cv2.fillPoly(mask, [contour], 255, shift=4)
  return mask


def mouth_box_mask(face_box, shape):
  """A filled ellipse that holds the lips of a frontal face, shut or open."""
  x0, y0, x1, y1 = face_box
  mask = np.zeros(shape[:2], np.uint8)
  centre = (round((x0 + x1) / 2), round(y0 + 0.8 * (y1 - y0)))
  axes = (round(0.22 * (x1 - x0)), round(0.14 * (y1 - y0)))
  cv2.ellipse(mask, centre, axes, 0, 0, 360, 255, cv2.FILLED)
  return mask


def blacken_background(image, face_box=None, points=None):
  """The image, black outside of the face.

  Args:
    image: uint8 [H, W, 3].
    face_box: what `detect_face` found; the face is taken for an ellipse
      around it, from the hairline to the chin.
    points: float [68, 2] where known: the face is their convex hull, as
      OpenFace has it.
  """
  mask = np.zeros(image.shape[:2], np.uint8)
  if points is not None:
    hull = cv2.convexHull(np.asarray(points, np.float32))
    cv2.fillConvexPoly(mask, np.round(hull * 16).astype(np.int32), 1, shift=4)
  elif face_box is not None:
    x0, y0, x1, y1 = face_box
    centre = (round((x0 + x1) / 2), round(y0 + 0.55 * (y1 - y0)))
    axes = (round(0.45 * (x1 - x0)), round(0.65 * (y1 - y0)))
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, cv2.FILLED)
  else:
    return image  # Points of a clip that this frame lacks.
  return image * mask[..., None]


def _prominence(face, shape):
  """Area, less the further the face is from the middle of the image."""
  x, y, w, h = face
  away = np.hypot(x + w / 2 - shape[1] / 2, y + h / 2 - shape[0] / 2)
  return w * h * (1 - away / np.hypot(*shape))


@functools.lru_cache(maxsize=16)
def _cascade(name, thread):
  """A loaded cascade; OpenCV's are not to be shared between threads."""
  del thread
  return cv2.CascadeClassifier(cv2.data.haarcascades + name)
