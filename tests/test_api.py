"""hatjax from Python: load a run, animate whatever stands for a face."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import hatjax
from hatjax import photos, synthetic_faces, video


@pytest.fixture(scope='module')
def run(tiny_run):
  return hatjax.load(tiny_run)


@pytest.fixture(scope='module')
def photo():
  """A face in the corner of a larger picture, uint8 [120, 160, 3]."""
  image = np.full((120, 160, 3), 200, np.uint8)
  clip = synthetic_faces.render_clip(3, 'happy', 1, 96)
  image[12:108, 50:146] = clip['video'][0]
  return image


def test_a_path_a_pil_image_and_an_array_are_one_photo(run, photo, tmp_path):
  path = tmp_path / 'me.png'
  video.write_image(path, photo)
  clip = run.animate(path, label='happy', num_frames=4)
  assert clip.dtype == np.uint8 and clip.shape == (1, 4, 16, 16, 3)
  for same in (str(path), Image.open(path), photo, [path]):
    np.testing.assert_array_equal(
      clip, run.animate(same, label='happy', num_frames=4)
    )
  # As where the face was cropped before.
  crop = photos.crop_face(photo, 16, 'none' if run.crop == 'none' else 'auto')
  np.testing.assert_array_equal(
    clip, run.animate(crop, label='happy', num_frames=4)
  )
  pair = run.animate([photo, path], ['happy', 'surprise'], num_frames=4)
  assert pair.shape == (2, 4, 16, 16, 3)
  assert np.abs(pair[0].astype(int) - clip[0]).max() <= 1


def test_a_face_is_found_and_cropped(photo):
  crop = photos.crop_face(photo, 32)
  whole = photos.crop_face(photo, 32, 'none')
  assert crop.shape == whole.shape == (32, 32, 3)
  # The head fills the crop; of the whole picture the left is empty.
  assert np.ptp(whole[:, :8].reshape(-1, 3), 0).max() < 3
  assert np.ptp(crop[8:24, 8:24].reshape(-1, 3), 0).max() > 50


@pytest.mark.parametrize('wrong, message', [
  (np.zeros((20, 20), np.uint8), 'path, a PIL image or uint8'),
  (np.zeros((20, 20, 3)), 'not float64'),
  ('nowhere.jpg', 'Cannot read nowhere.jpg'),
])
def test_what_is_no_photo_says_what_would_be(run, wrong, message):
  with pytest.raises(ValueError, match=message):
    run.animate(wrong, label='happy')


def test_no_face_is_an_error_with_a_cure():
  with pytest.raises(ValueError, match='no face found in the picture.*crop'):
    photos.crop_face(np.zeros((64, 64, 3), np.uint8), 16)
  with pytest.raises(ValueError, match='Unknown crop'):
    photos.crop_face(np.zeros((64, 64, 3), np.uint8), 16, 'centre')


def test_import_brings_nothing_heavy():
  code = (
    'import sys, hatjax; print(sorted({"jax", "flax", "numpy", "cv2", "av", '
    '"PIL", "tensorflow_datasets"} & set(sys.modules)), hatjax.load.__doc__)'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True,
                       text=True, check=True).stdout
  assert out.startswith('[] Opens a trained run')
