"""Expression intensity (alpha) of HAT-cGAN: how it is inferred from codes and
pixels, remembered over time, and swept to make a video.

Alpha is float32 [B, T], one value per clip and frame; 0 is the neutral face
and about 1 the strongest expression. Nothing here is clipped.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

RULES = ('reference', 'least_squares')
SOURCES = ('inferred', 'visible')
SWEEPS = ('linear', 'profile', 'reference')
PROFILE_KNOTS = 16
PROFILE_DECAY = 0.99


def is_inferred(method):
  """Whether a method can tell a frame's intensity.

  For that it needs a code along which the expression moves; affine 'spatial'
  moves pictures alone.
  """
  return hasattr(method, 'infer') and getattr(method, 'affine', '') != 'spatial'


def infer_alpha(base, base_neutral, residual, rule='reference'):
  """Length of each frame's shift along the hidden residual.

  'reference' is |<f_t - f_0, r>| / (|r| + 1e-6), as the released code has it;
  'least_squares' is <f_t - f_0, r> / (|r|^2 + 1e-6), the inverse of
  f_t = f_0 + alpha r, with its sign.

  Args:
    base: float32 [B, T, D], base code f_t of every frame.
    base_neutral: float32 [B, D], base code f_0 of the neutral face.
    residual: float32 [B, D], residual code r of the neutral face.
    rule: one of RULES.

  Returns:
    float32 [B, T], not clipped; 0 is neutral. One value per clip and frame.
  """
  shift = base - base_neutral[:, None]
  along = jnp.einsum('btd,bd->bt', shift, residual)
  square = jnp.sum(jnp.square(residual), -1, keepdims=True)
  if rule == 'least_squares':
    return along / (square + 1e-6)
  return jnp.abs(along) / (jnp.sqrt(square + 1e-12) + 1e-6)


def visible_progress(video):
  """How far each frame has gone from the neutral one to the farthest.

  The projection of its pixel change on that of the frame which differs most:
  0 at the neutral frame, 1 at the farthest.

  Args:
    video: float32 [B, 1 + K, H, W, C], neutral first.

  Returns:
    float32 [B, K].
  """
  change = rearrange(video[:, 1:] - video[:, :1], 'b t h w c -> b t (h w c)')
  farthest = jnp.square(change).sum(-1).argmax(-1)
  target = jnp.take_along_axis(change, farthest[:, None, None], 1)[:, 0]
  along = jnp.einsum('btn,bn->bt', change, target)
  return along / (jnp.square(target).sum(-1, keepdims=True) + 1e-6)


def code_error(codes, residual, progress):
  """Relative squared distance of the code shifts from the line p_k r.

  What makes the hidden path straight: a frame that has visibly gone the
  fraction p_k should stand at f_0 + p_k r, so that alpha runs from 0 to 1.

  Args:
    codes: [B, 1 + K, D], bottlenecks, neutral first.
    residual: [B, D].
    progress: [B, K].

  Returns:
    [B].
  """
  shift = codes[:, 1:] - codes[:, :1]
  line = progress[..., None] * residual[:, None]
  error = jnp.square(shift - line).sum((1, 2))
  return error / (jnp.square(shift).sum((1, 2)) + 1e-6)


def empty_profile(num_labels):
  """The motion profile before training: weighted sums at 16 times per label."""
  zeros = jnp.zeros((max(num_labels, 1), PROFILE_KNOTS))
  return {'alpha': zeros, 'weight': zeros}


def profile_terms(alpha, time, label, num_labels):
  """What a batch adds to the motion profile.

  Args:
    alpha: [B, K].
    time: [B, K] in [0, 1], the frame index over the last one.
    label: int32 [B]; ignored without labels.
    num_labels: 0 keeps one profile for everything.

  Returns:
    dict of alpha and weight, both [L, 16]: each frame is shared between the
    two knots around its time.
  """
  position = time[..., None] * (PROFILE_KNOTS - 1)
  tent = jnp.maximum(0, 1 - jnp.abs(position - jnp.arange(PROFILE_KNOTS)))
  row = label if num_labels else jnp.zeros_like(label)
  onehot = jax.nn.one_hot(row, max(num_labels, 1))
  return {
    'alpha': jnp.einsum('bl,btk,bt->lk', onehot, tent, alpha),
    'weight': jnp.einsum('bl,btk->lk', onehot, tent),
  }


def update_profile(profile, terms):
  """Exponential average of the profile, for the labels seen in the batch."""
  seen = terms['weight'].sum(1, keepdims=True) > 0
  return {
    key: jnp.where(seen, PROFILE_DECAY * old + terms[key], old)
    for key, old in profile.items()
  }


def sweep(kind, num_frames, alpha_max, profile, row):
  """Intensity of every frame of the videos to be made.

  Args:
    kind: 'linear' from 0 to alpha_max; 'profile', the mean inferred alpha
      over time, times alpha_max; 'reference', 0, 0.05, ..., 0.95 whatever T
      and alpha_max.
    num_frames: T.
    alpha_max: see above.
    profile: see `empty_profile`.
    row: int32 [B], which profile.

  Returns:
    float32 [B, T].

  Raises:
    ValueError: unknown kind.
  """
  if kind not in SWEEPS:
    raise ValueError(
      f'Unknown sweep {kind!r}. Choose one of: {", ".join(SWEEPS)}.'
    )
  b = row.shape[0]
  if kind == 'reference':
    return jnp.tile(jnp.arange(20) * 0.05, (b, 1))
  time = jnp.linspace(0.0, 1.0, num_frames)
  if kind == 'linear':
    return jnp.tile(alpha_max * time, (b, 1))
  at = time * (PROFILE_KNOTS - 1)
  curves = jax.vmap(lambda a, w: jnp.interp(at, *_knots(a, w)))(
    profile['alpha'], profile['weight']
  )
  return alpha_max * curves[row]


def _knots(alpha, weight):
  """Knots of the profile, starting at 0, unseen ones bridged by neighbours.

  Returns:
    (positions, values), where an unseen knot repeats the last seen one's
    position and value, so that interpolation jumps over it.
  """
  seen = (weight > 1e-6).at[0].set(True)
  values = jnp.where(seen, alpha / jnp.maximum(weight, 1e-6), 0.0).at[0].set(0)
  index = jax.lax.cummax(jnp.where(seen, jnp.arange(PROFILE_KNOTS), 0))
  return index.astype(jnp.float32), values[index]
