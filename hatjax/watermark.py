"""An invisible mark in the frames of a video, and its score.

A fixed pattern of waves, whose signs are drawn from a hash, is added to the
brightness of every frame (spread spectrum, Cox et al., 1997). It is the same
in all frames, so that nothing flickers, and is laid over the whole frame
whatever its size, so that it stays where it is when the frame is resized.

It tells that a video was made here; it does not stop who wants to remove it:
cropping and rotation do, and the pattern is public. Frames are uint8
[H, W, 3]; sides under 64 pixels have little room for it.
"""

import functools
import hashlib

import cv2
import numpy as np

THRESHOLD = 5.0  # a clip without the mark reaches it once in a million
SIDE = 256  # the pattern's own; larger frames enlarge it
SMALL = 96  # shorter sides get fewer waves, which are stronger
# Waves along an axis, and the root mean square in grey levels.
WAVES, SMALL_WAVES = 48, 28
STRENGTH, SMALL_STRENGTH = 1.4, 1.8
COARSEST = 14  # sum of the waves along both axes; a face has most below


@functools.cache
def _signs():
  """+1 or -1 for the waves [SIDE, SIDE]; the same on every machine."""
  data = hashlib.shake_256(b'hatjax watermark 1').digest(SIDE * SIDE // 8)
  bits = np.unpackbits(np.frombuffer(data, np.uint8))
  return 2.0 * bits.reshape(SIDE, SIDE) - 1


def _even(length):
  return max(2, min(length, SIDE) // 2 * 2)  # as OpenCV's DCT wants it


def _select(spectrum, waves):
  """The coefficients [<= waves, <= waves] that carry the mark."""
  part = spectrum[:waves, :waves].copy()
  down, right = np.indices(part.shape)
  part[down + right < COARSEST] = 0
  return part


@functools.lru_cache(maxsize=4)
def _pattern(height, width):
  """What is added and what is subtracted, both uint8 [height, width, 3]."""
  small = min(height, width) < SMALL
  spectrum = np.zeros((_even(height), _even(width)))
  part = _select(
    _signs()[: len(spectrum), : spectrum.shape[1]],
    SMALL_WAVES if small else WAVES,
  )
  spectrum[: len(part), : part.shape[1]] = part
  waves = cv2.resize(
    cv2.idct(spectrum), (width, height), interpolation=cv2.INTER_CUBIC
  )
  strength = SMALL_STRENGTH if small else STRENGTH
  waves = np.rint(waves * strength / max(waves.std(), 1e-9))
  waves = np.repeat(waves.clip(-127, 127)[..., None], 3, -1)
  return waves.clip(0).astype(np.uint8), (-waves).clip(0).astype(np.uint8)


def mark(frames):
  """Yields the frames uint8 [H, W, 3] with the mark, one by one.

  It costs a PSNR of about 45 dB, 43 dB where a side is under 96 pixels.
  """
  for frame in frames:
    frame = np.ascontiguousarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or not frame.size:
      yield frame  # video.write_video says what is wrong with it
      continue
    up, down = _pattern(*frame.shape[:2])
    yield cv2.subtract(cv2.add(frame, up), down)  # both stay in 0..255


def score(frames):
  """How clearly the mark is there, in standard deviations.

  Args:
    frames: iterable of uint8 [H, W, 3] of one size, held one at a time.

  Returns:
    float; without the mark normal around 0, with it above THRESHOLD. 0 for no
    frames.
  """
  total, count = 0, 0
  for frame in frames:
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    size = _even(grey.shape[1]), _even(grey.shape[0])
    count += 1
    total = total + cv2.resize(
      grey.astype(np.float32), size, interpolation=cv2.INTER_AREA
    )
  if not count:
    return 0.0
  spectrum = cv2.dct(_flatten(total / count).astype(np.float64))
  return max(_correlate(spectrum, n) for n in (SMALL_WAVES, WAVES))


def _flatten(grey):
  """What the picture's edges and shades leave, at the same scale all over."""
  blur = lambda x, sigma: cv2.GaussianBlur(x, (0, 0), sigma)
  rest = grey - blur(grey, 2.0)
  return rest / (np.sqrt(blur(rest * rest, 1.2)) + 0.2)


def _correlate(spectrum, waves):
  """Correlation with the signs, waves as strong as their neighbours."""
  part = _select(spectrum, waves)
  around = np.sqrt(cv2.blur(part * part, (5, 5)))
  part = np.clip(part / (around + 1e-3), -1.5, 1.5)
  signs = _signs()[: len(part), : part.shape[1]]
  return float((part * signs).sum() / max(np.linalg.norm(part), 1e-9))
