"""The methods: {name: class}. A method is a frozen set of hyperparameters
with pure functions `init`, `train_step` and `animate`."""

import dataclasses
import inspect
from typing import Protocol

import jax

from hatjax import optim
from hatjax.methods import (
  face_classifier,
  fev_gan,
  hat_cgan,
  identity_encoder,
  motion_transfer,
  super_resolution,
  video_diffusion,
)

METHODS = {
  'face_classifier': face_classifier.FaceClassifier,
  'fev_gan': fev_gan.FEVGAN,
  'hat_cgan': hat_cgan.HatCGAN,
  'identity_encoder': identity_encoder.IdentityEncoder,
  'motion_transfer': motion_transfer.MotionTransfer,
  'super_resolution': super_resolution.SuperResolution,
  'video_diffusion': video_diffusion.VideoDiffusion,
}

# What a profile sets in the model block, where the method has it.
PROFILES = {'': {}, '4gb': {'dtype': 'bfloat16', 'remat': True}}


class Method(Protocol):
  """What the commands ask of a method.

  One whose `train_step` reads batch['draft'], the video of the stage before,
  says so with a property `needs_draft`; one with nets that are trained
  elsewhere with `pretrained`, {net: file or stage it comes from}; one whose
  results need a word with `notes`, a dict; one that makes its videos faster by
  other options of the compiler with `video_options`, {platform: {name:
  value}}. One that makes no videos has,
  instead of `animate`, `score(state, clip, n, label)`: {name: scalar} of one
  clip float [T, H, W, 3], frames from n on being padding, for validation.
  """

  reads: tuple[str, ...]

  def init(self, rng, batch):
    """TrainState at step 0 from a batch; runs under `jax.eval_shape`."""

  def train_step(self, state, batch, rng):
    """(new state, {name: scalar}); pure."""

  def animate(self, state, inputs, rng, num_frames):
    """[B, T, H, W, C] in [-1, 1]; may be split into `encode`, `decode`."""


def makes_video(name):
  """Whether there is a method of that name that has `animate`."""
  return hasattr(METHODS.get(name), 'animate')


def make(stage, steps_per_epoch=1, **model):
  """Builds the method of a stage from its config blocks.

  Args:
    stage: mapping with `method`, `model` (keyword arguments of the class),
      `optim` (net name -> keyword arguments of `optim.make_tx`) and, for decays
      as long as the training, `train`.
    steps_per_epoch: for schedules that count in epochs.
    **model: model settings known from the data, such as num_labels; those of
      the config win, unless they are -1.

  Raises:
    ValueError: unknown method or setting, by its full name.
  """
  name = stage['method']
  if name not in METHODS:
    raise ValueError(
      f'Unknown method {name!r}. Choose one of: {", ".join(sorted(METHODS))}.'
    )
  cls = METHODS[name]
  fields = {f.name for f in dataclasses.fields(cls)}
  settings = {k: v for k, v in model.items() if k in fields}
  settings |= {
    # -1 stands for what the data say; a config cannot hold None and a number.
    k: _tuples(v) for k, v in dict(stage['model']).items()
    if not (k in settings and v == -1)
  }
  unknown = sorted(set(settings) - fields)
  if unknown:
    known = ', '.join(sorted(fields - {'tx', 'axis_name'}))
    raise ValueError(
      f'Unknown setting model.{unknown[0]}. {name} has: {known}.'
    )
  tx, train = {}, dict(stage.get('train', {}))
  lengths = dict(
    steps_per_epoch=steps_per_epoch, num_steps=train.get('num_steps', 0)
  )
  for net, block in dict(stage['optim']).items():
    known = inspect.signature(optim.make_tx).parameters
    for key in block:
      if key not in known:
        raise ValueError(
          f'Unknown setting optim.{net}.{key}. It has: {", ".join(known)}.'
        )
    tx[net] = optim.make_tx(**{**lengths, **dict(block)})
  return cls(tx=tx, **settings)


def settle(config, stage, num_devices=None):
  """A stage with what the config's profile and determinism mean for it.

  Args:
    config: mapping; of it `profile` ('4gb': bfloat16, recomputation, and one
      clip at a time where its norms allow) and `deterministic`.
    stage: one of its stages.
    num_devices: which share a batch; default all.

  Raises:
    ValueError: unknown profile.
  """
  profile = config.get('profile', '')
  if profile not in PROFILES:
    known = ', '.join(filter(None, PROFILES))
    raise ValueError(
      f"config.profile is {profile!r}. Choose one of: {known}, or '' for none."
    )
  changes = dict(PROFILES[profile])
  cls, model = METHODS.get(stage['method']), dict(stage['model'])
  whole = model.get('norm') in getattr(cls, 'whole_norms', ())
  if profile and not whole and model.get('microbatches', 1) == 1:
    share = stage['data']['batch_size'] // (num_devices or jax.device_count())
    changes['microbatches'] = max(1, share)
  if config.get('deterministic'):
    changes['deterministic'] = True
  fields = {f.name for f in dataclasses.fields(cls)} if cls else set()
  changes = {k: v for k, v in changes.items() if k in fields}
  return {**stage, 'model': {**stage['model'], **changes}}


def _tuples(value):
  """Sequences are tuples, also after a trip through json."""
  many = isinstance(value, list | tuple)
  return tuple(map(_tuples, value)) if many else value
