"""Paints hair, brows and beards of a synthetic face, strand by strand.

Positions are parts of the picture's side, colours floats 0..255, layers
float32 [S, S, 4] with the colour multiplied by the opacity. A face is an
`identity.Identity`, its points [82, 2] those of `actions.controls`.
"""

import cv2
import numpy as np

from hatjax.synthetic_faces import relief

THICK = 512  # a strand is one pixel wide on a layer of this side
LONG = ('long', 'wavy')
# Beards and the number of their strands.
BEARDS = {'moustache': 700, 'goatee': 1400, 'full': 3200}


def _draw_strands(layer, paths, colours, opacity=1.0, thick=1):
  """Draws polylines [N, M, 2], each in its colour, in place.

  Args:
    layer: what they are drawn on.
    paths: positions.
    colours: [N, 3].
    opacity: a number, or [S, S].
    thick: in pixels of a layer of side THICK.
  """
  side = len(layer)
  ink = np.zeros((side, side, 3), np.uint8)
  mask = np.zeros((side, side), np.uint8)
  thick = max(1, round(thick * side / THICK))
  how = (cv2.LINE_AA, relief.SHIFT)
  # Wider in colour than in opacity, or the edges would darken.
  wide = (thick + 1, cv2.LINE_8, relief.SHIFT)
  for line, colour in zip(relief.corners(paths, side),
                          np.clip(colours, 0, 255).tolist()):
    cv2.polylines(ink, [line], False, colour, *wide)
    cv2.polylines(ink, [line], False, colour, thick, *how)
    cv2.polylines(mask, [line], False, 255, thick, *how)
  alpha = mask.astype(np.float32) * (np.float32(opacity) / 255)
  layer *= 1 - alpha[..., None]
  layer[..., :3] += ink * alpha[..., None]
  layer[..., 3] += alpha


def _scatter(mask, n, rng):
  """n random places [n, 2] where mask > 0.3."""
  rows, columns = np.nonzero(cv2.resize(mask, (256, 256)) > 0.3)
  pick = rng.integers(0, len(rows), n)
  return (np.stack([columns[pick], rows[pick]], 1) + rng.random((n, 2))) / 256


def _brightness(face, p, at):
  """Of hair on the round of the head at places [N, 2], with its sheen."""
  nx = (at[:, 0] - face.centre) / (1.35 * face.width)
  ny = (at[:, 1] - p[0, 1]) / (1.25 * (p[0, 1] - face.skull))
  ny = np.minimum(ny, 0.15)
  nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.05, 1))
  lx, ly, lz = face.light
  lit = np.clip(nx * lx + ny * ly + nz * lz, 0, 1)
  sheen = np.exp(-(((ny + 0.62 + 0.12 * nx * lx) / 0.11) ** 2))
  return face.exposure * (0.45 + 0.5 * lit + 0.45 * sheen * lit)


def paint_brows(face, p, layer, rng):
  """Draws both brows on the skin, in place."""
  for spine, out in ((p[17:22], -1), (p[26:21:-1], 1)):
    curve = relief.spline(spine)
    n = int(110 + 130 * face.brow_density)
    u = rng.beta(1.1, 0.95, n)
    steps = np.linspace(0, 1, len(curve))
    at = np.stack([np.interp(u, steps, c) for c in curve.T], 1)
    wide = face.brow_thick * np.minimum(1, 3.5 * u) ** 0.7 * (0.75 + 0.25 * u)
    at[:, 1] += wide * rng.uniform(-0.5, 0.5, n)
    # u runs from the temple, where hairs lie, to the nose, where they stand.
    turn = np.interp(u, [0, 0.6, 1], [0.25, 0.45, 1.25])
    turn = turn + rng.normal(0, 0.15, n)
    tip = np.stack([out * np.cos(turn), -np.sin(turn)], 1)
    tip = at + rng.uniform(0.009, 0.016, (n, 1)) * tip
    colour = np.array(face.hair) * 0.62
    _shade_brow(face, layer, at, colour)
    _draw_strands(
      layer, np.stack([at, tip], 1), colour * rng.uniform(0.6, 1.25, (n, 1)),
      opacity=0.35 + 0.5 * face.brow_density,
    )


