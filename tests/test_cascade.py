"""HAT-cGAN-DIFF: two stages trained, killed, resumed and run as one."""

import importlib
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hatjax import (
  data,
  diffusion,
  generate,
  methods,
  parallel,
  runs,
  train,
  validation,
  video,
  workdir,
)

STAGES = ('hat_cgan', 'video_diffusion')


def tiny_config(argument='hat_cgan_diff', mode='paired', steps=4, **init_from):
  """configs/frame_folders.py:<argument>,tiny on the toy records."""
  module = importlib.import_module('configs.frame_folders')
  config = module.get_config(f'{argument},tiny')
  for name in config.stages:
    stage = config[name]
    stage.data.update(name='frame_folders/none-16', split='everything')
    stage.train.update(
      num_steps=steps, log_every=1, ckpt_every=2, sample_every=4,
      val_split='everything', val_clips=2,
    )
    if name == 'video_diffusion':
      stage.model.mode = mode
  config = json.loads(config.to_json())
  return config | ({'init_from': init_from} if init_from else {})


def parameters(folder, stage):
  """Everything in the newest checkpoint of a stage, as host arrays."""
  config = workdir.read_config(folder)
  state = runs.load_stage(folder, config, stage).state
  return jax.tree.leaves(jax.device_get(state))


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    np.testing.assert_array_equal(x, y)


def worst(a, b):
  """(largest difference, 95th percentile) over two trees."""
  diffs = np.concatenate([
    np.abs(np.asarray(x) - np.asarray(y)).ravel()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  ])
  return diffs.max(), np.quantile(diffs, 0.95)


@pytest.fixture(scope='module')
def folders(toy_records, tmp_path_factory):
  """An unbroken run, and what was on disk at step 3 of either stage."""
  root = tmp_path_factory.mktemp('cascade')
  log = workdir.Run.log

  def log_and_copy(self, step, scalars):
    log(self, step, scalars)
    copy = root / f'broken_{self.folder.name}'
    if step == 3 and not copy.exists():
      self.wait()  # Step 2 is on disk.
      shutil.copytree(root / 'whole', copy)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workdir.Run, 'log', log_and_copy)
    train.train(tiny_config(), root / 'whole', toy_records, keep=True)
  return root


@pytest.fixture(scope='module')
def run(folders):
  return runs.load(folders / 'whole')


@pytest.fixture
def face():
  return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def draft_of(run, images, label, **settings):
  """What the first stage alone makes."""
  return runs.Run(run.config, run.stages[:1]).animate(
    images, label, **settings
  )


# -- training ------------------------------------------------------------------


@pytest.mark.parametrize('stage', STAGES)
def test_killed_in_either_stage_resumed_equals_unbroken(
  folders, toy_records, stage, capsys
):
  broken = folders / f'broken_{stage}'
  disk = workdir.Run(broken / stage, read_only=True)
  assert disk.steps() == [2]
  assert (broken / 'video_diffusion').exists() == (stage == STAGES[1])
  train.train(tiny_config(), broken, toy_records, keep=True)
  out = capsys.readouterr().out
  assert f'Resuming {broken / stage} at step 2.' in out
  loaded = f'{broken / "hat_cgan"} is done: step 4.'
  assert (loaded in out) == (stage == 'video_diffusion')
  for name in STAGES:
    assert_same(parameters(broken, name), parameters(folders / 'whole', name))


def test_scores_and_samples_show_the_draft(folders):
  stage = workdir.Run(folders / 'whole' / 'video_diffusion', read_only=True)
  rows = [r for r in stage.history() if 'val/psnr' in r]
  assert [r['step'] for r in rows] == [2, 4]
  for row in rows:
    assert row['val/psnr'] == row['val/psnr_generated']
    assert 5 < row['val/psnr_draft'] < 60
    assert row['val/psnr_draft'] != row['val/psnr_generated']
  # Two clips of three frames: real, draft and refined.
  strip = video.read_image(stage.folder / 'samples' / '00000004.png')
  assert strip.shape == (6 * 16 + 5 * 2, 3 * 16 + 2 * 2, 3)
  frames, _ = video.read_video(stage.folder / 'samples' / '00000004.mp4')
  assert frames.shape == (3, 16, 2 * 3 * 16 + 2, 3)


