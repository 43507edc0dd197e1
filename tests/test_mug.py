"""MUG's builder on a small tree in its exact layout; the launch scripts."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import conftest
import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from hatjax import prepare, video

REPO = pathlib.Path(__file__).resolve().parent.parent
LITTLE = ('--crop', 'none', '--image_size', '16')
NATIVE = ('--crop', 'none', '--image_size', '0')
VAL = {'031', '048', '049', '077'}  # of the 42, by the rule of face_video


@pytest.fixture(scope='module')
def mug():
  return prepare.load_builder('mug')[0]


def save_take(folder, num_frames=36, apex=17, first=0):
  """Frames that go neutral -> apex -> neutral; the apex stands out."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for t in range(num_frames):
    fall = max(num_frames - 1 - apex, 1)
    near = t / max(apex, 1) if t <= apex else (num_frames - 1 - t) / fall
    openness = 1.0 if t == apex else 0.7 * near
    frame, _ = conftest.toy_frame(48, openness, (210, 180, 170), rng)
    cv2.imwrite(str(folder / f'img_{t + first:04d}.jpg'), frame[..., ::-1])


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  """MUG/ with both irregular subjects, suffixes and litter."""
  root = tmp_path_factory.mktemp('raw') / 'MUG'
  save_take(root / '001' / 'happiness' / 'take000', 41, 13)
  save_take(root / '001' / 'happiness' / 'take001nsg')
  save_take(root / '001' / 'neutral' / 'take000', 12, 5)
  save_take(root / '002' / 'session0' / 'anger' / 'take000end')
  save_take(root / '049' / 'session0' / 'happiness' / 'take000')
  save_take(root / '049' / 'session1' / 'happiness' / 'take000')
  save_take(root / '017' / 'fear' / 'take002')
  for place in ('.', '001', '049/session1/happiness', '001/neutral/take000'):
    (root / place / '.DS_Store').write_text('litter')
    (root / place / 'Thumbs.db').write_text('litter')
  return root


@pytest.fixture
def copy(tree, tmp_path):
  """A copy of the tree to spoil."""
  return shutil.copytree(tree, tmp_path / 'copy' / 'MUG')


def run(raw, data_dir, *options):
  return prepare.main(
    ['mug', '--raw', str(raw), '--data_dir', str(data_dir), *options]
  )


def read(data_dir, config):
  """(examples by id, metadata), the metadata naming them in stored order."""
  folder = data_dir / 'mug' / config / '1.0.0'
  builder = tfds.builder_from_directory(folder)
  examples = {e['id'].decode(): e for e in builder.as_data_source('clips')}
  metadata = json.loads((folder / 'metadata.json').read_text())
  assert list(examples) == list(metadata['clips'])
  return examples, metadata


def test_ids_labels_and_levels(tree, tmp_path, capsys):
  assert run(tree, tmp_path, *LITTLE, '--strict') == 0
  examples, metadata = read(tmp_path, 'none-16')
  assert {i: c['num_frames'] for i, c in metadata['clips'].items()} == {
    '001_happiness_take000': 21,  # (41 + 1) // 2
    '001_happiness_take001nsg': 18,
    '001_neutral_take000': 12,  # whole
    '002_session0_anger_take000end': 18,
    '017_fear_take002': 18,
    '049_session0_happiness_take000': 18,
    '049_session1_happiness_take000': 18,
  }
  assert metadata['labels'] == [
    'anger', 'disgust', 'fear', 'happiness', 'neutral', 'sadness', 'surprise'
  ]
  assert examples['002_session0_anger_take000end']['label'] == 0
  assert examples['001_neutral_take000']['label'] == 4
  assert {e['subject'] for e in examples.values()} == {
    b'001', b'002', b'017', b'049'
  }
  assert metadata['options'] == {
    'crop': 'none', 'image_size': 16, 'subjects': None, 'half': 'first',
  }
  assert metadata['report']['skipped'] == metadata['report']['notes'] == []
  assert '001 3, 002 1, 017 1, 049 2' in capsys.readouterr().out


