"""Synthetic faces: what is said of a frame is true of it; and the builder."""

import dataclasses
import json

import cv2
import numpy as np
import pytest

from hatjax import data, faces, prepare, synthetic_faces
from hatjax import records as records_lib
from hatjax.synthetic_faces import actions, identity

SIZE = 128
PEOPLE = (3, 7, 12)
CORNERS, BROWS = (48, 54), range(17, 27)


def shape_of(landmarks):
  """Points [68, 2] without the head's shift, tilt and size."""
  eyes = landmarks[36:42].mean(0), landmarks[42:48].mean(0)
  x = (eyes[1] - eyes[0]) / np.sum((eyes[1] - eyes[0]) ** 2)
  y = np.array([-x[1], x[0]])
  return (landmarks - (eyes[0] + eyes[1]) / 2) @ np.stack([x, y], 1)


def overlap(a, b):
  return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope='module')
def clips():
  """{expression: [clips of PEOPLE]}, 12 frames."""
  return {
    name: [synthetic_faces.render_clip(k, name, 12, SIZE) for k in PEOPLE]
    for name in (*synthetic_faces.EXPRESSIONS, 'neutral')
  }


def change(clip, points, axis=1):
  """How far points went along an axis, in distances between the eyes."""
  first, last = (shape_of(clip['landmarks'][t]) for t in (0, -1))
  return (last - first)[list(points), axis].mean()


def test_shapes_types_and_determinism(clips):
  clip = clips['happy'][0]
  assert {k: (v.shape, v.dtype.name) for k, v in clip.items()} == {
    'video': ((12, SIZE, SIZE, 3), 'uint8'),
    'lip_mask': ((12, SIZE, SIZE), 'uint8'),
    'landmarks': ((12, 68, 2), 'float32'),
    'alpha': ((12,), 'float32'),
  }
  # Painted anew, and from the Identity instead of its seed.
  synthetic_faces._puppet.cache_clear()
  face = synthetic_faces.sample_identity(PEOPLE[0])
  again = synthetic_faces.render_clip(face, 'happy', 12, SIZE)
  for key in clip:
    assert again[key].tobytes() == clip[key].tobytes(), key
  other = synthetic_faces.render_clip(face, 'happy', 12, SIZE, clip_seed=1)
  assert np.abs(other['landmarks'] - clip['landmarks']).max() > 0.5
  assert set(np.unique(clip['lip_mask'])) == {0, 255}


def test_alpha_rises_from_neutral_to_apex(clips):
  for name in synthetic_faces.EXPRESSIONS:
    for clip in clips[name]:
      alpha = clip['alpha']
      assert alpha[0] == 0 and alpha[-1] == 1
      assert (np.diff(alpha) >= 0).all() and 0.2 < alpha.mean() < 0.8
  assert not clips['neutral'][0]['alpha'].any()
  full = synthetic_faces.render_clip(3, 'sad', 21, 64, half='full')
  alpha, top = full['alpha'], full['alpha'].argmax()
  assert alpha[0] == alpha[-1] == 0 and alpha[top] == 1 and 5 < top < 15
  assert (np.diff(alpha[: top + 1]) >= 0).all()
  assert (np.diff(alpha[top:]) <= 0).all()
  there, back = (shape_of(full['landmarks'][t]) for t in (0, -1))
  np.testing.assert_allclose(there, back, atol=0.02)


def test_landmarks_and_lip_masks_belong_together(clips):
  for of_one in clips.values():
    for clip in of_one:
      points = clip['landmarks']
      assert 0 < points.min() and points.max() < SIZE - 1
      for mask, p in zip(clip['lip_mask'], points):
        filled = faces.lip_mask_from_landmarks(p, mask.shape)
        assert overlap(mask > 0, filled > 0) > 0.97  # but for rounding 1
        assert 0.002 < (mask > 0).mean() < 0.06


