"""The benchmark measures what it was asked for, and counts right."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import conftest
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hatjax import benchmark, methods, parallel, report, timing
from hatjax import state as state_lib
from hatjax.nets import hat_cgan as nets
from hatjax.nets import lowerings

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE, FRAMES, WIDTH = 16, 4, 512  # the neutral frame and three more


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product:
  """A method that is one matrix product per step, in turns of a loop."""

  tx: dict
  turns: int = 1
  image_size: int = SIZE
  dtype: str = 'float32'
  axis_name: str | None = None
  reads = ('image',)

  def init(self, rng, batch):
    pixels = math.prod(batch['video'].shape[1:])
    w = jax.random.normal(rng, (pixels, WIDTH))
    return state_lib.create({'net': {'w': w}}, {})

  def train_step(self, state, batch, rng):
    x = batch['video'].reshape(len(batch['video']), -1)
    w = state.params['net']['w'].reshape(self.turns, -1, len(x[0]))
    y = jax.lax.map(lambda w: x @ w.T, w)
    return state, state_lib.pmean({'loss/top': y.max()}, self.axis_name)

  def encode(self, state, inputs, rng):
    return inputs['image'] * state.params['net']['w'][0, 0]

  def sweep_alpha(self, state, label, num_frames):
    return jnp.ones((len(label), 1)) * jnp.linspace(0, 1, num_frames)

  def decode(self, state, context, chunk, rng):
    return jnp.tanh(context[:, None] * chunk[..., None, None, None])

  def animate(self, state, inputs, rng, num_frames):
    chunk = self.sweep_alpha(state, inputs['image'][:, 0, 0, 0], num_frames)
    return self.decode(state, self.encode(state, inputs, rng), chunk, rng)


measure_peak = timing.measure_peak


@pytest.fixture(autouse=True)
def product(monkeypatch):
  """Knows the method above, and takes the device's peak for granted."""
  monkeypatch.setitem(methods.METHODS, 'product', Product)
  monkeypatch.setattr(
    timing, 'measure_peak', lambda *_: {'size': 1, 'flops_per_second': 1e12}
  )


@pytest.fixture
def batches_run(monkeypatch):
  """The number of batches of every call of Runner.step."""
  calls, step = [], parallel.Runner.step

  def counting(self, state, batches, rng):
    calls.append(len(batches))
    return step(self, state, batches, rng)

  monkeypatch.setattr(parallel.Runner, 'step', counting)
  return calls


def product_config(mode='jit', turns=1, **settings):
  stage = {
    'method': 'product', 'model': {'turns': turns}, 'optim': {}, 'train': {},
    'data': dict(image_size=SIZE, batch_size=2, num_frames=FRAMES - 1)
    | settings,
  }
  return dict(seed=0, parallel=mode, stages=('product',), product=stage)


def run(config=None, **options):
  options = {'steps': 3, 'warmup': 1, 'devices': 1} | options
  return benchmark.benchmark(
    config or product_config(), benchmark.Options(**options)
  )


