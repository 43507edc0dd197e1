"""Batches: pure in (seed, k), the same from disk and from the device."""

import warnings

import jax
import numpy as np
import pytest

from hatjax import data, records


def batches(toy_records, **changes):
  settings = dict(
    name='frame_folders/none-16', split='everything', image_size=16,
    batch_size=2, num_frames=3, seed=5, pad=2, directory=toy_records,
  )
  return data.make_batches(**settings | changes)


def take(stream, count):
  return [next(stream) for _ in range(count)]


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batch_k_is_a_function_of_seed_and_k(toy_records):
  whole = take(batches(toy_records, resident='no').iterate(), 9)
  late = take(batches(toy_records, resident='no').iterate(6), 3)
  for a, b in zip(whole[6:], late):
    equal(a, b)
  other = take(batches(toy_records, resident='no', seed=6).iterate(), 9)
  assert any(not np.array_equal(a['video'], b['video'])
             for a, b in zip(whole, other))


def test_batch_holds_what_the_records_say(toy_records):
  source = batches(toy_records, resident='no')
  batch = next(source.iterate())
  assert batch['video'].shape == (2, 4, 16, 16, 3)
  assert batch['video'].dtype == batch['lip_mask'].dtype == np.uint8
  assert set(np.unique(batch['lip_mask'])) == {0, 1}
  np.testing.assert_array_equal(batch['time'][:, 0], 0)
  assert (batch['time'][:, 1:] > 0).all() and (batch['time'] <= 1).all()
  clips = list(source.whole_clips())
  assert len(clips) == 8
  for n in range(2):
    same = [
      c for c in clips if np.array_equal(c['video'][0], batch['video'][n, 0])
    ]
    assert [c['label'] for c in same] == [batch['label'][n]]
    frames = np.round(batch['time'][n] * (len(same[0]['video']) - 1))
    np.testing.assert_array_equal(
      same[0]['video'][frames.astype(int)], batch['video'][n]
    )


def test_the_apex_can_be_in_every_batch(toy_records):
  stream = batches(toy_records, include_last=True).iterate()
  times = np.concatenate([b['time'] for b in take(stream, 10)])
  np.testing.assert_array_equal(times[:, -1], 1)
  assert len(np.unique(times[:, 1:-1])) > 3
  without = batches(toy_records).iterate()
  times = np.concatenate([b['time'] for b in take(without, 10)])
  assert (times[:, -1] < 1).any()


def test_blended_frames_lie_between_two(toy_records):
  # 8 frames at 7 k / 4: 0, 1.75, 3.5, 5.25, 7; the mask is the nearer one's.
  for resident in ('no', 'yes'):
    made = batches(
      toy_records, frames='blend', num_frames=4, resident=resident, pad=0,
      flip=0.0, batch_size=1,
    )
    batch = next(made.iterate())
    at = 7 * np.arange(5) / 4
    out = made.prepare(batch, made.resident_frames(), jax.random.key(0))
    np.testing.assert_allclose(out['time'][0], at / 7, rtol=1e-6)
    video = np.asarray(out['video'][0] + 1) * 127.5
    clip = next(
      c['video'] for c in made.whole_clips()
      if np.abs(c['video'][0] - video[0]).max() < 1e-3
    ).astype(float)
    expected = [
      clip[int(t)] + t % 1 * (clip[int(np.ceil(t))] - clip[int(t)]) for t in at
    ]
    assert np.abs(video - expected).max() <= 0.501
    assert out['lip_mask'].shape == (1, 5, 16, 16, 1)
    assert 'at' not in out


def test_even_frames_spread_over_the_whole_clip_in_order(toy_records):
  # 8 frames, numbered 0..7: round(7 k / 3) = 0, 2, 5, 7.
  for resident in ('no', 'yes'):
    made = batches(
      toy_records, frames='even', num_frames=3, resident=resident
    )
    for batch in take(made.iterate(), 5):
      np.testing.assert_allclose(
        batch['time'], np.tile(np.array([0, 2, 5, 7]) / 7, (2, 1)), rtol=1e-6
      )
  # More than the clip has: frames come twice, none is left out.
  made = batches(toy_records, frames='even', num_frames=14)
  (batch,) = take(made.iterate(), 1)
  index = np.round(batch['time'][0] * 7).astype(int)
  assert index[0] == 0 and set(index) == set(range(8))
  assert (np.diff(index) >= 0).all()


