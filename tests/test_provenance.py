"""What generated videos carry, and what of it survives."""

import types

import cv2
import numpy as np
import pytest

from hatjax import (
  generate,
  provenance,
  sound,
  state,
  synthetic_faces,
  video,
  watermark,
)

ENDINGS = ('a.mp4', 'a.gif', 'a.webp', 'a/')


def clips(size, count=6, num_frames=12):
  """Drawn faces, a plain clip and a noisy one, by name."""
  made = {
    f'face {n}': synthetic_faces.render_clip(
      n + 100, synthetic_faces.EXPRESSIONS[n % 6], num_frames, size,
      grey=n % 3 == 2,
    )['video']
    for n in range(count)
  }
  rng = np.random.default_rng(0)
  shape = (num_frames, size, size, 3)
  plain = np.full(shape, 90, np.uint8)
  noise = rng.integers(0, 256, shape).astype(np.uint8)
  return made | {'plain': plain, 'noise': noise}


def marked(clip):
  return np.stack([*watermark.mark(clip)])


def through(path, clip):
  """The clip after it was written there and read back."""
  video.write_video(path, clip)
  return video.read_video(path)[0]


def half(clip):
  return video.resize(clip, (clip.shape[1] // 2, clip.shape[2] // 2))


def psnr(a, b):
  error = np.square(a.astype(float) - b).mean()
  return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize('size, cost', [(64, 42.8), (128, 44.8)])
def test_the_mark_survives_h264_and_a_resize_to_half(size, cost, tmp_path):
  for name, clip in clips(size).items():
    mark = marked(clip)
    assert mark.shape == clip.shape and mark.dtype == np.uint8
    assert psnr(mark, clip) > cost, name
    written = through(tmp_path / 'a.mp4', mark)
    scores = {
      'marked': mark, 'h264': written, 'half': half(mark),
    } | ({'half of h264': half(written)} if name != 'noise' else {}) | (
      {'h264 of half': through(tmp_path / 'b.mp4', half(mark)),
       'both twice': through(tmp_path / 'c.mp4', half(written))}
      if size == 128 else {}
    )
    for kind, frames in scores.items():
      assert watermark.score(frames) > watermark.THRESHOLD, (name, kind)


def test_other_files_keep_the_mark_too(tmp_path):
  clip = marked(clips(96, 1)['face 0'])
  for name in ENDINGS:
    assert watermark.score(through(tmp_path / name, clip)) > 10, name
  wide = np.concatenate([clip, clip[:, :, ::-1]], 2)[:, :-7]  # any shape
  assert watermark.score(wide) < watermark.THRESHOLD  # cut: the mark is lost
  wide = np.concatenate([clip, clip], 2)[:, :-7]
  again = marked(wide)
  assert watermark.score(through(tmp_path / 'b.mp4', again)) > 10


def test_what_is_unmarked_is_not_found():
  rng = np.random.default_rng(1)
  scores = []
  for name, clip in clips(64, 12, 2).items():
    for turn in range(4):
      for sign in (1, -1):
        other = np.rot90(clip, turn, (1, 2))[:, :, ::sign]
        scores.append(watermark.score(other))
    scores.append(watermark.score(half(clip)))
    assert abs(scores[-1]) < watermark.THRESHOLD, name
  for _ in range(300):
    size = rng.integers(20, 90, 2)
    rough = rng.normal(128, 60, (*(size // rng.integers(1, 6)), 3))
    rough = rough.clip(0, 255).astype(np.uint8)
    frame = cv2.resize(rough, tuple(map(int, size)))
    scores.append(watermark.score([frame]))
  scores = np.array(scores)
  assert abs(scores).max() < watermark.THRESHOLD - 0.5
  # The larger of two scores: 0.56 on average.
  assert 0.2 < scores.mean() < 0.9 and 0.6 < scores.std() < 1.2


def test_the_mark_stands_still_and_costs_little_time(tmp_path):
  clip = clips(64, 1)['face 0'].clip(10, 245)
  change = np.diff(marked(clip).astype(int), axis=0)
  np.testing.assert_array_equal(change, np.diff(clip.astype(int), axis=0))
  frame = np.full((64, 64, 3), 100, np.uint8)
  taken = []
  stream = watermark.mark(taken.append(n) or frame for n in range(10**9))
  for _ in range(3):
    next(stream)
  assert taken == [0, 1, 2]  # one frame at a time, however many come


@pytest.mark.parametrize('shape', [(1, 1), (2, 3), (5, 300), (33, 17)])
def test_any_shape_can_be_marked_and_scored(shape):
  clip = np.full((2, *shape, 3), 128, np.uint8)
  assert marked(clip).shape == clip.shape
  assert np.isfinite(watermark.score(marked(clip)))
  assert watermark.score([]) == 0.0


def signed(watermark='auto'):
  """The signature of a run of two stages without weights."""
  tree = state.create({'generator': {'w': np.ones(3, np.float32)}}, {})
  stage = types.SimpleNamespace(name='hat_cgan', method=None, state=tree)
  other = types.SimpleNamespace(
    name='video_diffusion', method=None, state=tree
  )
  run = types.SimpleNamespace(stages=(stage, other))
  return provenance.sign(run, watermark), state.checksum(tree.params)


@pytest.mark.parametrize('name', ENDINGS)
def test_every_file_says_where_it_comes_from(name, tmp_path, capsys):
  clip = clips(128, 1, 4)['face 0']
  signature, digest = signed()
  signature.write_video(tmp_path / name, clip, 20)
  frames, fps = video.read_video(tmp_path / name)
  assert frames.shape == clip.shape
  assert fps == (25 if name == 'a/' else 20)  # a folder knows none
  comment, score = provenance.read(tmp_path / name)
  assert comment == (
    f'made by hatjax {provenance.version()}; method hat_cgan+video_diffusion; '
    f'checkpoint sha256:{digest}+{digest}'
  )
  assert score > watermark.THRESHOLD
  assert provenance.main([str(tmp_path / name)]) == 0
  said = capsys.readouterr().out
  assert f'{tmp_path / name}: made by hatjax\n' in said and digest in said
  assert 'watermark  found' in said


def test_one_frame_says_so_too(tmp_path):
  for name in ENDINGS:
    signed()[0].write_video(tmp_path / name, np.full((1, 64, 98, 3), 99, 'u1'))
    comment, score = provenance.read(tmp_path / name)
    assert comment and score > watermark.THRESHOLD


def test_the_mark_stays_when_the_metadata_go_and_the_other_way(
  tmp_path, capsys
):
  clip = clips(128, 1, 4)['face 0']
  path = tmp_path / 'a.mp4'
  signed()[0].write_video(path, clip)
  frames, _ = video.read_video(path)
  video.write_video(tmp_path / 'stripped.mp4', frames)
  assert provenance.main([str(tmp_path / 'stripped.mp4')]) == 0
  said = capsys.readouterr().out
  assert 'metadata   none' in said and 'watermark  found' in said
  signed('none')[0].write_video(path, clip)
  assert provenance.main([str(path)]) == 0
  said = capsys.readouterr().out
  assert 'metadata   made by' in said and 'watermark  not found' in said
  np.testing.assert_array_equal(
    through(tmp_path / 'plain.mp4', clip), video.read_video(path)[0]
  )


def test_the_command_tells_three_cases_apart(tmp_path, capsys):
  plain = tmp_path / 'plain.mp4'
  video.write_video(plain, clips(64, 1, 4)['face 0'])
  assert provenance.main([str(plain)]) == 1
  assert 'not known to be made by hatjax' in capsys.readouterr().out
  (tmp_path / 'text.mp4').write_text('no video')
  for wrong in (tmp_path / 'text.mp4', tmp_path / 'absent.mp4'):
    assert provenance.main([str(plain), str(wrong)]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert wrong.name in err
  with pytest.raises(SystemExit) as stop:
    provenance.main(['--help'])
  assert stop.value.code == 0
  assert 'exit code' in capsys.readouterr().out


def test_sound_leaves_the_comment(tmp_path):
  from test_driving import write_with_sound

  clip = np.full((10, 64, 64, 3), 99, np.uint8)
  write_with_sound(tmp_path / 'sound.mp4', clip, 10)
  signed()[0].write_video(tmp_path / 'a.mp4', clip, 10)
  before = provenance.read(tmp_path / 'a.mp4')
  assert before[0] and sound.copy(tmp_path / 'sound.mp4', tmp_path / 'a.mp4')
  assert provenance.read(tmp_path / 'a.mp4') == before


def test_a_strangers_comment_is_only_text(tmp_path):
  clip = np.full((2, 64, 64, 3), 99, np.uint8)
  hostile = 'made by hatjax 1; method $(rm); checkpoint x\x1b[2J'
  video.write_video(tmp_path / 'a.mp4', clip, comment=hostile)
  assert provenance.read(tmp_path / 'a.mp4')[0] == ''


def test_checksums_tell_trees_apart():
  tree = {'a': np.arange(4.0), 'b': np.arange(3)}
  first = state.checksum(tree)
  assert first == state.checksum({k: v.copy() for k, v in tree.items()})
  flipped = tree['a'].copy()
  flipped.view(np.uint8)[5] ^= 1
  others = (
    tree | {'a': flipped}, tree | {'a': tree['a'].reshape(2, 2)},
    tree | {'a': tree['a'].view(np.int64)}, {'a': tree['a'], 'c': tree['b']},
    {'a': tree['a']},
  )
  digests = {state.checksum(other) for other in others}
  assert len(digests) == len(others) and first not in digests


def test_generate_offers_the_switch(capsys):
  with pytest.raises(SystemExit):
    generate.main(['--help'])
  assert '--watermark {auto,none}' in capsys.readouterr().out
