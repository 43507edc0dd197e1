"""Facial actions: which of them make an expression, how they move a face, when.

An action is one of FACS's action units (AU), of strength 0..1, on the left and
the right of the picture (sides 0 and 1). Points are [68, 2] (x, y) in the
order of the 68-point scheme of dlib and CK+; lengths here are parts of the
distance between the eyes, y pointing down.

`timeline` says what a face does over a clip, `displacements` where one action
at full strength moves the points. Both are NumPy and depend on nothing but
their arguments.
"""

import typing

import numpy as np

EXPRESSIONS = ('anger', 'disgust', 'fear', 'happy', 'sad', 'surprise')
# After EMFACS's prototypes.
PROTOTYPES = {
  'anger': {4: 1, 5: 0.5, 7: 0.8, 17: 0.35, 23: 1},
  'disgust': {4: 0.45, 7: 0.6, 9: 1, 10: 0.9, 15: 0.45, 17: 0.5, 25: 0.2},
  'fear': {1: 1, 2: 0.5, 4: 0.6, 5: 1, 20: 1, 25: 0.8, 26: 0.35},
  'happy': {6: 1, 7: 0.15, 12: 1, 25: 0.9, 26: 0.1},
  'sad': {1: 1, 4: 0.5, 7: 0.3, 15: 1, 17: 0.8},
  'surprise': {1: 1, 2: 1, 5: 0.9, 25: 0.5, 26: 1},
  'neutral': {},
}
# How the head joins in: right, down (parts of the picture), growth, tilt,
# turn, nod (radians); tilt and turn take either sign.
HEAD = {
  'anger': (0, 0.014, 0.05, 0.008, 0.02, 0.15),
  'disgust': (0, 0.006, -0.03, 0.015, 0.04, -0.14),
  'fear': (0, -0.014, -0.045, 0.008, 0.02, -0.10),
  'happy': (0, -0.008, 0.03, 0.015, 0.03, -0.08),
  'sad': (0, 0.022, -0.02, 0.012, 0.02, 0.20),
  'surprise': (0, -0.022, 0.02, 0.008, 0.02, -0.12),
  'neutral': (0,) * 6,
}
# Points of the left side and the middle that an action moves, by (x, y).
# From 68 on those of `controls`: cheek, fold beside the mouth, forehead above
# the inner and the outer brow, below the eye, jowl; in the middle the ball of
# the chin and the place between the brows.
CHEEK, FOLD, INNER, OUTER, UNDER, JOWL, BALL, GLABELLA = range(68, 76)
MOVES = {
  1: {21: (0.01, -0.16), 20: (0.01, -0.13), 19: (0, -0.07), 18: (0, -0.02),
      INNER: (0, -0.08), GLABELLA: (0, -0.05)},
  2: {17: (0, -0.09), 18: (0, -0.15), 19: (0, -0.13), 20: (0, -0.05),
      OUTER: (0, -0.07)},
  4: {21: (0.06, 0.10), 20: (0.06, 0.10), 19: (0.05, 0.08), 18: (0.03, 0.05),
      17: (0.02, 0.01), INNER: (0.01, 0.06), GLABELLA: (0, 0.07),
      27: (0, 0.05), 39: (0, 0.01)},
  5: {18: (0, -0.01)},
  6: {CHEEK: (0.01, -0.10), UNDER: (0, -0.06), FOLD: (0, -0.03),
      18: (0, 0.02), 36: (0.01, 0.0)},
  7: {UNDER: (0.01, -0.03)},
  9: {31: (-0.02, -0.08), 32: (0, -0.07), 33: (0, -0.05), 30: (0, -0.05),
      29: (0, -0.03), 21: (0.03, 0.07), 20: (0.02, 0.06), 19: (0.01, 0.04),
      50: (0, -0.05), 49: (-0.02, -0.05), 51: (0, -0.04), 61: (0, -0.04),
      62: (0, -0.03), FOLD: (-0.02, -0.08), CHEEK: (0, -0.07),
      UNDER: (0, -0.05), GLABELLA: (0, 0.05), 27: (0, 0.03),
      INNER: (0, 0.03)},
  10: {50: (-0.01, -0.08), 49: (-0.03, -0.08), 51: (0, -0.06),
       48: (-0.03, -0.01), 61: (0, -0.05), 62: (0, -0.04),
       31: (-0.02, -0.03), FOLD: (-0.04, -0.05), CHEEK: (0, -0.03)},
  12: {48: (-0.18, -0.14), 60: (-0.17, -0.13), 49: (-0.11, -0.06),
       50: (-0.04, -0.01), 51: (0, 0.01), 61: (-0.08, -0.02),
       59: (-0.11, -0.03), 58: (-0.05, 0.02), 57: (0, 0.03),
       67: (-0.08, 0.0), 66: (0, 0.02), FOLD: (-0.08, -0.07),
       CHEEK: (-0.05, -0.08), 31: (-0.03, -0.01), 5: (-0.03, -0.02),
       4: (-0.03, -0.02), JOWL: (-0.06, -0.05)},
  15: {48: (-0.03, 0.14), 60: (-0.02, 0.125), 49: (-0.01, 0.07),
       59: (-0.02, 0.105), 58: (0, 0.04), 61: (0, 0.045), 67: (0, 0.05),
       50: (0, 0.02), 51: (0, 0.01),
       FOLD: (0, 0.05), JOWL: (-0.01, 0.06)},
  17: {57: (0, -0.07), 58: (0, -0.065), 59: (0, -0.04), 66: (0, -0.045),
       67: (0, -0.04), 62: (0, -0.045), 61: (0, -0.04), 51: (0, -0.025),
       50: (0, -0.025), BALL: (0, -0.10), 8: (0, -0.04), 7: (0, -0.03)},
  20: {48: (-0.16, 0.04), 60: (-0.15, 0.04), 49: (-0.09, 0.03),
       50: (-0.03, 0.02), 59: (-0.10, 0.05), 58: (-0.04, 0.03),
       57: (0, 0.02), 61: (-0.07, 0.02), 67: (-0.07, 0.03), 66: (0, 0.02),
       62: (0, 0.01), JOWL: (-0.09, 0.03), 5: (-0.03, 0)},
  23: {48: (0.05, 0.01), 60: (0.05, 0.01), 49: (0.03, 0.035),
       50: (0.01, 0.045), 51: (0, 0.045), 59: (0.03, -0.04),
       58: (0.01, -0.06), 57: (0, -0.06), FOLD: (0.02, 0.01),
       61: (0.02, 0), 67: (0.02, 0), BALL: (0, -0.02)},
  25: {50: (0, -0.03), 49: (0, -0.015), 51: (0, -0.03), 61: (0, -0.045),
       62: (0, -0.045), 67: (0, 0.07), 66: (0, 0.08), 58: (0, 0.06),
       57: (0, 0.07), 59: (0, 0.03), BALL: (0, 0.04)},
  26: {8: (0, 0.24), 7: (0, 0.23), 6: (0.01, 0.19), 5: (0.02, 0.12),
       4: (0.02, 0.06), 3: (0.01, 0.02), BALL: (0, 0.25), 57: (0, 0.30),
       58: (-0.01, 0.29), 59: (0.03, 0.24), 66: (0, 0.29), 67: (-0.02, 0.27),
       48: (0.10, 0.13), 60: (0.11, 0.13), 49: (0.03, 0.0),
       50: (-0.01, -0.02), 61: (-0.03, 0.0), 51: (0, -0.02),
       62: (0, -0.03), JOWL: (0.02, 0.14), FOLD: (0.02, 0.03)},
}
UNITS = tuple(MOVES)
BLINK = len(UNITS)  # its place in `actions`
# Of every point the one across the face; 76..81 mirror 68..73.
MIRROR = np.array([
  *range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31,
  45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40, 54, 53, 52, 51, 50, 49, 48,
  59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65, *range(76, 82), 74, 75,
  *range(68, 74),
])
# What the lids do, in parts of the neutral opening above and below its axis.
UPPER_LID = {4: -0.15, 5: 0.55, 6: -0.18, 7: -0.28, 9: -0.2, 12: -0.1}
LOWER_LID = {5: 0.1, 6: -0.5, 7: -0.45, 9: -0.45, 12: -0.1, 26: 0.1}


