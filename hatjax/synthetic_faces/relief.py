"""The relief of a synthetic face: its height field, folds and light.

Positions and heights are parts of the picture's side, (0, 0) its top left
corner, x right, y down. A face is a `identity.Identity`, its points
[82, 2] those of `actions.controls`. Fields are float32 [GEO, GEO],
whatever size a picture will have. The module also holds what all drawing of
faces shares: grids, blobs, curves, filled shapes, noise.
"""

import math

import cv2
import numpy as np

GEO = 256  # side of the fields
FOLDS = ('nasolabial', 'forehead', 'frown', 'crow', 'nose', 'chin', 'corner',
         'cheek')
SHIFT = 4  # fractional bits of corners in OpenCV's drawing


def grid(side):
  """x [1, side] and y [side, 1] of the centres of pixels."""
  line = (np.arange(side, dtype=np.float32) + 0.5) / side
  return line[None, :], line[:, None]


def noise(rng, cells, side, octaves=1):
  """Smooth noise of about unit variance, [side, side]."""
  out = np.zeros((side, side), np.float32)
  for k in range(octaves):
    n = cells << k
    values = rng.standard_normal((n, n)).astype(np.float32)
    out += cv2.resize(
      values, (side, side),
      interpolation=cv2.INTER_CUBIC if n <= side else cv2.INTER_AREA,
    ) / 2**k
  return out


def spline(points, num=12):
  """A Catmull-Rom curve through points [N, 2], `num` steps between each two."""
  p = np.asarray(points, float)
  p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
  t = (np.arange(num) / num)[:, None, None]
  a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
  curve = 0.5 * (
    2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2
    + (3 * b - a - 3 * c + d) * t**3
  )
  curve = curve.transpose(1, 0, 2).reshape(-1, 2)
  return np.concatenate([curve, p[-2:-1]])


def corners(points, side):
  """Points as OpenCV's drawing wants them, with SHIFT fractional bits."""
  return np.round((np.asarray(points) * side - 0.5) * 2**SHIFT).astype(np.int32)


def fill(points, side, blur=0.0):
  """Opacity [side, side] of a polygon, its edge softened by `blur`."""
  mask = np.zeros((side, side), np.uint8)
  cv2.fillPoly(mask, [corners(points, side)], 255, cv2.LINE_AA, SHIFT)
  mask = mask.astype(np.float32) / 255
  return cv2.GaussianBlur(mask, (0, 0), blur * side) if blur else mask


def outline(face, landmarks):
  """The outline of the head without ears and hair, a polygon."""
  jaw = spline(landmarks[:17])
  a = np.linspace(0, np.pi, 40)[1:-1, None]
  top = np.concatenate([
    face.centre + face.width * np.sign(np.cos(a)) * np.abs(np.cos(a)) ** 0.72,
    landmarks[0, 1] - (landmarks[0, 1] - face.skull) * np.sin(a) ** 0.84,
  ], 1)
  return np.concatenate([jaw, top])


def blob(x, y, at, wide, high, turn=0.0):
  """A smooth bump around `at` on the grid x, y; sizes in sides, turn in rad."""
  dx, dy = x - float(at[0]), y - float(at[1])  # float32 as x and y are
  if turn:
    c, s = math.cos(turn), math.sin(turn)
    dx, dy = c * dx + s * dy, c * dy - s * dx
  return np.exp(-0.5 * ((dx / wide) ** 2 + (dy / high) ** 2))


def both(x, y, face, at, wide, high, turn=0.0):
  """A blob and its mirror image."""
  other = (2 * face.centre - at[0], at[1])
  return blob(x, y, at, wide, high, turn) + blob(x, y, other, wide, high,
                                                   -turn)