@pytest.mark.parametrize('resident', ['no', 'yes'])
def test_a_window_is_any_part_of_a_clip_evenly(toy_records, resident):
  made = batches(
    toy_records, frames='window', num_frames=3, resident=resident
  )
  seen = set()
  for batch in take(made.iterate(), 200):
    first, *window = np.round(batch['time'].T * 7).astype(int)
    assert (first == 0).all()  # the neutral frame, whatever the window
    seen |= set(zip(*window))
  # Of 8 frames: all spans from 2, all starts, the middle rounded.
  expected = {
    (s, round(s + span / 2), s + span)
    for span in range(2, 8) for s in range(8 - span)
  }
  assert seen == expected
  assert {(0, 1, 2), (5, 6, 7), (0, 4, 7)} <= seen


def test_windows_of_short_clips_and_of_apexes(toy_records):
  # As many frames as the clip has, or more: all of it.
  for count, expected in ((8, list(range(8))), (15, None)):
    made = batches(toy_records, frames='window', num_frames=count)
    for batch in take(made.iterate(), 3):
      for time in np.round(batch['time'] * 7).astype(int):
        assert time[0] == time[1] == 0 and set(time) == set(range(8))
        assert (np.diff(time) >= 0).all()
        assert expected is None or list(time[1:]) == expected
  made = batches(
    toy_records, frames='window', num_frames=3, include_last=True
  )
  times = np.concatenate([b['time'] for b in take(made.iterate(), 20)])
  np.testing.assert_array_equal(times[:, -1], 1)
  assert len(set(times[:, 1])) > 3


def test_every_clip_comes_once_per_epoch_in_changing_order(toy_records):
  # Batches of 3 straddle the epochs of 8 clips.
  stream = batches(toy_records, resident='no', batch_size=3).iterate()
  subjects = np.concatenate([b['subject'] for b in take(stream, 16)])
  epochs = subjects.reshape(6, 8)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(8), (6, 1)))
  assert len(set(map(tuple, epochs))) > 4
  other = batches(toy_records, resident='no', seed=6, batch_size=8).iterate()
  assert list(next(other)['subject']) != list(epochs[0])


def test_a_stream_starts_anywhere_at_once(toy_records):
  source = batches(toy_records, batch_size=3)
  late = take(source.iterate(10**9 + 1), 2)
  equal(late[1], next(source.iterate(10**9 + 2)))


def test_frames_that_nobody_wants_are_not_read(toy_records, monkeypatch):
  source, read = batches(toy_records, resident='yes'), []
  frames = type(source.records).frames

  def counting(records, clip, places):
    read.append(clip.id)
    return frames(records, clip, places)

  monkeypatch.setattr(type(source.records), 'frames', counting)
  source.resident_frames(lambda: True)
  assert not read
  source.resident_frames()
  assert len(read) == len(source.clips)


@pytest.mark.parametrize('jitter', [0.0, 0.2])
def test_resident_batches_are_bit_equal_to_streamed_ones(toy_records, jitter):
  streamed = batches(toy_records, resident='no', jitter=jitter)
  resident = batches(toy_records, resident='yes', jitter=jitter)
  frames = resident.resident_frames()
  assert frames['video'].shape == (64, 16, 16, 3)
  rng = jax.random.key(3)
  from_disk = jax.jit(streamed.prepare)
  on_device = jax.jit(resident.prepare)
  for a, b in zip(take(streamed.iterate(), 4), take(resident.iterate(), 4)):
    equal(
      jax.device_get(from_disk(a, {}, rng)),
      jax.device_get(on_device(b, frames, rng)),
    )