def _shade_brow(face, layer, at, colour):
  """The soft ground of a brow whose hairs grow at places [N, 2]."""
  small = 256
  soft = np.zeros((small, small), np.float32)
  x, y = np.clip(at * small, 0, small - 1).astype(int).T
  soft[y, x] = 1
  soft = cv2.GaussianBlur(soft, (0, 0), 0.006 * small)
  soft = np.clip(2 * soft * face.brow_density, 0, 0.55)
  soft = cv2.resize(soft, layer.shape[:2], interpolation=cv2.INTER_CUBIC)
  layer[..., :3] += soft[..., None] * (
    layer[..., 3:] * np.float32(colour) - layer[..., :3])


def _beard_area(face, p, style):
  """The outline of a beard, a polygon."""
  low = p[33] + (0, 0.014)
  half = [low - (0.012, 0), 0.5 * (p[31] + p[49]) - (0.004, -0.004),
          p[48] + (-0.020, -0.012)]
  if style == 'moustache':
    half += [p[48] + (-0.022, 0.012), p[48], p[50], p[51]]
  elif style == 'goatee':
    half += [p[48] + (-0.026, 0.03), p[7] + (0.005, -0.02),
             p[8] + (-0.02, 0.016)]
  else:
    half += [p[3] + (0.055, -0.01), p[1] + (0.02, 0.0), p[0] + (0.012, -0.03),
             p[0] + (-0.002, -0.02), *p[1:7] - (0.002, 0),
             p[7] + (0, 0.018), p[8] + (0, 0.022)]
  half = np.array(half)
  return np.concatenate([half, half[::-1] * (-1, 1) + (2 * face.centre, 0)])


def paint_beard(face, p, layer, rng):
  """Draws the shadow of shaving, stubble or a beard on the skin, in place."""
  side = len(layer)
  area = relief.fill(_beard_area(face, p, 'full'), side, 0.012)
  grain = relief.noise(rng, 200, side, 2)
  dense = face.shadow * np.clip(0.75 + 0.25 * grain, 0, 1.2)
  if face.beard == 'stubble':
    dense = dense + 0.34 * np.clip(0.6 + 0.6 * grain, 0, 1.2)
  dense = np.clip(dense * area, 0, 0.75)[..., None]
  ground = layer[..., 3:] * (0.55 * np.float32(face.hair))
  layer[..., :3] += dense * (ground - layer[..., :3])
  if face.beard not in BEARDS:
    return
  mask = relief.fill(_beard_area(face, p, face.beard), side, 0.006)
  n = BEARDS[face.beard]
  at = _scatter(mask, n, rng)
  dx = (at[:, 0] - face.centre) / face.width
  fan = 0.7 * dx
  if face.beard == 'moustache':
    fan = 2.0 * np.sign(dx) * np.sqrt(np.abs(dx))
  turn = np.pi / 2 - fan + rng.normal(0, 0.25, n)
  tip = at + 0.011 * np.stack([np.cos(turn), np.sin(turn)], 1)
  base = np.clip(1.05 * mask, 0, 0.82)[..., None]
  colour = np.float32(face.hair) * 0.7
  layer *= 1 - base
  layer[..., :3] += base * colour
  layer[..., 3:] += base
  shades = rng.uniform(0.55, 1.6, n) * _brightness(face, p, at)
  _draw_strands(layer, np.stack([at, tip], 1), colour * shades[:, None],
                opacity=0.8 * mask)


