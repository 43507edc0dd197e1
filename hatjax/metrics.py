"""Scores of generated frames and videos.

Of pictures (JAX, float [-1, 1], a leading axis B, float32 [B] back): PSNR,
SSIM, LPIPS, flicker, gradient energy. Of features that somebody else extracted
(NumPy, float64): ACD and its kin of one video's face embeddings; Frechet and
kernel distances and the Inception score of sets. Of scores: rank correlation
and bootstrap intervals.
"""

import dm_pix
import jax.numpy as jnp
import numpy as np
from jax import lax

# -- pictures -----------------------------------------------------------------


def psnr(a, b):
  """Peak signal-to-noise ratio in dB over the whole range of [-1, 1].

  Args:
    a: [B, ...].
    b: same shape.

  Returns:
    [B]; 120 dB at most, which is what equal images get.
  """
  flat = lambda x: _unit(x).reshape(len(x), -1, 1, 1)
  return jnp.minimum(dm_pix.psnr(flat(a), flat(b)), 120.0)


def ssim(a, b, window='gaussian'):
  """Structural similarity (Wang et al. 2004), of each channel, then the mean.

  K1 = 0.01, K2 = 0.03 of the range, windows that lie inside the image
  ('valid'). What is compared is light, not signed values: black is 0.

  Args:
    a: [B, H, W, C] in [-1, 1].
    b: same shape.
    window: 'gaussian', 11x11 with sigma 1.5 and biased variances; or
      'uniform7', 7x7 with unbiased ones, scikit-image's default.

  Returns:
    [B], 1 for equal images.

  Raises:
    ValueError: unknown window, images smaller than it.
  """
  if window not in WINDOWS:
    raise ValueError(
      f'Unknown window {window!r}. Choose one of: {", ".join(WINDOWS)}.'
    )
  weights, unbiased = WINDOWS[window]()
  side = len(weights)
  if min(a.shape[1:3]) < side:
    raise ValueError(f'SSIM needs images of side {side} or more.')
  a, b = _unit(a), _unit(b)

  def mean(x):  # Shifted sums: dm_pix's own convolution is slow on CPUs.
    for axis in (-3, -2):
      n = x.shape[axis] - side + 1
      x = sum(
        w * lax.slice_in_dim(x, i, i + n, axis=axis)
        for i, w in enumerate(weights)
      )
    return x

  if unbiased == 1:
    return dm_pix.ssim(a, b, filter_fn=mean)
  mean_a, mean_b = mean(a), mean(b)
  var_a = unbiased * (mean(a * a) - mean_a**2)
  var_b = unbiased * (mean(b * b) - mean_b**2)
  covariance = unbiased * (mean(a * b) - mean_a * mean_b)
  c1, c2 = 0.01**2, 0.03**2
  score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  score /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
  return score.mean((1, 2, 3))


def _unit(x):
  """[-1, 1] -> [0, 1], dm_pix's range."""
  return (x.astype(jnp.float32) + 1) / 2


def _gaussian():
  x = np.arange(-5, 6)
  weights = np.exp(-(x**2) / (2 * 1.5**2))
  return weights / weights.sum(), 1.0


WINDOWS = {
  'gaussian': _gaussian, 'uniform7': lambda: (np.full(7, 1 / 7), 49 / 48),
}


def flicker(video):
  """Mean absolute second difference in time: 0 for steady motion.

  Args:
    video: [B, T, H, W, C] in [-1, 1], T of 3 or more.

  Returns:
    [B].
  """
  bend = video[:, 2:] - 2 * video[:, 1:-1] + video[:, :-2]
  return jnp.abs(bend).mean((1, 2, 3, 4))


def gradient_energy(images):
  """Mean squared difference of neighbouring pixels: what blur takes away.

  Args:
    images: [B, ..., H, W, C] in [-1, 1].

  Returns:
    [B].
  """
  down = jnp.diff(images, axis=-3).reshape(images.shape[0], -1)
  right = jnp.diff(images, axis=-2).reshape(images.shape[0], -1)
  return jnp.square(down).mean(-1) + jnp.square(right).mean(-1)


def lpips(features, others, weights):
  """LPIPS (Zhang et al. 2018) from a net's features: learned distances.

  Of unit feature vectors at every place: sum over layers of the mean over
  places of sum_c w_c (f_c - g_c)^2.

  Args:
    features: list of [B, h, w, C], one per layer.
    others: the same of the images compared with.
    weights: list of [C], not negative.

  Returns:
    [B], 0 for equal features.
  """
  total = 0.0
  for f, g, w in zip(features, others, weights):
    f, g = (x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)
            for x in (f, g))
    total += (w * jnp.square(f - g)).sum(-1).mean((1, 2))
  return total


# -- features of one video ----------------------------------------------------


