"""Every score against a closed form, by hand or another library."""

import dm_pix
import numpy as np
import pytest
import scipy.linalg
import skimage.metrics

from hatjax import metrics


def pictures(seed=0, shape=(3, 20, 24, 3)):
  rng = np.random.default_rng(seed)
  a = rng.uniform(-1, 1, shape).astype(np.float32)
  return a, np.clip(a + rng.normal(0, 0.3, shape), -1, 1).astype(np.float32)


def test_psnr_of_constants_and_of_one_level():
  level = lambda n: np.full((1, 8, 8, 3), n / 127.5 - 1, np.float32)
  one = metrics.psnr(level(100), level(101))
  np.testing.assert_allclose(one, 20 * np.log10(255), atol=1e-3)  # 48.13 dB
  np.testing.assert_allclose(
    metrics.psnr(level(0), level(255)), 0, atol=1e-5
  )
  assert metrics.psnr(level(7), level(7))[0] == 120
  a, b = pictures()
  for x, y, found in zip(a, b, metrics.psnr(a, b)):
    expected = skimage.metrics.peak_signal_noise_ratio(x, y, data_range=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_released_psnr_wraps():
  # The released script subtracts uint8 arrays: 250 - 0 and 0 - 250 become
  # 250 and 6, and squares wrap once more. No pair can read less than 24.2 dB.
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
  wrapped = (a - b) ** 2
  assert wrapped.dtype == np.uint8 and wrapped.max() <= 249
  released = 20 * np.log10(255) - 10 * np.log10(wrapped.mean())
  ours = metrics.psnr(*(x[None].astype('f4') / 127.5 - 1 for x in (a, b)))[0]
  assert ours < 8.5 and 27.5 < released < 28.5


@pytest.mark.parametrize('window, options', (
  ('gaussian', dict(
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False
  )),
  ('uniform7', {}),
))
def test_ssim_is_that_of_scikit_image(window, options):
  a, b = pictures()
  levels = lambda x: np.rint((x + 1) * 127.5).astype(np.uint8)
  expected = [
    skimage.metrics.structural_similarity(
      levels(x), levels(y), channel_axis=-1, **options
    ) for x, y in zip(a, b)
  ]
  a, b = (levels(x) / np.float32(127.5) - 1 for x in (a, b))
  np.testing.assert_allclose(metrics.ssim(a, b, window), expected, atol=1e-5)
  np.testing.assert_allclose(metrics.ssim(a, a, window), 1, atol=1e-6)
  if window == 'gaussian':  # with its own filter
    np.testing.assert_allclose(
      metrics.ssim(a, b), dm_pix.ssim((a + 1) / 2, (b + 1) / 2), atol=1e-5
    )


def test_ssim_of_wrong_arguments():
  a, b = pictures()
  with pytest.raises(ValueError, match='Choose one of: gaussian, uniform7'):
    metrics.ssim(a, b, 'square')
  with pytest.raises(ValueError, match='side 11'):
    metrics.ssim(a[:, :10], b[:, :10])


def test_lpips_by_hand():
  # Unit vectors (1, 0) and (0.6, 0.8) at one place of two, equal at the other.
  f = np.array([[[[2.0, 0], [0, 3]]]])
  g = np.array([[[[3.0, 4], [0, 1]]]])
  expected = (5 * 0.4**2 + 7 * 0.8**2) / 2
  found = metrics.lpips([f, f], [g, f], [np.array([5.0, 7]), np.ones(2)])
  np.testing.assert_allclose(found, [expected], rtol=1e-5)


# -- faces --------------------------------------------------------------------


def test_content_distances_of_still_and_alternating_faces():
  n, found = 8, np.ones(8, bool)
  still = np.tile([1.0, 0], (n, 1))
  first = np.array([0.0, 1])
  scores = metrics.content_distances(still, found, first)
  np.testing.assert_allclose(
    [scores[k] for k in ('acd', 'acd_consecutive', 'acd_i')],
    [0, 0, np.sqrt(2)],
  )
  turns = still.copy()
  turns[1::2] = first
  scores = metrics.content_distances(turns, found, first)
  np.testing.assert_allclose(
    [scores[k] for k in ('acd', 'acd_consecutive', 'acd_i')],
    [n / (2 * (n - 1)) * np.sqrt(2), np.sqrt(2), np.sqrt(2) / 2],
  )


def test_missed_faces_are_left_out_and_never_invented():
  rng = np.random.default_rng(0)
  f = rng.normal(size=(6, 4))
  f /= np.linalg.norm(f, axis=1, keepdims=True)
  found = np.array([1, 1, 0, 1, 1, 1], bool)
  f[2] = 0
  scores = metrics.content_distances(f, found, f[0])
  kept = f[found]
  pairs = [
    np.linalg.norm(kept[i] - kept[j]) for i in range(5) for j in range(i)
  ]
  steps = [np.linalg.norm(f[i] - f[i + 1]) for i in (0, 3, 4)]
  np.testing.assert_allclose(scores['acd'], np.mean(pairs))
  np.testing.assert_allclose(scores['acd_consecutive'], np.mean(steps))
  found[:4] = False
  assert all(
    np.isnan(v) for v in metrics.content_distances(f, found, f[0]).values()
  )


# -- sets ---------------------------------------------------------------------


def test_frechet_distance_of_gaussians_by_formula():
  # Samples whitened to have exactly the mean and covariance asked for.
  rng = np.random.default_rng(0)

  def sample(mean, root, n):
    x = rng.normal(size=(n, 3))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T)).T)
    return x @ root + mean

  a = sample([0, 0, 0], np.diag([1, 2, 3]), 50)
  b = sample([1, -2, 0], np.diag([2, 2, 1]), 40)
  # Commuting covariances: |m|^2 + sum (s_a - s_b)^2.
  expected = 5 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
  np.testing.assert_allclose(metrics.frechet_distance(a, b), expected)
  assert abs(metrics.frechet_distance(a, a[::-1])) < 1e-10


