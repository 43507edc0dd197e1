"""Pictures: ranges, files of every kind, resizing."""

import os
import struct
import zlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_video import encode, make_clip, psnr

from hatjax import video


@pytest.mark.parametrize('wrap', [np.asarray, jnp.asarray])
def test_ranges_are_exact_inverses(wrap):
  values = wrap(np.arange(256, dtype=np.uint8))
  floats = video.to_float(values)
  assert floats.dtype == np.float32
  assert (float(floats[0]), float(floats[255])) == (-1, 1)
  back = video.to_uint8(floats)
  assert back.dtype == np.uint8
  np.testing.assert_array_equal(back, values)


def test_ranges_under_jit_and_from_bfloat16():
  values = jnp.arange(256, dtype=jnp.uint8)
  there_and_back = jax.jit(lambda x: video.to_uint8(video.to_float(x)))
  np.testing.assert_array_equal(there_and_back(values), values)
  # bfloat16 keeps 8 bits: half a step near 0, none lost at the ends.
  rough = video.to_uint8(video.to_float(values).astype(jnp.bfloat16))
  assert np.abs(np.asarray(rough, int) - np.arange(256)).max() <= 1


def test_to_uint8_clips_and_rounds_to_even():
  values = np.array([-9, -1.001, 0, 1.001, 9])  # (0 + 1) * 127.5 = 127.5
  np.testing.assert_array_equal(
    video.to_uint8(values), np.array([0, 0, 128, 255, 255], np.uint8)
  )


def test_type_comes_from_the_bytes(tmp_path):
  image = make_clip(1)[0]
  path = tmp_path / 'face.jpg'
  path.write_bytes(encode(image, 'PNG'))
  np.testing.assert_array_equal(video.read_image(path), image)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_exif_rotation(orientation, form):
  # What a viewer must do to the stored pixels, from the EXIF standard.
  shown = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90,
  }[orientation]
  stored = make_clip(1, 40, 64)[0]
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(stored, form, exif=exif)
  image = video.decode_image(data, 'face')
  assert image.shape == shown(stored).shape
  assert psnr(image, shown(stored)) > 30


def test_sixteen_bits():
  grey = np.array([[0, 257, 32768, 65535]], np.uint16)
  image = video.decode_image(cv2.imencode('.png', grey)[1].tobytes(), 'x')
  # 32768 / 257 = 127.5, to even.
  np.testing.assert_array_equal(image[0], [[v] * 3 for v in (0, 1, 128, 255)])
  colour = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), np.uint16)
  data = cv2.imencode('.png', colour[..., ::-1])[1].tobytes()
  difference = video.decode_image(data, 'x') - colour / 257
  assert np.abs(difference).max() <= 1


@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'BMP', 'WEBP'])
def test_grey_becomes_three_channels(form):
  grey = make_clip(1)[0, ..., 1]
  image = video.decode_image(encode(grey, form, 'L', lossless=True), 'x')
  np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, -1))


def test_one_bit():
  bits = Image.fromarray(np.uint8([[0, 255]])).convert('1')
  image = video.decode_image(encode(bits, 'PNG'), 'x')
  np.testing.assert_array_equal(image, [[[0] * 3, [255] * 3]])


@pytest.mark.parametrize(
  'inks, colour',
  [
    ((255, 0, 0, 0), (0, 255, 255)),
    ((0, 255, 255, 0), (255, 0, 0)),
    ((0, 0, 0, 255), (0, 0, 0)),
  ],
)
def test_cmyk(inks, colour):
  data = encode(Image.new('CMYK', (16, 16), inks), 'JPEG', quality=95)
  image = video.decode_image(data, 'x')
  assert image.shape == (16, 16, 3)
  assert np.abs(image.astype(int) - colour).max() <= 4


def test_transparency_lies_over_white():
  pixels = np.uint8([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]])
  image = video.decode_image(encode(pixels, 'PNG'), 'x')
  # 255 * (1 - 128 / 255) = 127
  np.testing.assert_array_equal(
    image, [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]
  )
  grey = Image.fromarray(np.uint8([[[9, 255], [9, 0]]]), 'LA')
  image = video.decode_image(encode(grey, 'PNG'), 'x')
  np.testing.assert_array_equal(image, [[[9] * 3, [255] * 3]])