def height(face, p):
  """The height field of head and ears, [GEO, GEO], in parts of the side."""
  x, y = grid(GEO)
  mask = fill(outline(face, p), GEO)
  inside = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
  edge = np.clip(inside / GEO / 0.13, 0, 1)
  middle = 0.5 * (face.skull + face.chin)
  r = ((x - face.centre) / (1.12 * face.width)) ** 2
  r = r + ((y - middle) / (0.62 * (face.chin - face.skull))) ** 2
  z = 0.19 * np.sqrt(np.clip(1 - r, 0.02, 1))
  z += 0.075 * edge * (2 - edge)
  outside = cv2.distanceTransform((mask <= 0.5).astype(np.uint8),
                                  cv2.DIST_L2, 5)
  z -= 1.6 * outside / GEO
  z = cv2.GaussianBlur(z, (0, 0), 0.008 * GEO)
  eye = p[36:42].mean(0)
  z -= 0.026 * both(x, y, face, eye + (0.012, -0.012), 0.042, 0.028)
  z += 0.016 * both(x, y, face, eye, 0.036, 0.024)
  z += face.ridge * both(x, y, face, p[19] + (0.01, 0.012), 0.055, 0.016)
  z -= 0.004 * both(x, y, face, eye + (0.005, 0.045), 0.035, 0.008, 0.12)
  cheek = p[68]
  z += 0.014 * both(x, y, face, cheek - (0.02, 0.0), 0.05, 0.04)
  z -= face.hollow * both(x, y, face, cheek + (-0.02, 0.10), 0.04, 0.06)
  z += _nose(face, p, x, y)
  mouth = p[48:60].mean(0)
  z += 0.016 * blob(x, y, mouth, 0.07, 0.045)
  z -= 0.006 * blob(x, y, (face.centre, p[57, 1] + 0.025), 0.04, 0.012)
  z += 0.014 * blob(x, y, p[74] + (0, 0.01), 0.045, 0.03)
  z -= 0.004 * blob(x, y, 0.5 * (p[33] + p[51]), 0.007, 0.018)
  z += 0.003 * both(x, y, face, 0.5 * (p[33] + p[51]) - (0.012, 0), 0.006, 0.02)
  z -= 0.005 * both(x, y, face, p[48] + (-0.006, 0.004), 0.013, 0.016)
  z -= 0.006 * (0.3 + face.age) * both(
    x, y, face, 0.55 * p[31] + 0.45 * p[48] - (0.016, 0), 0.011, 0.036, 0.45
  )
  z -= 0.006 * face.age * both(x, y, face, eye + (0, 0.042), 0.03, 0.006)
  return np.maximum(z, _ears(face, p)).astype(np.float32)


def _nose(face, p, x, y):
  tip, root, base = p[30], p[27], p[33]
  along = np.clip((y - root[1]) / (base[1] - root[1]), -1, 2)
  high = face.nose_height * np.clip(0.25 + 0.75 * along, 0, 1)
  high *= 1 / (1 + np.exp((y - base[1] + 0.008) / 0.0055))  # falls off below
  high *= np.clip(1 + 2.2 * along, 0, 1)
  wide = face.nose_bridge * (1 + 0.9 * np.clip(along, 0, 1) ** 2)
  z = high * np.exp(-0.5 * ((x - face.centre) / wide) ** 2)
  z += 0.4 * face.nose_height * blob(x, y, tip, 0.5 * face.nose_width, 0.017)
  wing = p[31] + (0.004, -0.012)
  z += 0.45 * face.nose_height * both(x, y, face, wing, 0.012, 0.013)
  z -= 0.006 * both(x, y, face, p[31] + (-0.007, -0.006), 0.005, 0.014)
  return z


def ear_outline(face, p, side):
  """Contour of an ear beside the jaw's points `p`."""
  size = face.ear
  at = np.array([p[0, 0] - 0.004, p[0, 1] + 0.045])
  a = np.linspace(0, 2 * np.pi, 24)
  high = 0.075 * size * (1 + 0.10 * np.sin(a))
  wide = (0.030 - 0.008 * np.sin(a)) * size
  points = at + np.stack([
    wide * np.cos(a) - 0.012 * size - 0.010 * np.sin(a), high * np.sin(a)
  ], 1)
  if side:
    points = points * (-1, 1) + (2 * face.centre, 0)
  return points


def _ears(face, p):
  z = np.full((GEO, GEO), -1, np.float32)
  for side in (0, 1):
    shape = ear_outline(face, p, side)
    mask = fill(shape, GEO)
    inside = cv2.distanceTransform((mask > 0.5).astype(np.uint8),
                                   cv2.DIST_L2, 5) / GEO
    rim = 0.02 + 0.03 * np.sqrt(np.clip(inside / 0.012, 0, 1))
    rim = np.where(inside > 0, rim, -1)
    hollow = fill(shape.mean(0) + 0.55 * (shape - shape.mean(0)), GEO, 0.006)
    z = np.maximum(z, rim - 0.022 * hollow)
  return z


