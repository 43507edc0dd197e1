"""Paints what does not move of a synthetic face: skin, hair, clothes, room.

Positions are parts of the picture's side, x right, y down; colours are floats
0..255, RGB. Layers are float32 [W, W, 4], their colour multiplied by their
opacity (0..1). A face is a `identity.Identity`, its points [82, 2]
those of `actions.controls`. The same face gives the same layers, and
layers of different widths show the same picture: all that is random is drawn
from the face's seed, on grids of fixed size.
"""

import typing

import cv2
import numpy as np

from hatjax.synthetic_faces import hair, relief

FINE = 512  # least side on which hair and texture are drawn
# Half width and height, power (2: ellipse), and thickness of the rims.
GLASSES = {
  'round': (0.075, 0.066, 2.2, 0.0045),
  'square': (0.083, 0.057, 4.5, 0.007),
  'thin': (0.080, 0.051, 3.0, 0.0030),
}
# From where things are drawn to where they are in the picture, such that
# `faces.square_crop_box` would cut out nearly the same picture again.
FRAMING = np.array([[1.14, 0, -0.07], [0, 1.14, -0.093], [0, 0, 1]])


class Portrait(typing.NamedTuple):
  """The layers of a face, W pixels wide.

  Attributes:
    plate: [W, W, 4], background, neck and clothes, opaque.
    skin: [W, W, 4], ears and face with shut plain eyes and no lips.
    folds: [len(FOLDS), W, W], relative brightness at full strength, less 1.
    hair: [W, W, 4], over everything.
    glasses: [W, W, 4] or None, over the eyes.
    depth: [GEO, GEO], height of the head, for its turns.
  """

  plate: np.ndarray
  skin: np.ndarray
  folds: np.ndarray
  hair: np.ndarray
  glasses: np.ndarray | None
  depth: np.ndarray


def paint(face, p, width):
  """All layers of a face."""
  fine = max(FINE, width)
  height = relief.height(face, p)
  light = relief.brightness(height, face)
  folds = [
    np.clip(relief.brightness(height + change, face) / light, 0.35, 1.6) - 1
    for change in relief.fold_heights(face, p)
  ]
  behind, locks = hair.paint_hair(face, p, fine)
  plate = warp(_plate(face, p, behind, fine), FRAMING)
  fit = lambda layer: _resize(layer, width)
  return Portrait(
    plate=fit(plate), skin=fit(_skin(face, p, light, fine)),
    folds=np.stack([fit(fold) for fold in folds]), hair=fit(locks),
    glasses=fit(_glasses(face, p, fine)) if face.glasses else None,
    depth=height,
  )


def _resize(layer, side):
  """A layer or field at another size, float32."""
  how = cv2.INTER_AREA if side < len(layer) else cv2.INTER_CUBIC
  return cv2.resize(layer.astype(np.float32), (side, side), interpolation=how)


def over(top, layer):
  """`top` laid over a layer."""
  keep = 1 - top[..., 3]
  return cv2.add(top, cv2.multiply(layer, cv2.merge([keep] * 4)))


def warp(layer, move):
  """Moves a layer by an affine map [3, 3] of positions."""
  side = len(layer)
  to_places = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, side]]) / side
  move = np.linalg.inv(to_places) @ move @ to_places
  return cv2.warpAffine(layer, move[:2], (side, side),
                        borderMode=cv2.BORDER_REPLICATE)


def _skin(face, p, light, side):
  """Face and ears, lit, with texture, brows and beard."""
  rng = np.random.default_rng([face.seed, 1])
  shade = np.maximum(_resize(light, side), 0)[..., None]
  # Blood makes the shadows of skin redder than its lights.
  shade = shade ** np.float32([0.92, 1.04, 1.10])
  linear = (_albedo(face, p, side, rng) / 255) ** 2.2 * shade * face.exposure
  shine = cv2.GaussianBlur(np.clip(light - 1, 0, 1) ** 1.5, (0, 0), 1.5)
  rgb = _develop(linear + face.oil * _resize(shine, side)[..., None])
  rgb *= 1 - _nostrils(face, p, side)[..., None] * (0.62, 0.74, 0.76)
  alpha = relief.fill(relief.outline(face, p), side)
  for k in (0, 1):
    alpha = np.maximum(alpha, relief.fill(relief.ear_outline(face, p, k), side))
  alpha = alpha[..., None]
  layer = np.concatenate([rgb * alpha, alpha], -1).astype(np.float32)
  hair.paint_beard(face, p, layer, rng)
  hair.paint_brows(face, p, layer, rng)
  return layer


def _develop(linear):
  """Linear light -> 0..255, highlights compressed instead of clipped."""
  high = 1 - 0.4 * np.exp((0.6 - linear) / 0.4)
  return 255 * np.where(linear < 0.6, linear, high).clip(0, 1) ** (1 / 2.2)


