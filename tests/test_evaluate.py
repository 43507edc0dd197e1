"""Scores against other libraries and by hand; the evaluation's rows."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hatjax import data, evaluate, metrics, runs, score_report, scores


def test_flicker_by_hand():
  time = np.arange(5.0)[None, :, None, None, None]
  still = np.zeros((1, 5, 4, 4, 3))
  assert metrics.flicker(jnp.array(still + 0.1 * time))[0] < 1e-6
  # 0, 1, 0, 1, 0 in half of the pixels: every second difference is 2.
  still[:, 1::2, :2] = 1
  np.testing.assert_allclose(metrics.flicker(jnp.array(still)), [1.0])


def test_gradient_energy_by_hand():
  image = np.zeros((1, 2, 3, 1))
  image[0, 0, 1] = 2.0
  # Down: 0, 4, 0 of three; right: 4, 4 and 0, 0 of four.
  np.testing.assert_allclose(metrics.gradient_energy(image), 4 / 3 + 8 / 4)


def test_spearman_is_that_of_scipy():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 30))
  b[3:9] = b[3]
  expected = scipy.stats.spearmanr(a, b)[0]
  np.testing.assert_allclose(metrics.spearman(a, b), expected, atol=1e-12)
  assert np.isnan(metrics.spearman(np.ones(4), np.arange(4)))


def test_temporal_mean_by_hand():
  frames = np.array([0, 30, 60, 90], np.uint8)[:, None, None, None]
  np.testing.assert_array_equal(
    scores.temporal_mean(frames).ravel(), [10, 30, 60, 80]
  )


class Fading:
  """Stands in for a run: goes from the face to white, as alpha says."""

  reads = ('image', 'label')

  def __init__(self, name):
    block = dict(name=name, image_size=16, split='everything')
    self.step, self.method = 7, self
    self.stages = (runs.Stage('hat_cgan', self, None),)
    self.config = {
      'stages': ['hat_cgan'], 'hat_cgan': {'data': block},
      'info': {'labels': ['happy', 'sad'], 'fingerprint': 'x'},
    }

  def infer(self, state, inputs):
    return (jnp.arange(inputs['driving'].shape[1])[None] / 7) ** 2  # of 8

  def animate(self, image, label, *, num_frames, sweep, alpha, seed, refine,
              num_sample_steps):
    if alpha is None:
      power = 1 if sweep == 'linear' else 3
      alpha = np.linspace(0, 1, num_frames)[None] ** power
    alpha = alpha[0][:, None, None, None]
    return np.rint((1 - alpha) * image + 255 * alpha).astype(np.uint8)[None]


def test_rows_by_hand(toy_records):
  run = Fading('frame_folders/none-16')
  found = evaluate.evaluate(
    run, 'everything', evaluate.PROTOCOLS, directory=toy_records,
    faces='none',
  )
  batches = data.make_batches(
    'frame_folders/none-16', 'everything', 16, directory=toy_records
  )
  clips = list(batches.whole_clips())
  assert found['n'] == {
    'clips': len(clips), 'subjects': len({c['subject'] for c in clips}),
    'skipped': 0,
  }
  clips = [c['video'].astype(float) for c in clips]

  def psnr(make, frames):
    scores = []
    for real in clips:
      steps = range(1, len(real) - (frames == 'inner'))
      error = [np.square(make(real)[i] - real[i]).mean() for i in steps]
      scores.append(np.mean(10 * np.log10(255**2 / np.array(error))))
    return np.mean(scores)

  def fade(power):
    def make(real):
      a = np.linspace(0, 1, len(real))[:, None, None, None] ** power
      return np.rint((1 - a) * real[0] + 255 * a)
    return make

  def blend(real):
    a = np.linspace(0, 1, len(real))[:, None, None, None]
    return np.rint((1 - a) * real[0] + a * real[-1])

  def smooth(x):
    x = np.concatenate([x[:1], x, x[-1:]])
    return np.rint((x[:-2] + x[1:-1] + x[2:]) / 3)

  for name, make, frames in (
    ('profile', fade(3), 'all'), ('linear', fade(1), 'all'),
    ('oracle', fade(2), 'all'), ('blend', blend, 'inner'),
    ('copy', lambda real: real[:1].repeat(len(real), 0), 'all'),
    ('linear temporal mean', lambda real: smooth(fade(1)(real)), 'all'),
  ):
    row = found['rows'][name]['psnr']
    np.testing.assert_allclose(row['mean'], psnr(make, frames), atol=1e-3)
    assert row['low'] <= row['mean'] <= row['high']
  # No clip of these tells its alpha: it is compared with time.
  np.testing.assert_allclose(found['clips']['alpha']['spearman'], 1.0)
  assert '| copy |' in score_report.table(found)


def test_refinements_are_compared_with_their_draft(toy_records):
  class Halving(Fading):
    """Two stages: the second halves the contrast, by its strength."""

    def animate(self, image, label, *, refine, **others):
      draft = super().animate(image, label, refine=None, **others)
      mean = draft.mean((2, 3), keepdims=True)
      soft = mean + (draft - mean) * (1 - refine / 2)
      return draft if refine == 0 else np.rint(soft).astype(np.uint8)

  run = Halving('frame_folders/none-16')
  run.stages = (*run.stages, run.stages[0])
  rows = evaluate.evaluate(
    run, 'everything', ('linear',), (0.0, 1.0), directory=toy_records,
    faces='none',
  )['rows']
  get = lambda name: rows[name]['sharpness_of_draft']['mean']
  assert get('linear refine 0') == 1
  np.testing.assert_allclose(get('linear refine 1'), 0.25, atol=0.01)
  assert 'sharpness_of_draft' not in rows['linear temporal mean']


def test_wrong_settings(toy_records):
  run = Fading('frame_folders/none-16')
  for wrong, message in (
    (dict(protocols=('guess',)), 'Choose some of: profile, linear, oracle'),
    (dict(split='nobody'), 'has no split'),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate.evaluate(run, directory=toy_records, **wrong)
  blind = types.SimpleNamespace(
    config=run.config, stages=(('a', object(), None),), step=0
  )
  with pytest.raises(ValueError, match='infers no intensity'):
    evaluate.evaluate(blind, 'everything', ('oracle',), directory=toy_records)