def test_what_each_half_keeps(tree, tmp_path):
  source = tree / '001' / 'happiness' / 'take000'
  frames = [video.read_image(path) for path in sorted(source.glob('*.jpg'))]
  assert len(frames) == 41
  for half, config, length, even in (
    ('first', 'none-native', 21, 18), ('farthest', 'none-native-farthest', 14,
    18), ('none', 'none-native-none', 41, 36),
  ):
    assert run(tree, tmp_path, *NATIVE, '--half', half) == 0
    examples, metadata = read(tmp_path, config)
    assert metadata['options']['half'] == half
    kept = examples['001_happiness_take000']['video']
    assert len(kept) == length
    for t in range(length):
      np.testing.assert_array_equal(kept[t], frames[t])
    assert len(examples['001_happiness_take001nsg']['video']) == even
    assert len(examples['001_neutral_take000']['video']) == 12
  assert len(list((tmp_path / 'mug').iterdir())) == 3


def test_neither_noise_nor_brightness_is_the_apex(mug, tmp_path):
  folder = tmp_path / '001' / 'fear' / 'take000'
  save_take(folder, 40, 11)
  rng = np.random.default_rng(1)
  for t, noise, brighter in ((25, 60, 0), (30, 0, 35)):
    path = str(folder / f'img_{t:04d}.jpg')
    image = cv2.imread(path).astype(int) + brighter
    image += rng.integers(-noise, noise + 1, image.shape)
    cv2.imwrite(path, np.clip(image, 0, 255))
  (clip,) = mug.scan(tmp_path, half='farthest').clips
  assert clip.frames[-1].name == 'img_0011.jpg' and len(clip.frames) == 12


def clips_of(subjects, per_subject=3):
  """Metadata of one neutral and some other takes per subject."""
  labels = ('neutral', 'fear', 'anger', 'surprise')
  return {
    f'{who}_{label}_take000': {'label': label, 'subject': who, 'still': False}
    for who in subjects for label in labels[: 1 + per_subject]
  }


def test_splits_of_all_subjects(mug):
  clips, notes = clips_of(mug.SUBJECTS), []
  splits = mug.name_splits(clips, notes)
  assert notes == [] and len(clips) == 52 * 4
  who = {k: {clips[i]['subject'] for i in v} for k, v in splits.items()}
  assert who['test'] == who['imaginator_test'] == {
    '017', '034', '045', '055', '060', '064', '065', '073', '078', '083'
  }
  assert len(who['imaginator_train']) == 42 and len(who['train']) == 38
  assert who['train'] | who['val'] == who['imaginator_train']
  assert who['val'] == VAL
  assert {'008', '084'} <= who['lfdm_train'] and '001' in who['lfdm_test']
  assert {k: (len(who[k]), len(v)) for k, v in splits.items()} == {
    'train': (38, 38 * 4), 'val': (4, 12), 'test': (10, 30),
    'everything': (52, 208), 'stills': (0, 0),
    'imaginator_train': (42, 126), 'imaginator_test': (10, 30),
    'lfdm_train': (26, 104), 'lfdm_test': (26, 104),
    'subjects_80': (42, 126), 'subjects_20': (10, 30),
    'by_video_train': (52, 198),
    'by_video_test': (len(who['by_video_test']), 10),
  }
  for one, other in (
    ('train', 'val'), ('train', 'test'), ('val', 'test'),
    ('lfdm_train', 'lfdm_test'), ('subjects_80', 'subjects_20'),
    ('imaginator_train', 'imaginator_test'),
  ):
    assert not who[one] & who[other]
  assert not set(splits['by_video_train']) & set(splits['by_video_test'])
  backwards = dict(reversed(clips.items()))
  assert mug.name_splits(backwards, []) == splits


@pytest.mark.parametrize(
  ('subjects', 'sizes', 'note'),
  [
    ('001 017', (1, 0, 1), None),
    ('001 002 006 017', (2, 1, 1), None),
    ('001 002 006', (1, 1, 1), 'rule of other data sets'),
    ('017 034', (1, 0, 1), 'rule of other data sets'),
    ('001', (1, 0, 0), 'rule of other data sets'),
    ('101 102 103', (1, 1, 1), 'subjects 101, 102, 103'),
    ('001 002 017 101', (2, 1, 1), 'subjects 101'),
  ],
)
def test_splits_of_few_subjects(mug, subjects, sizes, note):
  clips, notes = clips_of(subjects.split()), []
  splits = mug.name_splits(clips, notes)
  who = {k: {clips[i]['subject'] for i in v} for k, v in splits.items()}
  three = [who[name] for name in ('train', 'val', 'test')]
  assert tuple(len(names) for names in three) == sizes
  assert set.union(*three) == set(subjects.split())
  assert sum(sizes) == len(set.union(*three))
  assert (note or '') in ' '.join(notes) and bool(note) == bool(notes)
  known = set(subjects.split()) & mug.SUBJECTS
  assert who['imaginator_train'] | who['imaginator_test'] == known
  assert who['lfdm_train'] | who['lfdm_test'] == known
  if '001' not in known:
    assert splits['lfdm_test'] == []


