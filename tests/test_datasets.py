"""Every builder on a small tree in its raw layout, and on real frames.

The faces are drawn; Viola-Jones finds them.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from hatjax import faces, prepare

REPO = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = pathlib.Path(
  os.environ.get('HATJAX_SAMPLE_DATA', REPO.parent / 'shared' / 'data')
)
SIDE = 96
LIPS = (slice(61, 71), slice(38, 58))  # the rows and columns of drawn lips
GREEN = (10, 240, 10)


def draw_face(t=0, size=SIDE, shift=0):
  """A drawn face, uint8 [H, W, 3], with green lips; t moves its brows."""
  image = np.full((size, size, 3), 200, np.uint8)

  def ellipse(x, y, a, b, colour):
    centre = (int(48 + shift + x * 30), int(48 + y * 30))
    axes = (max(1, int(a * 30)), max(1, int(b * 30)))
    cv2.ellipse(image, centre, axes, 0, 0, 360, colour, -1)

  ellipse(0, -0.2, 0.85, 1.1, (60, 40, 30))
  ellipse(0, 0.1, 0.75, 1.0, (225, 190, 170))
  for side in (-0.33, 0.33):
    ellipse(side, -0.15, 0.2, 0.12, (150, 110, 90))
    ellipse(side, -0.12, 0.15, 0.07, (250, 250, 250))
    ellipse(side, -0.12, 0.07, 0.07, (30, 30, 30))
    ellipse(side, -0.32 - 0.02 * t, 0.2, 0.05, (60, 40, 30))
  ellipse(0, 0.25, 0.1, 0.18, (200, 160, 140))
  ellipse(0, 0.33, 0.12, 0.05, (150, 110, 95))
  rows, columns = LIPS
  image[rows, columns.start + shift : columns.stop + shift] = GREEN
  return image


def draw_mask(shift=0):
  mask = np.zeros((SIDE, SIDE), np.uint8)
  rows, columns = LIPS
  mask[rows, columns.start + shift : columns.stop + shift] = 255
  return mask


def save(path, image, ending='.png'):
  """Writes the bytes of a picture of type `ending`, whatever `path` says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = image[..., ::-1] if image.ndim == 3 else image
  path.write_bytes(cv2.imencode(ending, image)[1].tobytes())


def save_clip(part, video, num_frames, masks=False, first=246):
  for t in range(num_frames):
    name = f'{first + 2 * t:04d}.jpg'
    save(part / 'img' / video / name, draw_face(t))  # PNG bytes
    if masks:
      save(part / 'patch' / video / name, draw_mask())


@pytest.fixture
def folders(tmp_path):
  """AffineGAN's layout: 4 clips, 2 expressions, 1 still, and litter."""
  raw = tmp_path / 'raw'
  save_clip(raw / 'happy' / 'train', 'ann_1', 3, masks=True)
  save_clip(raw / 'happy' / 'train', 'bob_1', 2, masks=True)
  save_clip(raw / 'anger' / 'train', 'ann_1', 2)
  save_clip(raw / 'anger' / 'train', 'cem_1', 4, first=9)  # 0009, 0011: no 8
  save_clip(raw / 'happy' / 'test', 'dan_1', 1)
  (raw / '.DS_Store').write_text('litter')
  (raw / 'happy' / 'train' / 'img' / 'ann_1' / '.DS_Store').write_text('litter')
  return raw


@pytest.fixture
def ck(tmp_path):
  """CK+'s layout: three labelled sequences, one without, one neutral."""
  raw = tmp_path / 'ck'
  for number, (name, code) in enumerate(
    [('S005/001', 3), ('S005/002', 5), ('S010/001', 7), ('S011/001', None),
     ('S012/001', 0)]
  ):
    stem = name.replace('/', '_')
    for t in range(1, 3 + number % 2):
      frame = f'{stem}_{t:08d}'
      image = cv2.cvtColor(draw_face(t), cv2.COLOR_RGB2GRAY)
      save(raw / 'cohn-kanade-images' / name / f'{frame}.png', image)
      text = ''.join(f'  {x:.7e}  {y:.7e}\n' for x, y in points())
      write(raw / 'Landmarks' / name / f'{frame}_landmarks.txt', text)
    if code is not None:
      text = f'   {code}.0000000e+00\n'
      write(raw / 'Emotion' / name / f'{frame}_emotion.txt', text)
    text = '   4.0000000e+00   2.0000000e+00\n   7.0000000e+00   0.0e+00\n'
    write(raw / 'FACS' / name / f'{frame}_facs.txt', text)
  (raw / 'Emotion' / 'S011' / '001').mkdir(parents=True)
  (raw / 'cohn-kanade-images' / 'S005' / '.DS_Store').write_text('litter')
  return raw


