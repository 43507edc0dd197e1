"""FEV-GAN: a neutral face and a label -> all frames of a video at once.

Bouzid, Ballihi, "Facial expression video generation based-on spatio-temporal
convolutional GAN: FEV-GAN". A frozen face-recognition net E_id and a trained
encoder E_s see the face; a spatio-temporal decoder makes the video; one
discriminator judges video and label. Where the paper contradicts itself its
equations 1, 2, 4 and 5 are followed, with the usual terms of a conditional GAN
(eq. 3 and Algorithm 1 misprint them) and the input face in L_id.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from hatjax import lips, losses, optim, settings, warp
from hatjax import metrics as metrics_lib
from hatjax import state as state_lib
from hatjax.nets import fev_gan as nets
from hatjax.nets import vgg

# Where E_id's weights come from: the released VGG-Face; a net trained on the
# training subjects (`identity_encoder`); nowhere, an ablation.
SOURCES = ('vgg_face', 'trained', 'random')


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FEVGAN:
  """Hyperparameters and steps of FEV-GAN.

  A batch holds num_frames frames evenly spaced in time, the input face first.
  Weights of the loss terms are lambda_*; a weight of 0 skips the work.
  """

  tx: Mapping[str, optax.GradientTransformation]
  image_size: int = 64
  num_labels: int = 6
  num_frames: int = 32
  use_identity: bool = True
  use_spatial: bool = True
  eid: str = 'vgg_face'
  eid_size: int = 224
  eid_taps: tuple[str, ...] = ('relu5_3',)
  eid_depths: tuple[int, ...] = vgg.D
  eid_width: int = 64
  eid_dropout: float = 0.0
  es_width: int = 128
  dec_arch: str = 'down4'
  dec_width: int = 128
  dec_size: int = 0
  head: str = 'direct'
  flow_sizes: tuple[int, ...] = ()
  painter_width: int = 0
  norm: str = 'batch'
  label_everywhere: bool = False
  hold_ends: bool = False
  init_weights: str = 'normal'
  discriminator_width: int = 64
  discriminator_size: int = 0
  discriminator_lips: bool = False
  label_inject: str = 'first'
  n_id_frames: int = 4
  lambda_gan: float = 1.0
  lambda_rec: float = 100.0
  lambda_lips: float = 0.0
  lambda_id: float = 1.0
  ema_decay: float = 0.0
  microbatches: int = 1
  remat: bool = False
  dtype: str = 'float32'
  axis_name: str | None = None
  reads = ('image', 'label')
  whole_norms = ('batch',)  # whose batch cannot be computed in parts

  def __post_init__(self):
    settings.check_shares(model__eid_dropout=self.eid_dropout)
    settings.check_model(
      self, eid=SOURCES, dec_arch=nets.DECODERS, head=nets.HEADS,
      norm=nets.NORMS, init_weights=nets.INITS, label_inject=nets.INJECTIONS,
    )
    if self.microbatches > 1 and self.norm in self.whole_norms:
      raise ValueError(
        f'model.microbatches is {self.microbatches}, but model.norm='
        f'{self.norm} normalizes over the whole batch. Use 1, or '
        'model.norm=group.'
      )
    if not (self.use_identity or self.use_spatial):
      raise ValueError(
        'model.use_identity and model.use_spatial are both off: the decoder '
        'would not see the face. Turn one on.'
      )
    if not 1 <= self.n_id_frames <= self.num_frames:
      raise ValueError(
        f'model.n_id_frames is {self.n_id_frames}. Use 1 to '
        f'{self.num_frames}, the frames of a video.'
      )
    self._check_sizes()
    missing = {'generator', *self._judges} - set(self.tx)
    if missing:
      raise ValueError(
        f'optim lacks a block for: {", ".join(sorted(missing))}.'
      )

  def _check_sizes(self):
    halvings = nets.doublings(4, self.image_size, 'model.image_size')
    size = self.dec_size or self.image_size
    nets.doublings(size, self.image_size, 'model.image_size')
    if min(self.flow_sizes, default=1) < 1:
      raise ValueError('model.flow_sizes must be positive.')
    for small, large in itertools.pairwise((*self.flow_sizes, size)):
      nets.doublings(small, large, (
        f'What follows {small} in model.flow_sizes, the decoder last,'
      ))
    if self.discriminator_size:
      side = self.discriminator_size
      nets.doublings(4, side, 'model.discriminator_size')
      nets.doublings(side, self.image_size, 'model.image_size')
    nets.doublings(2, self.num_frames, 'model.num_frames')
    if self.num_frames % 2**halvings:
      raise ValueError(
        f'model.num_frames is {self.num_frames}. At {self.image_size} pixels '
        f'it must be a multiple of {2**halvings}.'
      )
    grid = self.grid
    fits = {
      'down4': grid >= 8 and grid % 2 == 0,
      'up16': (grid + 2) & (grid + 1) == 0 and grid + 2 <= size,
    }
    if not fits[self.dec_arch] or grid > self.image_size:
      raise ValueError(
        f'model.eid_size is {self.eid_size}: {len(self.eid_depths)} blocks '
        f'make a grid of {grid}, which {self.dec_arch} cannot use. Grids of 14 '
        'suit both (eid_size 224 with five blocks, 112 with four).'
      )

  @property
  def grid(self):
    """Side of the maps that the encoders end on."""
    return self.eid_size // 2 ** (len(self.eid_depths) - 1)

  @property
  def pretrained(self):
    """{frozen net: what it comes from}; see `init_from.load`."""
    if not self._has_identity or self.eid == 'random':
      return {}
    name = 'vgg_face' if self.eid == 'vgg_face' else 'identity_encoder'
    return {'identity_encoder': name}

  @property
  def notes(self):
    """What every result must say."""
    eid = self.eid if self._has_identity else 'none'
    notes = {'eid': eid}
    if not self.use_identity:
      notes['without'] = 'E_id'
    if not self.use_spatial:
      notes['without'] = 'E_s'
    return notes

  @property
  def _has_identity(self):
    return self.use_identity or bool(self.lambda_id)

  @property
  def _judges(self):
    return ('discriminator',) if self.lambda_gan else ()

  @property
  def identity_encoder(self):
    """E_id, frozen."""
    return vgg.VGG(
      self.eid_taps, self.eid_depths, self.eid_width,
      range='face' if self.eid == 'vgg_face' else 'unit',
      dtype=jnp.dtype(self.dtype),
    )

  @property
  def generator(self):
    """E_s and G_dec."""
    return nets.Generator(
      image_size=self.image_size, num_frames=self.num_frames,
      num_labels=self.num_labels, grid=self.grid, spatial=self.use_spatial,
      dropout=self.eid_dropout, es_width=self.es_width, dec_arch=self.dec_arch,
      dec_width=self.dec_width, dec_size=self.dec_size or self.image_size,
      head=self.head, flow_sizes=self.flow_sizes,
      painter_width=self.painter_width,
      label_everywhere=self.label_everywhere, hold_ends=self.hold_ends,
      init_kind=self.init_weights, norm_kind=self.norm,
      axis_name=self.axis_name, dtype=jnp.dtype(self.dtype),
    )

  @property
  def discriminator(self):
    """D."""
    return nets.Discriminator(
      width=self.discriminator_width, num_labels=self.num_labels,
      inject=self.label_inject, norm_kind=self.norm, axis_name=self.axis_name,
      dtype=jnp.dtype(self.dtype),
    )

  def init(self, rng, batch):
    """State at step 0 from one batch (only its shapes matter)."""
    video, label = batch['video'][:1], batch['label'][:1]
    shape = (self.num_frames, self.image_size, self.image_size, 3)
    if video.shape[1:] != shape:
      raise ValueError(
        f'fev_gan makes {self.num_frames} frames at once. Set '
        f'data.num_frames to {self.num_frames - 1} (the first one comes on top)'
        f' and data.image_size to {self.image_size}.'
      )
    rng_e, rng_g, rng_d = jax.random.split(rng, 3)
    image, params, identity = video[:, 0], {}, None
    if self._has_identity:
      small = nets.resize(image, self.eid_size)
      params['identity_encoder'] = (
        self.identity_encoder.init(rng_e, small)['params']
      )
    if self.use_identity:
      identity = self._join(self._identify(params['identity_encoder'], image))
    variables = self.generator.init(rng_g, image, identity, label)
    params['generator'] = variables['params']
    if self.lambda_gan:
      params['discriminator'] = (
        self.discriminator.init(
          rng_d, self._shown(video, batch['lip_mask'][:1]), label
        )['params']
      )
    tx = {name: self.tx[name] for name in ('generator', *self._judges)}
    return state_lib.create(
      params, tx, {'batch_stats': variables.get('batch_stats', {})},
      ema=('generator',) if self.ema_decay else (),
    )

  # -- training ------------------------------------------------------------

  def train_step(self, state, batch, rng):
    """Discriminator, then the generator through the updated one (Alg. 1).

    One forward pass of the generator serves both (jax.vjp).

    Args:
      state: TrainState.
      batch: video float32 [B, T, S, S, 3] in [-1, 1], neutral first and in
        the order of time; lip_mask [B, T, S, S, 1]; label int32 [B].
      rng: the key of this step.

    Returns: the new state and a dict of scalar metrics.
    """
    chex.assert_rank(batch['video'], 5)
    turn = self._turn if self.microbatches == 1 else self._turn_in_parts
    state, stats, metrics = turn(state, batch, rng)
    # Under pmap every device has normalized by, and noted, the same moments.
    state = state.replace(model_state={'batch_stats': stats})
    if self.ema_decay:
      average = optim.update_ema(
        state.ema['generator'], state.params['generator'], self.ema_decay,
        state.step,
      )
      state = state.replace(ema={'generator': average})
    return state, state_lib.pmean(metrics, self.axis_name)

  def _turn(self, state, batch, rng):
    """The updates of both; also the moments of the batch norms, the metrics."""
    faces, metrics = self._faces(state, batch), {}
    fake, pull, stats = self._forward(state, batch, faces, rng)
    if self.lambda_gan:
      grads, metrics = self._judge_grads(state, fake, batch)
      state = self._update(state, discriminator=grads)
    grads, learned = self._learn(state, batch, faces, fake, pull)
    state = self._update(state, generator=grads)
    return state, stats, metrics | learned

  def _turn_in_parts(self, state, batch, rng):
    """As `_turn`, one microbatch at a time: all of them meet the discriminator
    before any meets the generator, which therefore runs twice."""
    parts = state_lib.split_batch({'batch': batch}, self.microbatches)
    parts['rng'] = jax.random.split(rng, self.microbatches)
    params, stats = state.params['generator'], state.model_state['batch_stats']
    metrics = {}

    def generate(part):
      faces, batch = self._faces(state, part['batch']), part['batch']
      fake, _ = self._generate(
        params, stats, batch['video'][:, 0], faces, batch['label'], part['rng']
      )
      return (), {'faces': faces, 'fake': fake}

    judge = lambda part: (
      self._judge_grads(state, part['fake'], part['batch']), ()
    )
    if self.lambda_gan:
      parts |= state_lib.accumulate(generate, parts)[1]
      (grads, metrics), _ = state_lib.accumulate(judge, parts)
      state = self._update(state, discriminator=grads)

    def learn(part):
      batch, faces = part['batch'], part.get('faces')
      if faces is None:
        faces = self._faces(state, batch)
      fake, pull, _ = self._forward(state, batch, faces, part['rng'])
      return self._learn(state, batch, faces, fake, pull), ()

    (grads, learned), _ = state_lib.accumulate(learn, parts)
    state = self._update(state, generator=grads)
    return state, stats, metrics | learned

  def _faces(self, state, batch):
    """E_id's features of the input faces; None where nothing asks."""
    if not self._has_identity:
      return None
    params = state.params['identity_encoder']
    return losses.stop(self._identify(params, batch['video'][:, 0]))

  def _forward(self, state, batch, faces, rng):
    """(the videos, their pullback, the moments of the batch norms)."""
    image, label = batch['video'][:, 0], batch['label']
    stats = state.model_state['batch_stats']
    forward = lambda params: (
      self._generate(params, stats, image, faces, label, rng)
    )
    if self.remat:
      forward = jax.checkpoint(forward)
    return jax.vjp(forward, state.params['generator'], has_aux=True)

  def _judge_grads(self, state, fake, batch):
    grad = jax.grad(self.discriminator_loss, has_aux=True)
    return grad(state.params['discriminator'], fake, batch)

  def _learn(self, state, batch, faces, fake, pull):
    """(gradients of the generator, metrics)."""
    loss = lambda fake: self.generator_loss(fake, faces, state, batch)
    grad_fake, metrics = jax.grad(loss, has_aux=True)(fake)
    return pull(grad_fake)[0], metrics

  def _update(self, state, **grads):
    grads = state_lib.pmean(grads, self.axis_name)
    return state.apply_gradients(self.tx, **grads)

  def _identify(self, params, images):
    """F_id: E_id's features [N, g, g, C] of [N, S, S, 3], one per tap."""
    run = lambda params, x: self.identity_encoder.apply(
      {'params': params}, nets.resize(x, self.eid_size)
    )
    return (jax.checkpoint(run) if self.remat else run)(params, images)

  def _join(self, features):
    """Taps side by side, [N, g, g, C]."""
    for tap, feature in zip(self.eid_taps, features):
      if feature.shape[1] != self.grid:
        raise ValueError(
          f'model.eid_taps: {tap} has {feature.shape[1]}x{feature.shape[1]} '
          f'maps, not {self.grid}x{self.grid}. Take taps from after the last '
          f'but one pool, such as pool{len(self.eid_depths) - 1}.'
        )
    return jnp.concatenate(features, -1)

  def _generate(self, params, stats, image, faces, label, rng=None):
    """(video [B, T, S, S, 3], moments of the batch norms); trains if `rng`."""
    identity = self._join(faces) if self.use_identity else None
    video, new = self.generator.apply(
      {'params': params, 'batch_stats': stats}, image, identity, label,
      rng is not None, rngs=None if rng is None else {'dropout': rng},
      mutable=['batch_stats'],
    )
    return video, new.get('batch_stats', {})

  def discriminator_loss(self, params, fake, batch):
    """-log D(Y, L) - log(1 - D(Y^, L)), halved (eq. 3 as it is meant)."""
    fake = self._judge(params, losses.stop(fake), batch)
    real = self._judge(params, batch['video'], batch)
    fake, real = losses.bce(fake, 0.0).mean(), losses.bce(real, 1.0).mean()
    return 0.5 * (fake + real), {
      'loss/discriminator_fake': fake, 'loss/discriminator_real': real,
    }

  def _shown(self, video, masks):
    """What the discriminator sees: where it is small, means of cells, and
    behind them, if asked for, the lips as they are."""
    size = self.discriminator_size or self.image_size
    small = nets.cell_means(video, self.image_size // size)
    if not self.discriminator_lips:
      return small
    return jnp.concatenate([small, lips.cut(video, masks, size)], -1)

  def _judge(self, params, video, batch):
    shown = self._shown(video, batch['lip_mask'])
    logits, _ = self.discriminator.apply(
      {'params': params}, shown, batch['label'], mutable=['batch_stats']
    )
    return logits

  def generator_loss(self, fake, faces, state, batch):
    """L_adv + lambda_rec L_rec + lambda_id L_id (eq. 1), and its parts.

    Args:
      fake: float32 [B, T, S, S, 3].
      faces: E_id's features of the input face, or None.
      state: its discriminator judges.
      batch: see `train_step`.
    """
    real = batch['video']
    terms = {'l1': (self.lambda_rec, lambda: losses.l1(fake, real).mean())}
    if self.lambda_lips:
      terms['lips'] = (self.lambda_lips, lambda: lips.l1(
        fake[:, 1:], real[:, 1:], batch['lip_mask']
      ).mean())
    if self.lambda_id:
      terms[f'identity_{self.eid}'] = (self.lambda_id, lambda: (
        self.identity_loss(fake, faces, state.params['identity_encoder'])
      ))
    if self.lambda_gan:
      terms['gan'] = (self.lambda_gan, lambda: losses.bce(
        self._judge(state.params['discriminator'], fake, batch), 1.0
      ).mean())
    metrics, loss = {}, 0.0
    for name, (weight, term) in terms.items():
      metrics[f'loss/{name}'] = term()
      loss += weight * metrics[f'loss/{name}']
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    metrics['loss/generator'] = loss
    metrics['psnr/train'] = metrics_lib.psnr(flat(fake), flat(real)).mean()
    return loss, metrics

  def identity_loss(self, fake, faces, params):
    """Mean |F(I) - F(Y^_i)| over n_id_frames evenly spaced frames i (eq. 5).

    The paper sums over frames and features; the mean keeps lambda_id's
    meaning at every size. The second half of its Algorithm 1, which compares
    with Y_i instead, is a slip: text and equation say the input face.
    """
    last = self.num_frames - 1
    picks = [
      round(i * last / max(self.n_id_frames - 1, 1))
      for i in range(self.n_id_frames)
    ]
    frames = jnp.stack([fake[:, i] for i in picks], 1)
    features = self._identify(
      params, rearrange(frames, 'b t h w c -> (b t) h w c')
    )
    total = 0.0
    for face, feature in zip(faces, features):
      face = jnp.repeat(face, len(picks), 0)
      total += losses.l1(face, feature).mean() / len(faces)
    return total

  # -- generation ----------------------------------------------------------

  def animate(self, state, inputs, rng, num_frames):
    """[B, num_frames, S, S, 3] in [-1, 1] from image and label.

    Another number of frames than the method's own is blended from those two
    that are nearest in time.
    """
    del rng
    image, label = inputs['image'], inputs['label']
    chex.assert_shape(image, (None, self.image_size, self.image_size, 3))
    faces = None
    if self.use_identity:
      faces = self._identify(state.params['identity_encoder'], image)
    video, _ = self._generate(
      state.inference_params('generator'), state.model_state['batch_stats'],
      image, faces, label,
    )
    return warp.blend_frames(jnp.clip(video, -1, 1), num_frames)