def paint_hair(face, p, side):
  """(layer of the hair behind the neck, or None; layer over the head)."""
  rng = np.random.default_rng([face.seed, 2])
  layer = np.zeros((side, side, 4), np.float32)
  if face.style == 'bald':
    return None, layer
  area, behind = _hair_areas(face, p)
  mask = relief.fill(area, side, 0.004)
  if face.style == 'curly':
    mask = _add_curls(area, mask, rng)
  elif face.style == 'bun':
    x, y = relief.grid(side)
    at = (face.centre + 0.02 * face.part, face.skull - 0.02)
    far = np.hypot((x - at[0]) / 0.085, (y - at[1]) / 0.06)
    mask = np.maximum(mask, np.clip((1 - far) * 20, 0, 1))
  elif face.style == 'buzz':
    soft = cv2.GaussianBlur(mask, (0, 0), 0.012 * side)
    grain = relief.noise(rng, 220, side, 2)
    mask = soft * np.clip(0.62 + 0.2 * grain, 0, 1) * mask
  _fill_hair(face, p, layer, mask)
  if face.style != 'buzz':
    _comb(face, p, layer, mask, rng)
  if behind is None:
    return None, layer
  back = np.zeros_like(layer)
  mask = relief.fill(behind, side, 0.004)
  _fill_hair(face, p, back, mask)
  _comb(face, p, back, mask, rng)
  back[..., :3] *= 0.6
  return back, layer


def _hair_areas(face, p):
  """Outlines of the hair over the head and behind it (or None)."""
  c, w, level, style = face.centre, face.width, p[0, 1], face.style
  out = face.volume * {'buzz': 0.15, 'bun': 0.4, 'curly': 1.5}.get(style, 1)
  a = np.linspace(0, np.pi, 48)[:, None]
  arc = np.concatenate([
    c - (w + 0.55 * out + 0.004) * np.sign(np.cos(a))
    * np.abs(np.cos(a)) ** 0.8,
    level - 0.03 - (level - 0.03 - face.skull + out) * np.sin(a) ** 0.85,
  ], 1)
  inner = _hairline(face, p)
  if style not in LONG:
    return np.concatenate([arc, inner[::-1]]), None
  wide = w + 0.55 * out + 0.02
  left = [(c - wide - 0.045, 1.1), (c - wide - 0.035, 0.8),
          (c - wide + 0.012, level + 0.08)]
  right = [(2 * c - x, y) for x, y in left][::-1]
  area = np.concatenate([left, arc, right, inner[::-1]])
  return area, np.array([*left, (c, level), *right])


def _hairline(face, p):
  """The lower edge of the hair over the head, left to right, [N, 2]."""
  w, level, line, brow = face.width, p[0, 1], face.hairline, p[19, 1]
  # Distances from the middle in parts of the face's half width, and heights.
  if face.style == 'fringe':
    top = [(0.95, level - 0.03), (0.86, brow + 0.02), (0.6, brow - 0.012),
           (0.3, brow - 0.022), (0.08, brow - 0.018)]
  else:
    top = [(0.965, level - 0.07), (0.90, line + 0.10), (0.72, line + 0.032),
           (0.40, line + 0.004), (0.12, line + face.peak)]
  if face.style in LONG:  # locks that fall
    low = [(0.62, 1.1), (0.74 + 0.06 * face.part, 0.92), (0.90, 0.76),
           (0.97, 0.62), (0.96, level + 0.03)]
  else:  # sideburns
    low = [(0.995, level + 0.035), (0.945, level + 0.03)]
  half = np.array(low + top)
  inner = np.concatenate([half * (-w, 1), half[::-1] * (w, 1)])
  if face.style in ('swept', *LONG):
    high = np.clip((level - 0.1 - inner[:, 1]) / 0.1, 0, 1)
    inner[:, 1] -= high * face.part * 0.09 * inner[:, 0] / w
  return relief.spline(inner + (face.centre, 0), 6)