class Timeline(typing.NamedTuple):
  """What a face does over a clip, one row per frame.

  Attributes:
    alpha: float32 [T], the intensity, 0 in a neutral frame, 1 at the apex.
    actions: [T, len(UNITS) + 1, 2], strengths by side; the last is the blink.
    head: [T, 6], right, down, growth, tilt, turn, nod.
    gaze: [T, 2], of the irises, in parts of their radius.
  """

  alpha: np.ndarray
  actions: np.ndarray
  head: np.ndarray
  gaze: np.ndarray


def timeline(expression, num_frames, rng, strength, half='onset'):
  """The actions of a clip; its first frame is neutral.

  Args:
    expression: one of EXPRESSIONS or 'neutral', which only blinks and sways.
    num_frames: T.
    rng: NumPy generator; timing, blinks and head motion.
    strength: [len(UNITS), 2], of the person, by side.
    half: 'onset' ends at the apex, 'full' goes back to neutral.
  """
  t = np.arange(num_frames) / max(num_frames - 1, 1)
  hold = rng.uniform(0.06, 0.16)  # longest lag of an action
  bend = rng.uniform(0.8, 1.3)
  lag = rng.uniform(0, hold, (len(UNITS), 2))
  lag[:, 1] = lag[:, 0] + rng.uniform(-0.03, 0.03, len(UNITS))
  lag = np.clip(lag, 0, hold)
  curve = lambda time: _intensity(time, hold, bend, half)
  wanted = np.array([PROTOTYPES[expression].get(u, 0) for u in UNITS])
  strength = strength * rng.uniform(0.95, 1.05, strength.shape)
  actions = np.zeros((num_frames, len(UNITS) + 1, 2))
  later = curve(t[:, None, None] - lag)
  actions[:, :-1] = later * wanted[:, None] * strength
  alpha = curve(t) * (expression != 'neutral')
  actions[:, BLINK] = _blinks(t, num_frames, rng)[:, None]
  head, gaze = _head(expression, curve, t, rng, hold)
  gaze *= np.minimum(1, 8 * t)[:, None]
  return Timeline(alpha.astype(np.float32), actions, head, gaze)


