"""HAT-cGAN: one face becomes an expression video.

Hung, Duy, Huy, "Creating a Video from Facial Image Using Conditional
Generative Adversarial Network"; the GAN half of HAT-cGAN-DIFF; after AffineGAN
(Shen et al., ACM MM 2019). The code of a face at intensity alpha is
z_l = w_l(alpha) + alpha r_l: the base code, moved by predicted affine maps,
plus alpha times the code of the auxiliary encoder. Alpha is not annotated: it
is the projection of a frame's shift on that direction.
"""

import dataclasses
import functools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from hatjax import intensity, lips, losses, optim, settings
from hatjax import metrics as metrics_lib
from hatjax import state as state_lib
from hatjax.nets import hat_cgan as nets


def _fold(x):
  return rearrange(x, 'b t ... -> (b t) ...')


def _unfold(x, batch):
  return rearrange(x, '(b t) ... -> b t ...', b=batch)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HatCGAN:
  """Hyperparameters and steps of HAT-cGAN.

  Weights of the loss terms are lambda_*; a weight of 0 skips the work.
  """

  tx: Mapping[str, optax.GradientTransformation]
  image_size: int = 256
  num_labels: int = 0
  modulate: bool = False
  net: str = 'unet_256'
  width: int = 64
  discriminator_width: int = 64
  discriminator_layers: int = 3
  head: str = 'direct'
  affine: str = 'both'
  num_parts: int = 4
  warp_sizes: tuple[int, int] = (8, 64)
  embedding_dim: int = 64
  noise_dim: int = 0
  dropout: float = 0.5
  feature_noise: float = 0.01
  gan_loss: str = 'bce'
  alpha_rule: str = 'reference'
  alpha_clip: tuple[float, float] | None = None
  alpha_noise: bool = True
  training_alpha: str = 'inferred'
  lambda_gan: float = 1.0
  lambda_patch: float = 1.0
  lambda_alpha: float = 100.0
  lambda_l1: float = 10.0
  lambda_lips: float = 0.0
  lambda_recon: float = 10.0
  lambda_code: float = 0.0
  adversarial_warmup: int = 0
  patch_crop: int = 0
  generator_steps: int = 1
  discriminator_steps: int = 1
  ema_decay: float = 0.0
  remat: bool = False
  microbatches: int = 1
  deterministic: bool = False
  dtype: str = 'float32'
  axis_name: str | None = None

  def __post_init__(self):
    settings.check_model(
      self, net=nets.NETS, head=nets.HEADS, affine=nets.AFFINES,
      gan_loss=losses.GAN_LOSSES, alpha_rule=intensity.RULES,
      training_alpha=intensity.SOURCES,
    )
    nets.check_size(self.net, self.image_size)
    if self.patch_crop > self.image_size:
      raise ValueError('model.patch_crop is larger than model.image_size.')
    missing = {'generator', *self._discriminators} - set(self.tx)
    if missing:
      names = ', '.join(sorted(missing))
      raise ValueError(f'optim lacks a block for: {names}.')

  @property
  def reads(self):
    """Keys of `inputs` that animate takes ('alpha' may be added)."""
    return ('image', 'label') if self.num_labels else ('image',)

  @property
  def _discriminators(self):
    weights = {
      'discriminator': self.lambda_gan,
      'patch_discriminator': self.lambda_patch,
      'alpha_discriminator': self.lambda_alpha,
    }
    return tuple(name for name, weight in weights.items() if weight)

  @property
  def generator(self):
    """The generator module."""
    return nets.Generator(
      net=self.net, width=self.width, head=self.head, affine=self.affine,
      num_parts=self.num_parts, num_labels=self.num_labels,
      modulate=self.modulate,
      embedding_dim=self.embedding_dim, noise_dim=self.noise_dim,
      dropout=self.dropout, warp_sizes=self.warp_sizes, remat=self.remat,
      dtype=jnp.dtype(self.dtype),
      warp_form='matrix' if self.deterministic else 'auto',
    )

  @property
  def discriminator(self):
    """The PatchGAN, also used (with its own weights) on the lips."""
    return nets.PatchDiscriminator(
      width=self.discriminator_width, num_layers=self.discriminator_layers,
      num_labels=self.num_labels, dtype=jnp.dtype(self.dtype),
    )

  def init(self, rng, batch):
    """State at step 0 from one batch (only its shapes matter)."""
    video, label = batch['video'], batch['label']
    chex.assert_shape(
      video, (None, None, self.image_size, self.image_size, 3)
    )
    rng_g, rng_d, rng_p, rng_a = jax.random.split(rng, 4)
    image, label = video[:1, 0], label[:1]
    frames = video.shape[1] - 1
    params = {
      'generator': self.generator.init(
        rng_g, image, label, jnp.zeros((1, 1))
      )['params']
    }
    for name, key in (('discriminator', rng_d), ('patch_discriminator', rng_p)):
      if name in self._discriminators:
        params[name] = self.discriminator.init(key, image, image, label)[
          'params'
        ]
    if 'alpha_discriminator' in self._discriminators:
      params['alpha_discriminator'] = nets.AlphaDiscriminator().init(
        rng_a, jnp.zeros((1, frames))
      )['params']
    profile = {'profile': intensity.empty_profile(self.num_labels)}
    ema = ('generator',) if self.ema_decay else ()
    tx = {name: self.tx[name] for name in params}
    return state_lib.create(params, tx, profile, ema)

  # -- training ------------------------------------------------------------

  def train_step(self, state, batch, rng):
    """Discriminators first, then the generator through the updated ones.

    One forward pass of the generator serves both (jax.vjp).

    Args:
      state: TrainState.
      batch: video float32 [B, 1 + K, H, W, 3] in [-1, 1], neutral first; time
        [B, 1 + K]; lip_mask [B, 1 + K, H, W, 1] in {0, 1}; label int32 [B].
      rng: the key of this step.

    Returns: the new state and a dict of scalar metrics.
    """
    chex.assert_rank(batch['video'], 5)
    metrics, (b, frames) = {}, batch['video'].shape[:2]
    turn = self._turn if self.microbatches == 1 else self._turn_in_parts
    for i in range(self.generator_steps):
      rng, rng_forward, rng_real = jax.random.split(rng, 3)
      real_alpha = jax.random.uniform(rng_real, (b, frames - 1))
      judgings = 0 if i else self.discriminator_steps
      state, alpha, turn_metrics = turn(
        state, batch, real_alpha, rng_forward, judgings
      )
      metrics |= turn_metrics
    state = self._update_averages(state, alpha, batch)
    return state, state_lib.pmean(metrics, self.axis_name)

  def _turn(self, state, batch, real_alpha, rng, judgings):
    """`judgings` updates of the discriminators, one of the generator.

    Returns:
      The state, alpha [B, K] as the generator was given it, the metrics.
    """
    forward = lambda params: self._forward(params, batch, rng)
    out, pull = jax.vjp(forward, state.params['generator'])
    metrics = {}
    for _ in range(judgings):
      grads, metrics = self._judge(
        state.params, losses.stop(out), batch, real_alpha
      )
      state = self._update(state, grads)
    grads, learned = self._learn(state, batch, out, pull)
    state = self._update(state, grads)
    return state, out['shown'], metrics | learned

  def _turn_in_parts(self, state, batch, real_alpha, rng, judgings):
    """As `_turn`, one microbatch at a time.

    All of them meet the discriminators before any meets the generator, whose
    forward pass is therefore run twice, with the same keys.
    """
    parts = {'batch': batch, 'real_alpha': real_alpha}
    parts = state_lib.split_batch(parts, self.microbatches)
    parts['rng'] = jax.random.split(rng, self.microbatches)
    params, metrics = state.params['generator'], {}

    def generate(part):
      out = self._forward(params, part['batch'], part['rng'])
      return out['alpha'].mean(), {k: out[k] for k in ('fake', 'alpha')}

    judge = lambda judges, part: (
      self._judge(judges, part['out'], part['batch'], part['real_alpha']), ()
    )
    if judgings:
      parts['out'] = state_lib.accumulate(generate, parts)[1]
    for _ in range(judgings):
      (grads, metrics), _ = state_lib.accumulate(
        functools.partial(judge, state.params), parts
      )
      state = self._update(state, grads)

    def learn(part):
      forward = lambda p: self._forward(p, part['batch'], part['rng'])
      out, pull = jax.vjp(forward, params)
      return self._learn(state, part['batch'], out, pull), out['shown']

    (grads, learned), alpha = state_lib.accumulate(learn, parts)
    state = self._update(state, grads)
    return state, state_lib.join_batch(alpha), metrics | learned

  def _forward(self, params, batch, rng):
    """All generator passes of a step: each face encoded once, frames batched.

    Returns:
      dict: fake, recon [B, K, H, W, 3]; alpha [B, K], inferred; shown
      [B, K], what the fakes were made with; code_error [B].
    """
    generator = self.generator
    apply = lambda method, *args, key=None, **kwargs: generator.apply(
      {'params': params}, *args, method=method,
      rngs=None if key is None else {'dropout': key}, **kwargs
    )
    video = batch['video']
    image, frames = video[:, 0], video[:, 1:]
    b = image.shape[0]
    keys = jax.random.split(rng, 6)
    codes = apply('encode_base', _fold(video), key=keys[0], train=True)
    codes = [_unfold(c, b) for c in codes]
    motion = apply(
      'encode_motion', image, batch['label'], key=keys[1], train=True
    )
    neutral = [c[:, 0] for c in codes]
    later = [_fold(c[:, 1:]) for c in codes]

    codes_1d, residual_1d = self._bottlenecks(
      codes[-1], motion['residual'][-1], keys[2]
    )
    alpha = self._alpha(codes_1d, residual_1d)
    progress = intensity.visible_progress(video)
    shown = progress if self.training_alpha == 'visible' else alpha
    still = jax.lax.stop_gradient(shown)  # Image losses do not reach alpha.
    noise = jax.random.normal(keys[3], (b, self.noise_dim or 1))
    codes = apply('transform', neutral, motion, still, noise)
    moved = apply('moved_image', image, motion, still)
    style = apply('style', motion, still)
    passes = {'fake': (codes, moved, style)}
    if self.lambda_recon:  # Later faces from their own codes, at alpha = 0.
      own = None if moved is None else jnp.repeat(image, frames.shape[1], 0)
      passes['recon'] = later, own, jax.tree.map(jnp.zeros_like, style)
    def decode(rng, codes, moved, style):
      noise, drop = jax.random.split(rng)
      return _unfold(apply('decode', self._jitter(codes, noise), moved,
                           key=drop, train=True, style=style), b)
    if self.microbatches > 1:  # Apart: the judges' pass drops `recon`.
      made = [decode(key, *p) for key, p in zip(keys[4:], passes.values())]
    else:
      beside = lambda *x: _fold(jnp.concatenate([_unfold(y, b) for y in x], 1))
      made = decode(keys[4], *jax.tree.map(beside, *passes.values()))
      made = jnp.split(made, len(passes), 1)
    out = dict(zip(passes, made), alpha=alpha, shown=still)
    if self.lambda_code:
      out['code_error'] = intensity.code_error(
        codes_1d, residual_1d, progress
      )
    return out

  def _jitter(self, codes, rng):
    """Adds N(0, feature_noise) to every level of a U-Net code."""
    noisy = self.feature_noise and self.net.startswith('unet')
    return nets.add_noise(codes, self.feature_noise, rng) if noisy else codes

  def _bottlenecks(self, codes, residual, rng=None):
    """[B, 1 + K, h, w, C] and [B, h, w, C] -> float32 [.., D], noised."""
    if rng is not None and self.alpha_noise:
      rng_base, rng_residual = jax.random.split(rng)
      (codes,) = self._jitter([codes], rng_base)
      (residual,) = self._jitter([residual], rng_residual)
    codes = rearrange(codes, 'b t h w c -> b t (h w c)')
    residual = rearrange(residual, 'b h w c -> b (h w c)')
    return codes.astype(jnp.float32), residual.astype(jnp.float32)

  def _alpha(self, codes, residual):
    """Clipped intensities [B, K] from [B, 1 + K, D] and [B, D]."""
    alpha = intensity.infer_alpha(
      codes[:, 1:], codes[:, 0], residual, self.alpha_rule
    )
    if self.alpha_clip is not None:
      alpha = jnp.clip(alpha, *self.alpha_clip)
    return alpha

  def _scores(self, params, name, batch, frames):
    """Logits of a discriminator for frames [B, K or 2 K, H, W, 3]."""
    if name == 'patch_discriminator':
      images, frames = lips.pictures(
        batch['video'][:, 0], frames, batch['lip_mask'], self.patch_crop
      )
    else:
      images = jnp.repeat(batch['video'][:, :1], frames.shape[1], 1)
    label = jnp.repeat(batch['label'], frames.shape[1])
    return self.discriminator.apply(
      {'params': params}, _fold(images), _fold(frames), label
    )

  def _gan(self, logits, target, weight=None):
    """Mean GAN loss over samples, weighted per sample."""
    loss = losses.GAN_LOSSES[self.gan_loss](logits, target)
    return loss.mean() if weight is None else (loss * weight).mean()

  def discriminator_loss(self, params, name, out, batch, real_alpha):
    """0.5 (gan(D(fake), 0) + gan(D(real), 1)) of one discriminator."""
    scale, weight = 1.0, None
    if name == 'alpha_discriminator':
      net = nets.AlphaDiscriminator()
      fake = net.apply({'params': params}, out['alpha'])
      real = net.apply({'params': params}, real_alpha)
      scale = self.lambda_alpha
    else:
      both = jnp.concatenate([out['fake'], batch['video'][:, 1:]], 1)
      scores = _unfold(self._scores(params, name, batch, both), len(both))
      fake, real = map(_fold, jnp.split(scores, 2, 1))
      if name == 'patch_discriminator':
        weight = lips.known(batch['lip_mask'])
    fake, real = self._gan(fake, 0.0, weight), self._gan(real, 1.0, weight)
    return scale * 0.5 * (fake + real), {
      f'loss/{name}_fake': fake, f'loss/{name}_real': real,
    }

  def _judge(self, params, out, batch, real_alpha):
    """(gradients by net name, metrics) of the discriminators."""
    grads, metrics = {}, {}
    for name in self._discriminators:
      grad = jax.grad(self.discriminator_loss, has_aux=True)
      grads[name], m = grad(params[name], name, out, batch, real_alpha)
      metrics |= m
    return grads, metrics

  def _learn(self, state, batch, out, pull):
    """(gradients by net name, metrics) of the generator; see `_forward`."""
    loss = lambda out: self.generator_loss(out, state, batch)
    (_, metrics), grad_out = jax.value_and_grad(loss, has_aux=True)(out)
    return {'generator': pull(grad_out)[0]}, metrics

  def _update(self, state, grads):
    grads = state_lib.pmean(grads, self.axis_name)
    return state.apply_gradients(self.tx, **grads)

  def generator_loss(self, out, state, batch):
    """Adversarial, L1, base reconstruction and alpha terms (spec eq. L_G).

    `out` is what `_forward` returns; the discriminators of `state` judge it.

    Returns:
      The loss and its parts.
    """
    real = batch['video'][:, 1:]
    k = real.shape[1]
    ramp = 1.0
    if self.adversarial_warmup:
      ramp = jnp.minimum(1.0, (state.step + 1) / self.adversarial_warmup)
    metrics, loss = {}, 0.0
    for term, weight, error in (
      ('l1', self.lambda_l1, lambda: losses.l1(out['fake'], real)),
      ('lips', self.lambda_lips,
       lambda: lips.l1(out['fake'], real, batch['lip_mask'])),
      ('recon', self.lambda_recon, lambda: losses.l1(out['recon'], real)),
      ('code', self.lambda_code, lambda: out['code_error']),
    ):
      if weight:
        metrics[f'loss/{term}'] = error().mean()
        loss += weight * metrics[f'loss/{term}']
    for name, term, weight in (
      ('discriminator', 'gan', self.lambda_gan),
      ('patch_discriminator', 'patch', self.lambda_patch),
    ):
      if weight:
        scores = self._scores(state.params[name], name, batch, out['fake'])
        known = lips.known(batch['lip_mask']) if term == 'patch' else None
        metrics[f'loss/{term}'] = self._gan(scores, 1.0, known)
        loss += ramp * weight * metrics[f'loss/{term}']
    if self.lambda_alpha:
      scores = nets.AlphaDiscriminator().apply(
        {'params': state.params['alpha_discriminator']}, out['alpha']
      )
      metrics['loss/alpha'] = self._gan(scores, 1.0)
      loss += ramp * self.lambda_alpha / k * metrics['loss/alpha']
    metrics['loss/generator'] = loss
    metrics['psnr/train'] = metrics_lib.psnr(
      _fold(out['fake']), _fold(real)
    ).mean()
    metrics['alpha/mean'] = out['alpha'].mean()
    return loss, metrics

  def _update_averages(self, state, alpha, batch):
    """Averaged generator, and the mean alpha at each time of each label."""
    if self.ema_decay:
      average = optim.update_ema(
        state.ema['generator'], state.params['generator'], self.ema_decay,
        state.step,
      )
      state = state.replace(ema={'generator': average})
    terms = intensity.profile_terms(
      alpha, batch['time'][:, 1:], batch['label'], self.num_labels
    )
    profile = intensity.update_profile(
      state.model_state['profile'], state_lib.pmean(terms, self.axis_name)
    )
    return state.replace(model_state={**state.model_state, 'profile': profile})

  # -- generation ----------------------------------------------------------

  def sweep_alpha(
    self, state, label, num_frames, sweep='linear', alpha_max=1.0
  ):
    """Intensities [B, T] for int32 labels [B]; see `intensity.sweep`."""
    row = label if self.num_labels else jnp.zeros_like(label)
    return intensity.sweep(
      sweep, num_frames, alpha_max, state.model_state['profile'], row
    )

  def encode(self, state, inputs, rng=None):
    """Base code and motion of each face, once. inputs: image [B, H, W, 3]."""
    del rng
    params = {'params': state.inference_params('generator')}
    image, apply = inputs['image'], self.generator.apply
    label = inputs.get('label', jnp.zeros(image.shape[0], jnp.int32))
    return {
      'image': image, 'base': apply(params, image, method='encode_base'),
      'motion': apply(params, image, label, method='encode_motion'),
    }

  def decode(self, state, context, chunk, rng=None):
    """Frames at the intensities `chunk` float32 [B, T]: [B, T, H, W, 3]."""
    params = {'params': state.inference_params('generator')}
    apply = self.generator.apply
    noise = None
    if self.noise_dim:
      rng = jax.random.key(0) if rng is None else rng
      noise = jax.random.normal(rng, (chunk.shape[0], self.noise_dim))
    base, motion = context['base'], context['motion']
    codes = apply(params, base, motion, chunk, noise, method='transform')
    moved = apply(
      params, context['image'], motion, chunk, method='moved_image'
    )
    style = apply(params, motion, chunk, method='style')
    frames = apply(params, codes, moved, style=style, method='decode')
    return jnp.clip(_unfold(frames, chunk.shape[0]), -1, 1)

  def animate(self, state, inputs, rng, num_frames):
    """[B, T, H, W, 3] in [-1, 1] from image, label and (optional) alpha.

    Without inputs['alpha'] [B, T] the sweep is linear from 0 to 1.
    """
    image = inputs['image']
    chex.assert_shape(image, (None, self.image_size, self.image_size, 3))
    label = inputs.get('label', jnp.zeros(image.shape[0], jnp.int32))
    alpha = inputs.get('alpha')
    if alpha is None:
      alpha = self.sweep_alpha(state, label, num_frames)
    return self.decode(state, self.encode(state, inputs), alpha, rng)

  def infer(self, state, inputs):
    """Alpha [B, T] of frames inputs['driving'] [B, T, H, W, 3], noise-free."""
    params = {'params': state.inference_params('generator')}
    video = jnp.concatenate([inputs['image'][:, None], inputs['driving']], 1)
    codes = self.generator.apply(params, _fold(video), method='encode_base')
    label = inputs.get('label', jnp.zeros(video.shape[0], jnp.int32))
    motion = self.generator.apply(
      params, inputs['image'], label, method='encode_motion'
    )
    bottleneck = _unfold(codes[-1], video.shape[0])
    return self._alpha(*self._bottlenecks(bottleneck, motion['residual'][-1]))