def _albedo(face, p, side, rng):
  """Skin colour [S, S, 3] before the light."""
  x, y = relief.grid(side)
  colour = np.empty((side, side, 3), np.float32)
  colour[:] = face.skin
  blood = 0.6 * relief.both(x, y, face, p[68] + (-0.005, 0.02), 0.055, 0.04)
  blood += 0.8 * relief.blob(x, y, p[30] + (0, 0.005), 0.028, 0.022)
  blood += 0.35 * relief.blob(x, y, p[8] - (0, 0.03), 0.05, 0.025)
  blood += 0.5 * relief.both(x, y, face, p[0] + (-0.02, 0.05), 0.025, 0.06)
  blood += 0.18 * relief.noise(rng, 10, side, 3)
  colour *= 1 - face.flush * blood[..., None] * np.float32([0.0, 0.14, 0.12])
  eye = p[36:42].mean(0)
  tired = relief.both(x, y, face, eye + (0.012, 0.022), 0.035, 0.014, 0.15)
  tired += 0.7 * relief.both(x, y, face, eye + (0.008, -0.015), 0.042, 0.018)
  colour *= 1 - face.tired * tired[..., None] * np.float32([0.24, 0.26, 0.18])
  pores = relief.noise(rng, 128, side, 2)
  blotch = relief.noise(rng, 16, side, 2)
  colour *= 1 + (face.rough * (0.030 * pores + 0.022 * blotch))[..., None]
  spots = _spots(face, p, side, rng)[..., None]
  return colour * (1 - spots * np.float32([0.28, 0.42, 0.5]))


def _spots(face, p, side, rng):
  """Strength 0..1 of freckles about nose and cheeks, and of a few moles."""
  spots = np.zeros((side, side), np.uint8)

  def draw(at, size, strength):
    size = int(size * side * 2**relief.SHIFT)
    cv2.circle(spots, relief.corners(at, side).tolist(), size, int(strength),
               -1, cv2.LINE_AA, relief.SHIFT)

  n = 160 if face.freckles else 0
  freckles = rng.normal((face.centre, p[29, 1] + 0.03), (0.12, 0.05), (n, 2))
  for at in freckles:
    draw(at, rng.uniform(0.0012, 0.003), face.freckles * rng.uniform(60, 190))
  spots = cv2.GaussianBlur(spots, (0, 0), 0.0014 * side)
  for at in rng.uniform((0.3, 0.3), (0.7, 0.82), (face.moles, 2)):
    draw(at, rng.uniform(0.003, 0.005), 230)
  return spots.astype(np.float32) / 255


def _nostrils(face, p, side):
  """How dark they are, 0..1."""
  at = 0.45 * p[31] + 0.55 * p[33] + (-0.004, -0.004)
  hole = relief.both(*relief.grid(side), face, at, 0.24 * face.nose_width,
                     0.0055, -0.25)
  return np.clip(1.3 * hole, 0, 1) ** 1.5


def _glasses(face, p, side):
  """Lenses with a glint, rims, bridge and arms."""
  wide, high, power, rim = GLASSES[face.glasses]
  x, y = relief.grid(side)
  frame = np.zeros((side, side), np.float32)
  glare = np.zeros((side, side), np.float32)
  inner = []
  for eye, ear, out in ((p[36:42], p[0], -1), (p[42:48], p[16], 1)):
    at = eye.mean(0) + (0.006 * out, 0.012)
    dx, dy = x - at[0], y - at[1]
    r = np.abs(dx / wide) ** power + np.abs(dy / high) ** power
    away = (r ** (1 / power) - 1) * high  # of the rim, about
    frame = np.maximum(frame, np.clip((rim / 2 - np.abs(away)) * side + 0.5,
                                      0, 1))
    glint = np.exp(-(((dx + 0.6 * dy + 0.02) / 0.012) ** 2))
    glare += np.clip(-away * side, 0, 1) * (0.05 + 0.10 * glint)
    arm = [at + (wide * out, -0.02), ear + (0.01 * out, -0.02)]
    frame = np.maximum(frame, _line(arm, side, rim * 1.1))
    inner.append(at - (wide * out, 0.006))
  bridge = [inner[0], (face.centre, inner[0][1] - 0.01), inner[1]]
  frame = np.maximum(frame, _line(relief.spline(bridge), side, rim))
  tone = np.float32(face.rim) * face.exposure * (1.15 - 0.5 * y[..., None])
  frame, glare = frame[..., None], glare[..., None]
  rgb = tone * frame + 255 * glare * (1 - frame)
  return np.concatenate([rgb, frame + glare * (1 - frame)], -1)


def _line(points, side, wide):
  mask = np.zeros((side, side), np.uint8)
  cv2.polylines(mask, [relief.corners(points, side)], False, 255,
                max(1, round(wide * side)), cv2.LINE_AA, relief.SHIFT)
  return mask.astype(np.float32) / 255


