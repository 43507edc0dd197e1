"""Faces driven by clips: motion on the host, streaming, sound, the command."""

import dataclasses
import fractions
import json
import types

import av
import jax
import jax.export
import numpy as np
import pytest

from configs.methods import motion_transfer as config
from hatjax import (
  driving,
  generate,
  remake,
  runs,
  score_report,
  sound,
  video,
  workdir,
)
from hatjax.methods import motion_transfer
from hatjax.nets import motion_transfer as nets

SIZE = 16


def points(seed, *shape, k=5):
  rng = np.random.default_rng(seed)
  return {
    'value': rng.uniform(-0.8, 0.8, (*shape, k, 2)),
    'jacobian': np.eye(2) + 0.2 * rng.normal(size=(*shape, k, 2, 2)),
  }


def toy_frames(n, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), 'u1')


@pytest.fixture(scope='module')
def run():
  stage = config.get_stage('tiny', SIZE, {'name': 'none'})
  stage = json.loads(stage.to_json_best_effort())
  stage['model'] |= dict(jacobian=True)
  method = runs.make_method(stage, {'labels': []}, SIZE)
  batch = runs.example_batch(stage)
  state = jax.jit(method.init)(jax.random.key(0), batch)
  # Off its zeros, so that every input matters.
  rng = np.random.default_rng(1)
  move = lambda p: p + rng.normal(0, 0.1, p.shape).astype(p.dtype)
  state = state.replace(params=jax.tree.map(move, state.params))
  folder = {
    'info': {'crop': 'given', 'trained_labels': [], 'labels': []},
    'stages': ['motion_transfer'], 'motion_transfer': stage,
  }
  return runs.Run(folder, [runs.Stage('motion_transfer', method, state)])


# -- motion -------------------------------------------------------------------


def test_a_driver_that_stays_moves_nothing():
  source, still = points(0), points(1)
  moved = driving.relative(source, still, still, scale=1.7)
  for key in source:
    np.testing.assert_allclose(moved[key], source[key], atol=1e-9)


def test_relative_motion_by_hand():
  source, first = points(0), points(1)
  clip = points(2, 3)
  moved = driving.relative(source, clip, first, scale=2.0)
  t, k = 2, 4
  np.testing.assert_allclose(
    moved['value'][t, k],
    source['value'][k] + 2 * (clip['value'][t, k] - first['value'][k]),
  )
  turn = clip['jacobian'][t, k] @ np.linalg.inv(first['jacobian'][k])
  np.testing.assert_allclose(
    moved['jacobian'][t, k], turn @ source['jacobian'][k]
  )


def test_scale_is_the_root_of_the_hulls_areas():
  square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]])
  assert driving.hull_area(square) == 1.0
  scale = driving.face_scale({'value': 3 * square - 1}, {'value': square})
  np.testing.assert_allclose(scale, 3.0, rtol=1e-6)
  flat = {'value': np.zeros((5, 2))}
  assert driving.face_scale({'value': square}, flat) == 1.0


def test_likeness_of_poses_ignores_place_and_size():
  pose = points(0)['value']
  others = np.stack([points(3)['value'], 0.4 * pose + 0.3, points(4)['value']])
  away = driving.unlikeness(pose, others)
  assert away.argmin() == 1 and away[1] < 1e-9 < away[0]


def test_smoothing_rests_and_follows():
  none = driving.Smoother(0.0, 25)
  noise = np.random.default_rng(0).normal(0, 0.002, (200, 2))
  np.testing.assert_array_equal([none(x) for x in noise], noise)
  smooth = driving.Smoother(0.8, 25)
  calm = np.stack([smooth(x) for x in noise])
  assert calm[50:].std() < 0.6 * noise[50:].std()
  # A jump of a quarter of the picture in a fifth of a second arrives.
  path = np.r_[np.zeros(20), np.linspace(0, 0.5, 5), np.full(10, 0.5)]
  smooth = driving.Smoother(0.8, 25)
  followed = np.array([smooth(np.array([x]))[0] for x in path])
  assert abs(followed[26] - 0.5) < 0.05
  # At rest the first step is (1 - strength) of the way.
  smooth = driving.Smoother(0.75, 25)
  smooth._speed = np.zeros(1)
  smooth(np.array([0.0]))
  np.testing.assert_allclose(smooth._share(smooth._cutoff), 0.25)


# -- streaming ----------------------------------------------------------------


def test_absolute_motion_equals_animate_whatever_the_batch(run):
  image, clip = toy_frames(1, 1)[0], toy_frames(7, 2)
  made = [
    np.stack(list(driving.drive(
      run, image, iter(clip), motion='absolute', batch_size=size
    ))) for size in (3, 7)
  ]
  np.testing.assert_allclose(made[0], made[1].astype(int), atol=1)
  _, method, state = run.stages[0]
  inputs = {
    'image': video.to_float(image)[None], 'driving': video.to_float(clip)[None],
  }
  want = jax.jit(method.animate, static_argnums=3)(state, inputs, None, 7)
  want = np.asarray(video.to_uint8(want))[0].astype(int)
  np.testing.assert_allclose(made[0], want, atol=1)
  assert np.abs(np.diff(want, axis=0)).max() > 3  # the driver does matter