def test_splits_in_the_records(tree, tmp_path, capsys):
  assert run(tree, tmp_path, *LITTLE) == 0
  _, metadata = read(tmp_path, 'none-16')
  splits = metadata['splits']
  assert splits['test'] == splits['imaginator_test'] == ['017_fear_take002']
  assert splits['lfdm_train'] == ['017_fear_take002']
  assert '001_neutral_take000' in splits['lfdm_test']
  assert '001_neutral_take000' not in splits['imaginator_train']
  assert len(splits['imaginator_train']) == 5 and len(splits['val']) in (1, 2)
  assert 'imaginator_test 1, lfdm_train 1' in capsys.readouterr().out
  shutil.copytree(tree / '001', tmp_path / 'few' / '001')
  assert run(tmp_path / 'few', tmp_path / 'd', *LITTLE) == 0
  _, metadata = read(tmp_path / 'd', 'none-16')
  assert len(metadata['splits']['train']) == 3
  assert metadata['splits']['imaginator_test'] == []
  (note,) = metadata['report']['notes']
  assert 'follow the rule of other data sets' in note


def spoil(root):
  """One of every irregularity; returns what must be said of each."""
  happy = root / '001' / 'happiness'
  save_take(happy / 'take007', 20)
  save_take(root / '017' / 'disgust' / 'take000', 35)
  save_take(root / '017' / 'neutral' / 'take000', 1)
  (happy / 'take003').mkdir()
  (root / '001' / 'sadness').mkdir()
  (root / '003').mkdir()
  save_take(root / 'anna' / 'fear' / 'take000')
  save_take(root / '001' / 'boredom' / 'take000')
  save_take(happy / 'first try')
  save_take(root / '001' / 'Happiness' / 'take000')
  save_take(root / '001' / 'fear')
  (root / 'readme.txt').write_text('MUG')
  take = happy / 'take001nsg'
  (take / 'notes.txt').write_text('blinks')
  shutil.copy(take / 'img_0003.jpg', take / 'copy of img_0003.jpg')
  shutil.copy(take / 'img_0003.jpg', take / 'img_3.jpg')
  return {
    '001/happiness/take007': 'too short: 20 frames, MUG\'s published lists '
    'drop those under 36.',
    '017/disgust/take000': 'too short: 35 frames',
    '017/neutral/take000': 'clip 017_neutral_take000 has 1 frames',
    '001/happiness/take003': 'holds no frames',
    '001/sadness': 'holds no takes',
    '003': 'holds no expressions',
    'anna': 'is not a subject folder, named by three digits',
    '001/boredom': 'is no expression. Name it one of: anger, disgust',
    '001/happiness/first try': 'is not a take',
    # Capitals come first, so it is the other that is the second.
    '001/happiness/take000': 'second take with the id 001_happiness_take000',
    '001/fear': 'holds frames outside of takes',
    'readme.txt': 'is not a subject folder',
    '001/happiness/take001nsg/notes.txt': 'is not named like a picture',
    '001/happiness/take001nsg/copy of img_0003.jpg': 'not named like img_0000',
    '001/happiness/take001nsg/img_0003.jpg': 'is a second frame 3',
  }


