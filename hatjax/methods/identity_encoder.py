"""A stand-in for VGG-Face: faces told apart, learned from the training data.

A small VGG (`nets.vgg`) whose pooled features of one person are drawn together
and those of others apart: supervised contrastive loss (Khosla et al. 2020,
eq. 2), which needs no list of people, over the frames of a batch. It makes no
video; FEV-GAN takes its net, frozen, where VGG-Face's weights are not at hand.
"""

import dataclasses
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from hatjax import settings
from hatjax import state as state_lib
from hatjax.nets import fev_gan as nets
from hatjax.nets import vgg


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class IdentityEncoder:
  """Hyperparameters and steps of the encoder.

  Its net is `identity_encoder`; the last of `taps` is what it learns by.
  """

  tx: Mapping[str, optax.GradientTransformation]
  image_size: int = 64
  input_size: int = 112
  taps: tuple[str, ...] = ('relu4_2',)
  depths: tuple[int, ...] = (1, 1, 2, 2)
  width: int = 16
  temperature: float = 0.1
  dtype: str = 'float32'
  axis_name: str | None = None
  reads = ()

  def __post_init__(self):
    settings.check_choices(model__dtype=(self.dtype, settings.DTYPES))
    if 'identity_encoder' not in self.tx:
      raise ValueError('optim lacks a block for: identity_encoder.')

  @property
  def encoder(self):
    """The net."""
    return vgg.VGG(
      self.taps, self.depths, self.width, range='unit',
      dtype=jnp.dtype(self.dtype),
    )

  def init(self, rng, batch):
    """State at step 0 from one batch (only its shapes matter)."""
    image = nets.resize(batch['video'][:1, 0], self.input_size)
    params = {'identity_encoder': self.encoder.init(rng, image)['params']}
    return state_lib.create(params, self.tx)

  def embed(self, params, images):
    """Unit vectors float32 [N, D] of faces [N, S, S, 3] in [-1, 1]."""
    x = nets.resize(images, self.input_size)
    x = self.encoder.apply({'params': params}, x)[-1].astype(jnp.float32)
    x = x.mean((1, 2))
    x -= x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)

  def train_step(self, state, batch, rng):
    """One update. batch: video [B, 1 + K, H, W, 3], subject int32 [B]."""
    del rng
    chex.assert_rank(batch['video'], 5)
    frames = batch['video'].shape[1]
    images = rearrange(batch['video'], 'b t h w c -> (b t) h w c')
    subject = jnp.repeat(batch['subject'], frames)

    if self.axis_name:
      subject = self._gather(subject)

    def loss(params):
      vectors = self.embed(params, images)
      if self.axis_name:  # Everybody else is on all devices.
        vectors = self._gather(vectors)
      return contrast(vectors, subject, self.temperature)

    (value, right), grads = jax.value_and_grad(loss, has_aux=True)(
      state.params['identity_encoder']
    )
    grads = state_lib.pmean(grads, self.axis_name)
    state = state.apply_gradients(self.tx, identity_encoder=grads)
    metrics = {'loss/identity': value, 'identity/nearest': right}
    return state, state_lib.pmean(metrics, self.axis_name)

  def _gather(self, x):
    return jax.lax.all_gather(x, self.axis_name, tiled=True)

  def score(self, state, clip, n, label):
    """Mean cosine of a clip's later frames with its first; for validation."""
    del label
    vectors = self.embed(state.params['identity_encoder'], clip)
    known = (jnp.arange(len(clip)) < n) & (jnp.arange(len(clip)) > 0)
    cosines = vectors[1:] @ vectors[0]
    return {'cosine/val': (cosines * known[1:]).sum() / known.sum()}


def contrast(vectors, subject, temperature):
  """Supervised contrastive loss, and how often the nearest is the same person.

  Args:
    vectors: float32 [N, D], of length 1.
    subject: int32 [N].
    temperature: divides the cosines.

  Returns:
    (-mean over same-person pairs i, p of log softmax over all others of i,
    share of vectors whose nearest other one is of the same person).
  """
  cosines = vectors @ vectors.T / temperature
  n = len(subject)
  cosines = jnp.where(jnp.eye(n, dtype=bool), -1e9, cosines)
  same = (subject[:, None] == subject) & ~jnp.eye(n, dtype=bool)
  log_share = jnp.where(same, jax.nn.log_softmax(cosines), 0)
  each = log_share.sum(1) / jnp.maximum(same.sum(1), 1)
  nearest = jnp.take_along_axis(same, cosines.argmax(1)[:, None], 1)
  return -each.mean(), nearest.mean(dtype=jnp.float32)