def test_landmarks_lie_on_what_is_drawn():
  """Dark irises between the lids, red lips in the mask, dark brows."""
  face = dataclasses.replace(
    synthetic_faces.sample_identity(3), grain=0.0, iris=(10.0, 10.0, 10.0),
    lip=(200.0, 30.0, 60.0), hair=(20.0, 15.0, 10.0), glasses='',
    style='bald', beard='none', skin=(225.0, 180.0, 150.0), exposure=1.0,
    light=(0.0, -0.4, 0.9),
  )
  overlaps = []
  for name in ('surprise', 'sad', 'anger'):
    clip = synthetic_faces.render_clip(face, name, 6, 256)
    image = clip['video'][-1].astype(int)
    p, lips = clip['landmarks'][-1], clip['lip_mask'][-1] > 0
    at = lambda q, image=image: image[tuple(np.rint(q).astype(int)[::-1])]
    cheek = at(0.5 * (p[2] + p[31])).sum()
    for eye in (p[36:42], p[42:48]):
      x, y = np.rint(eye.mean(0)).astype(int)
      pupil = image[y - 2 : y + 3, x - 2 : x + 3].sum(-1)
      assert np.median(pupil) < 0.4 * cheek
    for brow in (p[18:21], p[23:26]):
      assert np.mean([at(q).sum() for q in brow]) < 0.72 * cheek
    hue = image[..., 0] / image.sum(-1)
    near = cv2.dilate(lips.astype(np.uint8), np.ones((25, 25))) > 0
    cut = 0.5 * (hue[lips].mean() + hue[near & ~lips].mean())
    red = near & (hue > cut)
    overlaps.append(overlap(red, lips))
  assert min(overlaps) > 0.6 and np.mean(overlaps) > 0.7


def test_expressions_move_what_they_should(clips):
  gap = lambda clip, t: np.subtract(*clip['landmarks'][t, [66, 62], 1])
  for k in range(len(PEOPLE)):
    surprise, happy, sad, anger, fear = (
      clips[name][k] for name in ('surprise', 'happy', 'sad', 'anger', 'fear'))
    gaps = [gap(surprise, t) for t in range(12)]
    assert gaps[0] == pytest.approx(0, abs=0.1) and gaps[-1] > 0.06 * SIZE
    assert np.corrcoef(gaps, surprise['alpha'])[0, 1] > 0.95
    # Lower is more; a face nods, too, which moves its features alike.
    nose = lambda clip, points: change(clip, points) - change(clip, [30])
    assert nose(happy, CORNERS) < -0.06 and nose(sad, CORNERS) > 0.05
    assert change(anger, BROWS) > 0.02
    assert change(surprise, BROWS) < -0.06
    assert change(sad, [21, 22]) - change(sad, [17, 26]) < -0.025
    widths = [np.ptp(shape_of(c['landmarks'][-1])[48:60, 0])
              / np.ptp(shape_of(c['landmarks'][0])[48:60, 0])
              for c in (happy, fear, surprise)]
    assert widths[0] > 1.1 and widths[1] > 1.05 and widths[2] < 1.0
    opening = lambda clip, t: np.subtract(
      *shape_of(clip['landmarks'][t])[[41, 37], 1])
    assert opening(surprise, -1) > 1.15 * opening(surprise, 0)
    assert opening(happy, -1) < 0.85 * opening(happy, 0)


def test_brows_move_in_the_pixels_as_in_the_landmarks():
  """Where a brow is darkest goes with its landmarks."""
  face = dataclasses.replace(
    synthetic_faces.sample_identity(3), hair=(20.0, 15.0, 10.0), grain=0.0,
    glasses='', style='bald', brow_density=0.8, skin=(225.0, 180.0, 150.0))
  for name in ('anger', 'surprise'):
    clip = synthetic_faces.render_clip(face, name, 8, 256)
    soft = [cv2.GaussianBlur(f, (0, 0), 3).sum(-1) for f in clip['video']]
    for image, p in zip(soft, clip['landmarks']):
      for x, y in p[[19, 24]].round().astype(int):
        assert abs(image[y - 9 : y + 10, x].argmin() - 9) <= 3, name
    said = clip['landmarks'][-1, 19, 1] - clip['landmarks'][0, 19, 1]
    assert abs(said) > 8