def points():
  """68 points; the outer lips run along the border of the drawn lips."""
  out = np.full((68, 2), 48.0)
  rows, columns = LIPS
  top, bottom, left, right = 61, rows.stop - 1, columns.start, columns.stop - 1
  across = np.linspace(left, right, 7)
  out[48:55] = [(x, top) for x in across]
  out[55:60] = [(x, bottom) for x in across[::-1][1:6]]
  out[48], out[54] = (left, 66), (right, 66)
  return out


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def run(name, raw, data_dir, *options):
  return prepare.main(
    [name, '--raw', str(raw), '--data_dir', str(data_dir), *options]
  )


def read(data_dir, name):
  """(examples by id, metadata, builder) of prepared records."""
  builder = tfds.builder_from_directory(data_dir / name / '1.0.0')
  source = builder.as_data_source('clips')
  examples = {e['id'].decode(): e for e in source}
  assert list(builder.info.metadata['clips']) == [
    e['id'].decode() for e in source
  ]
  return examples, builder.info.metadata, builder


NATIVE = ('--crop', 'none', '--image_size', '0')


def test_native_records_hold_the_source_pixels(
  folders, tmp_path, capsys, monkeypatch
):
  _, _, face_video = prepare.load_builder('frame_folders')
  monkeypatch.setattr(face_video, 'CLIPS_PER_FILE', 2)
  assert run('frame_folders', folders, tmp_path / 'd', *NATIVE) == 0
  examples, metadata, builder = read(
    tmp_path / 'd', 'frame_folders/none-native'
  )
  assert len(list(builder.data_path.glob('*.array_record*'))) == 3
  assert builder.info.features['label'].names == ['anger', 'happy']
  assert set(examples) == {
    'happy/ann_1', 'happy/bob_1', 'anger/ann_1', 'anger/cem_1',
    'happy/test/dan_1',
  }
  for name, frames in (('happy/ann_1', 3), ('anger/cem_1', 4)):
    example = examples[name]
    assert len(example['video']) == len(example['lip_mask']) == frames
    for t in range(frames):
      np.testing.assert_array_equal(example['video'][t], draw_face(t))
  np.testing.assert_array_equal(
    examples['happy/ann_1']['lip_mask'][1][..., 0], draw_mask()
  )
  still = examples['happy/test/dan_1']
  assert still['still'] == 1 and len(still['video']) == 1
  assert examples['anger/cem_1']['still'] == 0
  assert examples['anger/cem_1']['label'] == 0
  assert examples['happy/bob_1']['label'] == 1
  assert len(still['alpha']) == len(still['landmarks']) == 0
  assert still['facs'] == b'' and still['subject'] == b'happy/test/dan_1'
  assert metadata['clips']['happy/ann_1'] == {
    'label': 'happy', 'subject': 'happy/ann_1', 'num_frames': 3, 'still': False,
  }
  out = capsys.readouterr().out
  assert re.search(r'happy +2 +2 +5 +1\n', out)
  assert re.search(r'total +4 +4 +11 +1\n', out)
  assert metadata['fingerprint'] in out and 'skipped: 0' in out


