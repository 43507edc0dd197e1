"""Face super-resolution: sharpens a generated clip, frame by frame.

Karim and Saleh (iJIM 16(10), 2022), section 3.2 and eq. 7 (the norm is not
given; L1 here). A stage after any other: it learns from real frames that were
made worse (shrunk, enlarged again, compressed as JPEG), or from what the stage
before makes of them.
"""

import dataclasses
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from hatjax import losses, settings, video
from hatjax import state as state_lib
from hatjax.nets import super_resolution as nets

MODES = ('degraded', 'drafts')
# The JPEG standard's tables of luma and chroma at quality 50 (ITU-T T.81, K.1).
LUMA = (
  16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16,
  24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109,
  103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120,
  101, 72, 92, 95, 98, 112, 100, 103, 99,
)
CHROMA = (
  17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56,
  *(99,) * 5, 47, 66, *(99,) * 38,
)
# RGB -> YCbCr (JFIF).
_COLOURS = np.array([
  [0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5],
  [0.5, -0.418688, -0.081312],
])


def jpeg(x, quality):
  """What JPEG leaves of pictures, its chroma not subsampled.

  Args:
    x: [N, H, W, 3] in [-1, 1], sides multiples of 8.
    quality: [N], 1 to 100, as libjpeg counts it.

  Returns:
    [N, H, W, 3].
  """
  n, height, width, _ = x.shape
  scale = jnp.where(quality < 50, 5000 / quality, 200 - 2 * quality)
  table = np.array([LUMA, CHROMA, CHROMA]).reshape(3, 8, 8)
  table = jnp.floor((table * scale[:, None, None, None] + 50) / 100)
  table = jnp.clip(table, 1, 255)[:, None, None]  # [N, 1, 1, 3, 8, 8]
  pixels = jnp.einsum('dc,nhwc->nhwd', jnp.asarray(_COLOURS), 127.5 * x)
  cells = rearrange(pixels, 'n (i a) (j b) c -> n i j c a b', a=8, b=8)
  k = np.arange(8)
  basis = np.cos((2 * k + 1) * k[:, None] * np.pi / 16) / 2
  basis[0] /= np.sqrt(2)
  levels = jnp.einsum('ua,nijcab,vb->nijcuv', basis, cells, basis)
  levels = jnp.round(levels / table) * table
  cells = jnp.einsum('ua,nijcuv,vb->nijcab', basis, levels, basis)
  pixels = rearrange(cells, 'n i j c a b -> n (i a) (j b) c')
  back = jnp.asarray(np.linalg.inv(_COLOURS))
  return jnp.einsum('dc,nhwc->nhwd', back, pixels).clip(-127.5, 127.5) / 127.5


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SuperResolution:
  """Hyperparameters and steps of super-resolution."""

  tx: Mapping[str, optax.GradientTransformation]
  image_size: int = 256
  scale: int = 1
  width: int = 64
  mode: str = 'degraded'
  shrink: int = 4
  jpeg_quality: tuple[int, int] = (40, 90)
  microbatches: int = 1
  dtype: str = 'float32'
  axis_name: str | None = None

  def __post_init__(self):
    settings.check_model(self, mode=MODES)
    if self.scale not in (1, 2):
      raise ValueError(f'model.scale is {self.scale}. Use 1 or 2.')
    smallest = self.scale * 2**nets.LEVELS
    if self.image_size % smallest:
      raise ValueError(
        f'model.image_size is {self.image_size}, the side of the result. Use a '
        f'multiple of {smallest}.'
      )
    low, high = self.jpeg_quality
    if not 1 <= low <= high <= 100 or self.shrink < 1:
      raise ValueError(
        'model.jpeg_quality must be (low, high) within 1..100, model.shrink at '
        'least 1.'
      )
    if 'generator' not in self.tx:
      raise ValueError('optim lacks a block for: generator.')

  @property
  def reads(self):
    """Keys of `inputs` that animate takes."""
    return ('draft',)

  @property
  def needs_draft(self):
    """Whether training reads the videos of the stage before."""
    return self.mode == 'drafts'

  @property
  def input_size(self):
    """Side of the frames that it is given."""
    return self.image_size // self.scale

  @property
  def generator(self):
    """The module."""
    return nets.SuperResolution(
      self.width, self.scale, jnp.dtype(self.dtype)
    )

  def init(self, rng, batch):
    """State at step 0 from one batch (only its shapes matter)."""
    size = self.image_size
    chex.assert_shape(batch['video'], (None, None, size, size, 3))
    image = jnp.zeros((1, self.input_size, self.input_size, 3))
    params = {'generator': self.generator.init(rng, image)['params']}
    return state_lib.create(params, {'generator': self.tx['generator']})

  def degrade(self, clips, rng):
    """Real clips [B, T, H, W, 3] as a poor generator might make them.

    Shrunk by `shrink` and back to the input's size, bicubic, rounded to 8
    bits, then JPEG of a quality drawn for each clip.
    """
    b, t = clips.shape[:2]
    frames = rearrange(clips, 'b t ... -> (b t) ...')
    for side in (self.image_size // self.shrink, self.input_size):
      frames = jax.image.resize(frames, (b * t, side, side, 3), 'cubic')
    frames = video.to_float(video.to_uint8(frames))
    quality = jax.random.uniform(
      rng, (b,), minval=self.jpeg_quality[0], maxval=self.jpeg_quality[1]
    )
    frames = jpeg(frames, jnp.repeat(jnp.round(quality), t))
    return rearrange(frames, '(b t) ... -> b t ...', b=b)

  def train_step(self, state, batch, rng):
    """One step of eq. 7.

    Args:
      state: TrainState.
      batch: video float32 [B, T, H, W, 3] in [-1, 1]; draft [B, T, H / scale,
        W / scale, 3] in mode 'drafts'.
      rng: the key of this step.

    Returns: the new state and a dict of scalar metrics.
    """
    chex.assert_rank(batch['video'], 5)
    parts = {'real': batch['video']}
    parts['poor'] = (
      batch['draft'] if self.needs_draft else self.degrade(parts['real'], rng)
    )

    def learn(part):
      real, poor = (
        rearrange(part[k], 'b t ... -> (b t) ...') for k in ('real', 'poor')
      )
      plain = losses.l1(nets.enlarge(poor, self.scale), real).mean()

      def loss(params):
        out = self.generator.apply({'params': params}, poor)
        return losses.l1(out, real).mean()

      value, grads = jax.value_and_grad(loss)(state.params['generator'])
      return (grads, {'loss/l1': value, 'loss/l1_bicubic': plain}), ()

    if self.microbatches > 1:
      parts = state_lib.split_batch(parts, self.microbatches)
      (grads, metrics), _ = state_lib.accumulate(learn, parts)
    else:
      (grads, metrics), _ = learn(parts)
    grads, metrics = state_lib.pmean((grads, metrics), self.axis_name)
    return state.apply_gradients(self.tx, generator=grads), metrics

  def sharpen(self, state, frames):
    """Frames [N, h, w, 3] -> [N, scale h, scale w, 3], in [-1, 1]."""
    params = {'params': state.inference_params('generator')}
    return jnp.clip(self.generator.apply(params, frames), -1, 1)

  def animate(self, state, inputs, rng, num_frames):
    """inputs['draft'] [B, T, h, w, 3], sharpened: [B, T, H, W, 3]."""
    del rng, num_frames
    draft = inputs['draft']
    frames = rearrange(draft, 'b t ... -> t b ...')
    frames = jax.lax.map(lambda x: self.sharpen(state, x), frames)
    return rearrange(frames, 't b ... -> b t ...')