def test_copying_is_wrong_and_so_is_cross_fading(clips):
  psnr = lambda a, b: 10 * np.log10(255**2 / np.mean((a - b) ** 2))
  copied, faded = [], []
  for name in synthetic_faces.EXPRESSIONS:
    for clip in clips[name]:
      video, alpha = clip['video'].astype(float), clip['alpha']
      copied.append(psnr(video[0], video[-1]))
      middle = np.abs(alpha - 0.5).argmin()
      blend = video[0] + alpha[middle] * (video[-1] - video[0])
      faded.append(psnr(blend, video[middle]))
  assert 19 < np.mean(copied) < 23.5
  assert 24 < np.mean(faded) < 31
  # Unlike expressions, the camera's noise is small.
  still = synthetic_faces.render_clip(3, 'neutral', 2, SIZE)['video']
  assert psnr(still[0].astype(float), still[1]) > 26


def test_people_differ_and_are_framed_alike():
  firsts = np.stack([
    synthetic_faces.render_clip(k, 'neutral', 1, 64)['video'][0]
    for k in range(9)
  ])
  far = np.abs(firsts[:, None].astype(int) - firsts[None]).mean((2, 3, 4))
  assert far[~np.eye(9, dtype=bool)].min() > 12
  boxes = [faces.detect_face(cv2.resize(f, (SIZE, SIZE))) for f in firsts]
  assert sum(box is not None for box in boxes) >= 8
  box = np.mean([box for box in boxes if box], 0) / SIZE
  # Grown by MARGIN on every side this is nearly the whole picture.
  np.testing.assert_allclose(box, [1 / 6, 1 / 6, 5 / 6, 5 / 6], atol=0.04)
  points = [identity.neutral_landmarks(synthetic_faces.sample_identity(k))
            for k in range(24)]
  assert np.std(points, 0).max() > 0.012
  kinds = [synthetic_faces.sample_identity(k) for k in range(200)]
  for field, least in (('style', 8), ('beard', 5), ('glasses', 4), ('room', 4)):
    assert len({getattr(face, field) for face in kinds}) >= least


def test_grey_and_every_size_show_the_same():
  for seed, name in ((3, 'surprise'), (12, 'happy')):
    face = dataclasses.replace(synthetic_faces.sample_identity(seed), grain=0.0)
    small, large, grey = (
      synthetic_faces.render_clip(face, name, 3, size, grey=grey)
      for size, grey in ((128, False), (256, False), (128, True)))
    halved = np.stack([
      cv2.resize(f, (128, 128), interpolation=cv2.INTER_AREA)
      for f in large['video']
    ])
    away = np.abs(halved.astype(int) - small['video'])
    assert away.mean() < 1.5 and np.percentile(away, 99) < 14
    np.testing.assert_allclose(
      (large['landmarks'] + 0.5) / 2 - 0.5, small['landmarks'], atol=1e-3)
    for channel in (1, 2):
      np.testing.assert_array_equal(grey['video'][..., channel],
                                    grey['video'][..., 0])
    luma = small['video'] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma - grey['video'][..., 0]).mean() < 1
    np.testing.assert_array_equal(grey['landmarks'], small['landmarks'])
  odd = synthetic_faces.render_clip(3, 'fear', 2, 50)
  assert odd['video'].shape == (2, 50, 50, 3)


def test_settings_are_checked():
  for kwargs, message in (
    ({'expression': 'joyous'}, "Unknown expression 'joyous'"),
    ({'half': 'offset'}, "half is 'offset'"),
    ({'size': 8}, '16 or more'), ({'num_frames': 0}, '1 or more'),
  ):
    call = {'identity': 0, 'expression': 'sad', 'num_frames': 2, 'size': 32}
    with pytest.raises(ValueError, match=message):
      synthetic_faces.render_clip(**{**call, **kwargs})


