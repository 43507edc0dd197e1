"""Who a synthetic face is: a person's looks, drawn from a seed, and 68 points.

Lengths and positions are parts of the picture's side, x right, y down; colours
are RGB, 0..255. The framing is that of `faces.square_crop_box`.
"""

import dataclasses

import numpy as np

from hatjax.synthetic_faces import actions

SKIN_TONES = (
  (250, 219, 198), (240, 200, 174), (226, 182, 150), (205, 158, 121),
  (172, 122, 86), (128, 86, 60), (94, 62, 46),
)
HAIR_TONES = (
  (34, 29, 27), (58, 42, 33), (92, 66, 46), (136, 100, 66), (205, 170, 112),
  (150, 74, 40), (158, 154, 150), (214, 212, 208),
)
IRIS_TONES = (
  (84, 52, 30), (60, 38, 24), (112, 82, 44), (92, 104, 66), (84, 116, 148),
  (110, 122, 130),
)
CLOTH_TONES = (
  (40, 44, 58), (120, 34, 40), (40, 84, 72), (190, 186, 176), (70, 70, 74),
  (58, 82, 132), (168, 132, 72), (104, 72, 108), (28, 28, 30),
)


@dataclasses.dataclass(frozen=True)
class Identity:
  """A person and the room the person is in; lengths are parts of the side."""

  seed: int
  age: float  # 0 young .. 1 old
  # Shape.
  centre: float
  width: float
  jaw: float
  chin: float
  skull: float
  hairline: float
  peak: float
  eye_gap: float
  eye_level: float
  eye_width: float
  eye_height: float
  eye_tilt: float
  crease: float
  iris_size: float
  brow_gap: float
  brow_arch: float
  brow_thick: float
  brow_density: float
  nose_level: float
  nose_width: float
  nose_height: float
  nose_bridge: float
  mouth_level: float
  mouth_width: float
  lip_upper: float
  lip_lower: float
  bow: float
  ear: float
  neck: float
  ridge: float
  hollow: float
  # Surface.
  skin: tuple
  flush: float
  rough: float
  oil: float
  tired: float
  freckles: float
  moles: int
  lip: tuple
  iris: tuple
  lashes: float
  hair: tuple
  style: str
  volume: float
  part: float
  beard: str
  shadow: float
  glasses: str
  rim: tuple
  # Room and camera.
  light: tuple
  ambient: float
  exposure: float
  room: str
  backdrop: tuple
  cloth: tuple
  neckline: float
  knit: float
  grain: float
  # How strongly each action moves the face, left and right.
  strength: tuple


def sample_identity(seed):
  """The person of a seed."""
  rng = np.random.default_rng([seed, 0])
  u, n, flip = rng.uniform, rng.normal, lambda p: rng.random() < p
  woman, age = flip(0.5), float(rng.beta(1.2, 1.8))
  near = lambda mean, spread: float(np.clip(
    n(mean, spread), mean - 2 * spread, mean + 2 * spread))
  tone = u(0, len(SKIN_TONES) - 1)
  skin = _between(SKIN_TONES, tone) * u(0.96, 1.04, 3)
  dark = tone / (len(SKIN_TONES) - 1)
  shape = _sample_shape(near, woman, dark)
  hair = _sample_hair(rng, woman, age, dark)
  surface = _sample_surface(rng, near, skin, dark, woman, age)
  turn = u(-1.1, 1.1)
  light = np.array([0.75 * np.sin(turn), u(-0.65, -0.25), u(0.75, 1.0)])
  light /= np.linalg.norm(light)
  first = rng.choice([30, 60, 110, 160, 200]) * u(0.8, 1.15, 3)
  gain = u(0.8, 1.12) * u(0.88, 1.12, len(actions.UNITS))
  lean = 1 + n(0, 0.07, len(actions.UNITS)).clip(-0.15, 0.15)
  return Identity(
    seed=seed, age=age, **shape, **hair, **surface,
    light=_tuple(light), ambient=float(u(0.25, 0.5)),
    exposure=float(u(0.85, 1.08) + 0.08 * dark),
    room=str(rng.choice(['plain', 'lights', 'wall', 'shelves'])),
    backdrop=(_tuple(first), _tuple(first * u(0.6, 1.3) * u(0.85, 1.15, 3))),
    cloth=_tuple(np.array(CLOTH_TONES[rng.integers(9)]) * u(0.8, 1.2)),
    neckline=float(u(0.02, 0.09)), knit=float(flip(0.4)),
    grain=float(u(0.6, 1.6)),
    strength=tuple(map(_tuple, zip(gain * lean, gain * (2 - lean)))),
  )


