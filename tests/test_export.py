"""One file instead of a workdir: the same videos, none of the methods' code."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import hatjax
from hatjax import convert, driving, exported, provenance, video
from tests.conftest import ROOT, write_run

# What the config is asked for -> the most that a grey level may differ by.
MODELS = {
  'tiny': 1, 'fev_gan,tiny': 1, 'motion_transfer,tiny': 1,
  'hat_cgan_diff,tiny': 1, 'hat_cgan,super_resolution,tiny,32': 1,
}


@pytest.fixture(scope='module', params=MODELS)
def pair(request, tmp_path_factory):
  """(a run, the same from one file, how much they may differ)."""
  folder = tmp_path_factory.mktemp('export')
  write_run(folder / 'run', request.param)
  path = folder / 'model.hatjax'
  assert convert.main([
    'export', '--workdir', str(folder / 'run'), '--out', str(path)
  ]) == 0
  return hatjax.load(folder / 'run'), hatjax.load(path), MODELS[request.param]


def pictures(run, count=3):
  size = run.image_size
  return np.random.default_rng(0).integers(
    0, 256, (count, size, size, 3), np.uint8
  )


def test_one_file_gives_the_same_videos(pair):
  run, model, allowed = pair
  assert (model.labels, model.image_size, model.crop, model.step) == (
    run.labels, run.image_size, run.crop, run.step
  )
  signed = [provenance.sign(x).comment for x in (run, model)]
  assert signed[0] == signed[1]
  images = pictures(run)
  if 'driving' in run.stages[0].method.reads:
    clips = [
      list(driving.drive(x, images[0], images, batch_size=2))
      for x in (run, model)
    ]
  else:
    labels = ['happy', 'surprise', 'happy'] if run.labels else None
    clips = [x.animate(images, labels, num_frames=5) for x in (run, model)]
  ours, theirs = np.asarray(clips[0], int), np.asarray(clips[1], int)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() <= allowed
  assert ours.std() > 3


@pytest.fixture(scope='module')
def model(tiny_run, tmp_path_factory):
  path = tmp_path_factory.mktemp('model') / 'model.hatjax'
  assert convert.main([
    'export', '--workdir', str(tiny_run), '--out', str(path)
  ]) == 0
  return path


def test_any_number_of_faces_and_frames(model, tiny_run):
  run, model = hatjax.load(tiny_run), hatjax.load(model)
  for count, frames in ((1, 1), (2, 7), (5, 3)):
    images = pictures(run, count)
    ours = run.animate(images, 'happy', num_frames=frames).astype(int)
    theirs = model.animate(images, 'happy', num_frames=frames)
    assert np.abs(ours - theirs).max() <= 1


def test_the_file_says_what_it_is_and_holds_no_pickle(model):
  with zipfile.ZipFile(model) as file:
    manifest = json.loads(file.read('manifest.json'))
    weights = np.load(file.open('hat_cgan/weights.npz'), allow_pickle=False)
    names = [name for name in weights.files]
    assert all(weights[name].dtype != object for name in names)
  assert manifest['platforms'] == ['cpu', 'cuda', 'tpu']
  assert manifest['info']['labels'] == ['happy', 'surprise']
  assert manifest['stages'][0]['image_size'] == 16
  assert not [name for name in names if 'discriminator' in name]
  assert '/tmp' not in json.dumps(manifest)


def test_damage_is_noticed(model, tmp_path):
  data = bytearray(model.read_bytes())
  with zipfile.ZipFile(model) as file:
    members = {name: file.read(name) for name in file.namelist()}
  name = 'hat_cgan/encode.stablehlo'
  exported.write(tmp_path / 'a.hatjax', {**members, name: members[name] + b'!'})
  with pytest.raises(ValueError, match='encode.stablehlo has another checksum'):
    hatjax.load(tmp_path / 'a.hatjax')
  (tmp_path / 'b.hatjax').write_bytes(data[:1000])
  for wrong in ('b.hatjax', 'nowhere.hatjax'):
    with pytest.raises(ValueError, match='not an exported model.*convert'):
      hatjax.load(tmp_path / wrong)
  (tmp_path / 'me.jpg').write_bytes(data[:10])
  with pytest.raises(ValueError, match='me.jpg is a file, neither.*.hatjax'):
    hatjax.load(tmp_path / 'me.jpg')
  manifest = json.loads(members['manifest.json'])
  manifest['stages'][0]['checkpoint'] = 'f; method of somebody else'
  forged = {**members, 'manifest.json': json.dumps(manifest).encode()}
  exported.write(tmp_path / 'd.hatjax', forged)
  with pytest.raises(ValueError, match='checkpoint in its manifest is no SHA'):
    hatjax.load(tmp_path / 'd.hatjax')
  manifest = json.loads(members['manifest.json']) | {'format': 99}
  members['manifest.json'] = json.dumps(manifest).encode()
  exported.write(tmp_path / 'c.hatjax', members)
  with pytest.raises(ValueError, match='format 99'):
    hatjax.load(tmp_path / 'c.hatjax')


def test_generate_runs_it_without_the_methods(model, tmp_path):
  video.write_image(tmp_path / 'a.png', pictures(hatjax.load(model), 1)[0])
  code = (
    'import sys; from hatjax import generate; '
    f'code = generate.main(["--model", {str(model)!r}, "--image", "a.png", '
    '"--crop", "none", "--label", "happy", "--num_frames", "3", '
    '"--out", "a.mp4"]); '
    'print([m for m in sys.modules if m.startswith(("hatjax.methods", '
    '"hatjax.nets"))], code)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
    env={**__import__('os').environ, 'PYTHONPATH': str(ROOT)},
  )
  assert done.stdout.splitlines()[-1] == '[] 0', done.stderr
  assert video.read_video(tmp_path / 'a.mp4')[0].shape == (3, 16, 16, 3)


def test_an_exported_refinement_is_the_one_it_was(tmp_path):
  write_run(tmp_path / 'run', 'hat_cgan_diff,tiny')
  from hatjax import export

  export.export(tmp_path / 'run', tmp_path / 'm.hatjax')
  run, model = hatjax.load(tmp_path / 'run'), hatjax.load(tmp_path / 'm.hatjax')
  images = pictures(run, 1)
  ours = run.animate(images, 'happy', refine=0).astype(int)
  theirs = model.animate(images, 'happy', refine=0)
  assert np.abs(ours - theirs).max() <= 1
  with pytest.raises(ValueError, match='was exported to refine at'):
    model.animate(images, 'happy', refine=0.77)
