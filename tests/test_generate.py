import os
import pathlib
import sys
import threading
import types

import numpy as np
import pytest

import hatjax
from hatjax import faces, generate, photos, video

LABELS = ('anger', 'happy', 'sad')
SIZE = 32


class FakeRun:
  """A run whose clips say what was asked: red is the label, blue the time."""

  def __init__(self, labels=LABELS, crop='face'):
    self.labels, self.crop, self.image_size = labels, crop, SIZE
    self.background = 'keep'
    self.calls = []

  def match_label(self, label):
    label = {'happiness': 'happy'}.get(label, label)
    if label not in self.labels:
      raise ValueError(
        f'Unknown label {label!r}. Choose one of: {", ".join(self.labels)}.'
      )
    return label

  def animate(
    self, images, labels, *, num_frames, sweep='linear', alpha_max=1.0, seed=0
  ):
    assert images.dtype == np.uint8
    assert images.shape[1:] == (SIZE, SIZE, 3)
    self.calls.append(
      dict(
        labels=labels, num=len(images), num_frames=num_frames, sweep=sweep,
        alpha_max=alpha_max, seed=seed,
      )
    )
    clips = np.zeros((len(images), num_frames, SIZE, SIZE, 3), np.uint8)
    clips[..., 0] = np.reshape(
      [label_red(label) for label in labels or [None] * len(images)],
      (-1, 1, 1, 1),
    )
    clips[..., 1] = images.mean((1, 2))[:, None, None, None, 1].round()
    clips[..., 2] = np.linspace(0, 200, num_frames)[:, None, None]
    return clips


def label_red(label):
  return 40 if label is None else 60 * (LABELS.index(label) + 1)


def clip_of(label, green, num_frames):
  """What FakeRun makes of a picture of constant green."""
  clip = np.zeros((num_frames, SIZE, SIZE, 3), np.uint8)
  clip[..., 0], clip[..., 1] = label_red(label), green
  clip[..., 2] = np.linspace(0, 200, num_frames)[:, None, None]
  return clip


@pytest.fixture
def run(monkeypatch, tmp_path):
  """The fake in the place of hatjax.runs; works in an empty folder."""
  fake = FakeRun()

  def load(workdir, step=None):
    if workdir != 'runs/a':
      raise ValueError(f'{workdir} is no run: no config.json. Train one first.')
    fake.step = step
    return fake

  module = types.ModuleType('hatjax.runs')
  module.load = load
  monkeypatch.setitem(sys.modules, 'hatjax.runs', module)
  monkeypatch.setattr(hatjax, 'runs', module, raising=False)
  # A picture has a face unless it is black; it fills the middle.
  monkeypatch.setattr(
    faces, 'detect_face',
    lambda image: (10, 10, 30, 30) if image.any() else None,
  )
  monkeypatch.chdir(tmp_path)
  return fake


def picture(path, green=100, size=(40, 50)):
  image = np.zeros((*size, 3), np.uint8)
  image[..., 1] = green
  video.write_image(path, image)
  return str(path)


def call(*args):
  plain = () if '--watermark' in args else ('--watermark', 'none')
  return generate.main(['--workdir', 'runs/a', *map(str, args), *plain])


def made():
  """All files below the working folder but the pictures passed in."""
  return sorted(
    str(path) for path in pathlib.Path().rglob('*')
    if path.is_file() and path.parts[0] != 'in'
  )


def assert_frames(path, expected, most=0):
  frames, _ = video.read_video(path)
  assert frames.shape == expected.shape
  assert np.abs(frames.astype(int) - expected).max() <= most


def assert_fails(capsys, message, *args, code=1):
  """One line on stderr, that exit code, and nothing written."""
  before = made()
  assert call(*args) == code
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert message in err
  assert made() == before


def test_one_video_under_the_given_name(run, capsys):
  image = picture('in/face.png', 100)
  assert call('--image', image, '--label', 'happiness', '--out', 'a/s.mp4') == 0
  assert made() == ['a/s.mp4']
  assert_frames('a/s.mp4', clip_of('happy', 100, 32), most=6)
  assert run.calls == [
    dict(
      labels=['happy'], num=1, num_frames=32, sweep='profile', alpha_max=1.0,
      seed=0,
    )
  ]
  out, err = capsys.readouterr()
  assert out == 'a/s.mp4\n'  # for a pipe; the rest goes to stderr
  assert err.startswith('1 x 32 frames in ') and 'frames/s' in err


