"""Frames -> records -> train -> kill -> resume -> mp4."""

import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
import pytest

from hatjax import generate, runs, state, train, video, workdir
from hatjax.nets import lowerings

ROOT = pathlib.Path(__file__).resolve().parent.parent


def tiny_config(**settings):
  """configs/frame_folders.py:tiny on the toy records, as a plain dict."""
  config = importlib.import_module('configs.frame_folders').get_config('tiny')
  stage = config.hat_cgan
  stage.data.update(name='frame_folders/none-16', split='everything')
  stage.train.update(
    num_steps=8, log_every=2, ckpt_every=4, sample_every=8,
    val_split='everything', val_clips=2,
  )
  for name, value in settings.items():
    block, key = name.split('__')
    stage[block][key] = value
  return json.loads(config.to_json())


def parameters(folder, step=None):
  """Everything in a checkpoint, as host arrays."""
  return jax.tree.leaves(jax.device_get(runs.load(folder, step).state))


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    np.testing.assert_array_equal(x, y)


def command(toy_records, folder, num_steps=12, *extra):
  environment = {**os.environ, **conftest.xla_flags()}
  stage = '--config.hat_cgan'
  return dict(
    args=[
      sys.executable, '-m', 'hatjax.train', '--config',
      'configs/frame_folders.py:tiny', '--workdir', str(folder),
      '--data_dir', str(toy_records), f'{stage}.data.split=everything',
      f'{stage}.data.name=frame_folders/none-16',
      f'{stage}.train.val_split=everything', f'{stage}.train.val_clips=1',
      f'{stage}.train.num_steps={num_steps}', f'{stage}.train.ckpt_every=2',
      f'{stage}.train.log_every=2', f'{stage}.train.sample_every=100', *extra,
    ],
    cwd=ROOT, env=environment, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )


@pytest.fixture(scope='module')
def run_folder(toy_records, tmp_path_factory):
  """An unbroken run of 8 steps."""
  folder = tmp_path_factory.mktemp('run') / 'a'
  train.train(tiny_config(), folder, toy_records, keep=True)
  return folder


def test_a_run_leaves_what_it_promises(run_folder):
  stage = run_folder / 'hat_cgan'
  run = workdir.Run(stage, read_only=True)
  assert run.steps() == [4, 8]
  rows = run.history()
  assert [r['step'] for r in rows if 'loss/l1' in r] == [2, 4, 6, 8]
  assert all(np.isfinite(v) for r in rows for v in r.values())
  frames, fps = video.read_video(stage / 'samples' / '00000008.mp4')
  assert len(frames) == 8 and fps == 12
  strip = video.read_image(stage / 'samples' / '00000008.png')
  # Two clips, real over generated: four rows of eight 16-pixel frames.
  assert strip.shape[0] >= 4 * 16 and strip.shape[1] >= 8 * 16
  assert video.read_image(stage / 'losses.png').std() > 5
  assert list((stage / 'tensorboard').iterdir())


def test_one_seed_gives_the_same_bits_and_another_does_not(
  toy_records, run_folder, tmp_path
):
  train.train(tiny_config(), tmp_path / 'b', toy_records, keep=True)
  assert_same(parameters(run_folder), parameters(tmp_path / 'b'))
  other = {**tiny_config(train__num_steps=4), 'seed': 1}
  train.train(other, tmp_path / 'c', toy_records, keep=True)
  a, c = parameters(run_folder, 4), parameters(tmp_path / 'c', 4)
  assert any(not np.array_equal(x, y) for x, y in zip(a, c))


def test_resumed_equals_unbroken_and_num_steps_may_grow(
  toy_records, run_folder, tmp_path
):
  short = tiny_config(train__num_steps=4)
  train.train(short, tmp_path / 'a', toy_records, keep=True)
  train.train(tiny_config(), tmp_path / 'a', toy_records, keep=True)
  assert_same(parameters(run_folder), parameters(tmp_path / 'a'))
  speed = 'frames_per_second'
  rows = [
    [{k: v for k, v in r.items() if k != speed} for r in run.history()]
    for run in (
      workdir.Run(f / 'hat_cgan', read_only=True)
      for f in (run_folder, tmp_path / 'a')
    )
  ]
  assert rows[0] == rows[1]


def test_streamed_and_resident_runs_agree(toy_records, run_folder, tmp_path):
  config = tiny_config(data__resident='no')
  train.train(config, tmp_path / 'a', toy_records, keep=True)
  for x, y in zip(parameters(run_folder), parameters(tmp_path / 'a')):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_sigterm_saves_and_ends_cleanly(toy_records, tmp_path):
  folder = tmp_path / 'a'
  process = subprocess.Popen(**command(toy_records, folder, 100_000))
  metrics = folder / 'hat_cgan' / 'metrics.jsonl'
  deadline = time.time() + 120
  while not metrics.exists() and time.time() < deadline:
    time.sleep(0.02)
  begin = time.time()
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=100)
  seconds = time.time() - begin
  assert process.returncode == 0, err
  step = workdir.list_steps(folder / 'hat_cgan')[-1]
  assert f'SIGTERM: saved {folder}/hat_cgan at step {step}.' in out
  assert 0 < step < 100_000
  saved = workdir.read_checksums(folder / 'hat_cgan')[step]
  found = runs.load_stage(folder, workdir.read_config(folder), 'hat_cgan').state
  assert state.checksum(found) == saved and int(found.step) == step
  assert np.isfinite(jax.tree.leaves(found.params)[0]).all()
  print(f'SIGTERM: saved and gone after {seconds:.1f} s')
  assert seconds < 30  # 10 s on an idle machine