def test_palette_with_transparency():
  image = Image.new('P', (3, 1))
  image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
  image.putdata([0, 1, 2])
  decoded = video.decode_image(encode(image, 'PNG', transparency=1), 'x')
  np.testing.assert_array_equal(
    decoded, [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
  )


def test_first_frame_of_an_animation():
  red, blue = (Image.new('RGB', (8, 8), c) for c in ('red', 'blue'))
  data = encode(red, 'GIF', save_all=True, append_images=[blue])
  image = video.decode_image(data, 'x')
  np.testing.assert_array_equal(image, np.full((8, 8, 3), (255, 0, 0)))


def png_header(width, height):
  chunk = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  length, check = struct.pack('>I', 13), struct.pack('>I', zlib.crc32(chunk))
  data = b'\0\0\1\0IDAT' + bytes(256)
  return b'\x89PNG\r\n\x1a\n' + length + chunk + check + data


JPEG = encode(make_clip(1)[0], 'JPEG')
BAD_IMAGES = {
  'empty': (b'', 'is empty'),
  'text': (b'dear diary, this is no picture\n' * 9, 'is a text file'),
  'html': (b'<!DOCTYPE html><html>not found</html>', 'is a text file'),
  'heic': (b'\0\0\0\x18ftypheic' + bytes(90), 'is a HEIC photo'),
  'mp4': (b'\0\0\0\x18ftypisom' + bytes(90), 'is a video'),
  'noise': (bytes(range(200, 256)) * 9, 'not a picture of a known type'),
  'cut jpeg': (JPEG[:-40], 'damaged or cut off'),
  'cut png': (encode(make_clip(1)[0], 'PNG')[:120], 'damaged or cut off'),
  'cut header': (JPEG[:30], 'damaged'),
  'bomb': (png_header(60_000, 60_000), 'more than 100000000 pixels'),
  'large': (png_header(12_000, 9_000), 'more than 100000000 pixels'),
  'no size': (png_header(0, 9), 'damaged'),
  'floats': (
    encode(np.float32([[0.5]]), 'TIFF'), '32-bit values of unknown range',
  ),
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', BAD_IMAGES)
def test_bad_images_are_one_clear_line(name, tmp_path):
  data, message = BAD_IMAGES[name]
  path = tmp_path / 'face.jpg'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message) as caught:
    video.read_image(path)
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)


def test_every_cut_of_a_picture_is_an_error_or_a_picture():
  data = encode(make_clip(1, 16, 16)[0], 'JPEG')
  for length in range(1, len(data), 7):
    try:
      assert video.decode_image(data[:length], 'x').shape == (16, 16, 3)
    except ValueError as error:
      assert str(error).startswith('x ')


def test_max_pixels_is_a_limit_and_missing_files_are_named(tmp_path):
  data = encode(np.zeros((10, 10, 3), np.uint8), 'PNG')
  assert video.decode_image(data, 'x', max_pixels=100).shape == (10, 10, 3)
  with pytest.raises(ValueError, match='more than 99 pixels. Make it smaller'):
    video.decode_image(data, 'x', max_pixels=99)
  with pytest.raises(ValueError, match='none.png: No such file'):
    video.read_image(tmp_path / 'none.png')
  with pytest.raises(ValueError, match='Is a directory'):
    video.read_image(tmp_path)


def test_png_is_exact(tmp_path):
  image = make_clip(1, 33, 17)[0]
  np.testing.assert_array_equal(
    video.decode_image(video.encode_png(image), 'x'), image
  )
  video.write_image(tmp_path / 'new' / 'a.png', image)
  np.testing.assert_array_equal(
    video.read_image(tmp_path / 'new' / 'a.png'), image
  )
  assert os.listdir(tmp_path / 'new') == ['a.png']


def test_resize_averages_when_shrinking():
  image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
  blocks = image.reshape(4, 2, 6, 2, 3).mean((1, 3))
  for interpolation in ('auto', 'area'):
    small = video.resize(image, (4, 6), interpolation)
    assert np.abs(small - blocks).max() <= 0.5 + 1e-6
  np.testing.assert_array_equal(
    video.resize(image, (4, 6), 'cubic'),
    cv2.resize(image, (6, 4), interpolation=cv2.INTER_CUBIC),
  )


def test_resize_grows_bicubically_and_mixes_per_axis():
  image = make_clip(1, 8, 8)[0]
  cubic = dict(interpolation=cv2.INTER_CUBIC)
  np.testing.assert_array_equal(
    video.resize(image, 20), cv2.resize(image, (20, 20), **cubic)
  )
  halved = image.reshape(4, 2, 8, 3).mean(1).round().astype(np.uint8)
  mixed = video.resize(image, (4, 16)).astype(int)
  assert np.abs(mixed - cv2.resize(halved, (16, 4), **cubic)).max() <= 1


def test_resize_videos_and_bad_names():
  clip = make_clip(3, 20, 30)
  small = video.resize(clip, 10)
  assert small.shape == (3, 10, 10, 3)
  np.testing.assert_array_equal(small[1], video.resize(clip[1], (10, 10)))
  np.testing.assert_array_equal(video.resize(clip, (20, 30)), clip)
  with pytest.raises(ValueError, match="'bilinear'. Choose one of: area"):
    video.resize(clip, 10, 'bilinear')