def test_psnr_of_the_draft_is_that_of_the_first_stage(run, toy_records):
  clip = next(data.make_batches(
    name='frame_folders/none-16', split='everything', image_size=16,
    directory=toy_records,
  ).whole_clips(1))
  scorer = validation.make_scorer(run.method, run.stages[0])
  scores, shown = validation.score_clips(scorer, run.state, [clip], 8)
  label = run.config['info']['labels'][clip['label']]
  draft = draft_of(run, clip['video'][0], label, num_frames=8)[0]
  assert np.abs(shown[0][1].astype(int) - draft).max() <= 1
  error = (shown[0][1][1:] / 127.5 - clip['video'][1:] / 127.5) ** 2
  psnr = 10 * np.log10(4 / error.mean((1, 2, 3))).mean()
  np.testing.assert_allclose(scores['val/psnr_draft'], psnr, rtol=1e-4)


def prepared(run, toy_records, alpha, resident='no', parts=1, **settings):
  """(host batch, what the step of the second stage sees of it)."""
  block = run.config['video_diffusion']['data'] | settings
  batches = data.make_batches(
    **block | {'directory': toy_records, 'resident': resident}
  )
  _, method, state = run.stages[0]
  prepare = jax.jit(
    validation.add_drafts(batches.prepare, method, alpha, parts)
  )
  host = next(batches.iterate())
  frames = {'frames': batches.resident_frames(), 'previous': state.frozen()}
  return host, prepare(host, frames, jax.random.key(7))


def test_drafts_are_what_the_first_stage_makes_of_the_same_alphas(
  run, toy_records
):
  _, batch = prepared(run, toy_records, 'inferred')
  _, method, state = run.stages[0]
  first = batch['video'][:, 0]
  alpha = jax.jit(method.infer)(state, {
    'image': first, 'driving': batch['video'], 'label': batch['label'],
  })
  assert np.abs(alpha).max() > 1e-3
  labels = [run.config['info']['labels'][i] for i in batch['label']]
  made = draft_of(run, np.asarray(video.to_uint8(first)), labels, alpha=alpha)
  assert batch['draft'].shape == batch['video'].shape
  assert batch['draft'].dtype == jnp.float32
  np.testing.assert_array_equal(
    batch['draft'], video.to_float(video.to_uint8(batch['draft']))
  )
  draft = np.asarray(video.to_uint8(batch['draft'])).astype(int)
  difference = np.abs(draft - made)
  assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.mark.parametrize('sweep', ['profile', 'linear'])
def test_drafts_can_follow_a_sweep_at_the_times_of_the_frames(
  run, toy_records, sweep
):
  # 8 frames of 8: evenly spaced, as those of a generated video.
  _, batch = prepared(run, toy_records, sweep, num_frames=7, frames='even')
  images = np.asarray(video.to_uint8(batch['video'][:, 0]))
  labels = [run.config['info']['labels'][i] for i in batch['label']]
  made = draft_of(run, images, labels, num_frames=8, sweep=sweep)
  draft = np.asarray(video.to_uint8(batch['draft'])).astype(int)
  assert np.abs(draft - made).max() <= 1


def test_resident_and_streamed_drafts_are_equal(run, toy_records):
  (_, a), (_, b) = (
    prepared(run, toy_records, 'inferred', r) for r in ('no', 'yes')
  )
  np.testing.assert_array_equal(a['video'], b['video'])
  assert np.abs(a['draft'] - b['draft']).max() <= 1.001 / 127.5


def test_drafts_made_in_parts_equal_those_of_the_whole_batch(run, toy_records):
  (_, a), (_, b) = (
    prepared(run, toy_records, 'inferred', parts=n, batch_size=4)
    for n in (1, 2)
  )
  np.testing.assert_array_equal(a['video'], b['video'])
  difference = np.abs(a['draft'] - b['draft'])
  assert difference.max() <= 1.001 / 127.5 and difference.mean() < 1e-4
  assert np.abs(a['draft'][0] - a['draft'][1]).max() > 0.1


def test_a_stage_of_another_run_drafts_as_this_run_computes(folders):
  config = workdir.read_config(folders / 'whole') | {
    'profile': '4gb', 'deterministic': True,
    'init_from': {'hat_cgan': str(folders / 'whole')},
  }
  (stage,) = runs.load_earlier(config)
  assert stage.method.dtype == 'bfloat16' and stage.method.deterministic
  config |= {'profile': '', 'deterministic': False}
  (stage,) = runs.load_earlier(config)
  assert stage.method.dtype == 'float32' and not stage.method.deterministic


