"""One step, however it is spread: devices, processes, compiler options."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys

import conftest
import jax
import numpy as np
import pytest
import test_methods
import test_pipeline

from configs import common, mug
from hatjax import methods, parallel, settings, warp
from hatjax.methods import video_diffusion
from hatjax.nets import lowerings

HERE = pathlib.Path(__file__).resolve().parent
STAGES = test_methods.tiny_stages(lambda method: True)


# -- devices ------------------------------------------------------------------


class Settled(video_diffusion.VideoDiffusion):
  """Takes its noise from the clip, so that devices cannot disagree on it."""

  def draw_task(self, batch, rng):
    x0, _ = self._sorted_clip(batch)
    t = 1 + batch['subject'] % self.num_noise_steps
    return {'x0': x0, 'noise': x0[:, ::-1], 't': t, 'label': batch['label']}


def to_float64(tree):
  double = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
  return jax.tree.map(double, jax.device_get(tree))


def compare_devices():
  """One step on 1 and 8 devices, jit and pmap; run by the test below. Under
  jit they exchange sums, and no pictures.

  In float64: the gradient of a bilinear sample jumps where it crosses a pixel,
  and in float32 a sample or two lie within rounding of one.
  """
  parallel.start_process()
  jax.config.update('jax_enable_x64', True)
  settings.DTYPES += ('float64',)
  methods.METHODS['video_diffusion'] = Settled
  for stage in STAGES:
    changes = test_methods.QUIET.get(stage['method'], {})
    changes = {'dtype': 'float64', **changes}
    method, start, batch = test_methods.still(stage, 8, **changes)
    start, batch, results = to_float64(start), to_float64(batch), []
    for mode, count in (('jit', 1), ('jit', 8), ('pmap', 8)):
      runner = parallel.Runner(
        method, test_methods.identity, mode=mode,
        devices=jax.devices()[:count],
      )
      placed, key = runner.place(start), jax.random.key(1)
      if (mode, count) == ('jit', 8):
        text = runner.lower(placed, batch, key).compile().as_text()
        moved = re.findall(
          r' (?:all-gather|(?:ragged-)?all-to-all|collective-|send|recv).*\(.*',
          text,
        )
        # Who is who in the batch is what an identity encoder's loss asks.
        assert not moved or stage['method'] == 'identity_encoder', moved[0]
      state, metrics = runner.step(placed, [batch], key)
      for leaf in jax.tree.leaves(state.params) if mode == 'pmap' else ():
        leaf = np.asarray(leaf)
        np.testing.assert_array_equal(leaf, leaf[:1].repeat(count, 0))
      results.append(jax.device_get((runner.fetch(state), metrics)))
    (one, expected), *others = results
    for state, metrics in others:
      test_methods.assert_same_gradients(one, state)
      for name, value in metrics.items():
        np.testing.assert_allclose(
          value, expected[name], 1e-5, 1e-5, err_msg=name
        )
    print(f'{stage["method"]}: equal on {len(jax.devices())} devices')


def test_eight_devices_equal_one():
  path = os.pathsep.join([str(HERE), str(HERE.parent)])
  out = subprocess.run(
    [sys.executable, '-c',
     'import test_parallel; test_parallel.compare_devices()'],
    env={**os.environ, **conftest.xla_flags(8), 'PYTHONPATH': path}, cwd=HERE,
    capture_output=True, text=True,
  )
  assert out.returncode == 0, out.stderr[-3000:]
  for stage in STAGES:
    assert f'{stage["method"]}: equal on 8 devices' in out.stdout


# -- processes ----------------------------------------------------------------


def test_two_processes_equal_one(toy_records, tmp_path):
  quiet = [
    f'--config.hat_cgan.model.{name}=0.0' for name in
    ('dropout', 'feature_noise')
  ]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  runs = []
  for index in (0, 1):
    command = test_pipeline.command(
      toy_records, tmp_path / 'two', 4, *quiet, '--distributed'
    )
    command['env'] |= {
      'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
      'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': str(index),
    }
    runs.append(subprocess.Popen(**command))
  for run in runs:
    _, err = run.communicate(timeout=240)
    assert run.returncode == 0, err[-3000:]
  command = test_pipeline.command(toy_records, tmp_path / 'one', 4, *quiet)
  command['env'] |= conftest.xla_flags(2)
  one = subprocess.run(**command)
  assert one.returncode == 0, one.stderr
  diffs = [
    np.abs(np.asarray(a, np.float64) - b).max() for a, b in zip(
      test_pipeline.parameters(tmp_path / 'one'),
      test_pipeline.parameters(tmp_path / 'two'),
    )
  ]
  assert max(diffs) < 1e-6, max(diffs)


# -- compiler options, determinism, profiles ----------------------------------


def test_compiler_options_are_read_and_unknown_ones_left_out():
  lines = []
  read = lambda setting: parallel.compiler_options(
    {'compiler_options': setting}, lines.append
  )
  auto = parallel.COMPILER_OPTIONS['cpu']
  assert read('auto') == auto and read('') == {}
  assert lines[-1] == 'compiler options: none'
  both = 'auto, xla_cpu_enable_fast_min_max=true'
  assert read(both) == {**auto, 'xla_cpu_enable_fast_min_max': True}
  assert read({'xla_no_such_thing': 1}) == {}
  assert lines[-2] == (
    'note: compiler option xla_no_such_thing is unknown here and left out.'
  )
  for setting, message in (
    ('xla_cpu_enable_fast_min_max=maybe', 'not a valid bool'),
    ('fast', "'fast' has no value"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      read(setting)
    assert 'config.compiler_options: ' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_method_knows_better_how_its_videos_are_compiled():
  class Method:
    video_options = {
      'cpu': {'xla_cpu_enable_fast_min_max': True}, 'gpu': {'xla_gpu_no': 1},
    }

  read = lambda words, method=Method: parallel.compiler_options(
    {'compiler_options': words}, lambda line: None, method
  )['xla_cpu_enable_fast_min_max']
  assert read('auto') and not read('auto,xla_cpu_enable_fast_min_max=false')
  with pytest.raises(KeyError):
    read('auto', None)
  assert parallel.jit(lambda x: x + x, Method)(3) == 6
  Method.video_options = {'cpu': {'xla_cpu_enable_fast_min_max': 'perhaps'}}
  with pytest.raises(ValueError, match='perhaps'):
    parallel.jit(lambda x: x + x, Method)


@pytest.mark.parametrize('mode', parallel.MODES)
def test_options_reach_the_compiler(mode):
  stage = STAGES[0]
  method, state, batch = test_methods.still(stage, 2)
  runner = parallel.Runner(
    method, test_methods.identity, mode=mode, options={'xla_no_such': 1}
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such'):
    runner.step(runner.place(state), [batch], jax.random.key(0))


@pytest.mark.parametrize('name', ('hat_cgan', 'video_diffusion'))
def test_state_updated_in_place_equals_copied_state(name):
  (stage,) = (stage for stage in STAGES if stage['method'] == name)
  auto, results = parallel.COMPILER_OPTIONS['cpu'], []
  copied = {k: v for k, v in auto.items() if 'copy_insertion' not in k}
  assert copied != auto == parallel.compiler_options({})  # It is known here.
  for words in auto, copied:
    options = parallel.compiler_options({'compiler_options': words})
    method, state, batch = test_methods.still(stage, 2)
    runner = parallel.Runner(
      method, test_methods.identity, devices=jax.devices()[:1], options=options
    )
    state = runner.place(state)
    for _ in range(3):
      state, metrics = runner.step(state, [batch], jax.random.key(1))
    results.append(jax.tree.leaves(jax.device_get((state, metrics))))
  for a, b in zip(*results, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('lowering', ('aligned', 'rewritten'))
@pytest.mark.parametrize('stage', STAGES, ids=lambda s: s['method'])
def test_a_deterministic_step_scatters_nothing(stage, lowering, monkeypatch):
  # Nor does it convolve with whole pictures, spread out, which is what
  # autodiff makes of a doubling convolution and cuDNN is slow at.
  # Gathers wherever it may: as at 64x64 and above.
  monkeypatch.setattr(warp, 'MATRIX_MAX_SIDE', 2)

  def scatters(config):
    method = test_methods.make(methods.settle(config, stage))
    batch = test_methods.toy_batch(stage)
    state = jax.eval_shape(method.init, jax.random.key(0), batch)
    with lowerings.lowering(lowering):
      lowered = jax.jit(method.train_step).lower(
        state, batch, jax.random.key(1)
      )
    text = lowered.as_text()
    for line in re.findall(r'.*lhs_dilate = \[2.*', text):
      axes, kernel = re.search(
        r'x\[(.*?)\]->.*, tensor<([\dx]+)x\w+>\) ->', line
      ).groups()
      sides = zip(axes.split(', '), kernel.split('x'))
      assert all(int(n) <= 8 for axis, n in sides if axis.isdigit()), line
    return re.findall(r'stablehlo\.\w*scatter', text)

  assert scatters({'deterministic': True}) == []
  if stage['method'] == 'hat_cgan':
    assert scatters({}) != []


def test_determinism_says_what_it_does(monkeypatch):
  lines = []
  config = {'compiler_options': '', 'deterministic': True}
  assert parallel.compiler_options(config, lines.append) == {}
  assert lines[0] == 'deterministic: nothing to add on a cpu, which repeats.'
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  options = parallel.compiler_options({'deterministic': True}, lines.append)
  assert options == {'xla_gpu_deterministic_ops': True}


@pytest.mark.parametrize('name', common.METHODS)
def test_the_profile_fills_the_model_block(name):
  config = mug.get_config(f'{name},tiny,4gb').to_dict()
  stage = config[name]
  stage['data']['batch_size'] = 6
  before, model = stage['model'], methods.settle(config, stage, 2)['model']
  wanted = {'dtype': 'bfloat16', 'remat': True, 'microbatches': 3}
  known = {f.name for f in dataclasses.fields(methods.METHODS[name])}
  assert 'dtype' in known
  assert model == before | {k: v for k, v in wanted.items() if k in known}
  assert before['dtype'] == 'float32'  # As it was.
  assert methods.settle({}, stage)['model'] == stage['model']
  stage['model']['microbatches'] = 2
  assert methods.settle(config, stage, 2)['model']['microbatches'] == 2
  frugal = parallel.compiler_options(config, lambda line: None)
  assert parallel.FRUGAL_OPTIONS['cpu'].items() <= frugal.items()
  with pytest.raises(ValueError, match="'5gb'. Choose one of: 4gb, or ''"):
    methods.settle({'profile': '5gb'}, stage)
  assert mug.get_config('').profile == '4gb'
  assert mug.get_config('64').profile == ''
