"""Moves a painted face: skin that follows actions, eyes, mouth, head.

A frame is drawn at W pixels, at least twice the size asked for, and shrunk.
Positions are parts of the picture's side, colours floats 0..255, layers
float32 [H, W, 4] with the colour multiplied by the opacity.
"""

import cv2
import numpy as np

from hatjax.synthetic_faces import actions, identity, portrait, relief

FIELD = 64  # side of the grid on which the skin's motion is computed
REACH = 0.16  # how far around a point the skin follows it
LIDS = (37, 38, 40, 41, 43, 44, 46, 47)


class Puppet:
  """A painted face that can be moved: its layers and its motions."""

  def __init__(self, face, width):
    self.face, self.width = face, width
    self.points = actions.controls(identity.neutral_landmarks(face))
    self.layers = portrait.paint(face, self.points, width)
    moves = actions.displacements() * 2 * face.eye_gap
    self.moves = moves.reshape(-1, *moves.shape[2:])  # [2 units, 82, 2]
    depth = self.layers.depth
    at = np.clip(self.points * relief.GEO, 0, relief.GEO - 1).astype(int)
    self.depth = depth[at[:, 1], at[:, 0]]
    self._field_of_moves(cv2.resize(depth, (FIELD, FIELD),
                                    interpolation=cv2.INTER_AREA))
    rng = np.random.default_rng([face.seed, 4])
    self.lip_lines = relief.noise(rng, 64, 64)[0]
    self.iris_rays = rng.uniform(0, 2 * np.pi, 3)

  def _field_of_moves(self, depth):
    """How each action, turn and nod move the skin, [.., FIELD, FIELD, 2].

    The skin follows the points smoothly: compactly supported radial functions
    (Wendland's) through all of them and through fixed places around.
    """
    # Lids and inner lips slide over eyes and teeth: the skin ends there.
    held = [k for k in range(82) if k not in (*LIDS, *range(60, 68))]
    a = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    middle = np.array([self.face.centre, 0.5])
    fixed = middle + np.stack([0.31 * np.cos(a), 0.46 * np.sin(a)], 1)
    fixed = fixed[fixed[:, 1] < 0.6]
    top = self.points[[17, 19, 24, 26]] * (1, 0)
    top[:, 1] = self.face.hairline - 0.02
    # What is below the jaw goes with it, or it would fold where the jaw drops.
    jaw = range(3, 14)
    under = middle + 1.2 * (self.points[jaw] - middle)
    places = np.concatenate([self.points[held], under, fixed, top])
    moves = np.zeros((len(self.moves), len(places), 2))
    moves[:, : len(held) + len(jaw)] = self.moves[:, [*held, *jaw]]
    moves = moves.transpose(1, 0, 2).reshape(len(places), -1)
    matrix = _wendland(places, places) + 1e-6 * np.eye(len(places))
    x, y = relief.grid(FIELD)
    nodes = np.stack(np.broadcast_arrays(x, y), -1)
    field = _wendland(nodes.reshape(-1, 2), places) @ np.linalg.solve(
      matrix, moves)
    field = field.reshape(FIELD, FIELD, -1, 2).transpose(2, 0, 1, 3)
    turns = np.zeros((2, FIELD, FIELD, 2))
    turns[0, ..., 0] = turns[1, ..., 1] = depth
    self.field = np.concatenate([field, turns]).astype(np.float32)
    self.nodes = nodes

  def pose(self, action, head):
    """The points [82, 2] and where the skin comes from [W, W, 2], in pixels."""
    strength = action[:-1].reshape(-1)
    points = self.points + np.tensordot(strength, self.moves, 1)
    actions.move_lids(points, self.points, action)
    points = points + self.depth[:, None] * head[4:]
    weights = np.concatenate([strength, head[4:]]).astype(np.float32)
    moved = np.tensordot(weights, self.field, 1)
    source = self.nodes
    for _ in range(16):  # damped: where a mouth opens the skin doubles
      at = source * FIELD - 0.5
      there = cv2.remap(moved, at, None, cv2.INTER_LINEAR,
                        borderMode=cv2.BORDER_REPLICATE)
      source = source + 0.6 * (self.nodes - there - source)
    size = (self.width, self.width)
    source = cv2.resize(source, size, interpolation=cv2.INTER_CUBIC)
    return points, source * self.width - 0.5

  def draw(self, action, head, gaze):
    """The head before tilt and shift: (layer [W, W, 4], points [82, 2])."""
    points, source = self.pose(action, head)
    folded = np.ones((self.width, self.width), np.float32)
    for strength, fold in zip(_fold_strengths(action), self.layers.folds):
      if strength:
        cv2.scaleAdd(fold, strength, folded, folded)
    folded = cv2.merge([folded, folded, folded, np.ones_like(folded)])
    skin = cv2.multiply(self.layers.skin, folded)
    layer = cv2.remap(skin, source, None, cv2.INTER_LINEAR,
                      borderMode=cv2.BORDER_REPLICATE)
    self._draw_eye(layer, points[36:42], gaze, -1)
    self._draw_eye(layer, points[42:48], gaze, 1)
    self._draw_mouth(layer, points, head[5])
    if self.layers.glasses is not None:
      shift = (points[27] - self.points[27]) * self.width
      move = np.float32([[1, 0, shift[0]], [0, 1, shift[1]]])
      size = (self.width, self.width)
      glasses = cv2.warpAffine(self.layers.glasses, move, size)
      layer = portrait.over(glasses, layer)
    return portrait.over(self.layers.hair, layer), points

  def _draw_eye(self, layer, p, gaze, outward):
    """Paints the eye of points [6, 2]; `outward` is the way to the ear, +-1."""
    face = self.face
    part, x, y = _window(layer, p.mean(0), (face.eye_width + 0.018, 0.046))
    upper, lower = _curve(p[:4], x), _curve(p[[0, 5, 4, 3]], x)
    (left, _), (right, _) = p[0], p[3]
    inside = (x > left) & (x < right)
    opening = self._cover(y - upper) * self._cover(lower - y) * inside
    middle = 0.5 * (p[0] + p[3]) - (0, 0.08 * face.eye_height)
    iris = middle + gaze * face.iris_size * (1, 0.5)
    ball = self._eyeball(x, y, middle, iris)
    ball *= 0.52 + 0.48 * np.clip((y - upper) / 0.011, 0, 1)[..., None]
    ball = self._add_glint(x, y, ball, iris)
    part[..., :3] += opening[..., None] * (ball - part[..., :3])
    u = np.clip((x - left) / (right - left), 0, 1)
    outer = u if outward > 0 else 1 - u
    # Lashes begin a little outside of the corner.
    left, right = left - 0.007 * (outward < 0), right + 0.007 * (outward > 0)
    reach = np.clip(1 - np.maximum(left - x, x - right) / 0.004, 0, 1)
    comb = 0.72 + 0.28 * np.cos(2 * np.pi * 9 * outer)
    thick = (0.0016 + 0.0032 * outer * comb) * face.lashes
    dark = 0.85 * reach * np.exp(
      -(((y - upper + 0.5 * thick) / (0.0014 + 0.6 * thick)) ** 2))
    edge = inside * np.exp(-(((y - lower - 0.0012) / 0.0022) ** 2))
    edge = edge * min(face.lashes, 1.2) * (0.16 + 0.2 * outer)
    crease = np.exp(-(((y - upper + face.crease + 0.002) / 0.0028) ** 2))
    crease = crease * reach * np.sin(np.pi * np.clip(0.1 + 0.85 * u, 0, 1))
    crease = crease * 0.42 * min(1, face.crease / 0.006)
    dark = np.maximum(dark, np.maximum(edge, crease))[..., None]
    part[..., :3] *= 1 - dark * np.float32([0.86, 0.92, 0.95])

  def _cover(self, distance, sharp=0.8):
    """Opacity of what lies `distance` inside an edge, about a pixel soft."""
    return np.clip(distance * (self.width * sharp) + 0.5, 0, 1)

  def _eyeball(self, x, y, middle, iris):
    """White, iris and pupil, [h, w, 3]."""
    face, r = self.face, self.face.iris_size
    dx, dy = x - iris[0], y - iris[1]
    d = np.hypot(dx, dy)
    corner = np.abs(x - middle[0]) / face.eye_width - 0.45
    corner = np.clip(corner, 0, 1)[..., None]
    white = np.float32([206, 200, 194]) * face.exposure
    white = white * (1 - corner * np.float32([0.20, 0.31, 0.31]))
    angle = np.arctan2(dy, dx)
    tone = 0.75 + 0.55 * np.clip(dy / r, -0.4, 1)
    for count, phase in zip((7, 13, 19), self.iris_rays):
      tone = tone + 0.06 * np.sin(count * angle + phase)
    tone = tone * (1 - 0.55 * np.clip((d / r - 0.72) / 0.28, 0, 1))
    colour = np.float32(face.iris) * (face.exposure * tone)[..., None]
    colour = colour + self._cover(0.42 * r - d)[..., None] * (8 - colour)
    return white + self._cover(r - d)[..., None] * (colour - white)

  def _add_glint(self, x, y, ball, iris):
    """The light mirrored in the eye."""
    r = self.face.iris_size
    at = iris + (0.38 * r * np.sign(self.face.light[0]), -0.42 * r)
    d = np.hypot(x - at[0], y - at[1]) / (0.22 * r)
    return ball + 0.9 * np.exp(-(d**2))[..., None] * (255 - ball)

  def _draw_mouth(self, layer, points, nod):
    low, high = points[48:60].min(0), points[48:60].max(0)
    part, x, y = _window(layer, 0.5 * (low + high), 0.5 * (high - low) + 0.02)
    top = _curve(points[48:55], x)
    bottom = _curve(points[[48, 59, 58, 57, 56, 55, 54]], x)
    above = _curve(points[[48, 60, 61, 62, 63, 64, 54]], x)
    below = _curve(points[[48, 60, 67, 66, 65, 64, 54]], x)
    below = np.maximum(below, above)
    u = (x - points[48, 0]) / (points[54, 0] - points[48, 0])
    inside = (u > 0) & (u < 1)
    lips = self._cover(y - top, 0.4) * self._cover(bottom - y, 0.4) * inside
    colour = self._lip_colour(y, u, top, above, below, bottom)
    part[..., :3] += 0.94 * lips[..., None] * (colour - part[..., :3])
    hole = self._cover(y - above) * self._cover(below - y) * inside
    hole = hole * np.clip((below - above) * self.width * 0.8, 0, 1)
    colour = self._mouth_inside(x, y, above, below, points, nod)
    part[..., :3] += hole[..., None] * (colour - part[..., :3])
    # Where the lips meet.
    line = np.exp(-(((y - 0.5 * (above + below)) / 0.0026) ** 2))
    line = line * np.clip(1 - (below - above) / 0.008, 0, 1)
    line = line * np.clip(1 - np.maximum(-u, u - 1) / 0.05, 0, 1)
    line = line * np.clip(0.55 + 0.25 * (2 * u - 1) ** 4, 0, 0.8)
    part[..., :3] *= 1 - line[..., None] * np.float32([0.78, 0.88, 0.86])

  def _lip_colour(self, y, u, top, above, below, bottom):
    face = self.face
    tone = 1 + 0.05 * self.lip_lines[np.clip(u * 63, 0, 63).astype(int)]
    v = np.clip((y - top) / np.maximum(above - top, 1e-4), 0, 1)
    w = np.clip((y - below) / np.maximum(bottom - below, 1e-4), 0, 1)
    side = 1 + 0.35 * face.light[0] * (u - 0.5)
    upper = 0.86 - 0.22 * v
    lower = 0.80 + 0.30 * np.sin(np.pi * np.clip(0.1 + 0.85 * w, 0, 1))
    shade = np.where(y < 0.5 * (above + below), upper, lower) * tone * side
    colour = np.float32(face.lip) * (face.exposure * shade)[..., None]
    glow = np.exp(-((w - 0.38) / 0.2) ** 2) * np.exp(
      -((u - 0.5 - 0.1 * face.light[0]) / 0.2) ** 2)
    glow = glow * (y > 0.5 * (above + below)) * (0.06 + 0.22 * face.oil)
    return colour + glow[..., None] * (235 - colour)

  def _mouth_inside(self, x, y, above, below, points, nod):
    """Teeth, which stay with skull and jaw, the tongue and the dark."""
    face = self.face
    gap = np.maximum(below - above, 1e-4)
    wide = gap.max()
    c = 0.5 * (points[48, 0] + points[54, 0])
    dx = np.abs(x - c)
    colour = np.float32([58, 20, 20]) * np.ones((*gap.shape, 1), np.float32)
    pink = np.float32([168, 84, 82]) * (
      0.55 + 0.4 * np.clip((y - above) / gap, 0, 1)[..., None])
    tongue = np.clip((y - below + 0.47 * wide) / 0.012, 0, 1)
    tongue = tongue * np.clip(1.15 - (dx / 0.042) ** 4, 0, 1)
    tongue = tongue * np.clip(wide / 0.03 - 0.6, 0, 1)
    colour = colour + tongue[..., None] * (pink - colour)
    row = dx / 0.0125
    enamel = 1 - 0.22 * np.exp(-(((row - np.round(row)) / 0.10) ** 2))
    enamel = enamel * np.clip(1.12 - (dx / 0.062) ** 2, 0.15, 1)
    enamel = enamel * np.clip((y - above) / 0.006, 0.45, 1)
    enamel = np.float32([232, 226, 210]) * enamel[..., None]
    rest = face.mouth_level + self.depth[62] * nod
    upper = self._cover(rest + 0.014 - 1.7 * dx**2 - y)
    jaw = points[8, 1] - self.points[8, 1] - self.depth[8] * nod
    lower = self._cover(y - np.maximum(rest + 0.9 * jaw + 0.006, below - 0.010))
    lower = lower * np.clip(1.2 - (dx / 0.04) ** 4, 0, 1)
    teeth = np.maximum(upper, 0.62 * lower)[..., None]
    return face.exposure * (colour + teeth * (enamel - colour))


