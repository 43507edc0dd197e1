"""Two fake devices, toy clips and runs, and where the real sample data are."""

import gc
import importlib
import json
import os
import pathlib
import subprocess
import sys

# Compiling is most of the suite's time; subprocesses inherit this.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
if 'HATJAX_TEST_FLAGS' not in os.environ:  # before jax starts
  os.environ['HATJAX_TEST_FLAGS'] = (
    '--xla_cpu_use_fusion_emitters=false '
    '--xla_cpu_parallel_codegen_split_count=1'
  )
  if subprocess.run(  # XLA aborts at a flag that it does not know
    [sys.executable, '-c', 'import jax; jax.devices()'], capture_output=True,
    env={**os.environ, 'XLA_FLAGS': os.environ['HATJAX_TEST_FLAGS']},
  ).returncode:
    os.environ['HATJAX_TEST_FLAGS'] = ''
  os.environ['XLA_FLAGS'] = (
    os.environ['HATJAX_TEST_FLAGS']
    + ' --xla_force_host_platform_device_count=2'
  )

import cv2
import jax
import numpy as np
import pytest

from hatjax import cache, environment

gc.set_threshold(100_000, 20, 100)  # What a trace makes is hardly ever waste.

ROOT = pathlib.Path(__file__).resolve().parent.parent

# That of the commands.
CACHE = cache.folder('xla') / f'{environment.cores()}_cores'
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def xla_flags(devices=1):
  """Environment of a subprocess with that many fake devices."""
  count = f'--xla_force_host_platform_device_count={devices}'
  return {'XLA_FLAGS': f'{os.environ["HATJAX_TEST_FLAGS"]} {count}'}


@pytest.fixture(scope='session')
def sample_data():
  """The folder of real faces; skips where it is absent."""
  default = ROOT.parent / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('HATJAX_SAMPLE_DATA', default))
  if not folder.is_dir():
    pytest.skip(f'no sample faces in {folder} (set HATJAX_SAMPLE_DATA)')
  return folder


def toy_frame(size, openness, shade, rng):
  """A face of sorts: an ellipse, eyes, and a mouth that opens.

  Returns:
    (frame uint8 [size, size, 3], mask uint8 [size, size]).
  """
  scale = size / 64
  at = lambda *xy: tuple(int(round(v * scale)) for v in xy)
  frame = np.full((size, size, 3), 60, np.uint8)
  mask = np.zeros((size, size), np.uint8)
  cv2.ellipse(frame, at(32, 32), at(22, 28), 0, 0, 360, shade, -1)
  for x in (23, 41):
    cv2.circle(frame, at(x, 26), max(1, at(3, 0)[0]), (40, 40, 40), -1)
  mouth = at(9, 1.5 + 7 * openness)
  for image, colour in ((frame, (150, 60, 60)), (mask, 255)):
    cv2.ellipse(image, at(32, 46), mouth, 0, 0, 360, colour, -1)
  noise = rng.integers(-3, 4, frame.shape)
  return np.clip(frame + noise, 0, 255).astype(np.uint8), mask


def write_frame_folders(root, size=48, num_videos=4, num_frames=8):
  """AffineGAN's layout with toy clips: two expressions, masks, stills."""
  rng = np.random.default_rng(0)
  for label, top in (('happy', 1.0), ('surprise', 0.5)):
    for v in range(num_videos):
      shade = tuple(int(c) for c in rng.integers(150, 240, 3))
      parts = {}
      for part in ('img', 'patch'):
        parts[part] = root / label / 'train' / part / f'vid_{v:04d}'
        parts[part].mkdir(parents=True)
      for t in range(num_frames):
        frame, mask = toy_frame(size, top * t / (num_frames - 1), shade, rng)
        for part, image in (('img', frame[..., ::-1]), ('patch', mask)):
          cv2.imwrite(str(parts[part] / f'{t + 7:04d}.png'), image)
  return root


@pytest.fixture(scope='session')
def toy_records(tmp_path_factory):
  """data_dir holding frame_folders/none-16 of eight toy clips."""
  from hatjax import prepare

  raw = write_frame_folders(tmp_path_factory.mktemp('raw'))
  data_dir = tmp_path_factory.mktemp('records')
  code = prepare.main([
    'frame_folders', '--raw', str(raw), '--data_dir', str(data_dir),
    '--crop', 'none', '--image_size', '16',
  ])
  assert code == 0
  return data_dir


def write_run(folder, argument, labels=('happy', 'surprise'), **model):
  """A run of configs/frame_folders.py, untrained but off its zeros.

  Args:
    folder: its workdir.
    argument: of the config; its parameters are drawn, not learned.
    labels: that it knows.
    **model: settings of its last stage.
  """
  from hatjax import runs, workdir

  config = importlib.import_module('configs.frame_folders')
  config = json.loads(config.get_config(argument).to_json_best_effort())
  config[config['stages'][-1]]['model'] |= model
  info = dict(labels=labels, trained_labels=labels, crop='face',
              background='keep', fingerprint='')
  with workdir.open_workdir(folder, {**config, 'info': info}):
    for n, name in enumerate(config['stages']):
      stage = config[name]
      method = runs.make_method(stage, info, stage['data']['image_size'])
      state = jax.jit(method.init)(jax.random.key(n), runs.example_batch(stage))
      leaves, tree = jax.tree.flatten((state.params, state.ema))
      keys = jax.random.split(jax.random.key(n), len(leaves))
      leaves = [
        x + 0.05 * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, keys)
      ]
      params, ema = jax.tree.unflatten(tree, leaves)
      disk = workdir.Run(pathlib.Path(folder) / name)
      disk.save(0, state.replace(params=params, ema=ema))
      disk.close()
  return folder


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
  """The workdir of a HAT-cGAN at 16x16 that knows happy and surprise."""
  return write_run(tmp_path_factory.mktemp('tiny') / 'run', 'tiny')


@pytest.fixture(scope='session')
def run_folder(toy_records, tmp_path_factory):
  """An unbroken run of eight steps, a checkpoint after every second; only to
  be read and copied."""
  from test_pipeline import tiny_config

  from hatjax import train

  folder = tmp_path_factory.mktemp('run') / 'a'
  config = tiny_config(train__ckpt_every=2, train__val_clips=1)
  train.train(config, folder, toy_records, keep=True)
  return folder
