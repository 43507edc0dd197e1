"""Who is it, and which expression: a judge of generated videos.

Not a paper. One small net of single frames with two heads: an identity code,
learned by telling the people of the training split apart from their angles to
one proxy each (NormFace, Wang et al. 2017), which serves ACD; and the
expression, learned from the second halves of clips that end at their apex, with
a class of its own for neutral frames, which serves 'expression recognised'. It
makes no videos.
"""

import dataclasses
from collections.abc import Mapping

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hatjax import settings
from hatjax import state as state_lib
from hatjax.nets import layers


class Judge(nn.Module):
  """Halvings of a picture down to 4x4, then two heads.

  Attributes:
    width: channels after the first halving; they double up to 8 times that.
    code_dim: D, length of the identity code.
    num_classes: expressions, neutral among them.
    num_people: proxies of the identity head.
    dtype: compute type.
  """

  width: int
  code_dim: int
  num_classes: int
  num_people: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """float [B, H, W, 3] in [-1, 1] -> (code [B, D] of length 1, expression
    logits [B, classes], cosines with the proxies [B, people])."""
    init = nn.initializers.he_normal()
    x = x.astype(self.dtype)
    for i in range(layers.num_halvings(x.shape[1]) - 2):
      features = self.width * min(2**i, 8)
      x = layers.Conv(
        features, stride=2, kernel_init=init, dtype=self.dtype,
        name=f'halve_{i}',
      )(x)
      x = nn.relu(nn.GroupNorm(4, dtype=self.dtype, name=f'norm_{i}')(x))
    x = x.reshape(len(x), -1).astype(jnp.float32)
    code = _unit(nn.Dense(self.code_dim, name='identity')(x))
    proxies = self.param(
      'proxies', nn.initializers.normal(1.0), (self.num_people, self.code_dim)
    )
    hidden = nn.relu(nn.Dense(self.code_dim, name='hidden')(x))
    logits = nn.Dense(self.num_classes, name='expression')(hidden)
    return code, logits, code @ _unit(proxies).T


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FaceClassifier:
  """Hyperparameters and steps of the judge.

  People are numbered within the records; beyond num_people they share proxies.
  """

  tx: Mapping[str, optax.GradientTransformation]
  image_size: int = 64
  num_labels: int = 0
  width: int = 16
  code_dim: int = 128
  num_people: int = 512
  sharpness: float = 16.0
  lambda_identity: float = 1.0
  microbatches: int = 1
  dtype: str = 'float32'
  axis_name: str | None = None

  reads = ('image',)

  def __post_init__(self):
    settings.check_model(self)
    if 'judge' not in self.tx:
      raise ValueError('optim lacks a block for: judge.')

  @property
  def judge(self):
    """The network."""
    return Judge(
      width=self.width, code_dim=self.code_dim,
      num_classes=self.num_labels + 1, num_people=self.num_people,
      dtype=jnp.dtype(self.dtype),
    )

  def init(self, rng, batch):
    """State at step 0 from one batch (only its shapes matter)."""
    size = self.image_size
    chex.assert_shape(batch['video'], (None, None, size, size, 3))
    params = self.judge.init(rng, batch['video'][:1, 0])['params']
    return state_lib.create({'judge': params}, {'judge': self.tx['judge']})

  def train_step(self, state, batch, rng):
    """One update.

    Args:
      state: TrainState.
      batch: video float32 [B, 1 + K, H, W, 3] in [-1, 1], the neutral frame
        first and the apex last; time [B, 1 + K]; label, subject int32 [B].
      rng: not used.

    Returns:
      The new state and a dict of scalar metrics.
    """
    del rng
    chex.assert_rank(batch['video'], 5)
    read = {k: batch[k] for k in ('video', 'time', 'label', 'subject')}
    grad = lambda part: (
      jax.grad(self.judge_loss, has_aux=True)(state.params['judge'], part), ()
    )
    if self.microbatches == 1:
      (grads, metrics), _ = grad(read)
    else:
      parts = state_lib.split_batch(read, self.microbatches)
      (grads, metrics), _ = state_lib.accumulate(grad, parts)
    grads = state_lib.pmean(grads, self.axis_name)
    state = state.apply_gradients(self.tx, judge=grads)
    return state, state_lib.pmean(metrics, self.axis_name)

  def judge_loss(self, params, batch):
    """Cross-entropy of expression and identity.

    The first frame counts as neutral, a later one as its clip's expression with
    a weight that rises from 0 in the middle of the clip to 1 at its end.
    """
    video, label = batch['video'], batch['label']
    b, t = video.shape[:2]
    frames = video.reshape(b * t, *video.shape[2:])
    _, logits, cosines = self.judge.apply({'params': params}, frames)
    logits = logits.reshape(b, t, -1)
    first = jnp.arange(t) == 0
    target = jnp.where(first, self.num_labels, label[:, None])
    weight = jnp.clip(2 * batch['time'] - 1, 0, 1)
    weight = jnp.where(first, 0.5, weight)
    # Products with ones and zeros: a pick's gradient would be a scatter.
    entropy = lambda logits, label: optax.softmax_cross_entropy(
      logits, jax.nn.one_hot(label, logits.shape[-1])
    )
    expression = (weight * entropy(logits, target)).sum(1) / weight.sum(1)
    expression = expression.mean()
    person = jnp.repeat(batch['subject'] % self.num_people, t)
    identity = entropy(self.sharpness * cosines, person).mean()
    loss = expression + self.lambda_identity * identity
    return loss, {
      'loss/judge': loss, 'loss/expression': expression,
      'loss/identity': identity,
      'accuracy/train': (logits.argmax(-1) == target)[:, -1].mean(),
    }

  def score(self, state, clip, n, label):
    """{'accuracy/val': whether frame n - 1 of [T, H, W, 3] is recognised}."""
    logits = self.classify(state, clip[n - 1][None])
    return {'accuracy/val': (logits[0].argmax() == label).astype(jnp.float32)}

  def classify(self, state, frames):
    """[B, H, W, 3] in [-1, 1] -> logits [B, labels + 1], neutral last."""
    return self._apply(state, frames)[1]

  def embed(self, state, frames):
    """[B, H, W, 3] in [-1, 1] -> identity codes [B, D] of length 1."""
    return self._apply(state, frames)[0]

  def _apply(self, state, frames):
    params = {'params': state.inference_params('judge')}
    return self.judge.apply(params, frames)