def numbers(tree):
  """All numbers in a report, with their paths."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in items:
    if isinstance(value, dict | list | tuple):
      yield from ((f'{key}.{k}', v) for k, v in numbers(value))
    elif isinstance(value, int | float):
      yield key, value


def test_times_exactly_the_steps_asked(batches_run):
  (row,) = run(steps=5, warmup=2)['rows']
  assert len(row['step_seconds']) == 5
  assert batches_run == [1] * (1 + 2 + 2 * 5)  # The first, warm-up, timed.
  assert row['step_seconds_median'] == np.median(row['step_seconds'])
  assert row['step_seconds_median'] <= row['step_seconds_p90']


def test_waits_for_the_device(monkeypatch):
  def slow(self, state, batches, rng):
    wait = lambda: time.sleep(0.02) or np.float32(0)
    return state, {'x': jax.pure_callback(wait, np.float32(0))}

  clock = itertools.count(0, 3)  # CPU seconds: 3 from one look to the next
  monkeypatch.setattr(timing.time, 'process_time', lambda: next(clock))
  monkeypatch.setattr(parallel.Runner, 'step', slow)
  (row,) = run(steps=3)['rows']
  assert min(row['step_seconds']) >= 0.02
  assert math.isclose(row['cores_busy'] * row['step_seconds_mean'], 1)


def test_rows_follow_from_the_times():
  report = run(batch_sizes=(4, 2))
  assert [row['batch_size'] for row in report['rows']] == [2, 4]
  peak = report['peaks']['float32']['flops_per_second']
  for row in report['rows']:
    seconds = row['step_seconds_mean']
    videos = row['batch_size'] / seconds
    assert row['videos_per_second'] == pytest.approx(videos)
    assert row['frames_per_second'] == pytest.approx(videos * (FRAMES - 1))
    assert row['share_of_peak'] == pytest.approx(row['flops'] / seconds / peak)


def test_growth_is_told_of_each_input_by_itself():
  rows = [
    {'batch_size': b, 'input': kind, 'frames_per_second': speed}
    for b, kind, speed in (
      (2, 'streamed', 10.0), (2, 'resident', 20.0), (4, 'streamed', 18.0),
      (4, 'resident', 40.0), (8, 'resident', 60.0),
    )
  ]
  assert list(report.growth(rows)) == [
    'batch 2 to 4: 1.8 times the frames/s, 90 % of linear',
    'batch 2 to 4: 2 times the frames/s, 100 % of linear',
    'batch 2 to 8: 3 times the frames/s, 75 % of linear',
  ]
  assert list(report.growth(rows[:2])) == []


@pytest.mark.parametrize(('mode', 'devices', 'turns'), (
  ('jit', 1, 1), ('jit', 2, 1), ('jit', 2, 4), ('pmap', 2, 1), ('pmap', 2, 4),
))
def test_counts_the_operations_of_a_matrix_product(mode, devices, turns):
  config = product_config(mode, turns, batch_size=64)
  (row,) = run(config, devices=devices)['rows']
  pixels = FRAMES * SIZE * SIZE * 3
  assert row['flops'] == pytest.approx(2 * 64 * pixels * WIDTH, rel=0.02)
  # Float32 weights, read by every device, and uint8 clips, read by one. XLA
  # sees one turn of a loop.
  assert row['bytes_accessed'] > pixels * (4 * devices * WIDTH / turns + 64)
  assert row['compiled_peak_bytes'] >= 4 * pixels * WIDTH


def test_library_calls_are_counted_before_compiling(monkeypatch):
  # As on GPUs, where a compiled convolution is a call of no known cost.
  monkeypatch.setattr(
    jax.stages.Compiled, 'cost_analysis', lambda self: {'flops': 10.0}
  )
  (row,) = run(product_config(turns=4, batch_size=64))['rows']
  pixels = FRAMES * SIZE * SIZE * 3
  assert row['flops'] == pytest.approx(2 * 64 * pixels * WIDTH, rel=0.02)


@pytest.mark.parametrize('mode', parallel.MODES)
def test_programs_of_unknown_cost_are_counted_for_a_cpu(mode, monkeypatch):
  # As on GPUs: nothing is known before compiling, and little after.
  asked, count = [], jax.stages.Lowered.cost_analysis

  def only_later(self):
    asked.append(self)
    if len(asked) == 1:
      raise NotImplementedError
    return count(self)

  monkeypatch.setattr(jax.stages.Lowered, 'cost_analysis', only_later)
  monkeypatch.setattr(
    jax.stages.Compiled, 'cost_analysis', lambda self: {'flops': 10.0}
  )
  (row,) = run(product_config(mode, 4, batch_size=64), devices=2)['rows']
  pixels = FRAMES * SIZE * SIZE * 3
  assert row['flops'] == pytest.approx(2 * 64 * pixels * WIDTH, rel=0.02)


def test_a_stage_that_makes_no_videos_is_left_out(monkeypatch):
  monkeypatch.delattr(Product, 'animate')
  assert run(mode='generate')['rows'] == []


def test_generates_whole_videos_and_their_parts(batches_run):
  (row,) = run(mode='generate', num_frames=5)['rows']
  assert row['num_frames'] == 5
  assert row['frames_per_second'] == pytest.approx(
    5 * row['batch_size'] / row['step_seconds_mean']
  )
  assert row['encode_seconds_median'] > 0 < row['decode_seconds_median']
  assert sum(batches_run) == 1 + 1 + 2 * 3


def test_the_data_mode_runs_the_training_loop(toy_records, batches_run):
  config = product_config(
    name='frame_folders/none-16', split='everything', resident='auto'
  )
  config['product']['train'] = {'steps_per_dispatch': 2}
  report = run(
    config, mode='data', steps=4, warmup=2, data_dir=str(toy_records)
  )
  assert [row['input'] for row in report['rows']] == ['streamed', 'resident']
  assert batches_run == [2] * 2 * (1 + 1 + 2)
  for row in report['rows']:
    assert 0 <= row['waiting_share'] <= 1
    assert row['batches_per_second'] > 0 < row['fetch_seconds_mean']


def test_waiting_is_fetching_while_nothing_runs():
  class Idle:
    def step(self, state, batches, rng):
      return state, {'x': jnp.zeros(())}

  class Busy:
    def step(self, state, batches, rng):
      time.sleep(0.02)
      return state, {}

  def slowly():
    while True:
      time.sleep(0.02)
      yield {}

  def share(runner, stream):
    _, (total, fetching, waiting) = benchmark._train_loop(
      runner, (None, {}), stream, 5, 1
    )
    assert waiting <= fetching <= total
    return waiting / total

  assert share(Idle(), slowly()) > 0.5
  assert share(Busy(), itertools.repeat({})) < 0.3


def test_products_of_matrices_are_fast():
  peak = measure_peak('bfloat16', jax.devices()[:2], longest=1e-3)
  assert peak['flops_per_second'] == max(peak['by_size'].values())
  assert 1e8 < peak['flops_per_second'] < 1e16


def test_batches_are_random_and_in_range():
  example = product_config()['product']
  batch = benchmark._random_batch(benchmark.runs.example_batch(example), 0)
  assert batch['video'].dtype == np.uint8 and batch['video'].std() > 50
  assert set(np.unique(batch['lip_mask'])) == {0, 1}
  assert (np.diff(batch['time'], axis=1) > 0).all()
  ready = benchmark._prepare(batch)
  assert ready['video'].min() == -1 and ready['video'].max() == 1
  assert ready['lip_mask'].dtype == np.float32


@pytest.fixture
def own_cache():
  with timing._empty_cache() as folder:
    yield pathlib.Path(folder)


def test_the_user_cache_is_left_alone(own_cache):
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9)
  (row,) = run()['rows']
  assert jax.config.jax_compilation_cache_dir == str(own_cache)
  assert list(own_cache.iterdir()) == []
  assert row['first_step_seconds'] > 0 < row['compile_seconds']


def test_cached_takes_what_the_user_cache_holds(own_cache):
  names = lambda: {path.name for path in own_cache.glob('jit__one-*-cache')}
  (first,) = run(cached=True)['rows']
  kept = names()
  (second,) = run(cached=True)['rows']
  assert kept and names() == kept
  same = 'flops', 'bytes_accessed', 'compiled_peak_bytes'
  assert [first[k] for k in same] == [second[k] for k in same]


def test_the_lowering_switch_changes_the_program(monkeypatch):
  module = importlib.import_module('configs.frame_folders')
  config = module.get_config('hat_cgan,tiny').to_dict()
  programs = []

  def measure(case, steps, warmup, cached):
    runner = case.make_runner()
    key = jax.random.key(0)
    state = jax.eval_shape(runner.method.init, key, case.example)
    programs.append(runner.lower(state, case.batches[0], key).as_text())
    return {'step_seconds_mean': 1.0}, runner, None

  monkeypatch.setattr(timing, 'measure', measure)
  for lowering in ('plain', 'rewritten'):
    run(config, lowering=lowering, mode='generate', devices=2)
  run({**config, 'lowering': 'plain'}, mode='generate', devices=2)
  assert programs.pop() == programs[0]
  count = lambda text: len(
    re.findall(r'(?:stride|lhs_dilate|rhs_dilate) = \[2, 2\]', text)
  )
  assert count(programs[0]) > 5
  assert count(programs[1]) == 0
  forms = re.findall(r'stablehlo\.(?:convolution|dot_general)', programs[1])
  assert len(forms) > 5
  assert lowerings._lowering == ['auto']


def test_a_batch_too_large_ends_the_stage(monkeypatch):
  measure = timing.measure

  def limited(case, *rest):
    if len(case.batches[0]['video']) > 2:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no room\nmore')
    return measure(case, *rest)

  monkeypatch.setattr(timing, 'measure', limited)
  lines = []
  report = benchmark.benchmark(
    product_config(),
    benchmark.Options(steps=1, devices=1, batch_sizes=(2, 4, 8)), lines.append,
  )
  assert [row['batch_size'] for row in report['rows']] == [2]
  assert lines[-1] == 'batch size 4 does not fit: RESOURCE_EXHAUSTED: no room'


@pytest.mark.parametrize('options, message', (
  ({'mode': 'foo'}, "--mode is 'foo'. Choose one of: train, generate, data."),
  ({'lowering': 'foo'}, '--lowering is'),
  ({'steps': 0}, '--steps must be at least 1.'),
  ({'devices': 99}, '--devices is 99, but there are'),
  ({'devices': 2, 'batch_sizes': (2, 3)}, 'does not divide over 2 devices'),
  ({'dtype': 'float8', 'config': 'tiny'}, "model.dtype is 'float8'"),
))
def test_wrong_settings_have_one_clear_line(options, message, monkeypatch):
  options = dict(options)
  config = product_config()
  if options.pop('config', None):
    module = importlib.import_module('configs.frame_folders')
    config = module.get_config('hat_cgan,tiny').to_dict()
  monkeypatch.delattr(timing, 'measure')  # Before anything is measured.
  with pytest.raises(ValueError) as error:
    run(config, **options)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_a_profile_is_compared_and_a_trace_written(tmp_path):
  module = importlib.import_module('configs.frame_folders')
  config = module.get_config('super_resolution,tiny,4gb').to_dict()
  lines = []
  options = benchmark.Options(
    steps=1, warmup=0, devices=1, trace=str(tmp_path)
  )
  report = benchmark.benchmark(config, options, lines.append)
  frugal, plain = report['rows']
  assert (plain['variant'], frugal['variant']) == ('', '4gb')
  assert (plain['dtype'], frugal['dtype']) == ('float32', 'bfloat16')
  assert frugal['flops'] != plain['flops']
  gib = [row['compiled_peak_bytes'] / 2**30 for row in (frugal, plain)]
  assert lines[-1].startswith(
    'batch 2, 4gb: compiled memory {:.4g} GiB (without: {:.4g})'.format(*gib)
  )
  assert list((tmp_path / 'super_resolution_2').rglob('*.xplane.pb'))


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'hatjax.benchmark', '--config',
     'configs/frame_folders.py:hat_cgan,tiny', *arguments],
    cwd=ROOT, env={**os.environ, **conftest.xla_flags()},
    capture_output=True, text=True,
  )


def test_the_command_writes_numbers_and_a_plot(tmp_path):
  path = tmp_path / 'new' / 'out.json'
  out = command(
    '--mode', 'generate', '--batch_sizes', '2', '--steps', '2', '--json',
    str(path),
  )
  assert out.returncode == 0, out.stderr
  titles, line = out.stdout.split('hat_cgan: generate')[1].split('\n')[1:3]
  assert titles.split()[0] == 'batch' and line.split()[0] == '2'
  report = json.loads(path.read_text())
  for row in report['rows']:
    assert row['device_peak_bytes'] is None  # As on CPUs.
    for name, value in numbers(row):
      zero = name.startswith('memory.')
      assert math.isfinite(value) and (value > 0 or zero), name
    assert len(row['step_seconds']) == 2
  assert report['machine']['platform'] == 'cpu'
  assert 'jax ' in report['machine']['versions']
  assert report['peaks']['float32']['flops_per_second'] > 1e9
  assert cv2.imread(str(path.with_suffix('.png'))).std() > 5


def test_a_wrong_option_ends_the_command():
  out = command('--batch_sizes', '1,x')
  assert out.returncode == 1 and out.stdout == ''
  assert out.stderr == (
    "error: --batch_sizes is '1,x'. Pass numbers above 0, such as 1,2,4.\n"
  )


# -- tests/torch_reference.py -------------------------------------------------


def copy_weights(net, params):
  """Flax's HWIO kernels -> the convolutions of a torch net, in order."""
  import torch

  convs = [m for m in net.modules() if hasattr(m, 'in_channels')]
  assert len(convs) == len(params)
  for n, conv in enumerate(convs):
    leaf = jax.tree.map(np.array, params[f'Conv_{n}'])
    transposed = isinstance(conv, torch.nn.ConvTranspose2d)
    order = (2, 3, 0, 1) if transposed else (3, 2, 0, 1)
    with torch.no_grad():
      conv.weight.copy_(torch.from_numpy(leaf['kernel'].transpose(order)))
      conv.bias.copy_(torch.from_numpy(leaf['bias']))