def test_actions_mirror():
  assert (actions.MIRROR[actions.MIRROR] == np.arange(82)).all()
  moves = actions.displacements().sum(1)  # both sides at full strength
  np.testing.assert_allclose(moves, moves[:, actions.MIRROR] * (-1, 1))
  for prototype in actions.PROTOTYPES.values():
    assert set(prototype) <= set(actions.UNITS)


SMALL = ('--num_identities', '5', '--num_frames', '4', '--image_size', '32')


def run(data_dir, *options):
  return prepare.main(['synthetic', '--data_dir', str(data_dir), *options])


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """data_dir with synthetic/32-i5-f4-s0, made on first use."""
  folder = tmp_path_factory.mktemp('records')
  assert prepare.ensure_synthetic('synthetic/32-i5-f4-s0', folder) is True
  return folder


def test_records_hold_what_was_drawn(records):
  stored = records_lib.Records('synthetic/32-i5-f4-s0', records)
  assert stored.labels == synthetic_faces.EXPRESSIONS
  assert len(stored.clips) == 30
  assert stored.metadata['options']['crop'] == 'face'
  for name in ('0000_happy', '0004_surprise'):
    person, label = name.split('_')
    drawn = synthetic_faces.render_clip(int(person), label, 4, 32)
    video, masks = stored.read(stored.clips[name], range(4))
    np.testing.assert_array_equal(video, drawn['video'])
    np.testing.assert_array_equal(masks[..., 0] * 255, drawn['lip_mask'])
    example = stored._source[stored.clips[name].index]
    np.testing.assert_array_equal(example['alpha'], drawn['alpha'])
    np.testing.assert_array_equal(example['landmarks'], drawn['landmarks'])
    assert example['subject'].decode() == person