def _wendland(a, b):
  """Wendland's C2 radial function between places [N, 2] and [M, 2]."""
  d = np.linalg.norm(a[:, None] - b[None], axis=-1) / REACH
  return np.clip(1 - d, 0, None) ** 4 * (4 * d + 1)


def _fold_strengths(action):
  """How deep every one of relief.FOLDS is; both sides share a depth."""
  s = dict(zip(actions.UNITS, action.mean(1).tolist()))
  return [
    min(1, s[12] + 0.45 * s[9] + 0.4 * s[10] + 0.2 * s[20]),
    min(1, 0.75 * s[1] + 0.6 * s[2]) * (1 - 0.5 * s[4]),
    min(1, s[4] + 0.3 * s[9]),
    min(1, s[6] + 0.4 * s[7] + 0.4 * s[9]),
    s[9],
    s[17],
    min(1, s[15] + 0.3 * s[20]),
    min(1, 0.8 * s[6] + 0.5 * s[9] + 0.3 * s[12]),
  ]


def _window(layer, middle, reach):
  """A view of a layer around a place, and its x [1, w] and y [h, 1]."""
  side = len(layer)
  box = np.array([middle - np.array(reach), middle + np.array(reach)])
  (x0, y0), (x1, y1) = np.clip(box * side, 0, side).astype(int)
  x, y = relief.grid(side)
  return layer[y0:y1, x0:x1], x[:, x0:x1], y[y0:y1]


def _curve(points, x):
  """Height [1, w] of a smooth curve through points, left to right, at x."""
  curve = relief.spline(points, 8)
  return np.interp(x[0], curve[:, 0], curve[:, 1])[None].astype(np.float32)