@pytest.mark.parametrize(
  'options', [('face', 64), ('face', 128), ('none', 64), ('none', 200)]
)
def test_masks_stay_on_the_lips(folders, tmp_path, options):
  """Mask against the green of the frame itself, crop and size aside."""
  crop, size = options
  args = ('--crop', crop, '--image_size', str(size))
  assert run('frame_folders', folders, tmp_path / 'd', *args) == 0
  examples, _, _ = read(tmp_path / 'd', f'frame_folders/{crop}-{size}')
  for t in range(3):
    image = examples['happy/ann_1']['video'][t].astype(int)
    mask = examples['happy/ann_1']['lip_mask'][t][..., 0]
    assert image.shape == (size, size, 3) and mask.shape == (size, size)
    assert set(np.unique(mask)) == {0, 255}
    green = (image[..., 1] - image[..., 0] > 120) & (image[..., 2] < 110)
    both, either = (mask > 0) & green, (mask > 0) | green
    assert both.sum() > 0.85 * either.sum()


def test_one_face_box_per_clip(folders, tmp_path):
  """The neutral frame's box cuts every frame, though the face moves."""
  part = folders / 'anger' / 'train' / 'img' / 'eva_1'
  images = [draw_face(0, shift=0), draw_face(1, shift=6)]
  for t, image in enumerate(images):
    save(part / f'{t}.png', image)
  run('frame_folders', folders, tmp_path / 'd', '--image_size', '64')
  examples, _, _ = read(tmp_path / 'd', 'frame_folders/face-64')
  face = faces.detect_face(images[0])
  box = faces.square_crop_box(face, images[0].shape)
  assert box[0] <= face[0] and box[3] >= face[3]
  for t, image in enumerate(images):
    np.testing.assert_array_equal(
      examples['anger/eva_1']['video'][t], faces.crop(image, box, 64)
    )
  # No masks of its own: an ellipse in the face box, over the drawn lips.
  mask = examples['anger/eva_1']['lip_mask'][0][..., 0]
  lips = faces.crop(draw_mask(), box, 64) > 250
  assert (mask[lips] == 255).mean() > 0.7 and (mask > 0).mean() < 0.15


def test_ck_plus(ck, tmp_path, capsys):
  assert run('ck_plus', ck, tmp_path / 'd', '--image_size', '64') == 0
  examples, metadata, builder = read(tmp_path / 'd', 'ck_plus/face-64')
  assert builder.info.features['label'].names == [
    'anger', 'contempt', 'disgust', 'fear', 'happy', 'sadness', 'surprise'
  ]
  labels = {name: int(e['label']) for name, e in examples.items()}
  assert labels == {'S005_001': 2, 'S005_002': 4, 'S010_001': 6}
  assert [len(examples[n]['video']) for n in sorted(labels)] == [2, 3, 2]
  example = examples['S005_002']
  assert example['subject'] == b'S005' and example['facs'] == b'4:2 7:0'
  # Landmarks of the stored frame: the mask drawn from them lies on the mask.
  mask = example['lip_mask'][2][..., 0]
  again = faces.lip_mask_from_landmarks(example['landmarks'][2], (64, 64))
  assert np.shape(example['landmarks']) == (3, 68, 2)
  assert ((mask > 0) & (again > 0)).sum() > 0.7 * (again > 0).sum() > 20
  captured = capsys.readouterr()
  assert 'skipped cohn-kanade-images/S011/001: no Emotion file' in captured.err
  assert 'S012' in captured.err and "says '0.0000000e+00'" in captured.err
  assert 'S005 2, S010 1' in captured.out
  assert len(metadata['report']['skipped']) == 2


def test_ck_plus_without_the_optional_archives(ck, tmp_path, capsys):
  shutil.rmtree(ck / 'Landmarks')
  shutil.rmtree(ck / 'FACS')
  # Every archive in a folder of its own.
  (ck / 'images').mkdir()
  (ck / 'cohn-kanade-images').rename(ck / 'images' / 'cohn-kanade-images')
  assert run('ck_plus', ck, tmp_path / 'd', '--image_size', '64') == 0
  examples, metadata, _ = read(tmp_path / 'd', 'ck_plus/face-64')
  assert len(examples) == 3 and metadata['report']['masks'] == {'mouth box': 3}
  assert len(examples['S005_001']['landmarks']) == 0
  assert examples['S005_001']['facs'] == b''
  assert 'without the optional Landmarks and FACS' in capsys.readouterr().out