def test_settings_reach_the_run(run):
  image = picture('in/face.png')
  args = '--label sad --num_frames 6 --sweep profile --alpha_max 1.5 --seed 7'
  args += ' --step 400 --fps 10 --out s.gif'
  assert call('--image', image, *args.split()) == 0
  assert run.step == 400
  assert run.calls == [
    dict(
      labels=['sad'], num=1, num_frames=6, sweep='profile', alpha_max=1.5,
      seed=7,
    )
  ]
  assert video.read_video('s.gif')[0].shape == (6, SIZE, SIZE, 3)
  assert video.read_fps('s.gif') == pytest.approx(10)


def test_the_reference_sweep_is_20_frames(run, capsys):
  image = picture('in/face.png')
  args = ('--image', image, '--label', 'sad', '--sweep', 'reference')
  assert call(*args, '--out', 'f/') == 0
  assert run.calls[0]['num_frames'] == 20
  assert len(os.listdir('f')) == 20
  capsys.readouterr()
  assert_fails(capsys, 'always 20 frames', *args, '--num_frames', 32)
  assert_fails(capsys, 'always 20 frames', *args, '--alpha_max', 1)


@pytest.mark.parametrize('num_frames, total', [(5, 8), (2, 2), (1, 1)])
def test_boomerang_repeats_no_end(run, num_frames, total):
  image = picture('in/face.png', 90)
  args = ('--num_frames', num_frames, '--boomerang', '--label', 'anger')
  assert call('--image', image, *args, '--out', 'f/') == 0
  clip = clip_of('anger', 90, num_frames)
  there_and_back = np.concatenate([clip, clip[1:-1][::-1]])
  assert len(there_and_back) == total
  assert_frames('f', there_and_back)


def test_strip_lies_beside(run):
  image = picture('in/face.png', 90)
  args = ('--image', image, '--label', 'sad', '--num_frames', 15, '--strip')
  assert call(*args, '--out', 'f/') == 0
  assert call(*args, '--out', 's.mp4') == 0
  assert made()[-3:] == ['f_strip.png', 's.mp4', 's_strip.png']
  expected = video.strip(clip_of('sad', 90, 15))
  for name in ('f_strip.png', 's_strip.png'):
    np.testing.assert_array_equal(video.read_image(name), expected)


def test_a_video_of_the_same_name_is_replaced(run):
  image = picture('in/face.png', 90)
  for num_frames in (9, 4):
    args = ('--image', image, '--label', 'sad', '--num_frames', num_frames)
    assert call(*args, '--out', 'f') == 0
    assert call(*args, '--out', 's.webp') == 0
  assert_frames('f', clip_of('sad', 90, 4))
  assert_frames('s.webp', clip_of('sad', 90, 4), most=4)


def test_all_labels_and_their_grid(run):
  image = picture('in/face.png', 100)
  args = ('--image', image, '--num_frames', 3)
  assert call(*args, '--label', 'all', '--out', 'smile.mp4') == 0
  names = [f'smile_{name}.mp4' for name in ('anger', 'grid', 'happy', 'sad')]
  assert made() == names
  for label in LABELS:
    assert_frames(f'smile_{label}.mp4', clip_of(label, 100, 3), most=6)
  grid, _ = video.read_video('smile_grid.mp4')
  expected = video.grid_with_labels(
    np.stack([clip_of(label, 100, 3) for label in LABELS]), LABELS
  )
  height, width = expected.shape[1:3]
  difference = np.abs(grid[:, :height, :width].astype(int) - expected)
  assert grid.shape[1:3] == (height + height % 2, width + width % 2)
  assert np.median(difference) <= 3
  bar = (height - 2) // 2 - SIZE  # two rows, two pixels between
  for i, label in enumerate(LABELS):
    y = i // 2 * (SIZE + bar + 2) + bar + SIZE // 2
    x = i % 2 * (SIZE + 2) + SIZE // 2
    assert abs(int(grid[0, y, x, 0]) - label_red(label)) <= 6, label


