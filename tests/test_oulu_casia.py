"""Oulu-CASIA: both trees, every camera and light; backgrounds made black."""

import json

import conftest
import cv2
import numpy as np
import pytest

from configs import oulu_casia as config
from hatjax import data, faces, prepare, records

EXPRESSIONS = ('Anger', 'Disgust', 'Fear', 'Happiness', 'Sadness', 'Surprise')


def write(folder, subjects=3, num_frames=4, size=(24, 32), shade=0):
  for s in range(1, 1 + subjects):
    for n, expression in enumerate(EXPRESSIONS):
      clip = folder / f'P{s:03d}' / expression
      clip.mkdir(parents=True)
      for t in range(num_frames):
        image = np.full((*size, 3), 10 * s + n + 30 * t + shade, np.uint8)
        cv2.imwrite(str(clip / f'{t:03d}.jpeg'), image)
  return folder


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
  raw = tmp_path_factory.mktemp('oulu')
  frames = raw / 'B_OriginalImg' / 'B_OriginalImg' / 'OriginalImg'
  crops = raw / 'C_PreProcess_Img' / 'PreProcess Img'
  write(frames / 'VL' / 'Strong')
  write(frames / 'NI' / 'Weak', subjects=2, shade=60)
  write(crops / 'VL_Acropped' / 'Strong', size=(16, 16), shade=5)
  return raw


def run(raw, tmp_path, *words):
  code = prepare.main([
    'oulu_casia', '--raw', str(raw), '--data_dir', str(tmp_path),
    '--crop', 'none', '--image_size', '16', *words,
  ])
  return code


def first_pixel(name, folder, clip='P002_fear'):
  found = records.Records(name, folder)
  (frame,), _ = found.read(found.clips[clip], [1])
  return int(frame[0, 0, 0])


def test_frames_are_preferred_and_split_by_subject(raw, tmp_path, capsys):
  assert run(raw, tmp_path) == 0
  out = ' '.join(capsys.readouterr().out.split())
  assert '18 sequences of 3 subjects, the whole database has 480 of 80' in out
  assert 'face crops are there as well' in out
  found = records.Records('oulu_casia/none-16', tmp_path)
  assert found.labels == (
    'anger', 'disgust', 'fear', 'happiness', 'sadness', 'surprise'
  )
  splits = {s: {c.subject_name for c in found.split(s)}
            for s in ('train', 'val', 'test')}
  assert sorted(map(len, splits.values())) == [1, 1, 1]
  assert set.union(*splits.values()) == {'P001', 'P002', 'P003'}
  assert all(c.num_frames == 4 for c in found.clips.values())
  # 10 s + n + 30 t: subject 2, fear is number 2, second frame.
  assert abs(first_pixel('oulu_casia/none-16', tmp_path) - 52) <= 1
  made = data.make_batches(
    'oulu_casia/none-16', image_size=16, frames='even', num_frames=31,
    batch_size=2, directory=tmp_path,
  )
  batch = next(made.iterate())
  assert batch['time'].shape == (2, 32) and (np.diff(batch['time']) >= 0).all()


def test_other_conditions_and_the_crops(raw, tmp_path, capsys):
  assert run(raw, tmp_path, '--condition', 'ni_weak') == 0
  assert abs(first_pixel('oulu_casia/none-16-ni_weak', tmp_path) - 112) <= 1
  crops = raw / 'C_PreProcess_Img'
  assert run(crops, tmp_path) == 0
  assert abs(first_pixel('oulu_casia/none-16', tmp_path) - 57) <= 1
  capsys.readouterr()
  for words, message in (
    (('--condition', 'ni_dark'), 'Here are: ni_weak, vl_strong. Pass'),
    (('--condition', 'red'), "--condition is 'red'. Choose one of: vl_strong"),
    (('--half', 'first'), '--half is for mug'),
    (('--subjects', 'P'), 'leave out --subjects'),
  ):
    assert run(raw, tmp_path, *words) == 1
    assert message in ' '.join(capsys.readouterr().err.split())
  with pytest.raises(ValueError, match='--condition ni_weak --background blac'):
    records.Records('oulu_casia/face-64-ni_weak-black', tmp_path)


def test_stray_entries_are_listed(raw, tmp_path):
  folder = write(tmp_path / 'VL' / 'Strong', subjects=2, num_frames=2)
  (folder / 'P001' / 'Anger' / 'notes.txt').write_text('x')
  (folder / 'P001' / 'Joy').mkdir()
  (folder / 'readme').write_text('x')
  assert run(tmp_path, tmp_path / 'records') == 0
  made = tmp_path / 'records' / 'oulu_casia' / 'none-16' / '1.0.0'
  metadata = json.loads((made / 'metadata.json').read_text())
  skipped = [path for path, _ in metadata['report']['skipped']]
  assert sorted(p.rpartition('/')[2] for p in skipped) == [
    'Joy', 'notes.txt', 'readme'
  ]


def test_background_is_black_outside_the_face(tmp_path):
  image = np.full((60, 80, 3), 200, np.uint8)
  out = faces.blacken_background(image, (20, 10, 60, 50))
  assert (out[30, 40] == 200).all()
  assert (out[[0, 0, -1], [0, -1, 40]] == 0).all()
  # The ellipse: pi * 18 * 26 pixels.
  area = (out[..., 0] > 0).sum()
  assert area == pytest.approx(np.pi * 18 * 26, rel=0.08)
  points = np.zeros((68, 2))
  points[:4] = (20, 10), (60, 10), (60, 50), (20, 50)
  points[4:] = 40, 30
  out = faces.blacken_background(image, None, points)
  assert (out[..., 0] > 0).sum() == pytest.approx(40 * 40, rel=0.06)
  root = conftest.write_frame_folders(tmp_path / 'raw', num_videos=2)
  code = prepare.main([
    'frame_folders', '--raw', str(root), '--data_dir', str(tmp_path),
    '--crop', 'none', '--image_size', '16', '--background', 'black',
  ])
  assert code == 0
  found = records.Records('frame_folders/none-16-black', tmp_path)
  frames, _ = found.read(next(iter(found.clips.values())), range(8))
  assert (frames[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
  assert (frames[:, 8, 8] > 100).all()


def test_config_is_the_papers():
  full = config.get_config('fev_gan,paper')
  stage = full.fev_gan
  assert stage.data.name == 'oulu_casia/face-256-black'
  # 64 of 80 subjects, six clips each, 400 epochs in batches of 8.
  assert stage.train.num_steps == 64 * 6 * 400 // stage.data.batch_size
  assert config.get_config().stages == ('identity_encoder', 'fev_gan')