def test_augmentation_is_one_crop_and_flip_per_clip(toy_records):
  source = batches(toy_records, resident='no', pad=0, load_size=20, flip=1.0)
  batch = next(source.iterate())
  out = source.prepare(batch, {}, jax.random.key(0))
  for n in range(2):
    found = [
      (i, j) for i in range(5) for j in range(5)
      if np.allclose(
        (out['video'][n] + 1) * 127.5,
        batch['video'][n, :, i : i + 16, j : j + 16][:, :, ::-1], atol=1e-3,
      ) and np.array_equal(
        out['lip_mask'][n],
        batch['lip_mask'][n, :, i : i + 16, j : j + 16][:, :, ::-1],
      )
    ]
    assert len(found) == 1
  assert out['video'].dtype == np.float32


def test_released_crop_offsets_stop_one_short(toy_records):
  source = batches(
    toy_records, resident='no', load_size=20, pad=0, crop_offsets=2, flip=0.0
  )
  batch = next(source.iterate())
  prepare = jax.jit(source.prepare)
  seen = set()
  for seed in range(20):
    out = prepare(batch, {}, jax.random.key(seed))
    for i in range(5):
      for j in range(5):
        part = batch['video'][0, :, i : i + 16, j : j + 16]
        if np.allclose((out['video'][0] + 1) * 127.5, part, atol=1e-3):
          seen.add((i, j))
  assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_colour_jitter_keeps_the_range_and_serves_the_whole_clip(toy_records):
  source = batches(toy_records, resident='no', jitter=0.5, flip=0.0, pad=0)
  batch = next(source.iterate())
  batch['video'][:, 1:] = batch['video'][:, :1]  # a still clip
  out = np.asarray(source.prepare(batch, {}, jax.random.key(1))['video'])
  assert out.min() >= -1 and out.max() <= 1
  np.testing.assert_allclose(out[:, 1:], out[:, :1].repeat(3, 1), atol=1e-5)
  plain = batch['video'] / 127.5 - 1
  assert np.abs(out - plain).mean() > 0.01


def test_labels_filter_by_alias(toy_records):
  only = batches(toy_records, labels=('joy',))
  assert [c.id.split('/')[0] for c in only.clips] == ['happy'] * 4
  assert only.labels == ('happy', 'surprise')
  assert only.trained_labels() == ['happy']
  with pytest.raises(ValueError, match="'angst'. Known: happy, surprise"):
    batches(toy_records, labels=('angst',))


@pytest.mark.parametrize('changes, message', [
  (dict(split='trian'), 'Choose one of: .*everything'),
  (dict(name='frame_folders/face-99'), 'hatjax.prepare frame_folders'),
  (dict(name='mug/face-256-none'), 'image_size 256 --half none --data_dir'),
  (dict(name='synthetic/default'), 'hatjax.prepare synthetic --data_dir'),
  (dict(name='synthetic/32-grey-i6-f4-s1'), 'prepare synthetic --image_size 32 '
   '--grey --num_identities 6 --num_frames 4 --seed 1 --data_dir'),
  (dict(resident=True), 'auto, yes, no'),
  (dict(resize='nearest'), 'auto, cubic, area'),
  (dict(frames='odd'), 'data.frames is .odd.*random, even, blend, window'),
  (dict(load_size=8), 'load_size 8 is smaller'),
  (dict(load_size=20, pad=0, crop_offsets=6), r'1\.\.5'),
])
def test_wrong_settings_say_the_cure(toy_records, changes, message):
  with pytest.raises(ValueError, match=message):
    batches(toy_records, **changes)


def test_split_by_video_warns_of_leakage(toy_records):
  with pytest.warns(UserWarning, match='subjects leak'):
    assert batches(toy_records, split='by_video_train').clips
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    batches(toy_records, split='train')


def test_data_dir_is_where_tfds_users_expect(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  assert records.data_dir() == tmp_path
  assert records.data_dir('/elsewhere').as_posix() == '/elsewhere'
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert records.data_dir() == tmp_path / 'tensorflow_datasets'


@pytest.mark.parametrize('text, expected', [
  ('happiness', 'happy'), (' Happy ', 'happy'), ('scared', 'Fear'),
  ('drumcheeks', 'drumcheeks'),
])
def test_match_label(text, expected):
  labels = ('Fear', 'drumcheeks', 'happy')
  assert records.match_label(text, labels) == expected