def test_splits_by_subject():
  _, _, face_video = prepare.load_builder('ck_plus')
  clips = {
    f'c{i:02}': {'subject': f's{i // 3}', 'still': i == 0, 'num_frames': 2}
    for i in range(61)
  }
  splits = face_video.make_splits(clips)
  who = [{clips[i]['subject'] for i in splits[s]}
         for s in ('train', 'val', 'test')]
  assert [len(w) for w in who] == [15, 2, 4]  # 10 % and 20 % of 21 subjects
  assert len(set.union(*who)) == 21  # so no subject is in two
  assert splits['stills'] == ['c00'] and len(splits['everything']) == 60
  assert len(splits['by_video_test']) == 10  # as the papers
  both = splits['by_video_train'] + splits['by_video_test']
  assert sorted(both) == splits['everything']
  backwards = dict(reversed(clips.items()))
  assert face_video.make_splits(backwards) == splits
  for n, sizes in ((1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1))):
    few = {f'c{i}': {'subject': f's{i}', 'still': False} for i in range(n)}
    splits = face_video.make_splits(few)
    assert tuple(len(splits[s]) for s in ('train', 'val', 'test')) == sizes
  assert len(face_video.make_splits(few)['by_video_test']) == 1


def test_subjects_by_pattern_and_by_table(folders, tmp_path, capsys):
  args = (*NATIVE, '--subjects', r'/(\w+)_\d')
  assert run('frame_folders', folders, tmp_path / 'd', *args) == 0
  _, metadata, _ = read(tmp_path / 'd', 'frame_folders/none-native')
  assert 'clips per subject: ann 2, bob 1, cem 1\n' in capsys.readouterr().out
  splits = metadata['splits']
  together = {'happy/ann_1', 'anger/ann_1'}
  assert any(together <= set(splits[s]) for s in ('train', 'val', 'test'))
  write(folders / 'subjects.csv', 'id,subject\nanger/ann_1,Ann\n')
  assert run('frame_folders', folders, tmp_path / 'd', *NATIVE) == 0
  _, metadata, _ = read(tmp_path / 'd', 'frame_folders/none-native')
  assert metadata['clips']['anger/ann_1']['subject'] == 'Ann'
  assert metadata['clips']['anger/cem_1']['subject'] == 'anger/cem_1'
  out = capsys.readouterr().out
  assert 'no subject for 4 clips' in out and 'split by video' in out


def fingerprint(data_dir, config='face-64'):
  folder = data_dir / 'frame_folders' / config / '1.0.0'
  return json.loads((folder / 'metadata.json').read_text())['fingerprint']


def test_fingerprint_and_reuse(folders, tmp_path, capsys):
  size = ('--image_size', '64')
  run('frame_folders', folders, tmp_path / 'a', *size)
  moved = folders.rename(tmp_path / 'moved')
  run('frame_folders', moved, tmp_path / 'b', *size)
  first = fingerprint(tmp_path / 'a')
  assert fingerprint(tmp_path / 'b') == first
  capsys.readouterr()
  records = tmp_path / 'a' / 'frame_folders' / 'face-64' / '1.0.0'
  made = records.stat().st_mtime_ns
  assert run('frame_folders', moved, tmp_path / 'a', *size) == 0
  assert 'already prepared' in capsys.readouterr().out
  assert records.stat().st_mtime_ns == made
  image = draw_face(1)
  image[40:56, 40:56] = 0
  save(moved / 'anger' / 'train' / 'img' / 'cem_1' / '0011.jpg', image)
  run('frame_folders', moved, tmp_path / 'a', *size, '--crop', 'none')
  changed = fingerprint(tmp_path / 'a', 'none-64')
  assert fingerprint(tmp_path / 'a') == first  # other options, other records
  assert run('frame_folders', moved, tmp_path / 'a', *NATIVE) == 0
  run('frame_folders', moved, tmp_path / 'a', *NATIVE, '--force')
  err = capsys.readouterr().err
  assert '--force given, preparing again' in err
  assert run('frame_folders', moved, tmp_path / 'a', *size) == 0
  assert 'has changed, preparing again' in capsys.readouterr().err
  prints = {first, changed, fingerprint(tmp_path / 'a', 'none-native')}
  prints.add(fingerprint(tmp_path / 'a'))
  assert len(prints) == 4
  left = {path.name for path in (tmp_path / 'a' / 'frame_folders').iterdir()}
  assert left == {'face-64', 'none-64', 'none-native'}
  assert [p.name for p in (tmp_path / 'a').iterdir()] == ['frame_folders']