def test_all_is_the_default_and_goes_to_out(run):
  image = picture('in/face.png')
  assert call('--image', image, '--num_frames', 2) == 0
  assert made() == [
    f'out/face_{name}.mp4' for name in ('anger', 'grid', 'happy', 'sad')
  ]


@pytest.mark.parametrize(
  'args, labels',
  [
    (['--label', 'sad,happiness'], ['sad', 'happy']),
    (['--label', 'sad', '--label', 'anger, happy'], ['sad', 'anger', 'happy']),
    (['--label', 'happy,happiness'], ['happy']),
    (['--label', 'sad,all'], ['sad', 'anger', 'happy']),
  ],
)
def test_labels_in_the_order_asked_for(run, args, labels):
  image = picture('in/face.png')
  assert call('--image', image, '--num_frames', 2, *args) == 0
  assert run.calls[0]['labels'] == labels
  grid = ['out/face_grid.mp4'] if len(labels) > 1 else []
  assert made() == sorted([f'out/face_{name}.mp4' for name in labels] + grid)


def test_a_run_without_labels(run, capsys):
  run.labels = ()
  image = picture('in/face.png', 80)
  assert call('--image', image, '--num_frames', 4) == 0
  assert made() == ['out/face.mp4']
  assert run.calls[0]['labels'] is None
  assert_frames('out/face.mp4', clip_of(None, 80, 4), most=6)
  capsys.readouterr()
  args = ('--image', image, '--label', 'happy')
  assert_fails(capsys, 'This run reads no label. Leave --label out.', *args)
  args = ('--image', image, '--out', '{label}.mp4')
  assert_fails(capsys, 'Take {label} out of --out', *args)


def test_a_folder_in_batches_of_one_shape(run, capsys):
  greens = (30, 60, 90, 120, 150)
  for i, green in enumerate(greens):
    picture(f'in/p{2 * i}.png', green)
  args = ('--label', 'happy', '--num_frames', 3, '--batch_size', 2)
  assert call('--image', 'in', *args, '--out', 'clips/a.webp') == 0
  assert [c['num'] for c in run.calls] == [2, 2, 2]
  assert made() == [f'clips/a_p{2 * i}.webp' for i in range(5)]
  for i, green in enumerate(greens):
    expected = clip_of('happy', green, 3)
    assert_frames(f'clips/a_p{2 * i}.webp', expected, most=4)
  assert '5 x 3 frames' in capsys.readouterr().err


def test_batches_run_across_pictures_and_labels(run):
  pictures = [picture(f'in/{c}.png', g) for c, g in (('a', 50), ('b', 99))]
  args = ('--num_frames', 2, '--batch_size', 4, '--out', 'f/')
  assert call('--image', *pictures, *args) == 0
  assert [c['labels'] for c in run.calls] == [
    ['anger', 'happy', 'sad', 'anger'], ['happy', 'sad', 'sad', 'sad']
  ]
  for name, green in (('a', 50), ('b', 99)):
    for label in LABELS:
      assert_frames(f'f/{name}_{label}', clip_of(label, green, 2))
    grid, _ = video.read_video(f'f/{name}_grid')
    expected = video.grid_with_labels(
      np.stack([clip_of(label, green, 2) for label in LABELS]), LABELS
    )
    np.testing.assert_array_equal(grid, expected)


def test_patterns_and_equal_names(run):
  pictures = [picture(f'in/{d}/face.v2.png', 50) for d in 'abc']
  args = ('--num_frames', 2, '--label', 'sad,happy')
  out = '{label}/x-{image}/'
  assert call('--image', *pictures, *args, '--out', out) == 0
  found = {str(pathlib.Path(path).parent) for path in made()}
  assert found == {
    f'{label}/x-face.v2{n}' for label in ('sad', 'happy', 'grid')
    for n in ('', '-2', '-3')
  }