def _tuple(values):
  return tuple(float(v) for v in values)


def _between(tones, place):
  low = min(int(place), len(tones) - 2)
  a, b = np.array(tones[low], float), np.array(tones[low + 1], float)
  return a + (place - low) * (b - a)


def _sample_shape(near, woman, dark):
  man = 1 - woman
  level = near(0.475, 0.006)
  nose = level + near(0.138, 0.007)
  mouth = nose + near(0.092, 0.006) + 0.004 * man
  return {
    'centre': near(0.5, 0.006), 'width': near(0.236 + 0.010 * man, 0.010),
    'jaw': near(0.98 - 0.14 * man, 0.08),
    'chin': mouth + near(0.153 + 0.010 * man, 0.009),
    'skull': near(0.122, 0.010), 'hairline': near(0.268, 0.014),
    'peak': near(0.0, 0.006), 'eye_gap': near(0.116, 0.005),
    'eye_level': level, 'eye_width': near(0.054, 0.003),
    'eye_height': near(0.0172 + 0.001 * woman, 0.002),
    'eye_tilt': near(0.004, 0.004), 'crease': max(near(0.011, 0.006), 0.0),
    'iris_size': near(0.0222, 0.001),
    'brow_gap': near(0.054 + 0.006 * woman, 0.005),
    'brow_arch': near(0.012 + 0.005 * woman, 0.004),
    'brow_thick': near(0.0125 + 0.0055 * man, 0.0025),
    'brow_density': near(0.52 + 0.12 * man, 0.16), 'nose_level': nose,
    'nose_width': near(0.0435 + 0.004 * man + 0.006 * dark, 0.003),
    'nose_height': near(0.044 + 0.004 * man, 0.006),
    'nose_bridge': near(0.0125 + 0.002 * dark, 0.0015),
    'mouth_level': mouth, 'mouth_width': near(0.086, 0.006),
    'lip_upper': near(0.0165 + 0.003 * woman + 0.005 * dark, 0.003),
    'lip_lower': near(0.0225 + 0.003 * woman + 0.005 * dark, 0.003),
    'bow': near(0.0045, 0.0018), 'ear': near(1.0, 0.1),
    'neck': near(0.133 + 0.03 * man, 0.008),
    'ridge': max(near(0.003 + 0.006 * man, 0.002), 0),
    'hollow': max(near(0.006, 0.005), 0),
  }


def _sample_hair(rng, woman, age, dark):
  # Fair hair goes with fair skin, grey comes with age.
  fair, old = (1 - dark) ** 2.5, max(age - 0.5, 0)
  weights = np.array([3, 4, 3 * fair, 2.5 * fair, 2.5 * fair, 1.2 * fair,
                      8 * old, 5 * old])
  tone = rng.choice(len(HAIR_TONES), p=weights / weights.sum())
  styles = dict(bald=0.02, buzz=0.04, short=0.06, swept=0.1, fringe=0.14,
                long=0.26, wavy=0.16, curly=0.1, bun=0.12)
  if not woman:
    styles = dict(bald=0.12, buzz=0.16, short=0.36, swept=0.18, fringe=0.06,
                  long=0.02, wavy=0.02, curly=0.08, bun=0.0)
  bearded = not woman and rng.random() < 0.55
  beard = rng.choice(['stubble', 'moustache', 'goatee', 'full'],
                     p=[0.4, 0.15, 0.2, 0.25]) if bearded else 'none'
  worn = rng.choice(['', 'round', 'square', 'thin'], p=[0.78, .08, .06, .08])
  rim = [(30, 28, 28), (90, 56, 36), (150, 130, 90), (130, 40, 50)]
  return {
    'hair': _tuple(np.array(HAIR_TONES[tone]) * rng.uniform(0.85, 1.2)),
    'style': str(rng.choice(list(styles), p=list(styles.values()))),
    'volume': float(rng.uniform(0.025, 0.055)),
    'part': float(rng.choice([-1, 1]) * rng.uniform(0.3, 1)),
    'beard': str(beard),
    'shadow': 0.0 if woman else float(rng.uniform(0.03, 0.16)),
    'glasses': str(worn), 'rim': rim[rng.integers(4)],
  }