def test_both_stages_train_under_the_profile(toy_records, tmp_path, capsys):
  config = tiny_config('hat_cgan_diff,4gb', steps=1) | {'deterministic': True}
  states = train.train(config, tmp_path / 'a', toy_records, keep=True)
  assert capsys.readouterr().out.count('compiler options: ') == 1
  saved = workdir.read_config(tmp_path / 'a')
  for name in STAGES:
    model = saved[name]['model']
    assert (model['dtype'], model['remat']) == ('bfloat16', True)
    for leaf in jax.tree.leaves(states[name].params):
      assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
  assert saved['hat_cgan']['model']['deterministic'] is True
  run = runs.load(tmp_path / 'a')
  assert [s.method.dtype for s in run.stages] == ['bfloat16'] * 2


def test_devices_and_dispatch_agree_on_steps_with_drafts(run, toy_records):
  batches = data.make_batches(
    **run.config['video_diffusion']['data'] | {'directory': toy_records}
  )
  _, drafter, state = run.stages[0]
  frozen = jax.device_get(state.frozen())
  prepare = validation.add_drafts(batches.prepare, drafter)
  stream = batches.iterate()
  host = [next(stream) for _ in range(2)]
  results = {}
  for name, mode, dispatch, count in (
    ('one', 'jit', 'loop', 1), ('scan', 'jit', 'scan', 2),
    ('pmap', 'pmap', 'loop', 2),
  ):
    runner = parallel.Runner(
      run.method, prepare,
      {'frames': batches.resident_frames(), 'previous': frozen}, mode,
      jax.devices()[:count], dispatch,
    )
    new = runner.init(jax.random.key(0), batches.example())
    new, metrics = runner.step(new, host, jax.random.key(1))
    assert all(np.isfinite(v) for v in jax.device_get(metrics).values())
    if mode == 'pmap':  # Other noise on each device, equal parameters.
      for leaf in jax.tree.leaves(jax.device_get(new.params)):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    results[name] = jax.device_get(runner.fetch(new).params)
    # The first stage is not trained any further.
    assert_same(
      jax.tree.leaves(frozen), jax.tree.leaves(jax.device_get(state.frozen()))
    )
  most, typical = worst(results['one'], results['scan'])
  assert typical < 1e-5 and most < 5e-3


def test_a_frozen_state_is_the_average_without_optimizer(run):
  state = run.stages[0].state
  frozen = state.frozen()
  assert frozen.ema == frozen.opt_state == {}
  assert_same(
    jax.tree.leaves(frozen.inference_params('generator')),
    jax.tree.leaves(state.ema['generator']),
  )


def test_init_from_is_the_first_stage_of_another_run(
  folders, toy_records, tmp_path, run, face, monkeypatch
):
  monkeypatch.chdir(folders)  # A relative path is meant from here.
  config = tiny_config('video_diffusion', hat_cgan='whole')
  train.train(config, tmp_path / 'a', toy_records, keep=True)
  monkeypatch.chdir(tmp_path)
  assert_same(
    parameters(tmp_path / 'a', 'video_diffusion'),
    parameters(folders / 'whole', 'video_diffusion'),
  )
  other = runs.load(tmp_path / 'a')
  assert [s.name for s in other.stages] == list(STAGES)
  np.testing.assert_array_equal(
    other.animate(face, 'happy', num_frames=4, refine=0.5),
    run.animate(face, 'happy', num_frames=4, refine=0.5),
  )


@pytest.mark.parametrize('change, message', [
  (dict(), "config.video_diffusion.model.mode is 'paired'.*hat_cgan_diff"),
  (dict(init='nowhere'), 'nowhere is not a run'),
  (dict(init='whole', name='fev_gan'), 'has no stage fev_gan. It has: hat_cg'),
  (dict(init='whole', size=32), 'side 16, video_diffusion refines 32'),
  (dict(init='whole', draft_alpha='real'), 'inferred, linear, profile'),
])
def test_a_stage_that_cannot_follow_says_the_cure(
  folders, toy_records, tmp_path, change, message
):
  config = tiny_config('video_diffusion')
  if 'init' in change:
    name = change.get('name', 'hat_cgan')
    config['init_from'] = {name: str(folders / change['init'])}
  stage = config['video_diffusion']
  stage['train']['draft_alpha'] = change.get('draft_alpha', 'inferred')
  size = change.get('size', 16)
  stage['data']['image_size'] = stage['model']['image_size'] = size
  with pytest.raises(ValueError, match=message):
    train.train(config, tmp_path / 'a', toy_records, keep=True)
  assert not (tmp_path / 'a').exists()


