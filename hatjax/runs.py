"""A trained run: load its stages, animate faces; the Python API.

    run = hatjax.load('runs/a')
    video = run.animate(image, 'happy')        # uint8 [B, T, H, W, 3]
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from hatjax import data, methods, metrics, parallel, video, workdir

MAX_FRAMES = 32  # a validation clip is thinned out to at most this many
DECODE_FRAMES = 256  # frames decoded per call, over all clips


def make_method(stage, info, image_size, steps_per_epoch=1):
  """The method of a stage, given what the data said (`labels`)."""
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


def load(folder, step=None):
  """Opens a trained run.

  Args:
    folder: its workdir.
    step: which checkpoint; default the latest.

  Returns:
    Run.

  Raises:
    ValueError: no run there, no checkpoint, or one of another config.
  """
  parallel.enable_compilation_cache()
  config = workdir.read_config(folder)
  name = config['stages'][-1]
  stage = config[name]
  method = make_method(stage, config['info'], stage['data']['image_size'])
  disk = workdir.Run(pathlib.Path(folder) / name, read_only=True)
  abstract = jax.eval_shape(
    method.init, jax.random.key(0), example_batch(stage)
  )
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
  )
  state = disk.restore(abstract, step)
  if state is None:
    raise ValueError(
      f'{folder} has no checkpoint yet. Train further: run hatjax.train with '
      'the same config and workdir.'
    )
  return Run(config, method, state)


class Run:
  """A loaded run.

  Attributes:
    config: the dict in its config.json.
    labels: labels it was trained on, () if the method reads none.
    image_size: side of what it makes, pixels.
    crop: 'face' or 'none': how its training records were cropped.
    step: of the checkpoint.
  """

  def __init__(self, config, method, state):
    self.config, self.method, self.state = config, method, state
    self.crop = config['info']['crop']
    self.image_size = method.image_size
    self.step = int(state.step)
    reads_label = 'label' in method.reads
    self.labels = (
      tuple(config['info']['trained_labels']) if reads_label else ()
    )

  def match_label(self, text):
    """The known label that `text` means; ValueError listing the known."""
    return data.match_label(text, self.labels)

  def animate(
    self, images, labels=None, *, num_frames=32, sweep='profile',
    alpha_max=1.0, alpha=None, seed=0,
  ):
    """Expression videos.

    Args:
      images: uint8 [B, S, S, 3], or one [S, S, 3]; faces cropped as in
        training, S = image_size.
      labels: one name, or B names; None for a method without labels.
      num_frames: T ('reference' always makes 20).
      sweep: 'linear' (0 to alpha_max), 'profile' (the onset seen in
        training, times alpha_max) or 'reference' (0, 0.05, ..., 0.95).
      alpha_max: strength of the last frame.
      alpha: float [B, T] intensities instead of a sweep.
      seed: of the noise vector, for methods that have one.

    Returns:
      uint8 [B, T, S, S, 3].

    Raises:
      ValueError: unknown label, sweep or image size.
    """
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    size = (self.image_size, self.image_size, 3)
    if images.dtype != np.uint8 or images.shape[1:] != size:
      raise ValueError(
        f'images must be uint8 [B, {size[0]}, {size[1]}, 3], not '
        f'{images.dtype} {list(images.shape)}.'
      )
    label = self._label_ids(labels, len(images))
    rng = jax.random.key(seed)
    if not hasattr(self.method, 'encode'):
      return np.asarray(self._whole(self.state, images, label, rng, num_frames))
    if alpha is None:
      alpha = self._sweep(self.state, label, num_frames, sweep, alpha_max)
    alpha = jnp.asarray(alpha, jnp.float32)
    context = self._encode(self.state, images, label)
    chunk = max(1, DECODE_FRAMES // len(images))
    parts = []
    for start in range(0, alpha.shape[1], chunk):
      part = alpha[:, start : start + chunk]
      parts.append(self._decode(self.state, context, part, rng))
    return np.concatenate(jax.device_get(parts), 1)

  def neutral_faces(self, split, limit=None, directory=None):
    """First frames of the training records, one per subject of a split.

    Args:
      split: a named split of the records the run was trained on.
      limit: at most this many.
      directory: where the records live; see `data.data_dir`.

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
      return self.method.encode(state, inputs)

    return jax.jit(encode)

  @functools.cached_property
  def _decode(self):
    def decode(state, context, chunk, rng):
      return video.to_uint8(self.method.decode(state, context, chunk, rng))

    return jax.jit(decode)

  @functools.cached_property
  def _whole(self):
    def whole(state, images, label, rng, num_frames):
      inputs = {'image': video.to_float(images), 'label': label}
      inputs = {k: inputs[k] for k in self.method.reads if k in inputs}
      return video.to_uint8(
        self.method.animate(state, inputs, rng, num_frames)
      )

    return jax.jit(whole, static_argnums=4)

  @functools.cached_property
  def _sweep(self):
    return jax.jit(self.method.sweep_alpha, static_argnums=(2, 3))