def test_a_picture_without_a_face_among_others_is_skipped(run, capsys):
  pictures = [picture('in/a.png', 50), picture('in/b.png', 0),
              picture('in/c.png', 70)]
  pathlib.Path('in/d.jpg').write_text('no picture')
  args = ('--label', 'sad', '--num_frames', 2)
  assert call('--image', *pictures, 'in/d.jpg', *args) == 0
  assert made() == ['out/a_sad.mp4', 'out/c_sad.mp4']
  err = capsys.readouterr().err.splitlines()
  assert err[0] == (
    'warning: skipped: no face found in in/b.png. Crop the photo to the face '
    'yourself, or pass --crop none to use the whole picture.'
  )
  assert err[1].startswith('warning: skipped: in/d.jpg is a text file')
  assert len(err) == 3  # the last one says how fast it was


def test_no_usable_picture_among_several(run, capsys):
  pictures = [picture(f'in/{c}.png', 0) for c in 'ab']
  assert call('--image', *pictures) == 1
  err = capsys.readouterr().err.splitlines()
  assert [line.split(':')[0] for line in err] == ['warning', 'warning', 'error']
  assert 'None of the 2 images could be used' in err[2]
  assert made() == [] and run.calls == []


def test_the_face_is_cropped_as_in_training(run):
  image = np.zeros((60, 60, 3), np.uint8)
  image[10:30, 10:30, 1] = 200
  video.write_image('in/face.png', image)
  args = ('--label', 'sad', '--num_frames', 1, '--out', 'f/')
  assert call('--image', 'in/face.png', *args) == 0
  box = faces.square_crop_box((10, 10, 30, 30), image.shape)
  green = round(float(faces.crop(image, box, SIZE)[..., 1].mean()))
  assert green > 70
  assert video.read_video('f')[0][0, 0, 0, 1] == green


def test_whole_pictures_are_squeezed_where_asked_or_trained_so(
  run, capsys, monkeypatch
):
  image = np.zeros((60, 90, 3), np.uint8)
  image[:, :45, 1] = 200
  video.write_image('in/face.png', image)
  monkeypatch.setattr(faces, 'detect_face', None)  # nothing looks for it
  args = ('--image', 'in/face.png', '--label', 'sad', '--num_frames', 1)
  assert call(*args, '--crop', 'none', '--out', 'f/') == 0
  err = capsys.readouterr().err
  assert err.startswith('note: whole pictures are squeezed to 32x32 pixels.\n')
  run.crop = 'none'
  assert call(*args, '--out', 'g/') == 0
  assert 'so was this run\'s training data' in capsys.readouterr().err
  for folder in 'fg':
    assert video.read_video(folder)[0][0, 0, 0, 1] == 100


def test_bad_pictures(run, capsys):
  pathlib.Path('in').mkdir()
  pathlib.Path('in/text.jpg').write_text('not a picture, just words')
  picture('in/face.png')
  cut = pathlib.Path('in/face.png').read_bytes()[:-30]
  pathlib.Path('in/cut.png').write_bytes(cut)
  pathlib.Path('in/none').mkdir()
  for name, message in (
    ('in/text.jpg', 'in/text.jpg is a text file, not a picture. Pass a JPEG'),
    ('in/cut.png', 'in/cut.png is damaged or cut off'),
    ('in/lost.png', 'Cannot read in/lost.png: No such file or directory'),
    ('in/none', 'No pictures in in/none. Names must end in .png'),
    (picture('in/black.png', 0), 'no face found in in/black.png. Crop the'),
  ):
    assert_fails(capsys, message, '--image', name)
  assert run.calls == []


def test_too_large_a_picture(run, capsys, monkeypatch):
  monkeypatch.setattr(video.read_image, '__defaults__', (40 * 50 - 1,))
  image = picture('in/face.png')
  assert_fails(capsys, 'more than 1999 pixels. Make it', '--image', image)


def test_bad_settings(run, capsys):
  image = picture('in/face.png')
  assert_fails(
    capsys, "Unknown label 'joy'. Choose one of: anger, happy, sad.",
    '--image', image, '--label', 'happy,joy',
  )
  assert_fails(
    capsys, 'nowhere is no run', '--image', image, '--workdir', 'nowhere'
  )
  assert_fails(capsys, 'cannot play 0.0 frames', '--image', image, '--fps', 0)