def brightness(z, face):
  """Brightness [GEO, GEO] of the height field; 1 faces the viewer."""
  dx = cv2.Sobel(z, cv2.CV_32F, 1, 0, ksize=3) * (GEO / 8)
  dy = cv2.Sobel(z, cv2.CV_32F, 0, 1, ksize=3) * (GEO / 8)
  length = np.sqrt(1 + dx * dx + dy * dy)
  lx, ly, lz = face.light
  wrap = 0.18
  straight = (lz - lx * dx - ly * dy) / length
  direct = np.clip((straight + wrap) / (lz + wrap), 0, None)
  sky = 0.5 + 0.5 * (0.75 + 0.5 * dy) / length
  around = cv2.GaussianBlur(z, (0, 0), 0.02 * GEO)
  close = cv2.GaussianBlur(z, (0, 0), 0.006 * GEO)
  cave = np.exp(-22 * np.maximum(around - z, 0)
                - 55 * np.maximum(close - z, 0))
  ambient = face.ambient
  return (ambient * sky + (1 - ambient) * direct * _unshadowed(z, face)) * cave


def _unshadowed(z, face):
  """1 where the light reaches, softly down to 0.4 where it does not."""
  lx, ly, lz = face.light
  flat = np.hypot(lx, ly) + 1e-6
  blocked = np.zeros_like(z)
  for step in (0.008, 0.016, 0.028, 0.045, 0.07):
    move = np.float32([[1, 0, -lx / flat * step * GEO],
                       [0, 1, -ly / flat * step * GEO]])
    nearer = cv2.warpAffine(z, move, (GEO, GEO))
    blocked = np.maximum(blocked, nearer - z - 1.1 * step * lz / flat)
  soft = cv2.GaussianBlur(np.clip(blocked / 0.015, 0, 1), (0, 0), 0.008 * GEO)
  return 1 - 0.55 * soft


def _groove(lines, wide, deep):
  """A change of height: a groove along polylines, between two ridges."""
  mask = np.zeros((GEO, GEO), np.uint8)
  for line in lines:
    cv2.polylines(mask, [corners(line, GEO)], False, 255, 1, cv2.LINE_AA, SHIFT)
  mask = mask.astype(np.float32) / 255
  narrow = cv2.GaussianBlur(mask, (0, 0), wide * GEO)
  broad = cv2.GaussianBlur(mask, (0, 0), 2.6 * wide * GEO)
  change = narrow / (narrow.max() + 1e-6) - 1.2 * broad / (narrow.max() + 1e-6)
  return np.float32(-deep) * change


def fold_heights(face, p):
  """The change of height of every one of FOLDS at full strength."""
  x, y = grid(GEO)
  mirror = lambda line: np.asarray(line) * (-1, 1) + (2 * face.centre, 0)
  two = lambda lines: [m for line in lines for m in (line, mirror(line))]
  deep = 0.7 + 0.6 * face.age
  wing, corner, eye = p[31] + (-0.012, -0.01), p[48], p[36]
  fold = spline([wing, 0.5 * (wing + corner) + (-0.024, -0.004),
                 corner + (-0.032, 0.006), corner + (-0.034, 0.022)])
  fore = [
    spline([p[k] + (0, -high) for k in (17, 19, 21, 22, 24, 26)])
    for high in np.linspace(0.05, 0.115, 3)
  ]
  frown = [[p[21] + (0.010 + d, 0.028), p[21] + (0.006 + d, -0.03)]
           for d in (0, 0.006)]
  crow = [
    [eye + (-0.014, d), eye + (-0.042, d * 3.2 + 0.002)]
    for d in (-0.008, 0.001, 0.010)
  ]
  bag = spline([p[36] + (0.004, 0.02), p[41] + (0, 0.022), p[40] + (0, 0.02)])
  bridge = [[p[27] + (-0.03, d), p[27] + (-0.008, d + 0.006)]
            for d in (0.012, 0.028, 0.044)]
  chin = [spline([p[58] + (-0.01, 0.03), p[57] + (0, 0.024),
                  p[56] + (0.01, 0.03)])]
  marionette = spline([corner + (-0.012, 0.0), corner + (-0.02, 0.03),
                       corner + (-0.016, 0.055)])
  bump = both(x, y, face, p[68] + (0.008, 0.0), 0.035, 0.024)
  return (
    _groove(two([fold]), 0.0125, 0.0125 * deep),
    _groove(fore, 0.0055, 0.0055 * deep),
    _groove(two(frown), 0.004, 0.008 * deep),
    _groove(two([*crow, bag]), 0.004, 0.006 * deep),
    _groove(two(bridge), 0.004, 0.006 * deep),
    _groove(chin, 0.007, 0.012) + 0.006 * blob(x, y, p[74], 0.035, 0.02),
    _groove(two([marionette]), 0.005, 0.009 * deep),
    np.float32(0.016) * bump,
  )