def test_arguments_of_the_configs():
  get = lambda name, arg='': importlib.import_module(
    f'configs.{name}'
  ).get_config(arg)
  assert get('mug').stages == get('mug', 'hat_cgan_diff,64').stages == STAGES
  assert get('mug', 'video_diffusion').stages == STAGES[1:]
  assert get('mug', 'video_diffusion').init_from.hat_cgan == ''
  for name in ('ck_plus', 'frame_folders', 'synthetic'):
    assert get(name).stages == STAGES[:1] and 'init_from' not in get(name)
    assert get(name, 'hat_cgan_diff').stages == STAGES
    assert get(name, 'hat_cgan,video_diffusion,tiny').stages == STAGES
  paired = get('ck_plus', 'hat_cgan_diff,paired').video_diffusion.model
  assert (paired.mode, paired.strength) == ('paired', 0.03)
  assert get('ck_plus', 'video_diffusion').video_diffusion.model.mode == 'noise'
  config = get('mug', 'paper_1x1,64')
  assert config.hat_cgan.model.head == 'direct'
  assert config.video_diffusion.model.dim_mults == (1, 2, 4, 8, 8, 8, 8)
  assert {config[s].data.split for s in STAGES} == {'by_video_train'}
  assert {get('mug')[s].data.frames for s in STAGES} == {'random', 'window'}


@pytest.mark.parametrize('argument', ['', 'paper'])
def test_mug_is_both_stages_at_256_for_a_small_card(argument):
  config = importlib.import_module('configs.mug').get_config(argument)
  config = config.to_dict()
  assert config['stages'] == STAGES and config['profile'] == '4gb'
  key, frozen = jax.random.key(0), None
  for name in STAGES:
    stage = methods.settle(config, config[name], 1)
    changes = {'mode': 'paired'} if frozen else {}  # costs more than 'noise'
    method = methods.make(stage, num_labels=7, image_size=256, **changes)
    assert (method.dtype, method.remat) == ('bfloat16', True)
    batch = runs.example_batch(stage)
    assert batch['video'].shape[2:] == (256, 256, 3)
    if frozen:
      draft = jax.eval_shape(
        lambda state, batch, key, drafter=frozen[0]: validation.make_draft(
          drafter, state, batch, key, 'inferred'
        ), frozen[1], batch, key,
      )
      batch['draft'] = draft
    state = jax.eval_shape(method.init, key, batch)
    new, metrics = jax.eval_shape(method.train_step, state, batch, key)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert all(m.shape == () for m in metrics.values())
    frozen = (method, state.frozen())


# -- generation ----------------------------------------------------------------


def test_strength_zero_is_the_draft_bit_for_bit(run, face):
  run = runs.Run(run.config, run.stages)  # with empty caches
  settings = dict(label=['happy', 'surprise'], num_frames=7)
  faces = np.stack([face, face[::-1]])
  draft = draft_of(run, faces, **settings)
  np.testing.assert_array_equal(run.animate(faces, refine=0, **settings), draft)
  refined = run.animate(faces, refine=0.5, **settings)
  assert refined.shape == draft.shape and refined.dtype == np.uint8
  assert np.abs(refined.astype(int) - draft).mean() > 1
  np.testing.assert_array_equal(
    refined, run.animate(faces, refine=0.5, **settings)
  )
  # The config's strength is the default.
  np.testing.assert_array_equal(
    run.animate(faces, **settings),
    run.animate(faces, refine=run.method.strength, **settings),
  )
  other = run.animate(faces, refine=0.5, num_sample_steps=20, **settings)
  assert not np.array_equal(refined, other)
  assert run._denoise._cache_size() == 3 and run._encode._cache_size() == 1


def test_a_streamed_video_is_refined_as_a_generated_one(run, face):
  draft = draft_of(run, face, 'happy', num_frames=11)[0]
  whole = run.animate(face, 'happy', num_frames=11, refine=0.4)[0]
  streamed = np.stack([*run.refine(iter(draft), 'happy', strength=0.4)])
  np.testing.assert_array_equal(streamed, whole)
  # What comes later than the windows around a frame does not change it.
  part = np.stack([*run.refine(draft[:8], 'happy', strength=0.4)])
  np.testing.assert_array_equal(part[:5], whole[:5])
  other = np.stack([*run.refine(draft, strength=0.4)])  # no label
  assert other.shape == whole.shape
  kept = [*run.refine(iter(draft), strength=0)]
  np.testing.assert_array_equal(kept, draft)
  for short in (1, 2):
    assert len([*run.refine(draft[:short], strength=0.4)]) == short


