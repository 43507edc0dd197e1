"""Every command in the README: understood always, run where `slow` is asked.

The slow form runs each on made-up data, with the preset `tiny` and two steps,
in the README's order, so that one command finds what another left.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys

import cv2
import numpy as np
import pytest

from hatjax import (
  app,
  config_flag,
  convert,
  evaluate,
  generate,
  prepare,
  synthetic_faces,
  video,
)
from tests.conftest import ROOT, write_run, xla_flags

RECORDS = 'synthetic/128-i12-f8-s0'
# Commands that no test runs, and why. All others are run.
SKIPPED = {
  r'^bash launch/(quickstart|test|install)': 'downloads and minutes; CI does '
  'launch/test.sh, a person launch/quickstart.sh',
  r'hatjax\.app': 'serves until it is stopped; tests/test_app.py',
  r'prepare (ck_plus|mug|voxceleb)': 'raw data under licence; the builders run '
  'on trees in their layout in test_datasets, test_mug and test_voxceleb',
  r'convert fomm': 'a released file; test_foreign reads one in its layout',
  r'^(\.venv/bin/)?python tests/': 'PyTorch, or a plug-in for GPUs; '
  'test_benchmark compares PyTorch where it is there',
  r'convert weights': 'downloads; test_weights does it from a local server',
}
SETTINGS = {  # of every stage, where it has them
  'data.name': RECORDS, 'data.split': 'train',
  'data.batch_size': 2, 'train.val_split': 'val', 'train.val_clips': 1,
  'train.num_steps': 2, 'train.ckpt_every': 2, 'train.log_every': 1,
  'train.sample_every': 2, 'train.steps_per_dispatch': 1,
}


def blocks(kind):
  text = (ROOT / 'README.md').read_text()
  found = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.M | re.S)
  return [inside for name, inside in found if name == kind]


def commands():
  """Every command line of the README, in order, each once."""
  lines = '\n'.join(blocks('')).replace('\\\n', ' ').splitlines()
  table = re.findall(r'\| `(python -m [^`]*)` \|', (
    ROOT / 'README.md'
  ).read_text())
  found = []
  for line in table + lines:
    words = shlex.split(line, comments=True)
    if words:
      found.append(' '.join(map(shlex.quote, words)))
  return list(dict.fromkeys(found))


def words_of(line):
  """(name of the hatjax command or None, its arguments)."""
  words = shlex.split(line)
  while re.match('[A-Z_]+=', words[0]):  # of its environment
    words = words[1:]
  if words[1:2] == ['-m'] and words[2].startswith('hatjax.'):
    return words[2].removeprefix('hatjax.'), words[3:]
  return None, words


def load_config(path):
  file, _, argument = path.partition(':')
  module = importlib.import_module(f'configs.{os.path.basename(file)[:-3]}')
  return module.get_config(*([argument] if argument else []))


@pytest.mark.parametrize('line', commands())
def test_every_command_is_understood(line):
  name, words = words_of(line)
  if name is None:
    assert words[0] in ('bash', 'python') and (ROOT / words[1]).is_file()
  elif name == 'generate':
    generate._parser().parse_args(words)
  elif name == 'prepare':
    prepare._parse(words)
  elif name == 'convert':
    convert._parser().parse_args(words)
  elif name == 'app':
    app._parser().parse_args(words)
  else:
    if '--config' in words:
      config_flag._check([name, *words])
    known = ' '.join(evaluate._GROUPS.values())
    known += ' config workdir data_dir distributed mode batch_sizes num_frames'
    known += ' dtype devices lowering steps warmup cached json trace'
    for word in words:
      if word.startswith('--') and not word.startswith('--config.'):
        assert word[2:].partition('=')[0] in known.split(), word


def test_what_is_skipped_is_there():
  text = '\n'.join(commands()) + (ROOT / 'README.md').read_text()
  assert [p for p in SKIPPED if not re.search(p, text, re.M)] == []


def test_pictures_are_there_and_small():
  text = (ROOT / 'README.md').read_text()
  found = re.findall(r'!\[[^]]+\]\(([^)]+)\)', text)
  assert 'launch/faces.gif' in found
  for name in found:
    assert (ROOT / name).stat().st_size <= 2**20, name
  for link in re.findall(r'`((?:configs|launch|tests|hatjax)/[\w/.]+)`', text):
    if '*' not in link and 'mine' not in link:
      assert (ROOT / link).exists(), link


@pytest.fixture
def faces_here(tmp_path, monkeypatch, tiny_run):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'a').symlink_to(tiny_run)
  clip = synthetic_faces.render_clip(5, 'happy', 2, 128)['video']
  video.write_image('me.jpg', clip[0])
  return tmp_path


def test_the_python_block_and_the_file_run(faces_here, capsys):
  (block,) = blocks('python')
  exec(compile(block, 'README.md', 'exec'), {})
  assert '(1, 32, 16, 16, 3) (2, 32, 16, 16, 3)' in capsys.readouterr().out
  assert video.read_video('out/smile.gif')[0].shape == (32, 16, 16, 3)
  for line in commands():
    name, words = words_of(line)
    if 'model.hatjax' in words or 'smile.mp4' in words:
      assert {'convert': convert, 'generate': generate}[name].main(words) == 0
  assert video.read_video('smile.mp4')[0].shape == (32, 16, 16, 3)
  assert video.read_video('out/me_happy.mp4')[0].shape == (32, 16, 16, 3)


# -- slow: all of it ----------------------------------------------------------


def write_clips(folder, labels, people=4, frames=4):
  """Synthetic faces in AffineGAN's layout."""
  for person in range(people):
    for label in labels:
      part = folder / label / 'train' / 'img' / f'p{person}'
      part.mkdir(parents=True)
      shown = label if label in synthetic_faces.EXPRESSIONS else 'disgust'
      clip = synthetic_faces.render_clip(person, shown, frames, 96)['video']
      for t, frame in enumerate(clip):
        cv2.imwrite(str(part / f'{t:04d}.png'), frame[..., ::-1])


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(folder, environment): all that the README's commands take for granted."""
  here = tmp_path_factory.mktemp('readme')
  write_clips(here / 'home' / 'my_clips', ('happy', 'surprise'))
  sample = load_config('configs/frame_folders.py:sample').hat_cgan.data.labels
  for name in ('affinegan_sample', 'sample_fit', 'sample_held'):
    write_clips(here / name, sample, 1)
  clip = synthetic_faces.render_clip(5, 'happy', 6, 128)['video']
  for name in ('me.jpg', 'faces/1.png', 'faces/2.png'):
    (here / name).parent.mkdir(exist_ok=True)
    video.write_image(here / name, clip[0])
  for name in ('clip.mp4', 'in.mp4', 'made/1.mp4', 'clips/1.mp4'):
    (here / name).parent.mkdir(exist_ok=True)
    video.write_video(here / name, clip)
  environment = {
    **os.environ, **xla_flags(),
    'HOME': str(here / 'home'), 'TFDS_DATA_DIR': str(here / 'records'),
    'XDG_CACHE_HOME': os.environ.get('XDG_CACHE_HOME', os.path.expanduser(
      '~/.cache'
    )),
  }
  subprocess.run(
    [sys.executable, '-m', 'hatjax.prepare', 'synthetic', '--num_identities',
     '12', '--num_frames', '8'], cwd=here, env=environment, check=True,
  )
  labels = tuple(sorted(synthetic_faces.EXPRESSIONS))
  write_run(here / 'runs' / 'quickstart', 'tiny', labels)
  config = here / 'runs' / 'quickstart' / 'config.json'
  text = config.read_text().replace('frame_folders/face-256', RECORDS)
  config.write_text(text)
  return here, environment


