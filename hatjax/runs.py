"""A trained run: load its stages, animate faces; the Python API.

    run = hatjax.load('runs/a')
    video = run.animate('face.jpg', label='happy')   # uint8 [1, 32, S, S, 3]

Where a run has several stages, each refines the video of the one before.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hatjax import (
  data,
  diffusion,
  parallel,
  photos,
  records,
  settings,
  sharpening,
  video,
  workdir,
)
from hatjax import state as state_lib

# Imported where they are built: an exported model does without their code.
if TYPE_CHECKING:
  from hatjax import methods


DECODE_FRAMES = 256  # frames decoded per call, over all clips


def make_method(stage, info, image_size, steps_per_epoch=1):
  """The method of a stage, given what the data said (`labels`)."""
  from hatjax import methods

  return methods.make(
    stage, steps_per_epoch, num_labels=len(info['labels']),
    image_size=image_size,
  )


def example_batch(stage):
  """Zeros in the shapes of a stage's training batch."""
  block = stage['data']
  return data.example_batch(
    block['image_size'], block['batch_size'], block['num_frames']
  )


class Stage(NamedTuple):
  """A trained method, one link of a cascade."""

  name: str
  method: 'methods.Method'
  state: state_lib.TrainState


def restore_state(disk, method, stage, step=None, unchecked=False):
  """The state of a stage on one device, or None if it has no checkpoint.

  Args:
    disk: workdir.Run of the stage.
    method: see `make_method`.
    stage: its block of the config.
    step: which checkpoint; default the latest that is whole.
    unchecked: see `workdir.Run.restore`.
  """
  abstract = jax.eval_shape(
    method.init, jax.random.key(0), example_batch(stage)
  )
  if jax.process_count() == 1:  # Wherever it was when it was saved.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      abstract,
    )
  return disk.restore(abstract, step, unchecked)


def load_stage(folder, config, name, step=None, unchecked=False):
  """A stage of the run in a folder, whose config it is; default its latest."""
  stage = config[name]
  method = make_method(stage, config['info'], stage['data']['image_size'])
  disk = workdir.Run(pathlib.Path(folder) / name, read_only=True)
  state = restore_state(disk, method, stage, step, unchecked)
  disk.close()
  if state is None:
    raise ValueError(
      f'{folder} has no checkpoint yet. Train further: run hatjax.train with '
      'the same config and workdir.'
    )
  return Stage(name, method, state)


def load_earlier(config):
  """The stages that config.init_from takes from other runs; [] if none.

  Raises:
    ValueError: no such run, or one of other labels, named by the setting.
  """
  from hatjax import methods

  stages = []
  for name, folder in config.get('init_from', {}).items():
    if not folder or not methods.makes_video(name):
      continue
    other = workdir.read_other(
      folder, name, f'config.init_from.{name}', config['info']['labels']
    )
    # It makes drafts in the way this run computes: memory, determinism.
    other = {**other, name: methods.settle(config, other[name])}
    stages.append(load_stage(folder, other, name))
  return stages


def check_cascade(named):
  """Raises ValueError unless each stage can follow the one before.

  Args:
    named: list of (stage name, method), in order.
  """
  for (before, drafter), (name, method) in zip([('', None), *named], named):
    if drafter is None and getattr(method, 'needs_draft', False):
      raise ValueError(
        f'config.{name}.model.mode is {method.mode!r}: it learns from the '
        'drafts of a stage before it, and there is none. Train both '
        '(--config <file>:hat_cgan_diff), name a trained run '
        '(--config.init_from.hat_cgan=<workdir>), or set mode to '
        f"{'degraded' if method.mode == 'drafts' else 'noise'!r}."
      )
    wanted = getattr(method, 'input_size', method.image_size)
    if drafter and drafter.image_size != wanted:
      raise ValueError(
        f'{before} makes videos of side {drafter.image_size}, {name} refines '
        f'{wanted}. Set config.{name}.data.image_size (and '
        'model.image_size) to the same.'
      )