# -- validation --------------------------------------------------------------


def thin_out(clip, limit=MAX_FRAMES):
  """At most `limit` evenly spaced frames, the first and last among them."""
  if len(clip) <= limit:
    return clip
  return clip[np.linspace(0, len(clip) - 1, limit).round().astype(int)]


def make_scorer(method):
  """A jitted function that scores one clip.

  Args:
    method: see `hatjax.methods`.

  Returns:
    (state, clip uint8 [T, H, W, 3], n, label) -> dict of per-frame PSNR in dB
    [T] and the generated frames uint8 [T, H, W, 3]; frames from n on are
    padding. 'psnr_generated' knows what the method reads and nothing else,
    'psnr_copy' repeats the input, and 'psnr', the score a checkpoint is
    ranked by, has alpha inferred from each real frame where the method can
    (else it is psnr_generated).
  """

  def score(state, clip, n, label):
    real = video.to_float(clip)
    known = {
      'image': real[:1], 'driving': real[None],
      'label': jnp.full((1,), label, jnp.int32),
    }
    inputs = {key: known[key] for key in method.reads if key in known}
    time = jnp.arange(len(clip)) / jnp.maximum(n - 1, 1)
    rng = jax.random.key(0)
    if hasattr(method, 'sweep_alpha'):
      fine = method.sweep_alpha(state, known['label'], 256, 'profile')[0]
      inputs['alpha'] = jnp.interp(time, jnp.linspace(0, 1, 256), fine)[None]
    fake = method.animate(state, inputs, rng, len(clip))[0]
    if 'alpha' not in inputs:  # It made T frames for times 0..1.
      nearest = jnp.round(time * (len(clip) - 1)).astype(jnp.int32)
      fake = fake[jnp.minimum(nearest, len(clip) - 1)]
    out = {
      'psnr_generated': metrics.psnr(fake, real),
      'psnr_copy': metrics.psnr(jnp.broadcast_to(real[:1], real.shape), real),
      'frames': video.to_uint8(fake),
    }
    out['psnr'] = out['psnr_generated']
    if hasattr(method, 'infer'):
      out['alpha'] = method.infer(state, known)[0]
      inputs['alpha'] = out['alpha'][None]
      shown = method.animate(state, inputs, rng, len(clip))[0]
      out['psnr'] = metrics.psnr(shown, real)
    return out

  return jax.jit(score)


def score_clips(scorer, state, clips):
  """Mean scores over all frames but the first, and the frames themselves.

  Args:
    scorer: from `make_scorer`.
    state: TrainState.
    clips: as `Batches.whole_clips` yields them.

  Returns:
    ({name: value}, list of (real, generated)): 'val/psnr' and its kin in dB,
    'val/apex_generated' and 'val/apex_copy' for the last frames, and, where
    alpha is inferred, 'val/alpha_order', the lowest Spearman correlation of
    alpha with the frame index over the clips.
  """
  rows, pairs, orders = [], [], []
  for clip in clips:
    real = thin_out(clip['video'])
    n = len(real)
    padded = np.concatenate([real, real[-1:].repeat(MAX_FRAMES - n, 0)])
    out = jax.device_get(scorer(state, padded, n, clip['label']))
    rows.append({k: v[1:n] for k, v in out.items() if k.startswith('psnr')})
    pairs.append((real, out['frames'][:n]))
    if 'alpha' in out and n > 2:
      orders.append(_spearman(out['alpha'][1:n]))
  if not rows:
    return {}, []
  last = lambda key: float(np.mean([row[key][-1] for row in rows]))
  means = {
    f'val/{k}': float(np.concatenate([r[k] for r in rows]).mean())
    for k in rows[0]
  }
  means |= {
    'val/apex_generated': last('psnr_generated'),
    'val/apex_copy': last('psnr_copy'),
  }
  if orders:
    means['val/alpha_order'] = min(orders)
  return means, pairs


def _spearman(values):
  """Rank correlation with the index (ties in order of appearance)."""
  ranks = np.argsort(np.argsort(values, kind='stable'), kind='stable')
  return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