def test_one_pixel_changes_the_fingerprint(folders, tmp_path):
  run('frame_folders', folders, tmp_path / 'a', *NATIVE)
  mask = draw_mask()
  mask[0, 0] = 255
  save(folders / 'happy' / 'train' / 'patch' / 'bob_1' / '0246.jpg', mask)
  run('frame_folders', folders, tmp_path / 'b', *NATIVE)
  prints = [fingerprint(tmp_path / d, 'none-native') for d in 'ab']
  assert prints[0] != prints[1]


def spoil(raw):
  """One of every defect; returns what must be said of each."""
  train = raw / 'happy' / 'train'
  save_clip(train, 'eva_1', 7, masks=True)
  frames = sorted((train / 'img' / 'eva_1').iterdir())
  masks = sorted((train / 'patch' / 'eva_1').iterdir())
  frames[1].write_text('not a picture')
  frames[2].write_bytes(frames[2].read_bytes()[:300])
  save(frames[3], draw_face()[:80])
  masks[4].unlink()
  save(masks[5], draw_mask()[:80])
  write(train / 'img' / 'eva_1' / 'notes.txt', 'blink')
  save_clip(train, 'fay_1', 2)
  write(train / 'img' / 'fay_1' / '0246.jpg', 'not a picture')
  save_clip(train, 'gus_1', 1, masks=True)
  save(train / 'img' / 'hal_1' / '1.png', np.zeros((96, 96, 3), np.uint8))
  save(train / 'img' / 'hal_1' / '2.png', np.zeros((96, 96, 3), np.uint8))
  save(raw / 'only_test' / 'test' / 'img' / 'a' / '1.png', draw_face())
  clip = 'happy/train/img/eva_1'
  return {
    f'{clip}/{frames[1].name}': 'is a text file, not a picture',
    f'{clip}/{frames[2].name}': 'damaged or cut off',
    f'{clip}/{frames[3].name}': 'is 96x80, the first frame 96x96',
    f'{clip}/{frames[4].name}': 'has no mask',
    f'happy/train/patch/eva_1/{masks[5].name}': 'is a mask of 96x80',
    f'{clip}/notes.txt': 'is not named like a picture',
    'happy/train/patch/fay_1': 'is missing',
    'happy/train/img/fay_1/0246.jpg': 'the whole clip is skipped',
    'happy/train/img/gus_1': 'has 1 frames, a clip needs 2',
    'happy/train/img/hal_1/1.png': 'no face found',
    'happy/train/patch/hal_1': 'is missing',
    'only_test': 'no train/img',
  }


def test_defects_are_listed_with_file_and_reason(folders, tmp_path, capsys):
  size = ('--image_size', '64')
  run('frame_folders', folders, tmp_path / 'd', *size)
  before = fingerprint(tmp_path / 'd')
  expected = spoil(folders)
  capsys.readouterr()
  assert run('frame_folders', folders, tmp_path / 'd', *size, '--strict') == 1
  err = capsys.readouterr().err
  assert 'error: 12 skipped, and --strict: nothing was written' in err
  assert fingerprint(tmp_path / 'd') == before
  assert run('frame_folders', folders, tmp_path / 'd', *size) == 0
  captured = capsys.readouterr()
  lines = [li for li in captured.err.split('\n') if li.startswith('skipped ')]
  told = dict(line.removeprefix('skipped ').split(': ', 1) for line in lines)
  assert set(told) == set(expected)
  for path, reason in expected.items():
    assert reason in told[path]
  assert 'skipped: 12' in captured.out
  examples, _, _ = read(tmp_path / 'd', 'frame_folders/face-64')
  assert len(examples) == 6 and 'Traceback' not in captured.err
  masks = [m.max() for m in examples['happy/eva_1']['lip_mask']]
  assert masks == [255, 0, 0, 255]  # frames 0, 4 and 5 (no mask), 6
  assert run('frame_folders', folders, tmp_path / 'd', *size, '--strict') == 1