def test_splits_have_no_person_in_common(records):
  stored = records_lib.Records('synthetic/32-i5-f4-s0', records)
  splits, clips = stored.metadata['splits'], stored.metadata['clips']
  who = [{clips[i]['subject'] for i in splits[s]}
         for s in ('train', 'val', 'test')]
  assert [sorted(w) for w in who] == [['0000', '0001', '0002'], ['0003'],
                                      ['0004']]
  assert len(splits['everything']) == 30 and splits['stills'] == []
  both = splits['by_video_train'] + splits['by_video_test']
  assert sorted(both) == splits['everything']
  module, _, _ = prepare.load_builder('synthetic')
  whole = {c.id: {'subject': c.subject, 'still': False}
           for c in module.scan(module.complete({})).clips}
  splits = module.name_splits(whole)
  assert [len(splits[s]) // 6 for s in ('train', 'val', 'test')] == [48, 4, 12]
  assert module.config_name(module.complete({})) == 'default'
  assert module.seconds(module.complete({})) < 120


def test_batches(records):
  batches = data.make_batches(
    'synthetic/32-i5-f4-s0', batch_size=2, image_size=32, num_frames=3,
    resident='no', directory=records,
  )
  batch = next(batches.iterate())
  assert batch['video'].shape == (2, 4, 32, 32, 3)
  assert batch['lip_mask'].any((1, 2, 3, 4)).all()
  assert (batch['time'][:, 0] == 0).all()


def test_made_once_and_again_only_when_asked(records, tmp_path, capsys):
  folder = records / 'synthetic' / '32-i5-f4-s0' / '1.0.0'
  made = (folder / 'metadata.json').stat().st_mtime_ns
  assert prepare.ensure_synthetic('synthetic/32-i5-f4-s0', records) is False
  assert prepare.ensure_synthetic('ck_plus/face-64', tmp_path) is False
  assert capsys.readouterr().err == '' and not list(tmp_path.iterdir())
  assert run(records, *SMALL) == 0
  assert 'already prepared' in capsys.readouterr().out
  assert (folder / 'metadata.json').stat().st_mtime_ns == made
  metadata = json.loads((folder / 'metadata.json').read_text())
  # Older drawing code, other options.
  metadata['raw_digest'] = 'older'
  (folder / 'metadata.json').write_text(json.dumps(metadata))
  assert prepare.ensure_synthetic('synthetic/32-i5-f4-s0', records) is False
  assert 'was drawn by other code' in capsys.readouterr().err
  few = ('--num_identities', '1', *SMALL[2:])
  assert run(records, *few, '--grey', '--seed', '3') == 0
  names = {path.name for path in (records / 'synthetic').iterdir()}
  assert names == {'32-i5-f4-s0', '32-grey-i1-f4-s3'}
  grey = records_lib.Records('synthetic/32-grey-i1-f4-s3', records)
  video, _ = grey.read(grey.clips['0000_sad'], [3])
  drawn = synthetic_faces.render_clip(30_000, 'sad', 4, 32, grey=True)
  np.testing.assert_array_equal(video[0], drawn['video'][3])
  assert run(records, *SMALL) == 0
  captured = capsys.readouterr()
  assert 'has changed, preparing again' in captured.err
  assert f'fingerprint: {metadata["fingerprint"]}' in captured.out


def write_mug_layout(root, subjects, names, size=200, num_frames=36):
  """MUG's raw layout with takes that go to the apex and back.

  Args:
    root: becomes the folder of the subjects.
    subjects: names of three digits, as seeds of their faces, too.
    names: {MUG's expression: ours}.
  """
  for subject in subjects:
    for folder, name in names.items():
      take = root / subject / folder / 'take000'
      take.mkdir(parents=True)
      clip = synthetic_faces.render_clip(
        int(subject), name, num_frames, size, half='full')
      for t, frame in enumerate(clip['video']):
        cv2.imwrite(str(take / f'img_{t:04d}.jpg'), frame[..., ::-1])


def test_as_raw_data_of_mug(tmp_path):
  write_mug_layout(tmp_path / 'raw', ('001', '007'), {'surprise': 'surprise'})
  assert prepare.main([
    'mug', '--raw', str(tmp_path / 'raw'), '--data_dir', str(tmp_path / 'd'),
    '--image_size', '64', '--strict',
  ]) == 0
  stored = records_lib.Records('mug/face-64', tmp_path / 'd')
  assert {c.num_frames for c in stored.clips.values()} == {18}
  for subject in ('001', '007'):
    video, masks = stored.read(
      stored.clips[f'{subject}_surprise_take000'], [0, 17])
    # Cropped as photographs are, the face fills the picture as before.
    drawn = synthetic_faces.render_clip(int(subject), 'surprise', 1, 64)
    seen = [np.argwhere(m).mean(0) for m in (masks[0, ..., 0],
                                             drawn['lip_mask'][0])]
    assert np.abs(seen[0] - seen[1]).max() < 4
    assert np.abs(video[1].astype(int) - video[0]).mean() > 5


def test_wrong_options(tmp_path, capsys):
  for options, message in (
    (('--raw', 'x'), '--raw is for data that are read'),
    (('--crop', 'none'), '--crop is for data that are read'),
    (('--num_frames', '1'), '--num_frames is 1. Use 2 to 10000'),
    (('--image_size', '0'), '--image_size is 0. Use 16'),
  ):
    assert run(tmp_path, *options) == 1
    assert message in capsys.readouterr().err
  assert prepare.main(['ck_plus', '--data_dir', str(tmp_path)]) == 1
  assert 'ck_plus is read from a folder. Pass it' in capsys.readouterr().err
  with pytest.raises(ValueError, match="no synthetic faces 'face-64'"):
    prepare.ensure_synthetic('synthetic/face-64', tmp_path)
  assert not list(tmp_path.iterdir())
