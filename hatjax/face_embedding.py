"""Face embeddings for ACD: frames -> unit vectors, and which had a face.

An embedder has `name`, `about` (what a table says of it), `checksum` of its
weights ('' if it has none) and `embed(frames)`, which takes uint8 [T, H, W, 3]
and returns (float32 [T, D] unit vectors, bool [T]); where no face was found
the vector is 0 and says nothing. Values of different embedders are not
comparable. Nothing here is random.
"""

import hashlib

import cv2
import numpy as np

from hatjax import faces, video, weights

NAMES = ('openface', 'sface', 'builtin')
SIDE = 128  # Smaller frames are enlarged to it before a face is looked for.
# OpenFace's mean face, min-max scaled to its box, at YuNet's five points: the
# middles of the eyes (its points 36-41 and 42-47), tip of the nose (30),
# corners of the mouth (48, 54); x, y in [0, 1].
TEMPLATE = np.array([
  (0.2774, 0.1673), (0.7061, 0.1590), (0.4921, 0.4221), (0.3071, 0.6418),
  (0.6954, 0.6341),
])


def make(name='auto'):
  """An embedder.

  Args:
    name: one of NAMES, or 'auto': the first whose weights are there.

  Raises:
    ValueError: unknown, or its weights are absent or damaged.
  """
  if name == 'auto':
    there = weights.is_there
    name = next(
      (n for n in NAMES[:2] if there(n) and there('yunet')), 'builtin'
    )
  if name not in _MAKERS:
    raise ValueError(
      f'--faces: unknown embedding {name!r}. Choose one of: auto, '
      f'{", ".join(NAMES)}, or the workdir of a face_classifier run.'
    )
  return _MAKERS[name]()


class BuiltIn:
  """Histograms of oriented gradients of the face that Viola-Jones finds.

  Needs no weights. One box, the median of those found, serves a whole clip,
  so that a jittering detector adds nothing; 96x96, grey, equalized, 8x8 cells,
  2x2 blocks, 9 directions. It sees any change of the face's shape, also the
  wanted expression: values say less about identity than a face net's.
  """

  name = 'builtin-hog-1'
  about = (
    "built-in descriptor (HOG of the Viola-Jones face box; no face net's "
    'weights were there), not comparable with published ACD'
  )
  checksum = ''

  def __init__(self):
    self._hog = cv2.HOGDescriptor((96, 96), (16, 16), (8, 8), (8, 8), 9)

  def embed(self, frames):
    """See the module."""
    frames = _enlarged(frames)
    boxes = [_detect(frame) for frame in frames]
    found = np.array([box is not None for box in boxes])
    out = np.zeros((len(frames), self._hog.getDescriptorSize()), np.float32)
    if found.any():
      kept = np.array([box for box in boxes if box is not None])
      box = np.rint(np.median(kept, 0)).astype(int)
      for t in np.flatnonzero(found):
        face = faces.crop(frames[t], tuple(box), 96)
        grey = cv2.equalizeHist(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY))
        out[t] = self._hog.compute(grey).ravel()
    return _unit(out), found


_boxes = {}  # of pictures already looked at


def _detect(frame):
  """Looks once at each picture: rows and compared runs share their frames."""
  key = frame.shape, hashlib.sha256(frame.tobytes()).digest()
  if key not in _boxes:
    _boxes[key] = faces.detect_face(frame)
  return _boxes[key]


class OpenFace:
  """OpenFace nn4.small2 (Amos et al. 2016), 128 numbers, of aligned 96x96.

  Aligned by YuNet's five points, where the released code has dlib's 68: an
  affine map, least squares, to the same mean face.
  """

  name = 'openface-nn4.small2.v1'
  about = 'OpenFace nn4.small2.v1, aligned by YuNet (released: dlib)'

  def __init__(self):
    self._detector = YuNet()
    self._net = cv2.dnn.readNetFromTorch(str(weights.find('openface')))
    self.checksum = weights.checksum('openface')

  def embed(self, frames):
    """See the module."""
    return _embed_each(frames, self._detector.detect, self._embed_face)

  def _embed_face(self, frame, face):
    aligned = align(frame, face[4:14].reshape(5, 2), 96)
    self._net.setInput(cv2.dnn.blobFromImage(aligned, 1 / 255, (96, 96)))
    return self._net.forward().ravel()


class SFace:
  """SFace (Zhong et al. 2021), 128 numbers, with OpenCV's own alignment."""

  name = 'sface-2021dec'
  about = 'SFace 2021dec, aligned by YuNet'

  def __init__(self):
    self._detector = YuNet()
    self._net = cv2.FaceRecognizerSF.create(str(weights.find('sface')), '')
    self.checksum = weights.checksum('sface')

  def embed(self, frames):
    """See the module."""
    return _embed_each(frames, self._detector.detect, self._embed_face)

  def _embed_face(self, frame, face):
    bgr = np.ascontiguousarray(frame[..., ::-1])
    return self._net.feature(self._net.alignCrop(bgr, face)).ravel()


class YuNet:
  """Finds faces and five points on each."""

  def __init__(self):
    path = str(weights.find('yunet'))
    self._net = cv2.FaceDetectorYN.create(path, '', (SIDE, SIDE), 0.6)

  def detect(self, frame):
    """The largest face of uint8 [H, W, 3]: float32 [15], or None.

    Its box (x, y, w, h), five points (x, y) in the order of TEMPLATE, and a
    score.
    """
    self._net.setInputSize(frame.shape[1::-1])
    _, found = self._net.detect(np.ascontiguousarray(frame[..., ::-1]))
    if found is None or not len(found):
      return None
    return max(found, key=lambda face: face[2] * face[3])


_MAKERS = {'openface': OpenFace, 'sface': SFace, 'builtin': BuiltIn}


def align(frame, points, size):
  """The face with its five points moved onto the template's.

  Args:
    frame: uint8 [H, W, 3].
    points: [5, 2], (x, y) in the order of TEMPLATE.
    size: side of the result.

  Returns:
    uint8 [size, size, 3].
  """
  moved = np.concatenate([points, np.ones((5, 1))], 1)
  matrix = np.linalg.lstsq(moved, size * TEMPLATE, rcond=None)[0].T
  return cv2.warpAffine(frame, matrix, (size, size))


def _embed_each(frames, detect, embed):
  frames = _enlarged(frames)
  vectors, found = [], []
  for frame in frames:
    face = detect(frame)
    found.append(face is not None)
    vectors.append(None if face is None else embed(frame, face))
  some = next((v for v in vectors if v is not None), np.zeros(1))
  vectors = [np.zeros_like(some) if v is None else v for v in vectors]
  return _unit(np.stack(vectors)), np.array(found)


def _enlarged(frames):
  """Frames whose short side is SIDE or more."""
  side = min(frames.shape[1:3])
  if side >= SIDE:
    return frames
  size = [round(n * SIDE / side) for n in frames.shape[1:3]]
  return video.resize(frames, size, 'cubic')


def _unit(vectors):
  vectors = np.asarray(vectors, np.float32)
  norm = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.maximum(norm, 1e-12)