def test_another_config_is_refused_by_name(toy_records, run_folder):
  with pytest.raises(ValueError, match=r'lambda_l1: 100.0 -> 7.0'):
    config = tiny_config(model__lambda_l1=7.0)
    train.train(config, run_folder, toy_records, keep=True)
  assert parameters(run_folder)  # and the run is intact


def test_a_run_chooses_how_convolutions_are_lowered(
  toy_records, tmp_path, monkeypatch
):
  class Stopped(Exception):
    pass

  def stop(stage, root):
    raise Stopped(lowerings.form())

  monkeypatch.setattr(train, '_train_stage', stop)
  start = lambda folder, lowering: train.train(
    {**tiny_config(), 'lowering': lowering}, tmp_path / folder, toy_records
  )
  for lowering, form in ('', 'rewritten'), ('plain', 'plain'):
    with pytest.raises(Stopped, match=form):
      start(f'run{lowering}', lowering)
  with pytest.raises(ValueError, match="lowering: 'absent' -> 'aligned'"):
    start('run', 'aligned')
  older = tiny_config()
  del older['lowering']
  for config in older, {**older, 'lowering': 'auto'}:
    with pytest.raises(Stopped, match='rewritten'):
      train.train(config, tmp_path / 'run', toy_records)
  with pytest.raises(ValueError, match="^config.lowering is 'foo'"):
    start('other', 'foo')
  assert lowerings.form() == 'rewritten' and not (tmp_path / 'other').exists()


def test_second_process_on_a_workdir_is_refused(tmp_path):
  with workdir.open_workdir(tmp_path / 'a', {'x': 1}):
    with pytest.raises(ValueError, match='in use by another process'):
      with workdir.open_workdir(tmp_path / 'a', {'x': 1}):
        pass


def test_unwritable_workdir_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='Choose another folder'):
    with workdir.open_workdir(tmp_path / 'file' / 'a', {}):
      pass


def test_checkpoint_of_another_shape_is_refused(run_folder, tmp_path):
  copy = tmp_path / 'a'
  shutil.copytree(run_folder, copy)
  config = workdir.read_config(copy)
  config['hat_cgan']['model']['width'] = 6
  (copy / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='another config: .*generator'):
    runs.load(copy)