def content_distances(embeddings, found, first=None):
  """How much a face changes in a video: ACD, its consecutive form, ACD-I.

  Euclidean distances d of unit vectors f_1..f_n (MoCoGAN; Zhao et al. 2018):
  2 / (n (n - 1)) sum_{i<j} d(f_i, f_j), 1 / (n - 1) sum d(f_i, f_{i+1}), and
  1 / n sum d(f_i, f_0).

  Args:
    embeddings: [T, D] unit vectors.
    found: bool [T], False where no face was found; such frames are left out.
    first: [D], embedding f_0 of the input image; None if it has none.

  Returns:
    dict: acd, acd_consecutive, acd_i; nan where too little is known, which is
    also so for a video with more than half of its faces missed.
  """
  embeddings = np.asarray(embeddings, np.float64)
  found = np.asarray(found, bool)
  scores = dict.fromkeys(('acd', 'acd_consecutive', 'acd_i'), float('nan'))
  if 2 * found.sum() < len(found) or found.sum() < 2:
    return scores
  f = embeddings[found]
  i, j = np.triu_indices(len(f), 1)
  scores['acd'] = float(np.linalg.norm(f[i] - f[j], axis=1).mean())
  both = found[1:] & found[:-1]
  if both.any():
    steps = np.linalg.norm(np.diff(embeddings, axis=0), axis=1)
    scores['acd_consecutive'] = float(steps[both].mean())
  if first is not None:
    scores['acd_i'] = float(np.linalg.norm(f - first, axis=1).mean())
  return scores


# -- features of sets ---------------------------------------------------------


def frechet_distance(a, b):
  """Frechet distance of two sets of features, as Gaussians (FID).

  |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2). The trace of the root is
  the sum of the singular values of A B', A and B being the centred features
  over sqrt(n - 1): exact, however few the samples.

  Args:
    a: [N, D].
    b: [M, D].

  Returns:
    float, >= 0 up to rounding.
  """
  means, factors, traces = [], [], []
  for x in (a, b):
    x = np.asarray(x, np.float64)
    means.append(x.mean(0))
    x = (x - means[-1]) / np.sqrt(max(1, len(x) - 1))
    traces.append(np.square(x).sum())
    # An orthogonal factor changes no singular value.
    factors.append(np.linalg.qr(x, 'r') if len(x) > x.shape[1] else x)
  root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
  return float(np.square(means[0] - means[1]).sum() + sum(traces) - 2 * root)


def kernel_distance(a, b, subset=1000, subsets=100, seed=0):
  """Kernel Inception distance: unbiased squared MMD, kernel (x.y / D + 1)^3.

  Binkowski et al. 2018. Unlike FID it is unbiased for small samples.

  Args:
    a: [N, D].
    b: [M, D].
    subset: samples drawn from each at a time, all of them if fewer.
    subsets: how many draws; one if there is nothing to draw.
    seed: of the draws.

  Returns:
    (mean, standard deviation) over the draws.
  """
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  n, rng = min(subset, len(a), len(b)), np.random.default_rng(seed)
  if n == len(a) == len(b):
    subsets = 1
  kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
  found = []
  for _ in range(subsets):
    x, y = (z[rng.choice(len(z), n, replace=False)] for z in (a, b))
    inner = [kernel(z, z) for z in (x, y)]
    inner = sum(k.sum() - np.trace(k) for k in inner) / (n * (n - 1))
    found.append(inner - 2 * kernel(x, y).mean())
  return float(np.mean(found)), float(np.std(found))


def inception_score(logits, splits=10, seed=2020):
  """exp of the mean KL(p(y|x) || p(y)) over splits (Salimans et al. 2016).

  Args:
    logits: [N, classes].
    splits: how many parts, after a shuffle.
    seed: of the shuffle; torch-fidelity's.

  Returns:
    (mean, standard deviation) over the splits.
  """
  logits = np.asarray(logits, np.float64)
  order = np.random.RandomState(seed).permutation(len(logits))
  logits = logits[order]
  logits = logits - logits.max(1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  scores = []
  for part in np.array_split(log_p, splits):
    p = np.exp(part)
    kl = p * (part - np.log(p.mean(0, keepdims=True)))
    scores.append(np.exp(kl.sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


# -- scores -------------------------------------------------------------------


def spearman(a, b):
  """Rank correlation; ties share their mean rank. nan for a constant."""
  ranks = []
  for values in (a, b):
    _, index, counts = np.unique(
      values, return_inverse=True, return_counts=True
    )
    ranks.append((np.cumsum(counts) - (counts - 1) / 2)[index])
  if any(np.ptp(r) == 0 for r in ranks):
    return float('nan')
  return float(np.corrcoef(*ranks)[0, 1])


def bootstrap(values, seed=0, resamples=1000):
  """Mean of the values that are not nan, and its 95 % bootstrap interval.

  Returns:
    dict: mean, low, high, n (how many values); nan where n is 0.
  """
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  if not len(values):
    return dict(mean=float('nan'), low=float('nan'), high=float('nan'), n=0)
  drawn = np.random.default_rng(seed).integers(
    0, len(values), (resamples, len(values))
  )
  low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
  return dict(
    mean=float(values.mean()), low=float(low), high=float(high), n=len(values)
  )
