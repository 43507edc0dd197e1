"""Motion transfer: a face is driven by another face's clip.

Karim and Saleh, "Face Image Animation with Adversarial Learning and Motion
Transfer" (iJIM 16(10), 2022): keypoints of a source and a driving frame give a
dense motion that warps the source; a generator draws what the warp cannot. The
paper builds on the first-order motion model (Siarohin et al., NeurIPS 2019),
whose Jacobians, equivariance loss and feature warping are settings here.
Training needs no labels: source and driving are frames of one clip.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from hatjax import losses, optim, settings, warp
from hatjax import state as state_lib
from hatjax.nets import lowerings, resnet, vgg
from hatjax.nets import motion_transfer as nets

DETECTORS = ('resnet', 'hourglass')
PERCEPTUAL = ('pyramid', 'vgg19')
TAPS = tuple(f'relu{block}_1' for block in range(1, 6))
CHUNK = 16  # frames that animate makes at a time, at most
FEW_PIXELS = 2 * 256**2  # of the frames of a face that a CPU draws at a time
MOVING = ('keypoint_detector', 'dense_motion', 'generator')


def _fold(x):
  return rearrange(x, 'b t ... -> (b t) ...')


def _unfold(x, batch):
  return rearrange(x, '(b t) ... -> b t ...', b=batch)


def _share(length, most):
  """The largest divisor of a length up to `most`; where, in an exported
  program, no length is said: one by one if `most` is small, else all."""
  if not isinstance(length, int):
    return 1 if most < 4 else length
  return next(n for n in range(most, 0, -1) if length % n == 0)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MotionTransfer:
  """Hyperparameters and steps of motion transfer.

  Weights of the loss terms are lambda_*; a weight of 0 skips the work.
  """

  tx: Mapping[str, optax.GradientTransformation]
  image_size: int = 256
  detector: str = 'resnet'
  num_keypoints: int = 10
  jacobian: bool = False
  keypoint_scale: int = 1
  keypoint_width: int = 64
  keypoint_blocks: int = 5
  heatmap_stride: int = 1
  temperature: float = 0.1
  motion_scale: int = 4
  motion_width: int = 64
  motion_blocks: int = 5
  max_width: int = 1024
  warp: str = 'image'
  blend: bool = True
  width: int = 64
  num_down: int = 2
  num_residual: int = 6
  norm: str = 'batch'
  discriminator_width: int = 32
  discriminator_blocks: int = 4
  discriminator_keypoints: bool = False
  perceptual: str = 'pyramid'
  perceptual_scales: int = 4
  lambda_perceptual: float = 1.0
  lambda_l1: float = 0.0
  lambda_gan: float = 1.0
  lambda_features: float = 0.0
  lambda_equivariance: float = 10.0
  lambda_equivariance_jacobian: float = 10.0
  affine_std: float = 0.05
  plate_std: float = 0.005
  remat: bool = False
  microbatches: int = 1
  deterministic: bool = False
  dtype: str = 'float32'
  axis_name: str | None = None
  # Eigen's products: where a layer has about as many weights as it sees
  # numbers, YNNPACK's are slower. (In training there is no difference.)
  video_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
    'cpu': {'xla_cpu_experimental_ynn_fusion_type': ''}
  }

  def __post_init__(self):
    settings.check_model(
      self, detector=DETECTORS, warp=nets.WARPS, norm=nets.NORMS,
      perceptual=PERCEPTUAL, heatmap_stride=(1, 2, 4),
    )
    smallest = 2**self.num_down
    shrunk = {
      'motion_scale': self.motion_scale * 2**self.motion_blocks,
      'keypoint_scale': self.keypoint_scale * 2**self.keypoint_blocks,
      'num_down': smallest,
    }
    for name, factor in shrunk.items():
      if factor < 1 or self.image_size % factor:
        raise ValueError(
          f'model.image_size {self.image_size} cannot be divided by {factor}, '
          f'as model.{name} and the blocks after it ask. Use a multiple of '
          f'{factor}, or fewer of model.motion_blocks and keypoint_blocks.'
        )
    missing = {*MOVING, *self._judges} - set(self.tx)
    if missing:
      names = ', '.join(sorted(missing))
      raise ValueError(f'optim lacks a block for: {names}.')

  @property
  def reads(self):
    """Keys of `inputs` that animate takes."""
    return ('image', 'driving')

  @property
  def pretrained(self):
    """{net: where its weights come from}, for those that stay frozen."""
    return {'vgg19': 'vgg19'} if self.perceptual == 'vgg19' else {}

  @property
  def vgg19(self):
    """The frozen module of the perceptual loss."""
    return vgg.VGG(TAPS, vgg.E, range='imagenet', dtype=jnp.dtype(self.dtype))

  @property
  def _judges(self):
    return ('discriminator',) if self.lambda_gan else ()

  @property
  def _common(self):
    dtype = jnp.dtype(self.dtype)
    return dict(norm=self.norm, axis_name=self.axis_name, dtype=dtype)

  @property
  def keypoint_detector(self):
    """The module that finds keypoints."""
    common = dict(self._common)
    if self.detector == 'resnet':
      del common['norm']
      features = resnet.ResNetUNet(
        self.keypoint_width, self.keypoint_blocks,
        self.heatmap_stride.bit_length() - 1, **common,
      )
      options = dict(kernel=3, pad=1)
    else:
      features = nets.Hourglass(
        self.keypoint_width, self.keypoint_blocks, self.max_width, **common
      )
      options = dict(kernel=7, pad=0)
    return nets.KeypointDetector(
      features, self.num_keypoints, self.jacobian, scale=self.keypoint_scale,
      temperature=self.temperature, **options,
    )

  @property
  def dense_motion(self):
    """The module that turns keypoints into a flow."""
    return nets.DenseMotion(
      self.motion_width, self.motion_blocks, self.max_width,
      self.motion_scale, warp_form=self._warp_form, **self._common,
    )

  @property
  def generator(self):
    """The module that warps and draws."""
    return nets.Generator(
      self.warp, self.blend, self.width, num_down=self.num_down,
      num_residual=self.num_residual, warp_form=self._warp_form,
      **self._common,
    )

  @property
  def discriminator(self):
    """The PatchGAN."""
    return nets.Discriminator(
      self.discriminator_width, self.discriminator_blocks,
      dtype=jnp.dtype(self.dtype),
    )

  @property
  def _warp_form(self):
    # Gathering is the faster one for dense flows, whatever the size.
    return 'matrix' if self.deterministic else 'gather'

  def init(self, rng, batch):
    """State at step 0 from one batch (only its shapes matter)."""
    video = batch['video']
    chex.assert_shape(
      video, (None, None, self.image_size, self.image_size, 3)
    )
    image, side = video[:1, 0], self.image_size // self.motion_scale
    k = self.num_keypoints
    points = {
      'value': jnp.zeros((1, k, 2)),
      'jacobian': jnp.broadcast_to(jnp.eye(2), (1, k, 2, 2)),
    }
    heat = jnp.zeros((*image.shape[:3], k))
    flow = jnp.zeros((1, side, side, 2))
    known = {
      'keypoint_detector': (image,),
      'dense_motion': (image, points, points),
      'generator': (image, flow, flow[..., :1]),
      'discriminator': (
        image, heat if self.discriminator_keypoints else None
      ),
    }
    params, stats = {}, {}
    for name in (*MOVING, *self._judges):
      rng, key = jax.random.split(rng)
      variables = getattr(self, name).init(key, *known[name])
      params[name] = variables['params']
      if 'batch_stats' in variables:
        stats[name] = variables['batch_stats']
    tx = {name: self.tx[name] for name in params}
    for name in self.pretrained:
      params[name] = getattr(self, name).init(rng, image)['params']
    return state_lib.create(params, tx, {'batch_stats': stats})

  # -- training ------------------------------------------------------------

  def train_step(self, state, batch, rng):
    """Keypoints, motion and generator first, then the discriminator.

    Args:
      state: TrainState.
      batch: video float32 [B, 1 + K, H, W, 3] in [-1, 1], frames of one clip:
        the first is the source, each of the others a driving frame.
      rng: the key of this step.

    Returns: the new state and a dict of scalar metrics.
    """
    chex.assert_rank(batch['video'], 5)
    video = batch['video']
    plate = warp.random_thin_plate(
      rng, video.shape[0] * (video.shape[1] - 1), self.affine_std,
      self.plate_std,
    )
    plate = jax.tree.map(lambda x: _unfold(x, len(video)), plate)
    parts = {'video': video, 'plate': plate}
    if self.microbatches == 1:
      run = lambda function, parts: function(parts)
    else:
      run = state_lib.accumulate
      parts = state_lib.split_batch(parts, self.microbatches)
    (grads, stats, metrics), made = run(
      lambda part: self._learn(state, part), parts
    )
    params = state.params
    state = self._update(state, grads)
    state = state.replace(
      model_state={'batch_stats': state_lib.pmean(stats, self.axis_name)}
    )
    if self.lambda_gan:
      parts['made'] = made
      judge = lambda p: (self._judge(params, p['video'], p['made']), ())
      (grads, judged), _ = run(judge, parts)
      state = self._update(state, {'discriminator': grads})
      metrics |= judged
    metrics |= optim.swats_metrics(state.opt_state)
    return state, state_lib.pmean(metrics, self.axis_name)

  def _update(self, state, grads):
    grads = state_lib.pmean(grads, self.axis_name)
    return state.apply_gradients(self.tx, **grads)

  def _learn(self, state, part):
    """((gradients, statistics, metrics), what the discriminator is shown)."""
    moving = {name: state.params[name] for name in MOVING}

    def loss(params):
      out, stats = self._forward(params, state, part)
      total, metrics = self.generator_loss(out, state, part['video'])
      made = {k: out[k] for k in ('fake', 'heat') if k in out}
      return total, (stats, metrics, losses.stop(made))

    grads, (stats, metrics, made) = jax.grad(loss, has_aux=True)(moving)
    return (grads, stats, metrics), made

  def _apply(self, name, params, stats, *args, **options):
    """(what a net returns, its new statistics)."""
    net, kept = getattr(self, name), stats.get(name)

    def apply(params, *args):
      variables = {'params': params}
      variables |= {} if kept is None else {'batch_stats': kept}
      out, new = net.apply(
        variables, *args, train=True, mutable=['batch_stats'], **options
      )
      return out, {} if kept is None else {name: new['batch_stats']}

    apply = jax.checkpoint(apply) if self.remat else apply
    return apply(params[name], *args)

  def _forward(self, params, state, part):
    """All passes of the moving nets in a step, and their new statistics.

    Returns:
      (dict: fake [B K, H, W, 3], driving (keypoints of the real frames [B K,
      ...]), looked (those of the same frames, seen through the plates), plate,
      and heat if the discriminator sees keypoints; {net: statistics}).
    """
    views = video = part['video']
    source, real, count = video[:, 0], _fold(video[:, 1:]), len(video)
    old = state.model_state['batch_stats']
    plate = jax.tree.map(_fold, part['plate'])
    if self.lambda_equivariance or self.lambda_equivariance_jacobian:
      looks = warp.thin_plate_frames(plate, real, self._warp_form)
      # Clip by clip, so that none has to move to another device.
      views = jnp.concatenate([video, _unfold(looks, count)], 1)
    found, stats = self._apply('keypoint_detector', params, old, _fold(views))
    split = lambda x: jnp.split(_unfold(x, count), (1, video.shape[1]), 1)
    found = jax.tree.map(split, found)
    pick = lambda i: {key: _fold(value[i]) for key, value in found.items()}
    (flow, visible), new = self._apply(
      'dense_motion', params, old, source, pick(0), pick(1)
    )
    stats |= new
    fake, new = self._apply(
      'generator', params, old, source, flow, visible
    )
    out = {
      'fake': fake, 'driving': pick(1), 'looked': pick(2), 'plate': plate,
    }
    if self.discriminator_keypoints:
      size = self.image_size
      points = jax.lax.stop_gradient(pick(1)['value'])
      out['heat'] = nets.gaussians(points, size, size)
    return out, stats | new

  def generator_loss(self, out, state, video):
    """Weighted sum of eq. 3, eq. 5 and the first-order model's terms.

    Args:
      out: see `_forward`.
      state: its discriminator judges.
      video: [B, 1 + K, H, W, 3].

    Returns:
      (loss, metrics).
    """
    real, fake = _fold(video[:, 1:]), out['fake']
    terms = {
      'perceptual': (
        self.lambda_perceptual, self._perceptual(state, fake, real)
      ),
      'l1': (self.lambda_l1, losses.l1(fake, real)),
    }
    if self.lambda_gan:
      judge = state.params['discriminator']
      maps, logits = self._score(judge, fake, out)
      terms['gan'] = (self.lambda_gan, losses.least_squares(logits, 1))
      if self.lambda_features:
        like = losses.stop(self._score(judge, real, out)[0])
        terms['features'] = (
          self.lambda_features, losses.features(maps, like)
        )
    terms |= self._equivariance(out)
    metrics = {f'loss/{k}': term.mean() for k, (_, term) in terms.items()}
    total = sum(weight * term.mean() for weight, term in terms.values())
    return total, metrics | {'loss/generator': total}

  def _perceptual(self, state, fake, real):
    """Eq. 3 at several scales; 'pyramid' does without VGG-19's weights."""
    if self.perceptual == 'pyramid':
      return losses.pyramid(fake, real, self.perceptual_scales)
    total, params = 0, {'params': state.params['vgg19']}
    for level in range(self.perceptual_scales):
      a, b = (nets.shrink(x, 2**level) for x in (fake, real))
      like = losses.stop(self.vgg19.apply(params, b))
      total += losses.features(self.vgg19.apply(params, a), like)
    return total

  def _equivariance(self, out):
    """Keypoints of a frame seen through a plate, moved back, stay the same."""
    terms, driving, looked = {}, out['driving'], out['looked']
    mean = lambda x: jnp.abs(x).reshape(len(x), -1).mean(-1)
    if self.lambda_equivariance:
      back = warp.thin_plate_points(out['plate'], looked['value'])
      terms['equivariance'] = (
        self.lambda_equivariance, mean(driving['value'] - back)
      )
    if self.lambda_equivariance_jacobian and self.jacobian:
      turn = warp.thin_plate_jacobian(out['plate'], looked['value'])
      back = nets.inverse_2x2(driving['jacobian']) @ turn @ looked['jacobian']
      terms['equivariance_jacobian'] = (
        self.lambda_equivariance_jacobian, mean(jnp.eye(2) - back)
      )
    return terms

  def _score(self, params, frames, made):
    return self.discriminator.apply(
      {'params': params}, frames, made.get('heat')
    )

  def _judge(self, params, video, made):
    """(gradients of eq. 4, metrics): real frames 1, made ones 0."""

    def loss(params):
      logits = self._score(params, _fold(video[:, 1:]), made)[1]
      real = losses.least_squares(logits, 1).mean()
      logits = self._score(params, made['fake'], made)[1]
      return real + losses.least_squares(logits, 0).mean()

    value, grads = jax.value_and_grad(loss)(params['discriminator'])
    return grads, {'loss/discriminator': value}

  # -- generation ----------------------------------------------------------

  def _infer(self, name, state, *args, **options):
    variables = {'params': state.inference_params(name)}
    stats = state.model_state['batch_stats']
    variables |= {'batch_stats': stats[name]} if name in stats else {}
    return getattr(self, name).apply(variables, *args, **options)

  def keypoints(self, state, frames):
    """Keypoints of frames [N, H, W, 3]: value [N, K, 2] and jacobian."""
    return self._infer('keypoint_detector', state, frames)

  def encode(self, state, inputs, rng=None):
    """What depends on the source face alone; see `render`."""
    del rng
    image = inputs['image']
    chex.assert_shape(image, (None, self.image_size, self.image_size, 3))
    return {
      'image': image, 'keypoints': self.keypoints(state, image),
      'code': self._infer('generator', state, image, method='encode'),
    }

  def render(self, state, context, keypoints):
    """Frames [B, T, H, W, 3] of the faces in `encode`'s context [B, ...].

    Args:
      state: TrainState.
      context: of B faces.
      keypoints: value [B, T, K, 2] and jacobian, where the face is to go.
    """
    flow, visible = self._infer(
      'dense_motion', state, context['image'], context['keypoints'],
      jax.tree.map(_fold, keypoints),
    )
    batch, length = keypoints['value'].shape[:2]
    few = _share(length, max(1, FEW_PIXELS // self.image_size**2))
    few = few if lowerings.rewrites() else length
    # Moved by themselves: with what draws, XLA:CPU would pick their pixels one
    # number at a time.
    moved = self._infer(
      'generator', state, context['code'], flow, visible, method='move'
    )
    parts = jax.tree.map(lambda x: rearrange(
      x, '(b n t) ... -> n (b t) ...', b=batch, t=few
    ), moved)
    draw = lambda part: self._infer('generator', state, part, method='draw')
    frames = jax.lax.map(draw, parts)
    return rearrange(frames, 'n (b t) ... -> b (n t) ...', b=batch)

  def decode(self, state, context, chunk, rng=None):
    """Frames for the driving frames `chunk` [B, T, H, W, 3], absolute."""
    del rng
    found = self.keypoints(state, _fold(chunk))
    found = jax.tree.map(lambda x: _unfold(x, len(chunk)), found)
    return self.render(state, context, found)

  def animate(self, state, inputs, rng, num_frames):
    """[B, T, H, W, 3] in [-1, 1]: `image` moved as `driving` [B, T, ...].

    Keypoints are taken as they are (absolute motion), as when a face drives
    itself; `hatjax.driving` has the other ways. T is the driving clip's.
    """
    del rng, num_frames
    context, driving = self.encode(state, inputs), inputs['driving']
    length = driving.shape[1]
    if length <= CHUNK:
      return self.decode(state, context, driving)
    count = -(-length // CHUNK)
    size = 4 * -(-length // (4 * count))  # which `render` can share evenly
    last = jnp.repeat(driving[:, -1:], count * size - length, 1)
    driving = jnp.concatenate([driving, last], 1)
    chunks = rearrange(driving, 'b (n t) ... -> n b t ...', n=count)
    frames = jax.lax.map(lambda x: self.decode(state, context, x), chunks)
    return rearrange(frames, 'n b t ... -> b (n t) ...')[:, :length]
