"""Runs that are killed, starved and lied to end with the same bits.

The short form kills a run twice; the long one (-m slow, HATJAX_KILLS times,
default 20) kills every method, under jit and pmap.
"""

import contextlib
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest
from test_pipeline import assert_same, parameters, tiny_config

from hatjax import runs, state, train, workdir

ROOT = pathlib.Path(__file__).resolve().parent.parent
METHODS = (
  'hat_cgan', 'video_diffusion', 'identity_encoder,fev_gan',
  'motion_transfer', 'super_resolution', 'face_classifier', 'hat_cgan_diff',
)
WORKER = """
import json, sys
from hatjax import parallel, train
parallel.start_process()
config, folder, data_dir = sys.argv[1:]
train.train(json.load(open(config)), folder, data_dir, keep=True)
"""


def config_of(argument, mode, num_steps):
  """The tiny preset of a method on the toy records."""
  module = importlib.import_module('configs.frame_folders')
  config = module.get_config(f'{argument},tiny')
  config.parallel = mode
  for name in config.stages:
    config[name].data.update(
      name='frame_folders/none-16', split='everything'
    )
    config[name].train.update(
      num_steps=num_steps, log_every=3, ckpt_every=3, sample_every=10**6,
      val_split='everything', val_clips=1, keep=100,
    )
  return json.loads(config.to_json())


def start(config, folder, data_dir):
  path = folder.with_suffix('.json')
  path.write_text(json.dumps(config))
  flags = conftest.xla_flags(1 + (config['parallel'] == 'pmap'))
  return subprocess.Popen(
    [sys.executable, '-c', WORKER, str(path), str(folder), str(data_dir)],
    cwd=ROOT, env={**os.environ, **flags}, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, text=True,
  )


def finish(process):
  out, _ = process.communicate(timeout=500)
  assert process.returncode == 0, out
  return out


def kill(process):
  """Whether it was alive; an error of its own is a failure here."""
  process.kill()
  out, _ = process.communicate()
  assert process.returncode in (0, -signal.SIGKILL), out
  return process.returncode != 0


def kill_in_a_write(process, folder, rng):
  """Kills while a checkpoint is half there; (whether alive, whether half)."""
  writing = lambda: any(folder.glob('*/checkpoints/*tmp*'))
  while process.poll() is None and not writing():
    time.sleep(0.001)
  time.sleep(rng.uniform(0, 0.02))
  half = writing()
  return kill(process), half


def kill_after(process, seconds):
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(seconds)
  return kill(process)


def assert_equal_runs(whole, broken, stages, num_steps):
  """Every checkpoint and every logged number, bit for bit."""
  for name in stages:
    sums = workdir.read_checksums(whole / name)
    assert len(sums) == num_steps // 3
    assert workdir.read_checksums(broken / name) == sums, name
    rows = [
      [{k: v for k, v in row.items() if k != 'frames_per_second'}
       for row in workdir.Run(f / name, read_only=True).history()]
      for f in (whole, broken)
    ]
    assert rows[0] == rows[1]
    found = runs.load_stage(
      broken, workdir.read_config(broken), name, unchecked=True
    )
    assert state.checksum(found.state) == sums[num_steps]


def survive(argument, mode, kills, num_steps, toy_records, folder):
  """Kills a run again and again; it must end as the one left alone.

  A run that ends before the last kill is compared, and another one begun.

  Returns:
    (how many of the kills found a checkpoint half written, how many runs).
  """
  config = config_of(argument, mode, num_steps)
  whole, broken = folder / 'whole', folder / 'broken'
  finish(start(config, whole, toy_records))
  begin = time.time()
  finish(start(config, folder / 'again', toy_records))
  length = time.time() - begin  # of a run that is compiled
  compare = lambda run: assert_equal_runs(
    whole, run, config['stages'], num_steps
  )
  compare(folder / 'again')
  rng, done, halves, ended = random.Random(argument + mode), 0, 0, 0
  while done < kills:
    begin, process = time.time(), start(config, broken, toy_records)
    if done % 2 == 0:
      alive, half = kill_in_a_write(process, broken, rng)
      halves += half
    else:
      alive = kill_after(process, rng.uniform(0.2, 1.0) * length)
    done += alive
    if not alive:
      length = time.time() - begin  # machines get slower and faster
      compare(broken)
      shutil.rmtree(broken)
      ended += 1
  finish(start(config, broken, toy_records))
  compare(broken)
  return halves, ended + 1


def test_killed_twice(toy_records, tmp_path):
  halves, _ = survive('hat_cgan', 'jit', 2, 12, toy_records, tmp_path)
  assert halves >= 1


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['jit', 'pmap'])
@pytest.mark.parametrize('argument', METHODS)
def test_killed_many_times(argument, mode, toy_records, tmp_path):
  kills = int(os.environ.get('HATJAX_KILLS', '20'))
  halves, count = survive(argument, mode, kills, 30, toy_records, tmp_path)
  print(
    f'{argument} {mode}: killed {kills} times in {count} runs, '
    f'{halves} in a checkpoint'
  )
  assert halves >= kills // 4


# -- disks and clocks ---------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
  """A file system of `size` in a folder; skips where none may be mounted."""
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
  if shutil.which('mount') is None or subprocess.run(
    command, capture_output=True
  ).returncode:
    pytest.skip('may not mount a small disk')
  try:
    yield folder
  finally:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def remount(folder, options):
  subprocess.run(
    ['mount', '-o', f'remount,{options}', str(folder)], check=True
  )