def test_irregularities_are_listed_with_their_reasons(copy, tmp_path, capsys):
  expected = spoil(copy)
  for name in ('Fear', 'SAD'):  # read as fear and sadness
    save_take(copy / '006' / name / 'take000')
  assert run(copy, tmp_path, *LITTLE) == 0
  captured = capsys.readouterr()
  lines = [x for x in captured.err.split('\n') if x.startswith('skipped ')]
  told = dict(line.removeprefix('skipped ').split(': ', 1) for line in lines)
  assert set(told) == set(expected)
  for path, reason in expected.items():
    assert reason in told[path], path
  _, metadata = read(tmp_path, 'none-16')
  assert metadata['clips']['006_fear_take000']['label'] == 'fear'
  assert metadata['clips']['006_sadness_take000']['label'] == 'sadness'
  assert len(metadata['clips']) == 7 + 2
  before = metadata['fingerprint']
  assert run(copy, tmp_path, *LITTLE, '--force', '--strict') == 1
  assert read(tmp_path, 'none-16')[1]['fingerprint'] == before


def test_missing_numbers_and_an_apex_too_near(copy, tmp_path, capsys):
  take = copy / '001' / 'happiness' / 'take000'
  for t in (0, 7, 8, 9, 20):
    (take / f'img_{t:04d}.jpg').unlink()
  save_take(copy / '006' / 'fear' / 'take000', 36, 4)
  (copy / '017' / 'fear' / 'take002' / 'img_0000.jpg').write_text('no picture')
  assert run(copy, tmp_path, *NATIVE, '--half', 'farthest') == 0
  examples, metadata = read(tmp_path, 'none-native-farthest')
  kept = examples['001_happiness_take000']['video']
  assert len(kept) == 14 - 4  # 1-6 and 10-13
  for t, number in ((0, 1), (6, 10), (9, 13)):
    frame = video.read_image(take / f'img_{number:04d}.jpg')
    np.testing.assert_array_equal(kept[t], frame)
  note, _ = metadata['report']['notes']  # and that 017 is gone
  assert '1 takes lack frames' in note
  assert '(001_happiness_take000: 0000 0007 0008 ...)' in note
  err = capsys.readouterr().err
  assert (
    'skipped 006/fear/take000: too short: its frame 4 differs most from the '
    'first, 8 frames are needed. Use --half first.'
  ) in err
  assert 'img_0000.jpg: is a text file' in err and 'whole clip' in err
  assert len(examples) == 6


def test_folders_above_and_below(tree, mug, tmp_path):
  """The parent serves as well; anything else is told from MUG."""
  assert mug.scan(tree.parent).raw == tree
  deep = tmp_path / 'download' / 'subjects3'
  shutil.copytree(tree / '017', deep / '017')
  assert mug.scan(tmp_path).raw == deep  # two levels
  for part in ('001', '001/happiness', '049/session1', '049/session1/happiness',
               '049/session0/happiness/take000'):
    with pytest.raises(ValueError, match='is of one subject. Pass') as error:
      mug.scan(tree / part)
    assert str(error.value).endswith(f'the folder above: {tree}')
  shutil.copytree(tree / '017', tmp_path / 'download' / 'again' / '017')
  with pytest.raises(ValueError, match='holds MUG more than once') as error:
    mug.scan(tmp_path)
  assert str(deep) in str(error.value)
  (tmp_path / 'S005' / '001').mkdir(parents=True)
  with pytest.raises(ValueError, match="does not hold MUG's folders. Pass"):
    mug.scan(tmp_path / 'S005')


def test_wrong_options(tree, tmp_path, capsys):
  assert run(tree, tmp_path, '--subjects', 'x') == 1
  assert 'leave out --subjects' in capsys.readouterr().err
  args = ['ck_plus', '--raw', str(tree), '--half', 'none']
  assert prepare.main(args) == 1
  assert '--half is for mug: leave it out with ck_plus' in (
    capsys.readouterr().err
  )
  with pytest.raises(SystemExit):
    run(tree, tmp_path, '--half', 'second')


def test_fingerprint_is_of_the_content(copy, tmp_path, capsys):
  prints = []
  for raw, half in ((copy, 'first'), (copy.parent, 'first'),
                    (copy, 'farthest'), (copy, 'none')):
    out = tmp_path / str(len(prints))
    assert run(raw, out, *LITTLE, '--half', half) == 0
    config = 'none-16' if half == 'first' else f'none-16-{half}'
    prints.append(read(out, config)[1]['fingerprint'])
  assert prints[0] == prints[1] and len(set(prints)) == 3
  run(copy.parent, tmp_path / '0', *LITTLE)
  assert 'already prepared' in capsys.readouterr().out
  shutil.copy(copy / '017/fear/take002/img_0004.jpg',
              copy / '017/fear/take002/img_0005.jpg')
  run(copy, tmp_path / '0', *LITTLE)
  assert read(tmp_path / '0', 'none-16')[1]['fingerprint'] != prints[0]


