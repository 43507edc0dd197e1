"""What methods make of known clips: drafts for the next stage, and scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hatjax import intensity, metrics, video
from hatjax import state as state_lib

MAX_FRAMES = 32  # a clip is thinned out to at most this many
# Where the alphas of drafts come from, to learn from them.
DRAFT_ALPHAS = ('inferred', 'linear', 'profile')


def thin_out(clip, limit=MAX_FRAMES):
  """At most `limit` evenly spaced frames, the first and last among them."""
  if len(clip) <= limit:
    return clip
  return clip[np.linspace(0, len(clip) - 1, limit).round().astype(int)]


def imitate(method, state, batch, rng, alpha='profile'):
  """What a method makes of the faces in a batch, at the times of its frames.

  Args:
    method: see `hatjax.methods`.
    state: TrainState.
    batch: video float32 [B, T, H, W, 3] in [-1, 1], neutral first; time
      [B, T]; label int32 [B]; draft, where the method reads it, and the noise
      to start from, if it is to be known.
    rng: key.
    alpha: where intensities come from, for methods that have them: a sweep
      of `intensity`, or 'inferred' from the frames themselves.

  Returns:
    Video float32 [B, T, H, W, 3] in [-1, 1].
  """
  real, time = batch['video'], batch['time']
  known = {**batch, 'image': real[:, 0], 'driving': real}
  inputs = {k: known[k] for k in (*method.reads, 'noise') if k in known}
  if alpha == 'inferred' and intensity.is_inferred(method):
    inputs['alpha'] = method.infer(state, known)
  elif hasattr(method, 'sweep_alpha'):
    kind = 'profile' if alpha == 'inferred' else alpha
    fine = method.sweep_alpha(state, known['label'], 256, kind)
    at = lambda t, curve: jnp.interp(t, jnp.linspace(0, 1, 256), curve)
    inputs['alpha'] = jax.vmap(at)(time, fine)
  length = time.shape[1]
  fake = method.animate(state, inputs, rng, length)
  # T frames for times 0..1, unless each was asked for.
  if not {'alpha', 'draft', 'driving'} & inputs.keys():
    nearest = jnp.round(time * (length - 1)).astype(jnp.int32)
    nearest = jnp.clip(nearest, 0, length - 1)[..., None, None, None]
    fake = jnp.take_along_axis(fake, nearest, 1)
  return fake


def make_draft(method, state, batch, rng, alpha):
  """What `imitate` makes, as the next stage gets it: in steps of 1 / 255."""
  size = method.image_size
  if batch['video'].shape[2] != size:  # the next stage enlarges
    shape = (*batch['video'].shape[:2], size, size, 3)
    batch = {**batch, 'video': jax.image.resize(batch['video'], shape, 'cubic')}
  draft = imitate(method, state, batch, rng, alpha)
  return jax.lax.stop_gradient(video.to_float(video.to_uint8(draft)))


def add_drafts(prepare, method, alpha='inferred', microbatches=1):
  """A `prepare` that also fills batch['draft'] with another stage's videos.

  Args:
    prepare: (batch, resident, rng) -> batch; see `parallel.Runner`.
    method: of the stage before.
    alpha: see `imitate`.
    microbatches: parts of a batch whose drafts are made one after another.

  Returns:
    The same for a `resident` of {'frames': that of `prepare`, 'previous': the
    frozen state of `method`}.
  """

  def with_drafts(batch, resident, rng):
    batch = prepare(batch, resident['frames'], rng)
    make = lambda part, rng: make_draft(
      method, resident['previous'], part, rng, alpha
    )
    rng = jax.random.fold_in(rng, 2**31)
    if microbatches == 1:
      return {**batch, 'draft': make(batch, rng)}
    read = {key: batch[key] for key in ('video', 'time', 'label')}
    parts = state_lib.split_batch(read, microbatches)
    keys = jax.random.split(rng, microbatches)
    _, drafts = state_lib.accumulate(
      lambda part: ((), make(*part)), (parts, keys)
    )
    return {**batch, 'draft': state_lib.join_batch(drafts)}

  return with_drafts


def make_scorer(method, previous=None):
  """A jitted function that scores one clip.

  Args:
    method: see `hatjax.methods`.
    previous: (name, method, state) of the stage that makes the drafts of a
      method that reads them; without one it gets the real clips, noised or
      degraded as in training, and its scores say what is left of that.

  Returns:
    (state, clip uint8 [T, H, W, 3], n, label) -> dict of per-frame PSNR in dB
    [T] and the generated frames uint8 [T, H, W, 3]; frames from n on are
    padding. 'psnr_generated' knows what the method reads and nothing else,
    'psnr_copy' repeats the input, 'psnr_draft' is that of the draft, and
    'psnr', the score a checkpoint is ranked by, has alpha inferred from each
    real frame where the method can (else it is psnr_generated). Of a method
    that makes no videos: what its `score` returns.
  """

  if not hasattr(method, 'animate'):
    return jax.jit(lambda state, clip, n, label: method.score(
      state, video.to_float(clip), n, label
    ))

  def score(frozen, state, clip, n, label):
    real = video.to_float(clip)[None]
    batch = {
      'video': real, 'label': jnp.full((1,), label, jnp.int32),
      'time': (jnp.arange(len(clip)) / jnp.maximum(n - 1, 1))[None],
    }
    rng, out = jax.random.key(0), {}
    psnr = lambda x: metrics.psnr(x[0], real[0])
    if 'draft' in method.reads and previous is None:
      batch['draft'] = real
      if hasattr(method, 'add_noise'):
        batch['noise'] = jax.random.normal(rng, real.shape)
        noised = jnp.clip(method.add_noise(real, batch['noise']), -1, 1)
        out |= {'psnr_noised': psnr(noised), 'draft': video.to_uint8(noised[0])}
      elif hasattr(method, 'degrade'):
        batch['draft'] = method.degrade(real, rng)
        out |= {
          'psnr_draft': psnr(batch['draft']),
          'draft': video.to_uint8(batch['draft'][0]),
        }
    elif 'draft' in method.reads:
      draft = make_draft(previous.method, frozen, batch, rng, 'profile')
      batch['draft'] = draft
      if draft.shape == real.shape:
        out |= {'psnr_draft': psnr(draft), 'draft': video.to_uint8(draft[0])}
    fake = imitate(method, state, batch, rng)
    out |= {
      'psnr_generated': psnr(fake), 'psnr': psnr(fake),
      'psnr_copy': psnr(jnp.broadcast_to(real[:, :1], real.shape)),
      'frames': video.to_uint8(fake[0]),
    }
    if intensity.is_inferred(method):
      known = {**batch, 'image': real[:, 0], 'driving': real}
      out['alpha'] = method.infer(state, known)[0]
      out['psnr'] = psnr(imitate(method, state, batch, rng, 'inferred'))
    return out

  score = jax.jit(score)
  # Where the state is; as an argument, not as constants of the program.
  place = functools.cache(
    lambda sharding: previous and jax.device_put(previous.state, sharding)
  )
  return lambda state, *clip: score(place(state.step.sharding), state, *clip)


def score_clips(scorer, state, clips, limit=MAX_FRAMES):
  """Mean scores over all frames but the first, and the frames themselves.

  Args:
    scorer: from `make_scorer`.
    state: TrainState.
    clips: as `Batches.whole_clips` yields them.
    limit: longer ones are thinned out to so many frames.

  Returns:
    ({name: value}, list of (real, generated), or (real, draft, generated)):
    'val/psnr' and its kin in dB, 'val/apex_generated' and 'val/apex_copy' for
    the last frames, and, where alpha is inferred, 'val/alpha_order', the
    lowest Spearman correlation of alpha with the frame index over the clips.
  """
  rows, shown, orders, judged = [], [], [], []
  for clip in clips:
    real = thin_out(clip['video'], limit)
    n = len(real)
    padded = np.concatenate([real, real[-1:].repeat(limit - n, 0)])
    out = jax.device_get(scorer(state, padded, n, clip['label']))
    if 'frames' not in out:
      judged.append(out)
      continue
    rows.append({k: v[1:n] for k, v in out.items() if k.startswith('psnr')})
    made = [out[k][:n] for k in ('draft', 'frames') if k in out]
    shown.append((real, *made))
    if 'alpha' in out and n > 2:
      orders.append(_spearman(out['alpha'][1:n]))
  if not rows:
    names = judged[0] if judged else ()
    return {k: float(np.mean([j[k] for j in judged])) for k in names}, []
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
  return means, shown


def _spearman(values):
  """Rank correlation with the index (ties in order of appearance)."""
  ranks = np.argsort(np.argsort(values, kind='stable'), kind='stable')
  return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
