"""Any photo -> the square picture of a face that a run animates.

A photo is a path, a PIL image or an array; what a run takes is uint8 [S, S, 3]
(RGB), S its image_size, cropped as its training records were.
"""

import io
import os

import numpy as np
from PIL import Image, ImageOps

from hatjax import faces, video

CROPS = ('auto', 'none')
Photo = str | os.PathLike | Image.Image | np.ndarray


def read(photo):
  """A photo as uint8 [H, W, 3], the right way up.

  Args:
    photo: path, PIL image, or uint8 [H, W, 3].

  Raises:
    ValueError: no picture, or an array of another kind.
  """
  if isinstance(photo, str | os.PathLike):
    return video.read_image(photo)
  if isinstance(photo, Image.Image):
    data = io.BytesIO()
    ImageOps.exif_transpose(photo).save(data, 'png', compress_level=1)
    return video.decode_image(data.getvalue(), 'the picture')
  photo = np.asarray(photo)
  if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
    raise ValueError(
      'A picture must be a path, a PIL image or uint8 [H, W, 3], not '
      f'{photo.dtype} {list(photo.shape)}.'
    )
  return photo


def find_face(image, name='the picture'):
  """The Viola-Jones box of the face in uint8 [H, W, 3].

  Raises:
    ValueError: none found in what has this name.
  """
  face = faces.detect_face(image)
  if face is None:
    raise ValueError(
      f'no face found in {name}. Crop the photo to the face yourself, or pass '
      '--crop none to use the whole picture.'
    )
  return face


def crop_face(
  photo, size, crop='auto', background='keep', name='the picture', face=None
):
  """The face in a photo, uint8 [size, size, 3].

  Args:
    photo: see `read`.
    size: side of the result, pixels.
    crop: 'auto' finds the face and takes the head; 'none' squeezes the whole
      picture to a square.
    background: 'keep', or 'black' outside of the face.
    name: of the photo, for messages.
    face: box of the face, where it is known already.

  Raises:
    ValueError: no picture, no face, unknown crop.
  """
  if crop not in CROPS:
    raise ValueError(
      f'Unknown crop {crop!r}. Choose one of: {", ".join(CROPS)}.'
    )
  if isinstance(photo, str | os.PathLike):
    name = photo
  image = read(photo)
  if crop == 'none' and background == 'keep':
    return video.resize(image, size)
  face = face or find_face(image, name)
  if background == 'black':
    image = faces.blacken_background(image, face)
  if crop == 'none':
    return video.resize(image, size)
  return faces.crop(image, faces.square_crop_box(face, image.shape), size)


def faces_of(images, size, crop='auto', background='keep'):
  """One photo, or a list or tuple of them, as uint8 [B, size, size, 3].

  What is uint8 [size, size, 3] is a face already; an array [B, H, W, 3] is
  handed back as it is. See `crop_face` for the rest.
  """
  if getattr(images, 'ndim', 0) == 4:
    return np.asarray(images)
  cropped = []
  for photo in images if isinstance(images, list | tuple) else [images]:
    photo = photo if isinstance(photo, str | os.PathLike) else read(photo)
    if getattr(photo, 'shape', ())[:2] != (size, size):
      photo = crop_face(photo, size, crop, background)
    cropped.append(photo)
  return np.stack(cropped)
