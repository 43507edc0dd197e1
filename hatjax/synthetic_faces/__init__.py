"""Video of faces that nobody has: drawn, lit, with all that is true of them.

`render_clip` gives a clip of one face making one expression and, exact for
every frame, the intensity, the 68 points and the mask of the lips. One seed is
one face, whatever the size: the same arguments give the same bytes, and a
small picture shows what a large one shows.

  video      uint8 [T, S, S, 3], RGB; grey has equal channels
  lip_mask   uint8 [T, S, S], 0 or 255, the filled outer contour of the lips
  landmarks  float32 [T, 68, 2], (x, y) in pixels, whole numbers being centres
  alpha      float32 [T], 0 neutral .. 1 apex

A face fills its picture as `faces.square_crop_box` frames a photographed one.
"""

import functools

import cv2
import numpy as np

from hatjax.synthetic_faces import actions, portrait, puppet, relief
from hatjax.synthetic_faces.identity import Identity, sample_identity

EXPRESSIONS = actions.EXPRESSIONS
SHARP = 256  # least side on which frames are drawn


def render_clip(identity, expression, num_frames, size, grey=False,
                clip_seed=0, half='onset'):
  """A clip of a face that goes from neutral to an expression.

  Args:
    identity: an Identity, or the seed of one.
    expression: one of EXPRESSIONS, or 'neutral': blinks and a swaying head.
    num_frames: T.
    size: S, the side of the frames.
    grey: whether the channels are equal.
    clip_seed: of what differs between two clips of a person: timing, blinks,
      where the head is and how it sways, the camera's noise.
    half: 'onset' ends at the apex, 'full' returns to neutral.

  Returns:
    dict: video, lip_mask, landmarks, alpha; see the module.
  """
  _check(expression, num_frames, size, half)
  if not isinstance(identity, Identity):
    identity = sample_identity(identity)
  number = (*EXPRESSIONS, 'neutral').index(expression)
  rng = np.random.default_rng([identity.seed, 5, number, clip_seed])
  line = actions.timeline(expression, num_frames, rng,
                          np.array(identity.strength), half)
  rest = rng.normal(0, (0.006, 0.005, 0.012, 0.012), 4).clip(-0.02, 0.02)
  width = SHARP if 2 * size <= SHARP else min(2 * size, max(512, size))
  doll = _puppet(identity, width)
  video, masks, landmarks = [], [], []
  for action, head, gaze in zip(line.actions, line.head, line.gaze):
    image, points = _frame(doll, action, head, rest, gaze, size)
    video.append(_photograph(image, identity, rng, grey))
    masks.append(_lip_mask(points, size))
    landmarks.append(points[:68] * size - 0.5)
  return {
    'video': np.stack(video), 'lip_mask': np.stack(masks),
    'landmarks': np.stack(landmarks).astype(np.float32), 'alpha': line.alpha,
  }


def _check(expression, num_frames, size, half):
  known = (*EXPRESSIONS, 'neutral')
  if expression not in known:
    raise ValueError(f'Unknown expression {expression!r}. Choose one of: '
                     f'{", ".join(known)}.')
  if half not in ('onset', 'full'):
    raise ValueError(f"half is {half!r}. Choose 'onset' or 'full'.")
  if num_frames < 1 or size < 16:
    raise ValueError(f'{num_frames} frames of side {size}. Use 1 or more, and '
                     '16 or more.')


# A few people's layers: 5 MB each for small pictures, 60 MB at 896.
_puppet = functools.lru_cache(4)(puppet.Puppet)


def _frame(doll, action, head, rest, gaze, size):
  """One frame, float32 [S, S, 3], and its points [82, 2]."""
  layer, points = doll.draw(action, head, gaze)
  width = doll.width
  growth, tilt = 1 + head[2] + rest[2], head[3] + rest[3]
  c, s = growth * np.cos(tilt), growth * np.sin(tilt)
  turn = np.array([[c, -s], [s, c]])
  neck = np.array([doll.face.centre, 0.75])  # about which the head turns
  move = np.eye(3)
  move[:2, :2], move[:2, 2] = turn, neck + head[:2] + rest[:2] - turn @ neck
  move = portrait.FRAMING @ move
  points = points @ move[:2, :2].T + move[:2, 2]
  layer = portrait.warp(layer, move)
  image = portrait.over(layer, doll.layers.plate)
  if width != size:
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
  return cv2.merge(cv2.split(image)[:3]), points


def _photograph(image, identity, rng, grey):
  """uint8, with the camera's noise, as it would come from a file."""
  if grey:
    image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  noise = rng.standard_normal(image.shape, np.float32)
  level = identity.grain * (0.6 + 0.5 * np.sqrt(np.maximum(image, 0) / 255))
  image = np.clip(np.rint(image + level * noise), 0, 255).astype(np.uint8)
  return np.repeat(image[..., None], 3, -1) if grey else image


def _lip_mask(points, size):
  """As of photographs with landmarks: see `faces.lip_mask_from_landmarks`."""
  mask = np.zeros((size, size), np.uint8)
  contour = relief.corners(points[48:60], size)
  cv2.fillPoly(mask, [contour], 255, shift=relief.SHIFT)
  return mask