def small(name, words):
  """The same command on the made-up data: `tiny`, two steps, few frames."""
  if '--config' in words:
    at = words.index('--config') + 1
    file, _, argument = words[at].partition(':')
    kept = [
      x for x in argument.split(',')
      if x and x not in ('paired', 'paper', 'reference')
      and not x.isdecimal()
    ]
    if 'fev_gan' in kept and 'identity_encoder' not in kept:
      kept.insert(0, 'identity_encoder')  # in place of VGG-Face's weights
    words[at] = f'{file}:{",".join([*kept, "tiny"])}'
    if 'paired' in argument:
      words.append('--config.video_diffusion.model.mode=paired')
    config = load_config(words[at])
    for stage in config.stages if name == 'train' else ():
      for setting, value in SETTINGS.items():
        block, key = setting.split('.')
        # `sample` has its own records, which were prepared from made-up clips.
        known = key in config[stage][block]
        if known and not (block == 'data' and 'sample' in argument):
          words.append(f'--config.{stage}.{setting}={value}')
  if name == 'benchmark':
    words += ['--steps', '1', '--warmup', '0']
  if name == 'evaluate' and '--compare' not in words:
    words += ['--nonets', '--num_clips', '2']
  if name == 'generate' and '--video' not in words and '--driving' not in words:
    words += ['--num_frames', '4']
  return words


@pytest.mark.slow
def test_every_command_runs(world):
  here, environment = world
  failed, ran = [], 0
  # A comparison wants two runs; the README trains the second one later.
  for line in sorted(commands(), key=lambda line: '--compare' in line):
    if any(re.search(pattern, line) for pattern in SKIPPED):
      continue
    name, words = words_of(line)
    ran += 1
    done = subprocess.run(
      [sys.executable, '-m', f'hatjax.{name}', *map(
        os.path.expanduser, (
          w.replace('~', str(here / 'home')) for w in small(name, words)
        )
      )], cwd=here, env=environment, capture_output=True, text=True,
    )
    print(done.returncode, line, done.stderr[-600:] if done.returncode else '')
    if done.returncode:
      failed.append(f'{line}\n{done.stderr[-600:]}')
  assert ran >= 25 and not failed, '\n'.join(failed)
  assert np.all([(here / name).exists() for name in (
    'smile.mp4', 'refined.mp4', 'model.hatjax', 'out/b.json', 'runs/mug',
  )])