def test_damaged_checkpoint_names_itself_and_earlier_ones_work(
  run_folder, tmp_path, capsys
):
  copy = tmp_path / 'a'
  shutil.copytree(run_folder, copy)
  for file in (copy / 'hat_cgan/checkpoints/8/default').rglob('*'):
    if file.is_file() and file.stat().st_size > 2000:
      file.write_bytes(file.read_bytes()[:1000])
  with pytest.raises(ValueError, match='checkpoints/8 cannot be read'):
    runs.load(copy, step=8)
  assert runs.load(copy).step == 4
  warned = capsys.readouterr().err
  assert 'checkpoints/8 cannot be read' in warned
  assert 'Going on from 4.' in warned
  assert (copy / 'hat_cgan/checkpoints/8').is_dir()  # reading moves nothing
  with pytest.raises(ValueError, match='It has: 4, 8'):
    runs.load(copy, step=5)


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(
  toy_records, run_folder, tmp_path
):
  copy = tmp_path / 'a'
  shutil.copytree(run_folder, copy)
  config = tiny_config(train__num_steps=20)
  config['hat_cgan']['optim']['generator']['lr'] = float('inf')
  saved = workdir.read_config(copy)
  saved['hat_cgan']['optim'] = config['hat_cgan']['optim']
  (copy / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(ValueError, match='nan at step 9.*checkpoints/8'):
    train.train(config, copy, toy_records, keep=True)
  assert_same(parameters(run_folder), parameters(copy))


def test_failed_save_says_so_and_keeps_earlier_ones(
  toy_records, run_folder, tmp_path, monkeypatch
):
  copy = tmp_path / 'a'
  shutil.copytree(run_folder, copy)
  run = workdir.Run(copy / 'hat_cgan')
  state = runs.load(copy).state

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(run._manager, 'save', full)
  with pytest.raises(ValueError, match='No space left.*intact: 4, 8'):
    run.save(12, state)
  assert_same(parameters(run_folder), parameters(copy))


def test_torn_log_line_is_forgotten(tmp_path):
  run = workdir.Run(tmp_path / 'hat_cgan')
  for step in (1, 2, 3):
    run.log(step, {'loss/l1': step})
  with open(run.folder / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 4, "lo')
  assert [r['step'] for r in run.history()] == [1, 2, 3]
  run.forget_after(2)
  assert [r['step'] for r in run.history()] == [1, 2]
  run.close()


def test_best_checkpoint_is_kept_beside_the_latest(tmp_path):
  run = workdir.Run(tmp_path / 'hat_cgan', keep=2)
  for step, score in ((1, 20.0), (2, 30.0), (3, 25.0), (4, 24.0), (5, 21.0)):
    run.save(step, {'w': np.full(3, step)}, {'val/psnr': score})
    run.wait()
  assert run.steps() == [2, 4, 5]
  assert run.best_step() == 2
  np.testing.assert_array_equal(
    run.restore({'w': jax.ShapeDtypeStruct((3,), np.int64)}, 2)['w'], 2
  )
  run.close()


def test_free_settings_may_change_and_others_may_not():
  old = {'a': {'train': {'num_steps': 1, 'dispatch': 'loop'}, 'm': (1, 2)}}
  new = {'a': {'train': {'num_steps': 2, 'dispatch': 'loop'}, 'm': [1, 2]}}
  assert workdir.differences(old, new) == []
  new['a']['train']['dispatch'] = 'scan'
  assert workdir.differences(old, new) == [
    "a.train.dispatch: 'loop' -> 'scan'"
  ]


# -- generation ---------------------------------------------------------------


def test_run_animates_and_repeats(run_folder):
  run = runs.load(run_folder)
  assert run.labels == ('happy', 'surprise') and run.image_size == 16
  assert run.crop == 'none' and run.step == 8
  image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  clip = run.animate(image, 'joy', num_frames=5)
  assert clip.shape == (1, 5, 16, 16, 3) and clip.dtype == np.uint8
  np.testing.assert_array_equal(clip, run.animate(image, 'joy', num_frames=5))
  # Alpha 0 at the start: the base path, whatever the label.
  other = run.animate(image, 'surprise', num_frames=5)
  np.testing.assert_array_equal(clip[:, 0], other[:, 0])
  assert run.animate(image, 'joy', sweep='reference').shape[1] == 20


def test_many_frames_in_chunks_equal_few(run_folder, monkeypatch):
  run = runs.load(run_folder)
  image = np.full((2, 16, 16, 3), 90, np.uint8)
  whole = run.animate(image, 'happy', num_frames=10, sweep='linear')
  monkeypatch.setattr(runs, 'DECODE_FRAMES', 8)  # four frames of two clips
  parts = run.animate(image, 'happy', num_frames=10, sweep='linear')
  assert np.abs(whole.astype(int) - parts).max() <= 1


@pytest.mark.parametrize('call, message', [
  (dict(label='angst'), 'Known: happy, surprise'),
  (dict(label=None), 'reads a label'),
  (dict(label=['happy', 'happy']), '1 images but 2 labels'),
  (dict(label='happy', sweep='lineal'), 'linear, profile, reference'),
  (dict(label='happy', images=np.zeros((1, 8, 8, 3), np.uint8)), '16, 16'),
])
def test_wrong_calls_say_the_cure(run_folder, call, message):
  run = runs.load(run_folder)
  call = {'images': np.zeros((1, 16, 16, 3), np.uint8)} | call
  with pytest.raises(ValueError, match=message):
    run.animate(**call)


def test_a_folder_that_is_no_run_says_so(tmp_path):
  with pytest.raises(ValueError, match='is not a run.*hatjax.train'):
    runs.load(tmp_path)


def test_generate_shows_the_subjects_of_a_split(
  run_folder, toy_records, tmp_path
):
  code = generate.main([
    '--workdir', str(run_folder), '--split', 'everything', '--num_images',
    '3', '--data_dir', str(toy_records), '--out', f'{tmp_path}/frames/',
    '--num_frames', '4', '--watermark', 'none',
  ])
  assert code == 0
  run = runs.load(run_folder)
  faces = run.neutral_faces('everything', 3, toy_records)
  assert list(faces) == [f'happy/vid_000{n}' for n in range(3)]
  grid, _ = video.read_video(tmp_path / 'frames' / 'all_grid')
  assert len(grid) == 4
  last = video.read_image(tmp_path / 'frames' / 'all_grid.png')
  np.testing.assert_array_equal(last, grid[-1])
  # The first subject's first cell stands under its caption.
  clip = run.animate(faces['happy/vid_0000'], 'happy', num_frames=4)[0]
  height = (grid.shape[1] - 2 * 2) // 3 - 16  # two gaps of 2 pixels
  cell = grid[:, height : height + 16, :16].astype(int)
  assert np.abs(cell - clip).max() <= 1


def test_generate_writes_the_frames_of_animate(run_folder, tmp_path):
  image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
  video.write_image(tmp_path / 'face.png', image)
  code = generate.main([
    '--workdir', str(run_folder), '--image', str(tmp_path / 'face.png'),
    '--label', 'all', '--out', f'{tmp_path}/frames/', '--num_frames', '6',
    '--crop', 'none', '--watermark', 'none',
  ])
  assert code == 0
  run = runs.load(run_folder)
  for label in run.labels:
    frames, _ = video.read_video(tmp_path / 'frames' / label)
    expected = run.animate(image, label, num_frames=6)[0]
    assert np.abs(frames.astype(int) - expected).max() <= 1
