"""A run at the speed of a hand: a face is encoded once, frames as asked for.

    live = Live(hatjax.load('runs/a'), 'a')
    live.frame(face, 'happy', 0.4)                  # uint8 [S, S, 3]
    for frame in live.clip(face, 'happy', 1.0, 32):
      ...

Faces are uint8 [S, S, 3], S the run's image_size, cropped as `photos.crop_face`
does. All of it may be called from several threads.
"""

import collections
import threading

import jax.numpy as jnp
import numpy as np

from hatjax import driving, parallel, photos, provenance, video

CHUNK = 8  # frames decoded at once: no length of clip compiles anew
KEPT = 16  # faces (each with its expression) whose codes are kept


class Live:
  """One run behind sliders.

  Args:
    run: what `hatjax.load` gave.
    name: how to call it.

  Attributes:
    signature: what its videos carry, see `provenance.Signature`.
    labels: it knows, () if it reads none.
    driven: whether it wants a driving clip in place of an expression.
    refines: whether its clips can be refined.

  Raises:
    ValueError: a run that makes no videos from faces.
  """

  def __init__(self, run, name):
    self.run, self.name, self.labels = run, name, run.labels
    _, self._method, self._state = run.stages[0]
    reads = self._method.reads
    if 'draft' in reads or not hasattr(self._method, 'animate'):
      raise ValueError(
        f'{name} makes no videos from a face: it is a {run.stages[0].name}. '
        'Pass another --workdir.'
      )
    self.driven = 'driving' in reads
    self.refines = 'draft' in run.method.reads and not hasattr(run, 'sharpen')
    self.signature = provenance.sign(run)
    self._kept, self._lock = collections.OrderedDict(), threading.Lock()
    self._encode = parallel.jit(
      lambda state, image, label: self._method.encode(
        state, {'image': video.to_float(image), 'label': label}
      )
    )
    self._decode = parallel.jit(lambda state, context, alpha: video.to_uint8(
      self._method.decode(state, context, alpha)
    ))

  def warm(self):
    """Compiles what a slider and a clip need."""
    size = self.run.image_size
    if not self.driven:
      face = np.zeros((size, size, 3), np.uint8)
      label = self.labels[0] if self.labels else None
      self.frame(face, label, 0.5)
      collections.deque(self.clip(face, label, 1.0, 1), 0)

  def face(self, photo, whole=False, box=None):
    """A photo, uint8 [H, W, 3], as the run wants its faces.

    Args:
      photo: see `photos.read`.
      whole: squeeze all of it to a square.
      box: of the face, where it is known.

    Raises:
      ValueError: no face in it.
    """
    whole = whole or self.run.crop == 'none'
    return photos.crop_face(
      photo, self.run.image_size, 'none' if whole else 'auto',
      self.run.background, face=box,
    )

  def frame(self, face, label, alpha):
    """The face at one intensity, uint8 [S, S, 3].

    A method that makes all frames at once shows the frame whose part of the
    clip's time is alpha.
    """
    with self._lock:
      if not hasattr(self._method, 'encode'):
        clip = self._code(face, label)
        image = clip[round(min(max(alpha, 0), 1) * (len(clip) - 1))]
      else:
        image = self._frames(self._code(face, label), [alpha])[0]
      return next(self._sharp([image]))

  def clip(
    self, face, label, alpha_max=1.0, num_frames=32, sweep='profile',
    refine=None,
  ):
    """Yields the frames of a clip; see `runs.Run.animate` for the arguments."""
    label = label if self.labels else None
    if not hasattr(self._method, 'encode'):
      yield from self.run.animate(face, label, num_frames=num_frames)[0]
      return
    frames = self._moving(face, label, alpha_max, num_frames, sweep)
    if self.refines and refine != 0:
      frames = self.run.refine(frames, label, strength=refine)
    yield from self._sharp(frames)

  def drive(self, face, path, find=photos.find_face):
    """Yields the face's frames, moved as the clip in a file moves."""
    frames = driving.crops_of(path, self.run, 'auto', find)
    return driving.drive(self.run, face, frames)

  def _moving(self, face, label, alpha_max, num_frames, sweep):
    number = self._number(label)
    alpha = np.asarray(self._method.sweep_alpha(
      self._state, number, num_frames, sweep, alpha_max
    ))[0]
    for start in range(0, len(alpha), CHUNK):
      part = alpha[start : start + CHUNK]
      # A shorter last chunk would be another shape and compile again.
      full = np.append(part, np.repeat(part[-1:], CHUNK - len(part)))
      with self._lock:
        made = self._frames(self._code(face, label), full)
      yield from made[: len(part)]

  def _frames(self, context, alpha):
    alpha = jnp.asarray(alpha, jnp.float32)[None]
    return np.asarray(self._decode(self._state, context, alpha))[0]

  def _sharp(self, frames):
    sharpen = getattr(self.run, 'sharpen', iter)
    return sharpen(frames)

  def _number(self, label):
    if not self.labels:
      return jnp.zeros(1, jnp.int32)
    names = self.run.config['info']['labels']
    return jnp.array([names.index(self.run.match_label(label))], jnp.int32)

  def _code(self, face, label):
    """The face's code for an expression, or a whole clip of it; kept."""
    key = (face.tobytes(), label)
    if key not in self._kept:
      if hasattr(self._method, 'encode'):
        number = self._number(label)
        code = self._encode(self._state, face[None], number)
      else:
        label = label if self.labels else None
        code = self.run.animate(face, label)[0]
      self._kept[key] = code
      if len(self._kept) > KEPT:
        self._kept.popitem(last=False)
    self._kept.move_to_end(key)
    return self._kept[key]