def _add_curls(area, mask, rng):
  """Discs along the upper part of the outline."""
  side = len(mask)
  shape = (mask * 255).astype(np.uint8)
  for at in area[rng.integers(0, 48, 150)]:
    at = relief.corners(at + rng.normal(0, 0.006, 2), side).tolist()
    size = int(rng.uniform(0.012, 0.028) * side * 2**relief.SHIFT)
    cv2.circle(shape, at, size, 255, -1, cv2.LINE_AA, relief.SHIFT)
  return shape.astype(np.float32) / 255


def _fill_hair(face, p, layer, mask):
  """Lays the ground under the strands, in place."""
  small = 64
  x, y = relief.grid(small)
  at = np.stack(np.broadcast_arrays(x, y), -1).reshape(-1, 2)
  lit = _brightness(face, p, at).reshape(small, small).astype(np.float32)
  lit = cv2.resize(lit, mask.shape, interpolation=cv2.INTER_CUBIC)
  layer[..., :3] = 0.62 * np.float32(face.hair) * (lit * mask)[..., None]
  layer[..., 3] = mask


def _comb(face, p, layer, mask, rng):
  """Draws the strands over the ground, in place."""
  tones, n = (0.65, 0.85, 1.0, 1.15, 1.35), 1100
  if face.style == 'curly':
    tones, n = (0.7, 0.85, 0.95, 1.1), 1300
    a = rng.uniform(0, 2 * np.pi, (n, 1)) + np.linspace(0, 4.2, 8)
    radius = rng.uniform(0.007, 0.016, (n, 1, 1))
    circles = np.stack([np.cos(a), np.sin(a)], -1) * radius
    paths = _scatter(mask, n, rng)[:, None] + circles
  else:
    paths = _paths(face, p, _scatter(mask, n, rng), rng)
  middle = paths[:, paths.shape[1] // 2]
  shades = rng.choice(tones, n) * _brightness(face, p, middle)
  soft = cv2.GaussianBlur(mask, (0, 0), 0.004 * len(mask))
  _draw_strands(
    layer, paths, np.array(face.hair) * shades[:, None],
    opacity=0.75 * np.clip(1.6 * soft, 0, 1), thick=1,
  )


def _paths(face, p, at, rng):
  """Strands [N, 9, 2] that start at places [N, 2]."""
  step = 0.016 if face.style in LONG else 0.011
  turn = rng.normal(0, 0.10 + 0.25 * (face.style == 'short'), len(at))
  c, s = np.cos(turn), np.sin(turn)
  paths = [at]
  for _ in range(8):
    dx, dy = _direction(face, p, paths[-1]).T
    move = np.stack([c * dx - s * dy, s * dx + c * dy], 1)
    paths.append(paths[-1] + step * move)
  return np.stack(paths, 1)


def _direction(face, p, at):
  """Unit vectors: where hair at places [N, 2] grows."""
  w, level, style = face.width, p[0, 1], face.style
  dx, dy = at[:, 0] - face.centre, at[:, 1] - level
  side = np.sign(face.part)
  if style in (*LONG, 'fringe'):
    # Along the round of the head, away from the parting, then down.
    away = np.sign(dx - 0.45 * w * face.part)
    x = -away * dy / (level - face.skull) * 0.55 * (dy < 0)
    y = np.clip(0.15 + np.abs(dx) / w, 0, 1.2)
    if style == 'wavy':
      x = x + 0.45 * np.sin(38 * at[:, 1] + 9 * dx)
    if style == 'fringe':
      x, y = 0.35 * x, y + 0.8
  elif style == 'bun':
    x, y = -dx, face.skull - 0.03 - at[:, 1]
  elif style == 'swept':
    over = 0.4 * (-0.55 - 2.2 * dy + 3.2 * dx * side)
    x = np.full(len(at), -0.9 * side)
    y = np.where(np.abs(dx) > 0.85 * w, 1.2, over)
  else:
    x = 1.3 * dx / w + 0.35 * face.part
    y = np.where(np.abs(dx) > 0.8 * w, 0.8, -0.8)
  return np.stack([x, y], 1) / (np.hypot(x, y) + 1e-6)[:, None]