def test_a_full_disk_costs_the_last_steps_at_most(
  run_folder, toy_records, tmp_path
):
  config = tiny_config(train__ckpt_every=2, train__val_clips=1)
  size = sum(
    f.stat().st_size for f in run_folder.rglob('*') if f.is_file()
  )
  with small_disk(tmp_path / 'disk', f'{size // 2048}k') as disk:
    with pytest.raises((ValueError, OSError)) as error:
      train.train(config, disk / 'a', toy_records, keep=True)
    assert 'space' in str(error.value) or 'full' in str(error.value), error
    assert '\n' not in str(error.value)
    kept = workdir.list_steps(disk / 'a' / 'hat_cgan')
    assert 8 not in kept
    remount(disk, 'size=100m')
    train.train(config, disk / 'a', toy_records, keep=True)
    assert_same(parameters(run_folder), parameters(disk / 'a'))


def test_a_read_only_disk(run_folder, toy_records, tmp_path):
  with small_disk(tmp_path / 'disk', '100m') as disk:
    shutil.copytree(run_folder, disk / 'a')
    remount(disk, 'ro')
    assert_same(parameters(run_folder), parameters(disk / 'a'))
    for folder in (disk / 'a', disk / 'b'):
      with pytest.raises(ValueError, match='Cannot write to .*--workdir'):
        train.train(tiny_config(), folder, toy_records, keep=True)


def damage(path, kind, rng):
  data = bytearray(path.read_bytes())
  if kind == 'deleted':
    path.unlink()
    return
  if kind == 'cut':
    data = data[: rng.randrange(len(data))] if data else data
  for _ in range(3 if kind == 'flipped' and data else 0):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def test_damaged_checkpoints_never_give_wrong_bits(
  run_folder, tmp_path, capsys
):
  """One file of the newest checkpoint is damaged at a time."""
  newest = run_folder / 'hat_cgan' / 'checkpoints' / '8'
  files = sorted(
    p.relative_to(run_folder) for p in newest.rglob('*') if p.is_file()
  )
  config = workdir.read_config(run_folder)
  load = lambda folder: runs.load_stage(folder, config, 'hat_cgan').state
  sums = workdir.read_checksums(run_folder / 'hat_cgan')
  rng, outcomes = random.Random(0), []
  count = int(os.environ.get('HATJAX_DAMAGES', '16'))
  for n in range(count):
    copy = tmp_path / str(n)
    shutil.copytree(run_folder, copy)
    kind = ('cut', 'flipped', 'deleted')[n % 3]
    damage(copy / files[n // 3 % len(files)], kind, rng)
    found = load(copy)
    step = int(found.step)
    assert state.checksum(found) == sums[step], (n, kind)
    warned = capsys.readouterr().err
    assert (step == 8) or f'Going on from {step}.' in warned
    outcomes.append(step)
    shutil.rmtree(copy)
  print(f'{count} damages: {outcomes.count(8)} harmless, rest fell back')
  assert min(outcomes) >= 6


def test_damaged_scores_cost_only_themselves(run_folder, tmp_path, capsys):
  copy = shutil.copytree(run_folder, tmp_path / 'a')
  path = copy / 'hat_cgan' / 'checkpoints' / '6' / 'metrics' / 'metrics'
  path.write_text('{"val/ps')
  assert runs.load(copy).step == 8
  assert 'checkpoints/6 are damaged' in capsys.readouterr().err
  run = workdir.Run(copy / 'hat_cgan')
  assert run.steps()[-1] == 8 and run.best_step() != 6
  run.close()


def test_a_jumping_clock_changes_nothing(
  run_folder, toy_records, tmp_path, monkeypatch
):
  clock, save, jumps = time.time, workdir.Run.save, [0, 3e7, -6e7, 9e7, 0]
  monkeypatch.setattr(time, 'time', lambda: clock() + jumps[0])

  def save_and_jump(self, *args):
    save(self, *args)
    jumps.pop(0)

  monkeypatch.setattr(workdir.Run, 'save', save_and_jump)
  config = tiny_config(train__ckpt_every=2, train__val_clips=1)
  train.train(config, tmp_path / 'a', toy_records, keep=True)
  assert_same(parameters(run_folder), parameters(tmp_path / 'a'))
  assert workdir.list_steps(tmp_path / 'a' / 'hat_cgan')[-1] == 8


def test_a_second_process_is_refused(toy_records, run_folder, tmp_path):
  copy = shutil.copytree(run_folder, tmp_path / 'a')
  config = workdir.read_config(copy)
  with workdir.open_workdir(copy, config):
    process = start(config, copy, toy_records)
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert 'in use by another process' in out
  assert_same(parameters(run_folder), parameters(copy))


@pytest.mark.parametrize('tail', [
  b'{"step": 9, "loss', b'\x00' * 40, b'\xff\xfe{', b'[1, 2]\n', b'7\n',
])
def test_a_torn_log_is_mended(tail, tmp_path):
  run = workdir.Run(tmp_path / 'hat_cgan')
  for step in (1, 2, 3):
    run.log(step, {'loss/l1': step})
  path = run.folder / 'metrics.jsonl'
  path.write_bytes(path.read_bytes() + tail)
  assert [row['step'] for row in run.history()] == [1, 2, 3]
  run.forget_after(2)
  run.log(3, {'loss/l1': 3})
  assert [json.loads(x)['step'] for x in path.read_text().splitlines()] == [
    1, 2, 3
  ]
  run.close()
