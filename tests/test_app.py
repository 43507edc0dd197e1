"""The page: what a touch does, then the same by hand in a real browser."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import hatjax
from hatjax import app, live, page, video
from tests.conftest import write_run

ARGUMENTS = ['--no-sandbox', '--disable-dev-shm-usage']


@pytest.fixture(scope='module')
def moving(tiny_run):
  return live.Live(hatjax.load(tiny_run), 'tiny')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  return page.write_examples(tmp_path_factory.mktemp('photos'))


def test_frames_and_clips_are_those_of_animate(moving):
  face = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  run, alpha = moving.run, np.linspace(0, 1.2, 5)
  clip = run.animate(face, 'surprise', alpha=alpha[None])[0].astype(int)
  frames = [moving.frame(face, 'surprise', a) for a in alpha]
  assert np.abs(clip - frames).max() <= 1
  assert np.abs(clip[0] - clip[-1]).max() > 1
  # Eleven frames: a whole chunk and a part of one.
  clip = run.animate(face, 'happy', num_frames=11, alpha_max=0.7)[0]
  frames = list(moving.clip(face, 'happy', 0.7, 11))
  assert len(frames) == 11
  assert np.abs(clip.astype(int) - frames).max() <= 1


def test_a_face_is_encoded_once(moving, monkeypatch):
  calls, encode = [], moving._encode
  count = lambda *args: calls.append(1) or encode(*args)
  monkeypatch.setattr(moving, '_encode', count)
  for shade in range(1, live.KEPT + 2):
    face = np.full((16, 16, 3), shade, np.uint8)
    for alpha in (0.1, 0.5, 0.9):
      moving.frame(face, 'happy', alpha)
  assert len(calls) == live.KEPT + 1
  assert len(moving._kept) == live.KEPT


def test_all_frames_at_once_is_shown_by_time(tmp_path):
  run = hatjax.load(write_run(tmp_path / 'fev', 'fev_gan,tiny'))
  face = np.random.default_rng(0).integers(
    0, 256, (run.image_size, run.image_size, 3), np.uint8
  )
  moving = live.Live(run, 'fev')
  clip = run.animate(face, 'happy')[0]
  np.testing.assert_array_equal(moving.frame(face, 'happy', 1.5), clip[-1])
  np.testing.assert_array_equal(moving.frame(face, 'happy', 0.0), clip[0])


class Notes:
  """In place of gradio: what the page says."""

  def __init__(self):
    self.said = []

  def Warning(self, text):
    self.said.append(text)

  Info = Warning


@pytest.fixture
def touched(moving, tmp_path):
  made = page.Page([moving], tmp_path)
  made._gradio = Notes()
  return made


def test_wrong_photos_are_told(touched, tmp_path):
  path = tmp_path / 'secret_name.jpg'
  path.write_text('hello')
  assert touched.see(path, True, 'happy', 1.0)[0] is None
  assert 'text file' in touched._gradio.said[-1]
  assert 'secret' not in touched._gradio.said[-1]
  video.write_image(tmp_path / 'flat.png', np.zeros((80, 80, 3), np.uint8))
  assert touched.see(tmp_path / 'flat.png', True, 'happy', 1.0)[0] is None
  assert 'untick' in touched._gradio.said[-1]
  crops, _, _ = touched.see(tmp_path / 'flat.png', False, 'happy', 1.0)
  assert crops[0].shape == (16, 16, 3)
  assert list(touched.make(None, 'happy', 1, 8, 'linear', 0, True)) == []
  assert 'Drop a photo first' in touched._gradio.said[-1]


def test_a_clip_that_takes_too_long_is_cut(touched, photos, monkeypatch):
  monkeypatch.setattr(page, 'MAX_WAIT', -1)
  crops, box, moved = touched.see(photos[0], True, 'happy', 1.0)
  assert 'data:image/jpeg' in box and 'tiny, ' in moved
  (result,) = touched.make(crops, 'happy', 1.0, 16, 'linear', 0, False)
  assert 'Stopped' in touched._gradio.said[-1]
  assert len(video.read_video(result[0])[0]) == 1


def test_a_clip_drives_a_face(tmp_path, photos, monkeypatch):
  run = hatjax.load(write_run(tmp_path / 'm', 'motion_transfer,tiny', ()))
  driven = page.Page([live.Live(run, 'm')], tmp_path)
  driven._gradio = Notes()
  size = run.image_size
  clip = np.random.default_rng(0).integers(0, 256, (9, size, size, 3), np.uint8)
  video.write_video(tmp_path / 'clip.mp4', clip, 4)
  crops, _, _ = driven.see(photos[0], True, None, 1.0)
  assert list(driven.drive(crops, None)) == []
  monkeypatch.setattr(page, 'MAX_SECONDS', 1)
  (result,) = driven.drive(crops, tmp_path / 'clip.mp4')
  frames, fps = video.read_video(result[1])
  assert frames.shape == (4, size, size, 3) and fps == 4
  assert 'first 1 seconds' in driven._gradio.said[-1]


@pytest.fixture(scope='module')
def browser():
  chromium = shutil.which('chromium') or shutil.which('google-chrome')
  if not chromium:
    pytest.skip('no Chromium on this machine (apt-get install chromium)')
  playwright = pytest.importorskip('playwright.sync_api')
  with playwright.sync_playwright() as started:
    browser = started.chromium.launch(
      executable_path=chromium, args=ARGUMENTS
    )
    yield browser
    browser.close()


@contextlib.contextmanager
def serving(runs, folder):
  """The address of the page with these runs."""
  pytest.importorskip('gradio', reason="pip install 'hatjax[app]'")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('GRADIO_TEMP_DIR', str(folder))
    patch.setenv('GRADIO_ANALYTICS_ENABLED', 'False')
    for run in runs:
      run.warm()
    blocks = page.build(runs, folder)
    yield app.serve(blocks)
    blocks.close()


@pytest.fixture(scope='module')
def address(moving, tmp_path_factory):
  runs = [moving, live.Live(moving.run, 'other')]
  with serving(runs, tmp_path_factory.mktemp('page')) as where:
    yield where


PLAYS = (  # so many videos, all of them running
  'many => (videos => videos.length == many && videos.every('
  'v => v.currentTime > 0 && !v.paused))'
  '([...document.querySelectorAll(".hj-video video")])'
)


@pytest.mark.parametrize('width', [1280, 390])
def test_upload_slide_generate_download(
  browser, address, photos, tmp_path, width
):
  tab = browser.new_page(viewport={'width': width, 'height': 844})
  asked, errors = set(), []
  tab.on('request', lambda r: asked.add(r.url.split('/')[2]))
  tab.on('pageerror', lambda error: errors.append(error))
  tab.goto(address)
  tab.set_input_files('#photo input[type=file]', photos[0])
  tab.wait_for_selector('#moved img')
  assert tab.locator('#moved img').count() == 2  # side by side
  assert tab.locator('#box img').count() == 1
  first = tab.locator('#moved img').first
  before = first.get_attribute('src')
  tab.locator('#alpha input[type=range]').evaluate(
    's => {s.value = 0.2; s.dispatchEvent(new Event("input", {bubbles: true}))}'
  )
  changed = 'before => document.querySelector("#moved img").src != before'
  tab.wait_for_function(changed, arg=before)
  before = first.get_attribute('src')
  tab.get_by_label('surprise').click()
  tab.wait_for_function(changed, arg=before)
  tab.click('#make')
  tab.wait_for_function(PLAYS, arg=2)  # at once
  for kind, frames in (('mp4', 62), ('gif', 62)):
    with tab.expect_download() as download:
      tab.locator(f'.hj-{kind}').last.click()
    path = tmp_path / f'clip.{kind}'
    download.value.save_as(path)
    clip, fps = video.read_video(path)
    assert clip.shape == (frames, 16, 16, 3) and fps == 25
  assert tab.evaluate('document.documentElement.scrollWidth') <= width
  assert asked == {address.split('/')[2]} and not errors
  if os.environ.get('SCREENSHOTS'):  # to be looked at
    folder = pathlib.Path(os.environ['SCREENSHOTS'])
    tab.screenshot(path=folder / f'{width}.png', full_page=True)
  tab.close()


def test_two_users_wait_their_turn(browser, address, photos):
  tabs = [browser.new_context().new_page() for _ in range(2)]
  for tab, photo in zip(tabs, photos):
    tab.goto(address)
    tab.set_input_files('#photo input[type=file]', photo)
    tab.wait_for_selector('#moved img')
  for tab in tabs:
    tab.click('#make')
  sources = []
  for tab in tabs:
    tab.wait_for_function(PLAYS, arg=2)
    video_tag = tab.locator('.hj-video video').first
    sources.append(video_tag.get_attribute('src'))
    tab.context.close()
  assert sources[0] != sources[1]


def test_a_clip_drives_a_face_in_the_browser(browser, photos, tmp_path):
  run = hatjax.load(write_run(tmp_path / 'm', 'motion_transfer,tiny', ()))
  clip = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
  video.write_video(tmp_path / 'clip.mp4', clip, 10)
  with serving([live.Live(run, 'm')], tmp_path / 'page') as where:
    tab = browser.new_page()
    tab.goto(where)
    tab.set_input_files('#photo input[type=file]', photos[0])
    tab.wait_for_selector('#box img')
    tab.click('#drive')
    tab.get_by_text('record a driving clip first').wait_for()
    tab.set_input_files('#clip input[type=file]', tmp_path / 'clip.mp4')
    tab.wait_for_selector('#clip video')
    tab.click('#drive')
    tab.wait_for_function(PLAYS, arg=1)
    with tab.expect_download() as download:
      tab.locator('.hj-mp4').click()
    download.value.save_as(tmp_path / 'made.mp4')
    if os.environ.get('SCREENSHOTS'):
      folder = pathlib.Path(os.environ['SCREENSHOTS'])
      tab.screenshot(path=folder / 'driven.png', full_page=True)
    tab.close()
  frames, fps = video.read_video(tmp_path / 'made.mp4')
  assert frames.shape == (9, 16, 16, 3) and fps == 10


def test_a_wrong_file_gives_a_note(browser, address, tmp_path):
  path = tmp_path / 'flat.png'
  video.write_image(path, np.zeros((80, 80, 3), np.uint8))
  tab = browser.new_page()
  tab.goto(address)
  tab.click('#make')
  tab.get_by_text('Drop a photo first').wait_for()
  tab.set_input_files('#photo input[type=file]', path)
  tab.get_by_text('No face found.').wait_for()
  (tmp_path / 'words.jpg').write_text('not a picture')
  tab.reload()
  tab.set_input_files('#photo input[type=file]', tmp_path / 'words.jpg')
  tab.get_by_text('is a text file, not a picture').wait_for()
  assert tab.locator('#moved img').count() == 0
  assert tab.locator('.hj-video video').count() == 0
  tab.close()


def test_uploads_and_results_are_deleted(tmp_path):
  drawn = pathlib.Path(page.write_examples(tmp_path)[0])
  names = ('a/photo.png', 'a/smile.mp4', 'b/new.gif', 'c/synthetic_1.png')
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  shutil.copy(drawn, tmp_path / 'a' / 'copied.png')
  for path in tmp_path.rglob('*.*'):
    if path.name != 'new.gif':
      os.utime(path, (time.time() - page.KEEP - 1,) * 2)
  page.sweep(tmp_path)
  left = [name for name in names if (tmp_path / name).exists()]
  assert left == ['b/new.gif']
  assert drawn.exists() and (tmp_path / 'a' / 'copied.png').exists()


def test_folders_of_dead_pages_are_deleted(tmp_path, monkeypatch):
  monkeypatch.setattr(app.tempfile, 'tempdir', str(tmp_path))
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  for owner in (dead.pid, os.getpid()):
    (tmp_path / f'hatjax-app-{owner}-x').mkdir()
    (tmp_path / f'hatjax-app-{owner}-x' / 'photo.png').write_text('')
  mine = pathlib.Path(app._temporary_folder())
  left = {path.name for path in tmp_path.iterdir()}
  assert left == {f'hatjax-app-{os.getpid()}-x', mine.name}


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP', 'SIGINT'])
def test_nothing_outlives_the_page(name, tmp_path):
  # Stopped in an import, inside `exec`: where dataclasses are made.
  (tmp_path / 'gradio.py').write_text(
    "exec('import time; open(\"loads\", \"w\"); time.sleep(60)')"
  )
  package = pathlib.Path(app.__file__).parents[1]
  process = subprocess.Popen(
    [sys.executable, '-m', 'hatjax.app', '--workdir', 'none'], env={
      **os.environ, 'TMPDIR': str(tmp_path),
      'PYTHONPATH': f'{tmp_path}{os.pathsep}{package}',
    }, cwd=tmp_path, stderr=subprocess.PIPE,
  )
  while not (tmp_path / 'loads').exists():
    assert process.poll() is None
    time.sleep(0.1)
  assert list(tmp_path.glob('hatjax-app-*'))
  process.send_signal(getattr(signal, name))
  process.communicate(timeout=60)
  assert process.returncode == 0
  assert not list(tmp_path.glob('hatjax-app-*'))


def test_it_listens_to_this_machine_alone(address):
  assert address.startswith('http://127.0.0.1:')


def test_training_is_offered_where_nothing_is_trained(
  browser, tmp_path, monkeypatch
):
  pytest.importorskip('gradio')
  monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
  wanted = []

  class Process:
    returncode = 0

    def __init__(self, command, **_):
      (tmp_path / 'run').mkdir()
      wanted.append(command)

    def poll(self):
      return 0

  monkeypatch.setattr(app.subprocess, 'Popen', Process)
  blocks, done = app.offer_training(tmp_path / 'run')
  tab = browser.new_page()
  tab.goto(app.serve(blocks))
  tab.get_by_text('No trained run yet').wait_for()
  tab.click('#train')
  tab.get_by_text('opens by itself').wait_for()
  assert isinstance(done, threading.Event) and done.is_set()
  assert 'configs/synthetic.py' in wanted[0]
  tab.close()
  blocks.close()