def test_no_usable_clip(folders, tmp_path, capsys):
  for path in folders.glob('*/train/img/*/*.jpg'):
    path.write_text('not a picture')
  assert run('frame_folders', folders, tmp_path / 'd') == 1
  err = capsys.readouterr().err
  assert 'error: No usable clip' in err and 'anger/train/img/ann_1/0246' in err
  assert list((tmp_path / 'd').iterdir()) == []


@pytest.mark.parametrize(
  ('name', 'part', 'message'),
  [
    ('frame_folders', 'happy', 'is one expression. Pass the folder above it'),
    ('frame_folders', '..', 'one level deeper. Pass'),
    ('frame_folders', 'happy/test', 'no <expression>/train/img folder'),
    ('frame_folders', 'nowhere', 'is no folder. Pass the raw data'),
    ('ck_plus', '.', 'no folder cohn-kanade-images'),
  ],
)
def test_wrong_folder(folders, tmp_path, capsys, name, part, message):
  assert run(name, folders / part, tmp_path / 'd') == 1
  error = capsys.readouterr().err.strip().split('\n')[-1]
  assert error.startswith('error: ') and message in error
  assert not (tmp_path / 'd').exists()


def test_wrong_settings(folders, ck, tmp_path, capsys):
  for options in (['gum'], ['ck_plus', '--image_size', '7']):
    with pytest.raises(SystemExit) as exit_info:
      prepare.main([*options, '--raw', str(folders)])
    assert exit_info.value.code == 2
  err = capsys.readouterr().err
  assert "unknown NAME 'gum'. Choose one of: ck_plus, frame_folders" in err
  assert '--image_size is 7' in err
  assert run('ck_plus', ck, tmp_path / 'd', '--subjects', 'S') == 1
  assert run('frame_folders', folders, tmp_path / 'd', '--subjects', '(') == 1
  assert run('frame_folders', folders, tmp_path / 'd', '--subjects', 'zz') == 1
  (tmp_path / 'file').write_text('')
  assert run('frame_folders', folders, tmp_path / 'file') == 1
  assert 'Pass another --data_dir' in capsys.readouterr().err


def test_failure_leaves_earlier_records(folders, tmp_path, capsys, monkeypatch):
  size = ('--image_size', '64')
  run('frame_folders', folders, tmp_path / 'd', *size)
  before = fingerprint(tmp_path / 'd')
  save_clip(folders / 'anger' / 'train', 'eva_1', 2)
  rename = pathlib.Path.rename

  def fail(self, target):
    if target.name == '1.0.0' and 'replaced' not in self.name:
      raise OSError(28, 'No space left on device')
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, 'rename', fail)
  assert run('frame_folders', folders, tmp_path / 'd', *size) == 1
  assert 'No space left on device' in capsys.readouterr().err
  monkeypatch.undo()
  assert fingerprint(tmp_path / 'd') == before
  assert len(read(tmp_path / 'd', 'frame_folders/face-64')[0]) == 5
  assert [p.name for p in (tmp_path / 'd').iterdir()] == ['frame_folders']


WITHOUT_TENSORFLOW = """
import resource, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hide = lambda name, *a: name.split('.')[0] != 'tensorflow' and find(name, *a)
PathFinder.find_spec = lambda *args: hide(*args) or None
from hatjax import prepare
from tensorflow_datasets.core import shuffle
shuffle.MAX_MEM_BUFFER_SIZE = 0  # a large set: TFDS shuffles with TensorFlow
raw = ['--raw', sys.argv[3]]
code = prepare.main(sys.argv[1:3] + raw + ['--image_size', '64'])
import tensorflow_datasets as tfds
folder = sys.argv[4] + '/frame_folders/face-64/1.0.0'
source = tfds.builder_from_directory(folder).as_data_source('clips')
print('frames', sum(len(example['video']) for example in source))
full = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, full))  # a full disk
full = prepare.main(sys.argv[1:3] + raw)
assert 'tensorflow' not in sys.modules
print('codes', code, full)
"""