@pytest.mark.parametrize('n, m, d', ((200, 150, 6), (5, 7, 12), (40, 8, 12)))
def test_frechet_distance_is_that_of_scipy(n, m, d):
  rng = np.random.default_rng(1)
  a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
  b = rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + 0.3
  s, t = np.cov(a.T), np.cov(b.T)
  if min(n, m) > d:
    root = scipy.linalg.sqrtm(s @ t).trace().real
  else:  # sqrtm fails on singular products; their eigenvalues do not
    root = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
  expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t) - 2 * root
  np.testing.assert_allclose(
    metrics.frechet_distance(a, b), expected, rtol=1e-6, atol=1e-5
  )


def test_kernel_distance_by_hand_and_unbiased():
  a = np.array([[1.0, 0], [0, 1]])
  b = np.array([[1.0, 1], [-1, 0]])
  # k(x, y) = (x.y / 2 + 1)^3.
  k = lambda dot: (dot / 2 + 1) ** 3
  cross = np.mean([k(1), k(-1), k(1), k(0)])
  expected = k(0) + k(-1) - 2 * cross
  np.testing.assert_allclose(metrics.kernel_distance(a, b), (expected, 0))
  rng = np.random.default_rng(0)
  draw = lambda n: rng.normal(size=(n, 4))
  found = [metrics.kernel_distance(draw(40), draw(60))[0] for _ in range(30)]
  assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(30)
  assert metrics.kernel_distance(draw(50), draw(50) + 1)[0] > 0.5


def test_inception_score_of_sure_and_unsure_nets():
  sure = 50 * np.eye(8)[np.arange(80) % 8]
  mean, _ = metrics.inception_score(sure, splits=1)
  np.testing.assert_allclose(mean, 8, rtol=1e-6)
  mean, std = metrics.inception_score(np.zeros((40, 8)))
  np.testing.assert_allclose((mean, std), (1, 0), atol=1e-9)


def test_bootstrap_leaves_out_what_is_not_known():
  rng = np.random.default_rng(0)
  values = rng.normal(3, 2, 400)
  found = metrics.bootstrap(np.append(values, np.nan))
  half = 1.96 * values.std() / 20
  np.testing.assert_allclose(found['mean'], values.mean())
  np.testing.assert_allclose(found['mean'] - found['low'], half, rtol=0.15)
  np.testing.assert_allclose(found['high'] - found['mean'], half, rtol=0.15)
  assert found['n'] == 400
  assert metrics.bootstrap([np.nan])['n'] == 0