def _intensity(time, hold, bend, half):
  """Onset and apex, or onset, apex and offset; constant outside [0, 1]."""
  if half == 'onset':
    return _ease(time / (1 - hold), bend)
  end = 1 - hold
  return np.minimum(
    _ease(time / (0.38 * end), bend), _ease((end - time) / (0.38 * end), bend)
  )


def _ease(x, bend=1.0):
  x = np.clip(x, 0, 1) ** bend
  return x * x * (3 - 2 * x)


def _blinks(t, num_frames, rng):
  """Strength 0..1 of one blink in most clips, never in the first frame."""
  at = rng.uniform(0.15, 0.9)
  width = rng.uniform(2.0, 3.0) / max(num_frames, 16)
  blink = np.clip(1.4 - np.abs(t - at) / width, 0, 1) * (rng.random() < 0.6)
  # Never at the end: the last frame shows the apex.
  return blink * np.clip(20 * np.minimum(t, 1 - t), 0, 1)


def _head(expression, curve, t, rng, hold):
  """What the expression asks for, and a slow sway that starts at 0."""
  pose = np.array(HEAD[expression]) * rng.uniform(0.93, 1.07)
  pose[3:5] *= rng.uniform(-1, 1, 2)
  head = curve(t - rng.uniform(0, hold))[:, None] * pose
  reach = np.array([0.0011, 0.0009, 0.0014, 0.003, 0.012, 0.008])
  phase = rng.uniform(0, 2 * np.pi, (2, 6))
  for k, speed in enumerate(rng.uniform(2, 6, 2)):
    wave = np.sin(speed * t[:, None] + phase[k]) - np.sin(phase[k])
    head = head + reach * wave
  gaze = 0.12 * np.sin(rng.uniform(3, 7, 2) * t[:, None])
  return head, gaze * rng.uniform(-1, 1, 2)


def controls(landmarks):
  """The 68 points and those of the skin between them, [82, 2]."""
  p = np.concatenate([landmarks, np.zeros((14, 2))])
  p[CHEEK] = 0.55 * p[41] + 0.3 * p[48] + 0.15 * p[2]
  p[FOLD] = 0.5 * p[31] + 0.35 * p[48] + 0.15 * p[3]
  p[INNER] = p[20] + 0.9 * (p[20] - p[39])
  p[OUTER] = p[18] + 0.9 * (p[18] - p[37])
  p[UNDER] = 1.3 * p[41] - 0.3 * p[19] + 0.1 * (p[48] - p[41])
  p[JOWL] = 0.55 * p[48] + 0.45 * p[5]
  right = MIRROR[CHEEK:BALL]
  p[right] = p[CHEEK:BALL] * (-1, 1) + (2 * p[27, 0], 0)
  p[BALL] = 0.45 * p[57] + 0.55 * p[8]
  p[GLABELLA] = 0.5 * (p[21] + p[22])
  return p


def displacements():
  """Where every action moves every point, [len(UNITS), 2, 82, 2], by side."""
  moves = np.zeros((len(UNITS), 2, 82, 2))
  for k, table in enumerate(MOVES.values()):
    for point, move in table.items():
      share = 0.5 if MIRROR[point] == point else 1.0  # each side gives half
      moves[k, 0, point] = share * np.array(move)
  moves[:, 1] = moves[:, 0][:, MIRROR] * (-1, 1)
  return moves


def move_lids(points, neutral, actions):
  """Sets the points of the lids, 37, 38, 40, 41 and their mirrors, in place.

  Args:
    points: [82, 2], the corners of the eyes moved already.
    neutral: [82, 2].
    actions: [len(UNITS) + 1, 2] of one frame.
  """
  strength = dict(zip(UNITS, actions))
  for side in (0, 1):
    place = MIRROR if side else np.arange(82)
    corners = place[[36, 39]]
    shift = points[corners].mean(0) - neutral[corners].mean(0)
    axis = neutral[corners, 1].mean()
    factors = []
    for table in (UPPER_LID, LOWER_LID):
      change = sum(gain * strength[u][side] for u, gain in table.items())
      factors.append(max(1 + change, 0.25))
    upper, lower = place[[37, 38]], place[[41, 40]]
    for lid, factor in ((upper, factors[0]), (lower, factors[1])):
      points[lid] = neutral[lid] + shift
      points[lid, 1] += (factor - 1) * (neutral[lid, 1] - axis)
    shut = actions[BLINK, side] * 0.97
    points[upper] += shut * (points[lower] - points[upper])