def _room(face, rng):
  """The background [GEO, GEO, 3], out of focus."""
  side = relief.GEO
  x, y = relief.grid(side)
  first, second = np.float32(face.backdrop)
  slope = rng.normal(0, (0.6, 0.8))
  way = np.clip(0.5 + (x - 0.5) * slope[0] + (y - 0.5) * slope[1], 0, 1)
  room = first + (second - first) * way[..., None]
  if face.room == 'lights':
    for _ in range(26):
      at, size = rng.uniform(0, 1, 2), rng.uniform(0.02, 0.06)
      disc = np.clip((size - np.hypot(x - at[0], y - at[1])) * 90, 0, 1)
      tint = second * 0.5 + rng.uniform(60, 160, 3)
      room += (rng.uniform(0.1, 0.45) * disc)[..., None] * (tint - room)
  elif face.room == 'wall':
    room *= 1 + 0.06 * relief.noise(rng, 12, side, 4)[..., None]
  elif face.room == 'shelves':
    for _ in range(14):
      low = rng.uniform(-0.2, 1, 2)
      high = low + rng.uniform(0.05, 0.35, 2)
      low, high = (np.clip(v * side, 0, side).astype(int) for v in (low, high))
      rows, columns = slice(low[1], high[1]), slice(low[0], high[0])
      tint = room.mean((0, 1)) * rng.uniform(0.6, 1.4, 3)
      room[rows, columns] += 0.6 * (tint - room[rows, columns])
    room = cv2.GaussianBlur(room.astype(np.float32), (0, 0), 0.022 * side)
  dark = 1 - 0.5 * ((x - 0.5) ** 2 + (y - 0.45) ** 2)
  return np.clip(room * dark[..., None], 0, 250)


def _plate(face, p, behind, side):
  """Background, hair behind the neck, neck and clothes; opaque."""
  rng = np.random.default_rng([face.seed, 3])
  plate = _resize(_room(face, rng), side)
  if behind is not None:
    plate = plate * (1 - behind[..., 3:]) + behind[..., :3]
  c, wide, (x, _) = face.centre, face.neck, relief.grid(side)
  half = np.array([
    (wide, 0.70), (wide * 0.97, 0.83), (wide * 1.02, 0.89),
    (wide * 1.35, 0.93), (0.40, 0.99), (0.6, 1.1),
  ])
  neck = np.concatenate([half * (-1, 1), half[::-1]]) + (c, 0)
  lx, _, lz = face.light
  bend = np.clip((x - c) / (1.2 * wide), -1, 1)
  lit = np.clip(bend * lx + np.sqrt(1 - bend**2) * lz, 0, 1) / max(lz, 0.5)
  lit = 0.86 * (face.ambient + (1 - face.ambient) * lit)
  chin = relief.outline(face, p) + (-0.01 * lx, 0.045)
  lit = lit * (1 - 0.62 * relief.fill(chin, side, 0.016))
  lit *= 1 + 0.05 * face.rough * relief.noise(rng, 48, side, 3)
  tone = (np.float32(face.skin) / 255) ** 2.2 * face.exposure
  colour = _develop(lit[..., None] * tone * np.float32([1.0, 0.93, 0.9]))
  plate += relief.fill(neck, side)[..., None] * (colour - plate)
  cloth, mask = _clothes(face, side, rng)
  plate += mask[..., None] * (cloth - plate)
  return np.concatenate([plate, np.ones((side, side, 1))], -1)


def _clothes(face, side, rng):
  """Their colour [S, S, 3] and where they are [S, S]."""
  c, wide, dip = face.centre, face.neck, face.neckline
  x, y = relief.grid(side)
  collar = np.array([(0, 0.93 + dip), (0.5 * wide, 0.923 + 0.75 * dip),
                     (wide, 0.90)])
  collar = relief.spline(np.concatenate([collar[:0:-1] * (-1, 1), collar]))
  edge = np.array([(wide * 1.5, 0.925), (0.34, 0.96), (0.6, 1.05), (0.6, 1.2)])
  shape = np.concatenate([edge[::-1] * (-1, 1), collar, edge]) + (c, 0)
  mask = relief.fill(shape, side, 0.0015)
  lit = 0.8 + 0.10 * relief.noise(rng, 6, side, 3)
  lit = lit + 0.35 * face.light[0] * (x - c)
  lit = lit * (1 + 0.06 * face.knit * np.sin(x * 420) * np.sin(y * 420))
  lit = lit * (1 - 0.25 * np.abs(relief.fill(shape + (0, 0.014), side) - mask))
  cloth = np.float32(face.cloth) * face.exposure * lit[..., None]
  return np.clip(cloth, 0, 255), mask