def test_as_a_builder_of_tfds(tree, tmp_path):
  """Without `prepare`: the same records, by options or by name."""
  assert run(tree, tmp_path / 'a', *LITTLE, '--half', 'farthest') == 0
  cls = prepare.load_builder('mug')[1]
  builder = cls(data_dir=tmp_path / 'b', config='none-16-farthest')
  config = tfds.download.DownloadConfig(manual_dir=tree)
  builder.download_and_prepare(
    download_config=config, download_dir=tmp_path / 'download'
  )
  ours, metadata = read(tmp_path / 'a', 'none-16-farthest')
  theirs, same = read(tmp_path / 'b', 'none-16-farthest')
  assert same == metadata and list(ours) == list(theirs)
  for name, example in ours.items():
    np.testing.assert_array_equal(example['video'], theirs[name]['video'])
  assert cls(data_dir=tmp_path).builder_config.name == 'face-256'
  assert [config.name for config in cls.BUILDER_CONFIGS] == ['face-256']
  with pytest.raises(ValueError, match='no configuration .face256.. It is'):
    cls(data_dir=tmp_path, config='face256')
  for name in ('face-256', 'none-native-none', 'face-64-farthest'):
    options = sys.modules[cls.__module__].options_of(name)
    shared = prepare.load_builder('mug')[2]
    assert shared.config_name(options) == name


def test_tfds_finds_the_builder_by_path(tmp_path):
  """As `tfds build datasets/mug.py` does, whose own imports need Beam."""
  code = (
    'import sys; sys.path.insert(0, sys.argv[1])\n'
    'from tensorflow_datasets.core import community\n'
    "cls = community.builder_cls_from_module('mug')\n"
    "builder = cls(data_dir=sys.argv[2])\n"
    'print(builder.name, builder.info.full_name)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, REPO / 'datasets', tmp_path], cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(REPO)}, capture_output=True,
    text=True, check=False,
  )
  assert done.stdout == 'mug mug/face-256/1.0.0\n', done.stderr


SCRIPTS = ('run.sh', 'slurm.sbatch', 'tpu_pod.sh')


@pytest.mark.parametrize('name', SCRIPTS)
def test_launch_scripts_are_sound(name):
  script = REPO / 'launch' / name
  subprocess.run(['bash', '-n', script], check=True)
  beside = pathlib.Path(sys.executable).with_name('shellcheck')
  shellcheck = str(beside) if beside.is_file() else shutil.which('shellcheck')
  if shellcheck:
    command = [shellcheck, '--shell=bash', script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ('name', 'more', 'told'),
  [
    ('run.sh', [], ''),
    ('slurm.sbatch', ['--distributed'], '--kill-on-bad-exit=1'),
    ('tpu_pod.sh', ['--distributed'], 'ssh slice --zone=z --worker=all'),
  ],
)
def test_launch_scripts_pass_arguments_on(tmp_path, name, more, told):
  """Through stand-ins for python, srun and gcloud; odd characters stay."""
  for stand_in, text in (
    ('python', 'printf "<%s>" "$PWD" "$@"'),
    ('srun', 'echo "$1"; shift; exec "$@"'),
    ('gcloud', 'echo "${@:1:7}"; exec bash -c "${8#--command=}"'),
  ):
    (tmp_path / stand_in).write_text(f'#!/usr/bin/env bash\n{text}\n')
    (tmp_path / stand_in).chmod(0o755)
  args = ['--config', 'configs/mug.py:tiny', '--workdir', "it's a run"]
  env = {
    **os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}',
    'PYTHON': str(tmp_path / 'python'), 'HATJAX': str(REPO),
  }
  where = ['slice', 'z'] if name == 'tpu_pod.sh' else []
  done = subprocess.run(
    ['bash', REPO / 'launch' / name, *where, *args], env=env, cwd=REPO,
    capture_output=True, text=True, check=True,
  )
  expected = [str(REPO), '-m', 'hatjax.train', *more, *args]
  assert done.stdout.endswith(''.join(f'<{word}>' for word in expected))
  assert told in done.stdout