@pytest.mark.parametrize('warp', nets.WARPS)
def test_frames_drawn_one_by_one_are_those_of_a_batch(warp, run, monkeypatch):
  _, method, state = run.stages[0]
  image, clip = video.to_float(toy_frames(2, 1)), toy_frames(8, 2)
  inputs = {
    'image': image,
    'driving': video.to_float(clip).reshape(2, 4, SIZE, SIZE, 3),
  }
  if warp != method.warp:
    method = dataclasses.replace(method, warp=warp)
    batch = {'video': inputs['driving']}
    state = jax.jit(method.init)(jax.random.key(0), batch)
  drawn, infer = [], motion_transfer.MotionTransfer._infer

  def spy(self, name, state, *args, method=None):
    if method == 'draw':
      drawn.append(len(jax.tree.leaves(args)[0]))
    return infer(self, name, state, *args, method=method)

  monkeypatch.setattr(motion_transfer.MotionTransfer, '_infer', spy)

  def make(few):
    monkeypatch.setattr(motion_transfer, 'FEW_PIXELS', few * SIZE**2)
    return jax.jit(lambda state: method.animate(state, inputs, None, 4))(state)

  together = make(4)
  for few in (1, 2, 3):  # 4 frames are not shared by threes
    np.testing.assert_allclose(make(few), together, atol=1e-5)
  assert drawn == [2 * few for few in (4, 1, 2, 2)]


def test_frames_drawn_at_a_time_divide_their_number():
  share = lambda length: [motion_transfer._share(length, n) for n in (2, 3, 8)]
  assert share(15) == [1, 3, 5] and share(16) == [2, 2, 8]
  assert share(7) == [1, 1, 7]
  (unknown,) = jax.export.symbolic_shape('t')
  assert share(unknown) == [1, 1, unknown]


def test_relative_motion_starts_at_the_face_itself(run):
  image, clip = toy_frames(1, 1)[0], toy_frames(4, 2)
  driver = driving.Driver(run, image, 2)
  itself = driver.render({k: v[None] for k, v in driver.source.items()})[0]
  made = list(driving.drive(run, image, clip, driver=driver))
  np.testing.assert_allclose(made[0], itself.astype(int), atol=1)
  index, first = driving.best_frame(driver, clip)
  made = list(driving.drive(
    run, image, clip, driver=driver, first=first, adapt_scale=False
  ))
  np.testing.assert_allclose(made[index], itself.astype(int), atol=1)
  with pytest.raises(ValueError, match='holds no frames'):
    driving.best_frame(driver, [])


def test_frames_are_asked_for_as_they_are_used(run):
  asked = []

  def endless():
    while True:
      asked.append(1)
      yield toy_frames(1, len(asked) % 3)[0]

  made = driving.drive(run, toy_frames(1)[0], endless(), batch_size=2)
  for _ in range(40):
    next(made)
  assert len(asked) <= 40 + 2


def test_beside_shows_face_driver_and_result(run):
  image, clip = toy_frames(1, 1)[0], toy_frames(2, 2)
  plain, shown = (
    list(driving.drive(run, image, clip, batch_size=2, beside=beside))
    for beside in (False, True)
  )
  np.testing.assert_array_equal(
    shown[1], np.concatenate([image, clip[1], plain[1]], 1)
  )


def test_a_report_shows_photos_that_its_clips_drive(run, tmp_path):
  image, clip = toy_frames(1, 1)[0], toy_frames(3, 2)
  video.write_image(tmp_path / 'art.png', image)
  faces = remake.read_faces(types.SimpleNamespace(
    stages=run.stages, image_size=SIZE, crop='none'
  ), [tmp_path / 'art.png', tmp_path / 'art.png'])
  assert list(faces) == ['art', 'art-2']
  np.testing.assert_array_equal(faces['art'], image)
  faces.pop('art-2')
  gallery = score_report.Gallery(tmp_path)
  clips = [{'id': 'a', 'video': clip}]
  for shown in remake.drive_faces(run, faces, clips):
    gallery.add(*shown)
  (shown, made), = gallery.clips
  assert shown['id'] == 'art, driven by a'
  want = np.stack(list(driving.drive(run, image, clip)))
  np.testing.assert_array_equal(made['driven'], want)
  result = {
    'rows': {}, 'clips': {}, 'not_computed': {}, 'skipped': [],
    'n': {'clips': 0, 'subjects': 0, 'skipped': 0},
    'settings': {'workdir': 'x', 'ssim': 'gaussian', 'extractors': {}},
  }
  score_report.write(result, gallery, tmp_path / 'out')
  for row, frames in (('driving', clip), ('driven', want)):
    path = tmp_path / 'out' / 'strips' / f'art_driven_by_a_{row}.png'
    np.testing.assert_array_equal(video.read_image(path), video.strip(frames))