def _sample_surface(rng, near, skin, dark, woman, age):
  u = rng.uniform
  lip = skin * (0.86, 0.60, 0.60) + (4, 2, 6)
  if woman and rng.random() < 0.35:  # lipstick
    lip = 0.45 * lip + 0.55 * np.array([(170, 40, 60), (190, 80, 90)][
      rng.integers(2)])
  iris = rng.choice(len(IRIS_TONES), p=[.3, .2, .14, .12, .14, .1]
                    if dark < 0.5 else [.5, .4, .1, 0, 0, 0])
  return {
    'skin': _tuple(skin), 'flush': float(u(0.5, 1.3)),
    'rough': float(u(0.3, 0.7) + 0.4 * age), 'oil': float(u(0.1, 0.45)),
    'tired': float(u(0.5, 1.1) + 0.4 * age),
    'freckles': float(u(0.4, 1) * (rng.random() < 0.22 and dark < 0.5)),
    'moles': int(rng.integers(0, 4) * (rng.random() < 0.5)),
    'lip': _tuple(lip),
    'iris': _tuple(np.array(IRIS_TONES[iris]) * u(0.85, 1.15)),
    'lashes': near(0.8 + 0.5 * woman, 0.1),
  }


def neutral_landmarks(face):
  """The 68 points of a face at rest, [68, 2], in parts of the side."""
  c, p = face.centre, np.zeros((68, 2))
  a = np.linspace(-1, 1, 17) * np.pi / 2
  ear = face.eye_level + 0.005
  p[:17, 0] = c + face.width * np.sign(a) * np.abs(np.sin(a)) ** (
    0.66 + 0.3 * face.jaw)
  p[:17, 1] = ear + (face.chin - ear) * np.cos(a) ** (0.40 + 0.42 * face.jaw)
  inner, outer = 0.026, face.eye_gap + 0.068
  brow = face.eye_level - face.brow_gap
  for k, (part, high) in enumerate(
    ((1.0, 0.006), (0.8, 0.85), (0.52, 1.0), (0.25, 0.55), (0.0, 0.0))
  ):
    high = -0.006 if k == 0 else face.brow_arch * high
    p[17 + k] = c - inner - part * (outer - inner), brow - high + 0.004
  nose = np.linspace(face.eye_level - 0.006, face.nose_level - 0.028, 4)
  p[27:31] = np.stack([np.full(4, c), nose], 1)
  for k, (x, y) in enumerate(((-1, -0.004), (-0.5, 0.005), (0, 0.009))):
    p[31 + k] = c + x * face.nose_width, face.nose_level + y
  eye = np.array([c - face.eye_gap, face.eye_level])
  w, h, tilt = face.eye_width, face.eye_height, face.eye_tilt
  p[36:42] = eye + np.array([
    (-w, -tilt * 0.7), (-0.38 * w, -1.08 * h - 0.4 * tilt), (0.34 * w, -h),
    (w, tilt * 0.7), (0.32 * w, 0.78 * h), (-0.42 * w, 0.8 * h),
  ])
  _neutral_lips(face, p)
  right = actions.MIRROR[:68]
  left = [*range(17, 22), *range(31, 34), *range(36, 42),
          48, 49, 50, 51, 57, 58, 59, 60, 61, 62, 66, 67]
  p[right[left]] = p[left] * (-1, 1) + (2 * c, 0)
  p[[33, 51, 57, 62, 66], 0] = c
  return p


def _neutral_lips(face, p):
  c, line, w = face.centre, face.mouth_level, face.mouth_width
  up, low, bow = face.lip_upper, face.lip_lower, face.bow
  for k, (x, y) in {
    48: (-1, 0.0), 49: (-0.56, -0.72 * up), 50: (-0.2, -up - 0.3 * bow),
    51: (0, -up + bow), 57: (0, low), 58: (-0.32, 0.95 * low),
    59: (-0.66, 0.62 * low), 60: (-0.88, 0.0015), 61: (-0.34, 0.0005),
    62: (0, 0.002), 66: (0, 0.002), 67: (-0.34, 0.0005),
  }.items():
    p[k] = c + x * w, line + y
