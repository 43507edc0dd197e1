"""Super-resolution: the net, the damage it learns from, the stage."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.methods import super_resolution as config
from hatjax import methods, runs, sharpening, validation, video
from hatjax.methods import super_resolution
from hatjax.nets import super_resolution as nets


def make(preset='tiny', size=32, **changes):
  stage = config.get_stage(preset, size, {'name': 'none'})
  stage = json.loads(stage.to_json_best_effort())
  stage['model'] |= changes
  return methods.make(stage, image_size=stage['model']['image_size'])


def toy_clips(size=32, frames=3):
  y, x = np.mgrid[:size, :size] / size
  wave = np.stack([np.sin(9 * x + k + 5 * y) for k in range(frames)])
  colours = np.array([0.8, 0.3, -0.5])
  return jnp.asarray(wave[None, ..., None] * colours, jnp.float32)


@pytest.mark.parametrize('scale', (1, 2))
def test_starts_as_the_bicubic_enlargement(scale):
  net = nets.SuperResolution(2, scale)
  x = toy_clips(32)[0, :1]
  params = jax.jit(net.init)(jax.random.key(0), x)
  out = jax.jit(net.apply)(params, x)
  want = np.asarray(x)
  if scale == 2:
    want = jax.image.resize(x, (1, 64, 64, 3), 'cubic')
  np.testing.assert_array_equal(out, want)
  # Five blocks down, as many up, and one more that enlarges.
  names = params['params']
  count = lambda prefix: sum(name.startswith(prefix) for name in names)
  assert (count('down_'), count('up_')) == (5, 5)
  assert ('enlarge' in names) == (scale == 2)
  assert {v['kernel'].shape[0] for v in names.values()} == {3}


def test_jpeg_is_as_far_from_the_picture_as_pillows():
  image = video.to_uint8(np.asarray(toy_clips(64)[0, 0]))
  for quality in (40, 60, 90):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'jpeg', quality=quality, subsampling=0)
    want = np.asarray(Image.open(file), np.float32)
    got = jax.jit(super_resolution.jpeg)(
      jnp.asarray(video.to_float(image))[None], jnp.array([quality])
    )[0]
    got = 127.5 * (np.asarray(got) + 1)
    # Pillow rounds colours to integers on the way, twice.
    assert np.abs(got - want).mean() < 1.2
    assert np.abs(want - image).mean() > 0.3


def test_degraded_frames_lose_detail_by_clip():
  method = make(shrink=4)
  clips = jnp.repeat(toy_clips(), 2, 0)
  poor = jax.jit(method.degrade)(clips, jax.random.key(0))
  assert poor.shape == clips.shape and np.abs(poor).max() <= 1
  # Same clip, another quality.
  assert np.abs(poor[0] - poor[1]).max() > 1e-3
  assert np.abs(poor - clips).mean() > 0.01


def test_training_restores_what_was_lost():
  method = make(width=4, jpeg_quality=(60, 60))
  batch = {'video': toy_clips()}
  state = jax.jit(method.init)(jax.random.key(0), batch)
  step = jax.jit(method.train_step)
  for _ in range(60):
    state, metrics = step(state, batch, jax.random.key(1))
  assert metrics['loss/l1'] < 0.7 * metrics['loss/l1_bicubic']


def test_twice_the_size_from_the_stage_before():
  method = make('double', 64, width=2, mode='drafts')
  assert (method.input_size, method.needs_draft) == (32, True)
  batch = {'video': toy_clips(64), 'draft': toy_clips(32)}
  state = jax.jit(method.init)(jax.random.key(0), batch)
  new, metrics = jax.jit(method.train_step)(state, batch, jax.random.key(1))
  assert np.isfinite(metrics['loss/l1'])
  frames = jax.jit(method.animate, static_argnums=3)(
    new, {'draft': batch['draft']}, None, 3
  )
  assert frames.shape == (1, 3, 64, 64, 3)
  runs.check_cascade([
    ('before', dataclasses.replace(
      method, image_size=32, scale=1, mode='degraded'
    )),
    ('super_resolution', method),
  ])
  with pytest.raises(ValueError, match='super_resolution refines 32'):
    large = dataclasses.replace(method, mode='degraded')
    runs.check_cascade([('before', large), ('super_resolution', method)])
  with pytest.raises(ValueError, match="'drafts': .*set mode to 'degraded'"):
    runs.check_cascade([('super_resolution', method)])


def test_scores_are_of_degraded_clips():
  method = make(jpeg_quality=(90, 90))
  batch = {'video': toy_clips()}
  state = jax.jit(method.init)(jax.random.key(0), batch)
  clip = video.to_uint8(np.asarray(toy_clips()[0]))
  scores, shown = validation.score_clips(
    validation.make_scorer(method), state,
    [{'id': 'a', 'label': 0, 'video': clip}], 3,
  )
  # At the start it returns what it was given.
  assert 10 < scores['val/psnr_draft'] < 50
  np.testing.assert_allclose(
    scores['val/psnr'], scores['val/psnr_draft'], atol=0.1
  )
  assert len(shown[0]) == 3


def test_a_run_that_ends_in_it_sharpens_what_it_makes():
  method = make('double', 64, width=2)
  state = jax.jit(method.init)(jax.random.key(0), {'video': toy_clips(64)})

  class Before:
    labels, image_size, crop, method = ('happy',), 32, 'face', None

    def animate(self, images, labels=None, *, num_frames=2):
      return np.repeat(images[:, None], num_frames, 1)

  stage = runs.Stage('super_resolution', method, state)
  run = sharpening.Sharpened(Before(), stage, {'info': {'crop': 'none'}})
  assert (run.labels, run.image_size, run.crop) == (('happy',), 32, 'face')
  image = video.to_uint8(np.asarray(toy_clips(32)[0, :1]))
  clips = run.animate(image, 'happy', num_frames=11)
  assert clips.shape == (1, 11, 64, 64, 3)
  want = jax.image.resize(video.to_float(image), (1, 64, 64, 3), 'cubic')
  np.testing.assert_allclose(
    clips[0, 10], video.to_uint8(np.asarray(want[0])), atol=1
  )
  alone = sharpening.Sharpened(None, stage, {'info': {'crop': 'none'}})
  assert len(list(alone.refine(image, strength=None))) == 1
  with pytest.raises(ValueError, match='no stage before super_resolution'):
    alone.animate(image)


@pytest.mark.parametrize('changes, message', [
  (dict(scale=3), 'model.scale'), (dict(mode='noise'), 'degraded, drafts'),
  (dict(jpeg_quality=(90, 40)), 'jpeg_quality'),
  (dict(image_size=48), 'multiple of 32'),
])
def test_wrong_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)