def test_without_tensorflow_and_on_a_full_disk(folders, tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', WITHOUT_TENSORFLOW, 'frame_folders', '--force',
     folders, tmp_path / 'd'],
    env={**os.environ, 'TFDS_DATA_DIR': str(tmp_path / 'd')},
    cwd=REPO, capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr
  assert 'frames 12' in done.stdout and 'codes 0 1' in done.stdout
  assert 'error: Cannot write the records' in done.stderr
  assert 'Free some space' in done.stderr
  records = tmp_path / 'd' / 'frame_folders'
  assert [p.name for p in records.iterdir()] == ['face-64']
  assert [p.name for p in (tmp_path / 'd').iterdir()] == ['frame_folders']


def test_crop_boxes_points_and_edges():
  image = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
  # Side 4 * 1.5 = 6, moved inside where it fits: x from -1 to 0.
  assert faces.square_crop_box((0, 3, 4, 7), image.shape) == (0, 2, 6, 8)
  # Side 12 is higher than the image: centred on y, its edge repeated.
  box = faces.square_crop_box((6, 1, 14, 9), image.shape)
  assert box == (4, -1, 16, 11)
  out = faces.crop(image, box)
  np.testing.assert_array_equal(out[0], image[0, 4:16])
  np.testing.assert_array_equal(out[1:11], image[:, 4:16])
  mask = np.full((10, 20), 255, np.uint8)
  assert faces.crop(mask, box)[[0, 11]].max() == 0
  # Centre of pixel (7, 3) lies 3.5 and 4.5 pixels into the box: twice that
  # from the border of the resized crop.
  moved = faces.move_points([(7, 3)], box, (24, 24))
  np.testing.assert_allclose(moved, [(6.5, 8.5)])
  assert faces.detect_face(np.zeros((50, 200, 3), np.uint8)) is None
  found = faces.detect_face(cv2.resize(draw_face(), (1500, 1500)))
  small = faces.detect_face(draw_face())
  np.testing.assert_allclose(np.array(found) / 1500 * 96, small, atol=6)


needs_sample = pytest.mark.skipif(
  not (SAMPLE / 'affinegan_sample').is_dir(),
  reason=f'no real frames in {SAMPLE}; set HATJAX_SAMPLE_DATA',
)


@needs_sample
def test_real_frame_folders(tmp_path):
  raw = SAMPLE / 'affinegan_sample'
  size = ('--image_size', '128')
  assert run('frame_folders', raw, tmp_path, *size, '--strict') == 0
  examples, metadata, _ = read(tmp_path, 'frame_folders/face-128')
  assert len(metadata['splits']['everything']) == 11
  assert len(metadata['splits']['stills']) == 9
  assert metadata['report']['masks'] == {'own': 6, 'mouth box': 14}
  assert sum(c['num_frames'] for c in metadata['clips'].values()) == 193 + 9
  for name in metadata['splits']['everything']:
    mask = np.stack(examples[name]['lip_mask'])[0, ..., 0] > 0
    y, x = np.argwhere(mask).mean(0) / 128
    assert 0.6 < y < 0.8 and 0.4 < x < 0.6 and 0.004 < mask.mean() < 0.05


@needs_sample
def test_real_ck_plus(tmp_path):
  script = SAMPLE / 'ck_plus_layout.py'
  subprocess.run([sys.executable, script, tmp_path / 'ck'], check=True)
  args = ('--image_size', '128', '--strict')
  assert run('ck_plus', tmp_path / 'ck', tmp_path / 'd', *args) == 0
  examples, metadata, _ = read(tmp_path / 'd', 'ck_plus/face-128')
  assert sorted(examples) == [f'S90{i}_001' for i in range(1, 7)]
  labels = sorted(clip['label'] for clip in metadata['clips'].values())
  assert labels == ['anger'] * 2 + ['contempt'] * 2 + ['happy', 'surprise']