def load(folder, step=None):
  """Opens a trained run.

  Args:
    folder: its workdir.
    step: which checkpoint of its last stage; default the latest.

  Returns:
    Run.

  Raises:
    ValueError: no run there, no checkpoint, or one of another config.
  """
  from hatjax import methods

  parallel.start_process()
  config = workdir.read_config(folder)
  *first, last = config['stages']
  stages = load_earlier(config)
  stages += [
    load_stage(folder, config, name) for name in first
    if methods.makes_video(config[name]['method'])
  ]
  stages.append(load_stage(folder, config, last, step))
  if not hasattr(stages[-1].method, 'sharpen'):
    return Run(config, stages)
  run = Run(config, stages[:-1]) if stages[:-1] else None
  return sharpening.Sharpened(run, stages[-1], config)


class Run:
  """A loaded run.

  Attributes:
    config: the dict in its config.json.
    stages: tuple of Stage, in the order they work.
    labels: labels it was trained on, () if no method reads any.
    image_size: side of what it makes, pixels.
    crop: 'face' or 'none': how its training records were cropped.
    background: 'keep' or 'black': whether they show more than the face.
    step: of the last stage's checkpoint.
  """

  def __init__(self, config, stages):
    self.config, self.stages = config, tuple(stages)
    _, self.method, self.state = self.stages[-1]
    self.crop = config['info']['crop']
    self.background = config['info'].get('background', 'keep')
    self.image_size = self.method.image_size
    self.step = int(self.state.step)
    reads_label = any('label' in s.method.reads for s in self.stages)
    self.labels = (
      tuple(config['info']['trained_labels']) if reads_label else ()
    )

  def match_label(self, text):
    """The known label that `text` means; ValueError listing the known."""
    return records.match_label(text, self.labels)

  def animate(
    self, images: photos.Photo | Sequence[photos.Photo],
    label: str | Sequence[str] | None = None, *, crop: str = 'auto',
    num_frames: int = 32, sweep: str = 'profile', alpha_max: float = 1.0,
    alpha: np.ndarray | None = None, seed: int = 0,
    refine: float | None = None, num_sample_steps: int | None = None,
  ) -> np.ndarray:
    """Expression videos.

    Args:
      images: one photo, or B of them: a path, a PIL image or uint8
        [H, W, 3], whose face is found and cropped as in training. Faces that
        are cropped already, uint8 [B, S, S, 3] or [S, S, 3] with S =
        image_size, are taken as they are.
      label: one name, or B names; None for a method without labels.
      crop: 'auto', or 'none' to squeeze whole photos to a square.
      num_frames: T ('reference' always makes 20).
      sweep: 'linear' (0 to alpha_max), 'profile' (the onset seen in
        training, times alpha_max) or 'reference' (0, 0.05, ..., 0.95).
      alpha_max: strength of the last frame.
      alpha: float [B, T] intensities instead of a sweep.
      seed: of the noise.
      refine: strength of the refinement; 0 returns the first stage's video
        bit for bit; default: the config's.
      num_sample_steps: see `refine`.

    Returns:
      uint8 [B, T, S, S, 3].

    Raises:
      ValueError: unknown label or sweep, no picture, no face in it; a run
        that cannot.
    """
    if not hasattr(self.stages[0].method, 'animate'):
      raise ValueError(
        f'This run makes no videos: it is a {self.stages[0].name}. Pass '
        'another --workdir.'
      )
    crop = 'none' if self.crop == 'none' else crop
    images = photos.faces_of(images, self.image_size, crop, self.background)
    self._check_frames('images', images)
    if 'driving' in self.stages[0].method.reads:
      raise ValueError(
        f"{self.stages[0].name} reads 'driving', which a face alone lacks. "
        'Pass --driving clip.mp4 (in Python: hatjax.driving.drive).'
      )
    if 'draft' in self.stages[0].method.reads:
      raise ValueError(
        f'This run has no stage before {self.stages[0].name}: it refines '
        'videos and makes none from a face. Pass --video clip.mp4, '
        'or train both stages: --config <file>:hat_cgan_diff'
      )
    refines = len(self.stages) > 1
    if refines or (refine, num_sample_steps) != (None, None):
      refine, steps = self._refinement(refine, num_sample_steps)
    label = self._label_ids(label, len(images))
    rng = jax.random.key(seed)
    clips = self._make(images, label, rng, num_frames, sweep, alpha_max, alpha)
    if not refines or not refine:
      return clips
    frames = np.moveaxis(clips, 1, 0)
    label = label if self.labels else None
    refined = self._refined(frames, label, refine, steps, seed, images)
    return np.stack([*refined], 1)

  def _make(self, images, label, rng, num_frames, sweep, alpha_max, alpha):
    """The first stage's videos, uint8 [B, T, S, S, 3]."""
    _, method, state = self.stages[0]
    if not hasattr(method, 'encode'):
      return np.asarray(self._whole(state, images, label, rng, num_frames))
    if alpha is None:
      alpha = self._sweep(state, label, num_frames, sweep, alpha_max)
    alpha = jnp.asarray(alpha, jnp.float32)
    context = self._encode(state, images, label)
    chunk = max(1, DECODE_FRAMES // len(images))
    parts = []
    for start in range(0, alpha.shape[1], chunk):
      part = alpha[:, start : start + chunk]
      parts.append(self._decode(state, context, part, rng))
    return np.concatenate(jax.device_get(parts), 1)

  def refine(
    self, frames, label=None, *, strength=None, num_sample_steps=None, seed=0
  ):
    """Refines a video of any length, holding two windows of it at most.

    Windows of as many frames as the stage was trained on, each overlapping
    the next by half, are refined on their own and cross-faded. Frame t starts
    from noise that depends on (seed, t) alone, so the result does not depend
    on how the frames come.

    Args:
      frames: iterable of uint8 [S, S, 3], faces cropped as in training.
      label: name of the expression, if known.
      strength: share of the noise levels the video is noised by, 0 to 1; 0
        keeps every frame bit for bit; default: the config's.
      num_sample_steps: denoising steps from pure noise; a video needs its
        share, rounded. Default: the config's.
      seed: of the noise.

    Returns:
      Iterator of uint8 [S, S, 3], one for each frame.

    Raises:
      ValueError: a run without a refining stage, wrong strength, frame size.
    """
    strength, steps = self._refinement(strength, num_sample_steps)
    label = None if label is None else self._label_ids(label, 1)
    if not strength:
      return iter(frames)
    clips = (self._check_frames('frames', np.asarray(f)[None]) for f in frames)
    refined = self._refined(clips, label, strength, steps, seed)
    return (frame[0] for frame in refined)

  def animate_noise(
    self, numbers, label=None, *, num_frames=32, seed=0, num_sample_steps=None
  ):
    """Videos from pure noise, without a face or a draft.

    Args:
      numbers: int [B], which of the seed's draws.
      label: one name, or B names; None for no condition.
      num_frames: T.
      seed: of the noise.
      num_sample_steps: default: the config's.

    Returns:
      uint8 [B, T, S, S, 3].

    Raises:
      ValueError: a run that only refines, or refines nothing.
    """
    _, steps = self._refinement(None, num_sample_steps)
    if getattr(self.method, 'needs_draft', False):
      raise ValueError(
        "This run was trained in mode 'paired': it only refines drafts. Leave "
        "--from_noise out, or train with model.mode 'noise'."
      )
    numbers = np.asarray(numbers, np.int32)
    label = None if label is None else self._label_ids(label, len(numbers))
    return np.asarray(self._from_noise(
      self.state, label, numbers, jax.random.key(seed), num_frames, steps
    ))

  def _refinement(self, strength, steps):
    """(strength, steps) of a refinement, checked, or the config's."""
    if 'draft' not in self.method.reads:
      raise ValueError(
        f'This run has no stage that refines, only {self.stages[-1].name}. '
        'Train both stages: --config <file>:hat_cgan_diff'
      )
    strength = self.method.strength if strength is None else strength
    settings.check_shares(refine=strength)
    steps = self.method.num_sample_steps if steps is None else steps
    if steps < 1:
      raise ValueError(f'num_sample_steps is {steps}. It must be at least 1.')
    return float(strength), int(steps)

  def _check_frames(self, name, frames):
    """`frames`; ValueError unless they are uint8 [B, S, S, 3]."""
    size = (self.image_size, self.image_size, 3)
    if frames.dtype != np.uint8 or frames.shape[1:] != size:
      raise ValueError(
        f'{name} must be uint8 [B, {size[0]}, {size[1]}, 3], not '
        f'{frames.dtype} {list(frames.shape)}.'
      )
    return frames

  def _refined(self, frames, label, strength, steps, seed, images=None):
    """Iterables of uint8 [B, S, S, 3], before and after the last stage; images
    are what the frames were made from, by default the first of them."""
    name, method, state = self.stages[-1]
    rng = jax.random.key(seed)
    trained = self.config[name]['data']['num_frames']

    def denoise(clip, start):
      nonlocal images
      images = clip[0] if images is None else images
      positions = start + np.arange(len(clip))
      return np.asarray(self._denoise(
        state, np.stack(clip, 1), images, label, positions, rng, strength, steps
      ))

    window = method.window or trained
    for frame in diffusion.cross_fade(frames, denoise, window):
      yield video.to_uint8(frame)

  def neutral_faces(self, split, limit=None, directory=None):
    """First frames of the training records, one per subject of a split.

    Args:
      split: a named split of the records the run was trained on.
      limit: at most this many.
      directory: where the records live; see `records.data_dir`.

    Returns:
      {subject: uint8 [S, S, 3]}.
    """
    block = dict(self.config[self.config['stages'][-1]]['data'])
    batches = data.make_batches(
      **{**block, 'split': split, 'directory': directory}
    )
    return batches.neutral_faces(limit)

  def _label_ids(self, labels, count):
    if not self.labels:
      return np.zeros(count, np.int32)
    if labels is None:
      raise ValueError(f'This run reads a label: {", ".join(self.labels)}.')
    labels = [labels] * count if isinstance(labels, str) else list(labels)
    if len(labels) != count:
      raise ValueError(f'{count} images but {len(labels)} labels.')
    numbers = self.config['info']['labels']
    return np.array(
      [numbers.index(self.match_label(x)) for x in labels], np.int32
    )

  @functools.cached_property
  def _encode(self):
    def encode(state, images, label):
      inputs = {'image': video.to_float(images), 'label': label}
      return self.stages[0].method.encode(state, inputs)

    return parallel.jit(encode)

  @functools.cached_property
  def _decode(self):
    def decode(state, context, chunk, rng):
      method = self.stages[0].method
      return video.to_uint8(method.decode(state, context, chunk, rng))

    return parallel.jit(decode)

  @functools.cached_property
  def _whole(self):
    def whole(state, images, label, rng, num_frames):
      method = self.stages[0].method
      inputs = {'image': video.to_float(images), 'label': label}
      inputs = {k: inputs[k] for k in method.reads if k in inputs}
      return video.to_uint8(method.animate(state, inputs, rng, num_frames))

    return parallel.jit(whole, static_argnums=4)

  @functools.cached_property
  def _sweep(self):
    sweep = self.stages[0].method.sweep_alpha
    return parallel.jit(sweep, static_argnums=(2, 3))

  @functools.cached_property
  def _denoise(self):
    def denoise(state, draft, image, label, positions, rng, strength, steps):
      rng_noise, rng_walk = jax.random.split(rng)
      inputs = {
        'draft': video.to_float(draft), 'image': video.to_float(image),
        'noise': _noise(rng_noise, positions, draft[:, 0].shape, 1),
      } | ({} if label is None else {'label': label})
      method = dataclasses.replace(
        self.method, strength=strength, num_sample_steps=steps
      )
      rng_walk = jax.random.fold_in(rng_walk, positions[0])
      return method.animate(state, inputs, rng_walk, draft.shape[1])

    return parallel.jit(denoise, static_argnames=('strength', 'steps'))

  @functools.cached_property
  def _from_noise(self):
    def from_noise(state, label, numbers, rng, num_frames, steps):
      rng_noise, rng_walk = jax.random.split(rng)
      shape = (num_frames, self.image_size, self.image_size, 3)
      inputs = {'noise': _noise(rng_noise, numbers, shape)} | (
        {} if label is None else {'label': label}
      )
      method = dataclasses.replace(self.method, num_sample_steps=steps)
      rng_walk = jax.random.fold_in(rng_walk, numbers[0])
      return video.to_uint8(
        method.animate(state, inputs, rng_walk, num_frames)
      )

    return parallel.jit(from_noise, static_argnames=('num_frames', 'steps'))


def _noise(rng, numbers, shape, axis=0):
  """Normal noise, for each number its own, stacked along `axis`."""
  draw = lambda n: jax.random.normal(jax.random.fold_in(rng, n), shape)
  return jax.vmap(draw, out_axes=axis)(numbers)