def randomize(params, scale=0.2):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda p: jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype),
    params,
  )


@pytest.mark.parametrize('lowering', lowerings.LOWERINGS[1:])
def test_generator_equals_torch(lowering):
  torch = pytest.importorskip('torch')
  import torch_reference

  ours = nets.Generator(net='unet_64', width=4)
  rng = np.random.default_rng(1)
  image = rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
  alpha, label = jnp.array([[0.3], [0.3]]), jnp.zeros(2, jnp.int32)
  with lowerings.lowering(lowering):
    variables = jax.jit(ours.init)(jax.random.key(0), image, label, alpha)
    params = variables['params']
    params = randomize(params)
    frame = ours.apply({'params': params}, image, label, alpha)
  theirs = torch_reference.Generator(64, 4).eval()
  copy_weights(theirs.base, params['base_encoder'])
  copy_weights(theirs.residual, params['residual_encoder'])
  copy_weights(theirs.decoder, params['decoder'])
  with torch.no_grad():
    out, _ = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)), 1.0, 0.3)
  np.testing.assert_allclose(
    frame, out.numpy().transpose(0, 2, 3, 1), atol=2e-5
  )


def test_discriminator_equals_torch():
  torch = pytest.importorskip('torch')
  import torch_reference

  rng = np.random.default_rng(1)
  image, frame = rng.uniform(-1, 1, (2, 2, 32, 32, 3)).astype(np.float32)
  ours = nets.PatchDiscriminator(width=4)
  variables = jax.jit(ours.init)(jax.random.key(0), image, frame)
  params = randomize(variables['params'])
  theirs = torch_reference.PatchDiscriminator(4)
  copy_weights(theirs, params)
  with torch.no_grad():
    out = theirs(*(
      torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (image, frame)
    ))
  np.testing.assert_allclose(
    ours.apply({'params': params}, image, frame), out.numpy()[:, 0],
    atol=2e-4, rtol=1e-4,
  )