@pytest.mark.parametrize(
  'args, message',
  [
    (['--out', 'a.avi'], "cannot write '.avi'. End it with one of: .mp4"),
    (['--num_frames', '0'], "'0' is not a number above 0"),
    (['--batch_size', 'x'], "'x' is not a number above 0"),
    (['--sweep', 'round'], "invalid choice: 'round'"),
  ],
)
def test_wrong_options_are_exit_code_2(run, capsys, args, message):
  with pytest.raises(SystemExit) as caught:
    call('--image', 'x.png', *args)
  assert caught.value.code == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1
  assert message in err


def test_places_that_cannot_be_written_fail_before_the_work(run, capsys):
  image = picture('in/face.png')
  pathlib.Path('file').write_text('keep')
  pathlib.Path('full').mkdir()
  pathlib.Path('full/thesis.tex').write_text('keep')
  for out, message in (
    ('file/a.mp4', 'file is not a folder that you may write to'),
    ('full/', 'the folder holds other files than frames (thesis.tex)'),
    ('file', 'it is a file, and without an ending'),
  ):
    args = ('--image', image, '--label', 'sad', '--out', out)
    assert_fails(capsys, message, *args)
  assert run.calls == []


def test_a_failing_run_leaves_nothing_behind(run, capsys):
  image = picture('in/face.png')

  def animate(*args, **kwargs):
    raise ValueError('alpha_max must\nbe above 0')

  run.animate = animate
  assert_fails(capsys, 'alpha_max must be above 0', '--image', image)


def test_a_video_is_written_while_the_next_is_made(run, monkeypatch):
  begun, write, animate = threading.Event(), video.write_video, run.animate
  waited, order = [], []

  def slow_write(path, clip, fps, comment):
    if not order:
      waited.append(begun.wait(10))
    order.append(path)
    write(path, clip, fps, comment)

  def counting(*args, **kwargs):
    if run.calls:
      begun.set()
    return animate(*args, **kwargs)

  monkeypatch.setattr(video, 'write_video', slow_write)
  monkeypatch.setattr(run, 'animate', counting)
  args = ('--label', 'all', '--batch_size', 1, '--num_frames', 3)
  assert call('--image', picture('in/face.png'), *args, '--out', 's.gif') == 0
  assert waited == [True]
  names = [f's_{label}.gif' for label in LABELS]
  assert order == [*names, 's_grid.gif'] and made() == sorted(order)


def test_an_error_while_writing_is_told_once_and_ends_the_work(
  run, capsys, monkeypatch
):
  write = video.write_video

  def full(path, clip, fps, comment):
    if 'happy' in path:
      raise OSError(28, 'No space left on device')
    write(path, clip, fps, comment)

  monkeypatch.setattr(video, 'write_video', full)
  args = ('--label', 'all', '--batch_size', 1, '--num_frames', 3)
  assert call('--image', picture('in/face.png'), *args, '--out', 's.gif') == 1
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and 'error: ' in err and 'No space left' in err
  assert made() == ['s_anger.gif']


def test_help_tells_the_names_and_exit_codes(capsys):
  with pytest.raises(SystemExit) as caught:
    generate.main(['--help'])
  assert caught.value.code == 0
  out = capsys.readouterr().out
  for words in ('smile_grid.mp4', 'exit code:', '--boomerang', 'default: 32'):
    assert words in out


def test_faces_are_found_in_real_portraits():
  default = pathlib.Path(__file__).parents[2] / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('HATJAX_SAMPLE_DATA', default))
  if not folder.is_dir():
    pytest.skip(f'No sample data in {folder}. Set HATJAX_SAMPLE_DATA.')
  paths = video.list_images(folder / 'portrait_images')
  crops = []
  for path in paths:
    try:
      crops.append(photos.crop_face(path, 64))
    except ValueError as error:
      assert str(error).startswith(f'no face found in {path}. Crop')
  assert len(crops) >= 0.9 * len(paths)
  assert np.stack(crops).shape == (len(crops), 64, 64, 3)
