"""Clips that stay where they are: exact frames, tracks, splits, records."""

import json

import cv2
import numpy as np
import pytest

from hatjax import clips, data, faces, prepare, records, video


def numbered(n, size=32):
  """Frames that tell their number by their brightness, 3 levels apart."""
  frames = np.full((n, size, size, 3), 20, np.uint8)
  frames += (3 * np.arange(n, dtype=np.uint8))[:, None, None, None]
  return frames


def number_of(frame):
  return round((float(frame.mean()) - 20) / 3)


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
  """FOMM's layout: mp4 files and, under the same ending, folders."""
  root = tmp_path_factory.mktemp('vox')
  for part, people in (('train', ('id1', 'id2', 'id3')), ('test', ('id9',))):
    for who in people:
      name = f'{part}/{who}#vid#000000#000070.mp4'
      if who == 'id2':
        name += '/'
      video.write_video(f'{root}/{name}', numbered(70))
  folder = root / 'train' / 'id2#vid#000000#000070.mp4'
  for t, path in enumerate(sorted(folder.iterdir())):
    path.rename(folder / f'{t:07d}.png')
  (root / 'train' / 'notes.txt').write_text('not a clip')
  return root


@pytest.fixture(scope='module')
def prepared(raw, tmp_path_factory):
  directory = tmp_path_factory.mktemp('records')
  arguments = ['voxceleb', '--raw', str(raw), '--data_dir', str(directory)]
  assert prepare.main([*arguments, '--image_size', '16']) == 0
  return directory


def test_every_frame_is_found_again_in_any_order(raw):
  for path in sorted((raw / 'train').glob('id*')):
    times = [time for time, _ in clips.scan(path)]
    assert len(times) == 70
    for wanted in ([69], [0, 1, 2], [60, 3, 3, 64], range(0, 70, 9)):
      found = list(map(number_of, clips.read(path, wanted, times)))
      assert found == list(wanted), path


def test_another_clip_under_the_name_is_noticed(raw, tmp_path):
  path = tmp_path / 'a.mp4'
  video.write_video(str(path), numbered(9))
  times = [time for time, _ in clips.scan(path)]
  video.write_video(str(path), numbered(5))
  with pytest.raises(ValueError, match='is not the clip that was prepared'):
    list(clips.read(path, [8], times))
  path.unlink()
  with pytest.raises(ValueError, match='is gone'):
    list(clips.read(path, [0], times))


def test_splits_are_the_folders_and_people_are_in_one(prepared):
  found = records.Records('voxceleb/given-16', prepared)
  who = {
    name: {clip.subject_name for clip in found.split(name)}
    for name in ('train', 'val', 'test')
  }
  assert who['test'] == {'id9'} and len(who['val']) == 1
  assert who['train'] | who['val'] == {'id1', 'id2', 'id3'}
  assert not who['train'] & who['val']


def test_late_frames_are_not_among_the_early_ones(prepared):
  found = records.Records('voxceleb/given-16', prepared)
  early, late = (
    next(c for c in found.split(f'everything/{part}') if 'id1' in c.id)
    for part in ('early', 'late')
  )
  assert (early.num_frames, late.num_frames, late.first) == (56, 14, 56)
  frames, masks = found.read(late, [0, 13])
  assert [number_of(f) for f in frames] == [56, 69]
  assert frames.shape == (2, 16, 16, 3) and not masks.any()
  with pytest.raises(ValueError, match='everything/late'):
    found.split('everything/middle')


def test_pairs_are_any_two_frames_resident_or_streamed(prepared):
  batches = [
    data.make_batches(
      'voxceleb/given-16', 'train', image_size=16, batch_size=4, num_frames=1,
      frames='any', flip=0.0, resident=resident, directory=prepared,
    ) for resident in ('yes', 'no')
  ]
  resident, streamed = (next(b.iterate()) for b in batches)
  pictures = batches[0].resident_frames()['video']
  np.testing.assert_array_equal(
    pictures[resident['frames']], streamed['video']
  )
  many = [next(b) for b in [batches[0].iterate()] for _ in range(20)]
  first = np.concatenate([b['frames'][:, 0] for b in many]) % 70
  assert len(set(first)) > 20  # not the neutral frame alone


def test_a_track_keeps_the_last_box_and_smooths(monkeypatch):
  boxes = iter([(10, 10, 30, 30), None, (20, 10, 40, 30), None])
  monkeypatch.setattr(faces, 'detect_face', lambda image: next(boxes))
  track, image = faces.Track(margin=0.0, smoothing=0.75), np.zeros((99, 99, 3))
  found = [track(image) for _ in range(4)]
  # A quarter of the way from 10 to 20 is 12.5.
  assert found[0] == found[1] == (10, 10, 30, 30)
  assert found[2] == found[3] == (12, 10, 32, 30)
  assert (track.count, track.misses) == (4, 2)
  with pytest.raises(ValueError, match='first frame'):
    monkeypatch.setattr(faces, 'detect_face', lambda image: None)
    faces.Track()(image)


def test_face_crops_are_one_square_around_the_track(tmp_path, monkeypatch):
  # The "face" wanders; without real ones the detector is told where it is.
  raw, at = tmp_path / 'raw', iter(range(100))
  (raw / 'anna').mkdir(parents=True)
  for name in ('a.mp4', 'b.mp4'):
    video.write_video(str(raw / 'anna' / name), numbered(6, 64))

  def detect(image):
    x = 20 + next(at) % 6
    return (x, 20, x + 10, 30)

  monkeypatch.setattr(faces, 'detect_face', detect)
  arguments = ['voxceleb', '--raw', str(raw), '--data_dir', str(tmp_path)]
  assert prepare.main([*arguments, '--crop', 'face', '--image_size', '0']) == 0
  found = records.Records('voxceleb/face-native', tmp_path)
  (clip, *_) = found.split('everything')
  assert clip.subject_name == 'anna'
  frames, _ = found.read(clip, range(6))
  # 10 px grown by 0.35 on both sides: 17; moved by the smoothed track.
  assert len({f.shape for f in frames}) == 1
  assert 17 <= frames[0].shape[0] <= 22
  notes = found.metadata['report']['notes']
  assert any('no face in 0 of 12 frames' in note for note in notes)


def test_damaged_and_odd_clips_are_skipped_by_name(tmp_path, capsys):
  raw = tmp_path / 'raw'
  raw.mkdir()
  for name in ('a', 'b'):
    video.write_video(str(raw / f'{name}.mp4'), numbered(4))
  (raw / 'broken.mp4').write_bytes(b'no video at all')
  still = raw / 'still'
  still.mkdir()
  cv2.imwrite(str(still / '0.png'), numbered(1)[0])
  arguments = ['voxceleb', '--raw', str(raw), '--data_dir', str(tmp_path)]
  assert prepare.main(arguments) == 0
  out = capsys.readouterr()
  assert 'broken.mp4' in out.err and 'a clip needs 2' in out.err
  stored = json.loads(
    (tmp_path / 'voxceleb/given-256/1.0.0/metadata.json').read_text()
  )
  assert stored['splits']['everything'] == ['a', 'b']
  assert prepare.main([*arguments, '--crop', 'face', '--strict']) == 1


def test_crops_of_one_builder_are_refused_by_another(tmp_path, capsys):
  arguments = ['frame_folders', '--raw', str(tmp_path), '--crop', 'track']
  assert prepare.main(arguments) == 1
  assert '--crop track is not for frame_folders' in capsys.readouterr().err