def test_runs_that_are_not_driven_say_so(run):
  method = types.SimpleNamespace(reads=('image', 'label'))
  undriven = types.SimpleNamespace(
    stages=[runs.Stage('hat_cgan', method, None)]
  )
  with pytest.raises(ValueError, match='no clip drives this run'):
    remake.read_faces(undriven, ['me.jpg'])
  assert remake.read_faces(undriven, []) == {}
  with pytest.raises(ValueError, match='Pass --driving clip.mp4'):
    run.animate(toy_frames(1))
  with pytest.raises(ValueError, match=r'uint8 \[16, 16, 3\]'):
    driving.Driver(run, np.zeros((8, 8, 3), np.uint8))
  with pytest.raises(ValueError, match='Unknown motion'):
    next(driving.drive(run, toy_frames(1)[0], [], motion='free'))


# -- sound --------------------------------------------------------------------


def write_with_sound(path, frames, fps=20, codec='aac', form=None):
  """A clip with a tone of 440 Hz."""
  with av.open(str(path), 'w', format=form) as out:
    pictures = out.add_stream('libx264', rate=fps)
    pictures.width = pictures.height = frames.shape[1]
    pictures.pix_fmt = 'yuv420p'
    tone = out.add_stream(codec, rate=16_000, layout='mono')
    for frame in frames:
      out.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, 'rgb24')))
    out.mux(pictures.encode())
    time = np.arange(16_000 * len(frames) // fps) / 16_000
    wave = np.int16(9000 * np.sin(2 * np.pi * 440 * time))
    for start in range(0, len(wave), 1024):
      part = av.AudioFrame.from_ndarray(
        wave[None, start : start + 1024], format='s16', layout='mono'
      )
      part.sample_rate, part.pts = 16_000, start
      part.time_base = fractions.Fraction(1, 16_000)
      out.mux(tone.encode(part))
    out.mux(tone.encode())


def read_tone(path):
  """(length in seconds, loudest frequency in Hz) of a file's sound."""
  with av.open(str(path)) as container:
    rate = container.streams.audio[0].rate
    wave = np.concatenate([
      frame.to_ndarray().mean(0) if frame.format.is_planar
      else frame.to_ndarray()[0] for frame in container.decode(audio=0)
    ])
  spectrum = np.abs(np.fft.rfft(wave))
  return len(wave) / rate, spectrum.argmax() * rate / len(wave)


@pytest.mark.parametrize('name, codec', (
  ('a.mp4', 'aac'), ('a.avi', 'pcm_s16le'),
))
def test_sound_is_kept_and_pictures_stay(tmp_path, name, codec):
  source, target = tmp_path / name, tmp_path / 'out.mp4'
  write_with_sound(source, toy_frames(20).repeat(2, 1).repeat(2, 2), 20, codec)
  video.write_video(str(target), toy_frames(20, 5), 20)
  before, fps = video.read_video(target)
  assert sound.copy(source, target)
  after, fps_after = video.read_video(target)
  np.testing.assert_array_equal(after, before)
  assert fps_after == fps == 20
  length, tone = read_tone(target)
  assert abs(length - 1.0) < 0.15 and abs(tone - 440) < 5
  assert [p.name for p in tmp_path.iterdir() if 'part' in p.name] == []


def test_clips_without_sound_change_nothing(tmp_path):
  path = tmp_path / 'out.mp4'
  video.write_video(str(path), toy_frames(3))
  before = path.read_bytes()
  assert not sound.copy(path, path) and not sound.copy(tmp_path, path)
  assert path.read_bytes() == before


# -- the command --------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(run, tmp_path_factory):
  """The run on disk."""
  folder = tmp_path_factory.mktemp('run')
  stage = run.config['motion_transfer']
  full = {'seed': 0, **run.config, 'motion_transfer': stage}
  (folder / 'config.json').write_text(json.dumps(full))
  disk = workdir.Run(folder / 'motion_transfer')
  disk.save(0, run.state)
  disk.close()
  return folder


def test_generate_keeps_rate_sound_and_length(saved, tmp_path, capsys):
  face, clip = tmp_path / 'me.png', tmp_path / 'clip.mp4'
  video.write_image(face, toy_frames(1, 3)[0])
  write_with_sound(clip, toy_frames(11).repeat(2, 1).repeat(2, 2), 10)
  out = tmp_path / 'out.mp4'
  arguments = [
    '--workdir', str(saved), '--image', str(face), '--driving', str(clip),
    '--crop', 'none', '--out', str(out), '--batch_size', '4',
  ]
  assert generate.main(arguments) == 0
  said = capsys.readouterr()
  assert '11 frames' in said.out + said.err
  frames, fps = video.read_video(out)
  assert (frames.shape, fps) == ((11, SIZE, SIZE, 3), 10)
  assert abs(read_tone(out)[1] - 440) < 10
  more = ['--best_start', '--smooth', '0.5', '--side_by_side', '--fps', '5']
  assert generate.main([*arguments, *more]) == 0
  frames, fps = video.read_video(out)
  assert (frames.shape, fps) == ((11, SIZE, 3 * SIZE, 3), 5)
  assert generate.main([*arguments, '--smooth', '1']) == 1
  assert '--smooth' in capsys.readouterr().err
  assert out.exists()
