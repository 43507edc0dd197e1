"""What a run writes down of itself, and the replay that checks it."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from test_pipeline import assert_same, command, parameters, tiny_config

from hatjax import environment, records, replay, runs, state, train, workdir


@pytest.fixture
def copy(run_folder, tmp_path):
  return shutil.copytree(run_folder, tmp_path / 'copy')


def verify(folder, toy_records, num_steps=None):
  lines, again = [], functools.partial(train.train, keep=True)
  equal = replay.verify(again, folder, num_steps, toy_records, lines.append)
  return equal, lines


def flip(folder, step):
  """Saves another state as that checkpoint, as if it had been that."""
  found = runs.load_stage(
    folder, workdir.read_config(folder), 'hat_cgan', step
  ).state
  params = jax.device_get(found.params)
  leaf = next(x for x in jax.tree.leaves(params) if x.size > 3)
  leaf = np.array(leaf)
  changed = leaf.copy()
  changed.ravel().view(np.uint32)[2] ^= 1  # the least bit of one number
  params = jax.tree.map(
    lambda x: changed if x.shape == leaf.shape and (x == leaf).all() else x,
    params,
  )
  disk = workdir.Run(folder / 'hat_cgan', keep=9)
  shutil.rmtree(folder / 'hat_cgan' / 'checkpoints' / str(step))
  disk._manager.reload()
  disk.save(step, found.replace(params=params))
  disk.close()


def test_a_run_writes_down_what_made_it(run_folder, toy_records):
  (start,) = workdir.read_starts(run_folder)
  assert start['seed'] == 0 and start['steps'] == {'hat_cgan': 0}
  known = records.Records('frame_folders/none-16', toy_records)
  assert start['fingerprint'] == known.metadata['fingerprint']
  found = start['environment']
  assert found['packages']['jax'] == jax.__version__
  assert found['devices'].startswith('2 x ')
  assert 'device_count=2' in found['xla_flags']
  assert len(found['commit'].rstrip('+')) == 40
  assert environment.differences(found, environment.describe()) == []
  other = {**found, 'packages': {**found['packages'], 'jax': '0.1'}}
  assert environment.differences(other, found) == [
    f'jax: 0.1 -> {jax.__version__}'
  ]
  sums = workdir.read_checksums(run_folder / 'hat_cgan')
  assert sorted(sums) == [2, 4, 6, 8]
  for step in workdir.list_steps(run_folder / 'hat_cgan'):
    assert state.checksum(runs.load(run_folder, step).state) == sums[step]


def test_a_replay_is_equal(run_folder, toy_records):
  before = {p: p.stat().st_mtime_ns for p in run_folder.rglob('*')}
  equal, lines = verify(run_folder, toy_records)
  assert equal and lines == [
    'hat_cgan: steps 7 to 8: equal, bit for bit (checkpoints 8).'
  ]
  equal, lines = verify(run_folder, toy_records, 100)  # from the very start
  assert equal and lines == [
    'hat_cgan: steps 1 to 8: equal, bit for bit (checkpoints 2, 4, 6, 8).'
  ]
  after = {p: p.stat().st_mtime_ns for p in run_folder.rglob('*')}
  assert before == after


def test_a_replay_tells_where_they_part(copy, toy_records):
  flip(copy, 4)  # its checksum fits, but nothing leads to it
  equal, lines = verify(copy, toy_records, 4)
  assert not equal and lines == [
    'hat_cgan: steps 5 to 8: part between checkpoints 4 and 6.'
  ]


def test_a_replaced_checkpoint_is_found(copy, toy_records):
  stage = copy / 'hat_cgan'
  sums = workdir.read_checksums(stage)
  flip(copy, 8)
  workdir.write_checksums(stage, sums)  # as it was
  equal, lines = verify(copy, toy_records)
  assert not equal and lines == [
    'hat_cgan: parts at checkpoint 8: it is not what was saved there.'
  ]
  with pytest.raises(ValueError, match='8 is not what was saved'):
    runs.load(copy, 8)


def test_training_falls_back_and_mends_itself(copy, toy_records, capsys):
  whole = parameters(copy)
  stage = copy / 'hat_cgan'
  for file in (stage / 'checkpoints' / '8').rglob('*'):
    if file.is_file() and '/d/' in str(file):
      data = bytearray(file.read_bytes())
      data[len(data) // 2] ^= 0x10
      file.write_bytes(data)
  config = tiny_config(train__ckpt_every=2, train__val_clips=1)
  train.train(config, copy, toy_records, keep=True)
  said = capsys.readouterr()
  assert 'checkpoints/8' in said.err and 'Going on from 6.' in said.err
  assert 'Resuming' in said.out and 'at step 6' in said.out
  assert_same(whole, parameters(copy))
  assert (stage / 'damaged' / '8').is_dir()
  assert len(workdir.read_starts(copy)) == 2


def test_runs_that_cannot_be_replayed_say_why(copy, tmp_path, toy_records):
  with pytest.raises(ValueError, match='verify_steps is 0'):
    verify(copy, toy_records, 0)
  with pytest.raises(ValueError, match='is not a run'):
    verify(tmp_path / 'none', toy_records)
  (copy / 'hat_cgan' / 'checksums.json').write_text('{"8": ')
  with pytest.raises(ValueError, match='has no checksums'):
    verify(copy, toy_records)
  assert runs.load(copy).step == 8  # and it still loads


def test_the_command_needs_no_config(run_folder, toy_records):
  import subprocess

  call = command(toy_records, run_folder)
  call['args'] = [
    *call['args'][:3], '--verify', str(run_folder), '--data_dir',
    str(toy_records),
  ]
  done = subprocess.run(**call)
  assert done.returncode in (0, 1), done.stderr
  assert 'steps 7 to 8: ' in done.stdout, done.stderr
  # Trained on two devices, replayed on one: it says what differs.
  assert 'note: this is not what it was trained with' in done.stdout
  assert 'devices: 2 x cpu -> 1 x cpu' in done.stdout
  assert json.loads((run_folder / 'config.json').read_text())