@pytest.mark.parametrize('window', [1, 2, 3, 10])
@pytest.mark.parametrize('length', [1, 2, 9, 10, 11, 14, 15, 31])
def test_cross_fade_weighs_every_window_and_holds_few_frames(window, length):
  frames = np.random.default_rng(0).normal(size=(length, 2, 3))
  taken = given = most = 0

  def stream():
    nonlocal taken, most
    for frame in frames:
      taken += 1
      most = max(most, taken - given)
      yield frame

  def double(clip, start):
    assert len(clip) == min(window, length)
    np.testing.assert_array_equal(clip, frames[start : start + len(clip)])
    return np.stack(clip, 1) * 2 + start  # so that windows differ

  got = []
  for frame in diffusion.cross_fade(stream(), double, window):
    given += 1
    got.append(frame)
  size, stride = min(window, length), max(window // 2, 1)
  starts = sorted({*range(0, length - size + 1, stride), length - size})
  total, weight = np.zeros_like(frames), np.zeros((length, 1, 1))
  for start in starts:
    for i in range(size):
      w = min(i + 1, size - i)
      total[start + i] += w * (2 * frames[start + i] + start)
      weight[start + i] += w
  np.testing.assert_allclose(got, total / weight, rtol=1e-5, atol=1e-6)
  assert most <= window + stride


def test_wrong_refinements_say_the_cure(run, face, folders):
  for strength in (-0.1, 1.5):
    with pytest.raises(ValueError, match=r'refine is .*It must lie in 0..1'):
      run.animate(face, 'happy', refine=strength)
    with pytest.raises(ValueError, match=r'refine is .*It must lie in 0..1'):
      run.refine([face], strength=strength)
  with pytest.raises(ValueError, match='num_sample_steps is 0'):
    run.animate(face, 'happy', num_sample_steps=0)
  with pytest.raises(ValueError, match=r'uint8 \[B, 16, 16, 3\]'):
    [*run.refine([np.zeros((8, 8, 3), np.uint8)], strength=0.5)]
  with pytest.raises(ValueError, match='only refines drafts'):
    run.animate_noise(range(2))
  first = runs.Run(run.config, run.stages[:1])
  for call in (
    lambda: first.animate(face, 'happy', refine=0.1),
    lambda: first.refine([face]), lambda: first.animate_noise([0]),
  ):
    with pytest.raises(ValueError, match='no stage that refines.*hat_cgan_di'):
      call()
  last = runs.Run(run.config, run.stages[1:])
  with pytest.raises(ValueError, match='no stage before video_diffusion'):
    last.animate(face, 'happy')
  alone = folders / 'no_first_stage'
  shutil.copytree(folders / 'whole', alone)
  shutil.rmtree(alone / 'hat_cgan')
  with pytest.raises(ValueError, match='hat_cgan has no checkpoints yet'):
    runs.load(alone)


# -- the command ---------------------------------------------------------------


def call(*args):
  return generate.main([*map(str, args), '--watermark', 'none'])


def test_generate_runs_the_cascade(folders, run, face, tmp_path):
  video.write_image(tmp_path / 'face.png', face)
  args = (
    '--workdir', folders / 'whole', '--image', tmp_path / 'face.png',
    '--crop', 'none', '--label', 'happy', '--num_frames', 5,
  )
  for name, extra, settings in (
    ('draft', ['--refine', 0], dict(refine=0)),
    ('refined', ['--refine', 0.5, '--num_sample_steps', 6],
     dict(refine=0.5, num_sample_steps=6)),
  ):
    assert call(*args, *extra, '--out', tmp_path / name) == 0
    frames, _ = video.read_video(tmp_path / name)
    expected = run.animate(face, 'happy', num_frames=5, **settings)[0]
    np.testing.assert_array_equal(frames, expected)


def test_generate_refines_a_video(folders, run, face, tmp_path, capsys):
  clip = draft_of(run, face, 'happy', num_frames=10)[0]
  video.write_video(tmp_path / 'in.mp4', clip, 12)
  args = ('--workdir', folders / 'whole', '--video', tmp_path / 'in.mp4')
  out = tmp_path / 'out.mp4'
  assert call(*args, '--label', 'joy', '--refine', 0.3, '--out', out) == 0
  frames, fps = video.read_video(out)
  assert frames.shape == clip.shape and fps == 12
  assert '1 x 10 frames' in capsys.readouterr().err
  read, _ = video.read_video(tmp_path / 'in.mp4')
  assert call(*args, '--refine', 0.3, '--out', tmp_path / 'frames/') == 0
  frames, _ = video.read_video(tmp_path / 'frames')
  np.testing.assert_array_equal(frames, [*run.refine(read, strength=0.3)])
  # Frames of another size are squeezed, as the training pictures were.
  video.write_video(tmp_path / 'large', video.resize(read, (40, 30)))
  args = ('--workdir', folders / 'whole', '--video', tmp_path / 'large')
  assert call(*args, '--refine', 0, '--out', tmp_path / 'small/') == 0
  assert 'squeezed to 16x16' in capsys.readouterr().err
  frames, _ = video.read_video(tmp_path / 'small')
  expected = video.resize(video.resize(read, (40, 30)), 16)
  np.testing.assert_array_equal(frames, expected)


def test_frames_are_made_ahead_in_order_until_one_fails_or_no_more_are_wanted():
  made = []

  def frames(bad=None):
    for n in range(100):
      if n == bad:
        raise ValueError('spoilt')
      made.append(n)
      yield n

  assert list(generate._ahead(frames(), 3)) == list(range(100))
  made.clear()
  ahead = generate._ahead(frames(), 3)
  assert [next(ahead) for _ in range(5)] == list(range(5))
  ahead.close()
  assert len(made) <= 5 + 3
  got = []
  with pytest.raises(ValueError, match='spoilt'):
    for n in generate._ahead(frames(bad=4), 3):
      got.append(n)
  assert got == [0, 1, 2, 3] and list(generate._ahead([])) == []


def test_wrong_options_of_generate(folders, tmp_path, capsys):
  video.write_video(tmp_path / 'in.mp4', np.zeros((3, 16, 16, 3), np.uint8))
  args = ('--workdir', folders / 'whole', '--video', tmp_path / 'in.mp4')
  for extra, message in (
    (['--label', 'happy,surprise'], 'takes one --label, not 2'),
    (['--boomerang'], 'Leave --num_frames, --boomerang'),
    (['--label', 'angst'], 'Known: happy, surprise'),
  ):
    assert call(*args, *extra) == 1
    assert message in capsys.readouterr().err
  args = ('--workdir', folders / 'whole', '--from_noise')
  assert call(*args) == 1
  assert "mode 'paired': it only refines" in capsys.readouterr().err
  assert call(*args, '--refine', 0.1) == 1
  assert 'nothing to --refine' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    call(*args, '--refine', 1.2)
  assert "'1.2' is not a number from 0 to 1" in capsys.readouterr().err


# -- without a first stage -----------------------------------------------------


@pytest.fixture(scope='module')
def alone(toy_records, tmp_path_factory):
  """A denoiser that learned from real clips, without any draft."""
  folder = tmp_path_factory.mktemp('alone') / 'a'
  config = tiny_config('video_diffusion', mode='noise', steps=2)
  config['video_diffusion']['model']['strength'] = 0.0
  train.train(config, folder, toy_records, keep=True)
  return folder


def test_a_denoiser_alone_is_scored_on_real_clips(alone):
  stage = workdir.Run(alone / 'video_diffusion', read_only=True)
  (row,) = [r for r in stage.history() if 'val/psnr' in r]
  assert 'val/psnr_draft' not in row
  assert row['val/psnr'] > 100 > row['val/psnr_copy']  # strength 0


def test_videos_from_noise(alone, tmp_path):
  run = runs.load(alone)
  some = run.animate_noise(range(3), 'happy', num_frames=4)
  assert some.shape == (3, 4, 16, 16, 3) and some.dtype == np.uint8
  assert not np.array_equal(some[0], some[1])
  one = run.animate_noise([1], 'happy', num_frames=4)
  assert np.abs(one[0].astype(int) - some[1]).max() <= 1
  other = run.animate_noise(range(3), num_frames=4, seed=1)
  assert not np.array_equal(some, other)
  args = ('--workdir', alone, '--from_noise', '--num_frames', 4)
  args = (*args, '--batch_size', 3, '--num_images', 3, '--label', 'happy')
  assert call(*args, '--out', tmp_path / 'made/') == 0
  for n in range(3):
    frames, _ = video.read_video(tmp_path / 'made' / f'noise-{n}')
    np.testing.assert_array_equal(frames, some[n])
