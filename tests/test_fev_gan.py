"""FEV-GAN: the specification's shapes and counts, its losses, its nets taken
from elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from configs import frame_folders, mug, synthetic
from configs.methods import fev_gan as fev_config
from hatjax import (
  data,
  evaluate,
  init_from,
  losses,
  methods,
  runs,
  score_report,
  train,
)
from hatjax.methods import identity_encoder
from hatjax.nets import fev_gan as nets

KEY = jax.random.key(0)


def make(preset='tiny', size=16, **changes):
  stage = fev_config.get_stage(preset, size, {'name': 'none'}).to_dict()
  stage['model'] |= changes
  return methods.make(stage, num_labels=6)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(net, *args):
  """(shape of the output, parameters by name), without work."""
  args = [jax.ShapeDtypeStruct(a, jnp.float32) for a in args]
  out, variables = jax.eval_shape(net.init_with_output, KEY, *args)
  return out.shape, variables['params']


@pytest.fixture(scope='module')
def tiny():
  method = make()
  t, s = method.num_frames, method.image_size
  rng = np.random.default_rng(0)
  video = rng.uniform(-1, 1, (2, t, s, s, 3)).astype(np.float32)
  mask = np.zeros((*video.shape[:-1], 1), np.float32)
  batch = {'video': video, 'label': np.array([1, 4]), 'lip_mask': mask}
  return method, jax.jit(method.init)(KEY, batch), batch


@pytest.mark.parametrize('preset, decoder, total', [
  ('paper', 79.8e6, 81.5e6), ('paper_1024', 88.2e6, 89.9e6),
])
def test_parameter_counts_of_the_specification(preset, decoder, total):
  method = make(preset, 64)
  batch = data.example_batch(64, 1, 31)
  state = jax.eval_shape(method.init, KEY, batch)
  generator = state.params['generator']
  assert count(generator['decoder']) == pytest.approx(decoder, rel=1e-3)
  assert count(generator['spatial_encoder']) == pytest.approx(1.71e6, rel=2e-3)
  assert count(generator) == pytest.approx(total, rel=1e-3)
  assert count(state.params['discriminator']) == pytest.approx(
    11.1e6, rel=2e-3
  )
  assert count(state.params['identity_encoder']) == 14_714_688
  assert set(state.opt_state) == {'generator', 'discriminator'}
  inputs = {'image': batch['video'][:, 0], 'label': batch['label']}
  video = jax.eval_shape(
    lambda s: method.animate(s, inputs, None, 32), state
  )
  assert video.shape == (1, 32, 64, 64, 3)


def test_shapes_of_the_specification():
  # 64 -> 32 -> 16 -> 14; 224 -> 14 is in test_vgg.
  assert shapes(nets.SpatialEncoder(), (1, 64, 64, 3))[0] == (1, 14, 14, 512)
  for arch in nets.DECODERS:
    out, params = shapes(nets.Decoder(arch=arch), (1, 14, 14, 1030))
    assert out == (1, 32, 64, 64, 3)
  kernels = [p['kernel'].shape[:-2] for n, p in params.items() if 'Conv' in n]
  assert kernels == [(3, 3), (4,) * 3, (4,) * 3, (4,), (4,)]
  half = shapes(nets.Decoder(width=64), (1, 14, 14, 1030))[1]
  assert count(half) == pytest.approx(24.2e6, rel=2e-3)
  assert make('paper', 64).grid == make('default', 64).grid == 14


@pytest.mark.parametrize('time, space', [(True, False), (False, True)])
def test_doubling_one_axis_is_a_transposed_convolution(time, space):

  class Double(nets.Decoder):
    @nets.nn.compact
    def __call__(self, x):
      return self._double(x, 3, time, space)

  x = jax.random.normal(KEY, (2, 4, 6, 6, 5))
  double = Double()
  params = double.init(KEY, x)
  kernel = params['params']['Conv_0']['kernel']
  size = (4 if time else 1, *(4 if space else 1,) * 2)
  kernel = jnp.flip(kernel.reshape(*size, 5, 3), (0, 1, 2))
  expected = lax.conv_general_dilated(
    x, kernel, (1, 1, 1), [(2, 2) if k == 4 else (0, 0) for k in size],
    lhs_dilation=[2 if k == 4 else 1 for k in size],
    dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
  )
  np.testing.assert_allclose(double.apply(params, x), expected, atol=1e-5)


def test_batch_norm_is_over_all_devices():
  x = jax.random.normal(KEY, (4, 3, 3, 2)) * 3 + 1
  norm = nets.Norm('batch')
  variables = norm.init(KEY, x, True)
  params, stats = variables['params'], variables['batch_stats']
  gain, mean, var = params['BatchNorm_0']['scale'], x.mean((0, 1, 2)), x.var(
    (0, 1, 2)
  )
  run = lambda norm: lambda x: norm.apply(
    variables, x, True, mutable=['batch_stats']
  )
  whole, new = run(norm)(x)
  expected = gain * (x - mean) / np.sqrt(var + 1e-5)
  np.testing.assert_allclose(whole, expected, atol=1e-4)
  noted = 0.9 * stats['BatchNorm_0']['mean'] + 0.1 * mean
  np.testing.assert_allclose(
    new['batch_stats']['BatchNorm_0']['mean'], noted, atol=1e-5
  )
  halves, both = jax.pmap(run(nets.Norm('batch', 'd')), 'd')(
    x.reshape(2, 2, 3, 3, 2)
  )
  np.testing.assert_allclose(halves.reshape(x.shape), whole, atol=1e-5)
  for leaf, one in zip(jax.tree.leaves(both), jax.tree.leaves(new)):
    np.testing.assert_allclose(leaf, np.stack([one, one]), atol=1e-5)


def test_group_norm_is_flaxs():
  x = jax.random.normal(KEY, (2, 3, 4, 4, 8)) * 3 + 1
  ours, theirs = nets.Norm('group'), nets.nn.GroupNorm(None, group_size=4)
  params = ours.init(KEY, x, True)
  np.testing.assert_allclose(
    ours.apply(params, x, False), theirs.apply(params, x), atol=1e-4
  )


def test_identity_loss_is_zero_for_the_input_face(tiny):
  method, state, batch = tiny
  params, image = state.params['identity_encoder'], batch['video'][:, 0]
  faces = method._identify(params, image)
  still = np.repeat(image[:, None], method.num_frames, 1)
  assert float(method.identity_loss(still, faces, params)) == 0
  moved = still.copy()
  moved[:, 1] += 0.5  # frame 1 of 8 is not among the four
  assert float(method.identity_loss(moved, faces, params)) == 0
  moved[:, 2] += 0.5
  feature = method._identify(params, moved[:, 2])
  expected = losses.l1(faces[0], feature[0]).mean() / 4
  loss = method.identity_loss(moved, faces, params)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert loss > 0


def test_losses_are_those_of_equations_1_and_3(tiny):
  method, state, batch = tiny
  fake = np.asarray(batch['video'])[:, ::-1] * 0.5
  faces = method._identify(
    state.params['identity_encoder'], batch['video'][:, 0]
  )
  loss, m = method.generator_loss(fake, faces, state, batch)
  np.testing.assert_allclose(
    loss, 0.25 * m['loss/gan'] + 100 * m['loss/l1']
    + m['loss/identity_trained'], rtol=1e-5,
  )
  np.testing.assert_allclose(
    m['loss/l1'], np.abs(fake - batch['video']).mean(), rtol=1e-5
  )
  params = state.params['discriminator']
  loss, _ = method.discriminator_loss(params, fake, batch)
  real, made = (
    jax.nn.sigmoid(method._judge(params, video, batch))
    for video in (batch['video'], fake)
  )
  # -log D(Y) - log(1 - D(Y^)), halved; the generator's is -log D(Y^).
  expected = -0.5 * (jnp.log(real) + jnp.log(1 - made)).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  np.testing.assert_allclose(m['loss/gan'], -jnp.log(made).mean(), rtol=1e-4)


@pytest.mark.parametrize('changes, nets_left, notes', [
  (dict(use_identity=False), ['decoder', 'spatial_encoder'],
   {'eid': 'trained', 'without': 'E_id'}),
  (dict(use_identity=False, lambda_id=0.0), ['decoder', 'spatial_encoder'],
   {'eid': 'none', 'without': 'E_id'}),
  (dict(use_spatial=False, head='direct', norm='batch'), ['decoder'],
   {'eid': 'trained', 'without': 'E_s'}),
  (dict(eid='random', lambda_gan=0.0, dec_arch='down4', eid_size=16,
        head='residual', remat=True, dtype='bfloat16', dec_size=8),
   ['decoder', 'spatial_encoder'], {'eid': 'random'}),
  (dict(eid='random', discriminator_size=8, label_everywhere=False),
   ['decoder', 'spatial_encoder'], {'eid': 'random'}),
])
def test_ablations_and_variants_build(tiny, changes, nets_left, notes):
  method, batch = make(**changes), tiny[2]
  state = jax.eval_shape(method.init, KEY, batch)
  new, _ = jax.eval_shape(method.train_step, state, batch, KEY)
  same = jax.tree.map(lambda a, b: a.shape == b.shape, state, new)
  assert all(jax.tree.leaves(same))
  parts = set(state.params['generator'])
  assert ('label_maps' in parts) == method.label_everywhere
  assert ('painter' in parts) == (method.head != 'direct')
  assert sorted(parts - {'label_maps', 'painter'}) == nets_left
  assert ('identity_encoder' in state.params) == (notes['eid'] != 'none')
  assert method.notes == notes


def test_label_and_both_encoders_reach_the_video(tiny):
  method, state, batch = tiny
  params, stats = state.params['generator'], state.model_state['batch_stats']
  image, label = batch['video'][:1, 0], np.array([1])
  faces = method._identify(state.params['identity_encoder'], image)
  run = jax.jit(lambda image, faces, label: method.generator.apply(
    {'params': params, 'batch_stats': stats}, image, faces, label
  ))
  base = run(image, faces[0], label)
  for other in (
    run(-image, faces[0], label), run(image, 1 - faces[0], label),
    run(image, faces[0], np.array([2])),
  ):
    assert np.abs(base - other).max() > 0


def test_a_flow_fetches_pixels(tiny):
  image = tiny[2]['video'][:, 0]
  flow = np.zeros((2, 3, 16, 16, 2), np.float32)
  still = nets.move(image, flow)
  expected = np.repeat(image[:, None], 3, 1)
  np.testing.assert_allclose(still, expected, atol=1e-5)
  # One pixel to the right: 2 / 15 of the width, in units of a quarter.
  flow[..., 0] = 4 * 2 / 15
  both = np.concatenate([0.25 * flow, 0.75 * flow], -1)  # that add up
  for args in ((flow,), (flow, (4,)), (both, (4, 8))):
    moved = nets.move(image, *args)
    np.testing.assert_allclose(
      moved[..., :-1, :], expected[..., 1:, :], atol=1e-5
    )


def test_a_painter_sees_near_pixels_and_hints_alone():
  net = nets.Painter(width=4, detail=2)
  frames = np.random.default_rng(0).normal(size=(1, 2, 32, 32, 3))
  hints = np.random.default_rng(1).normal(size=(1, 2, 16, 16, 5))
  params = net.init(KEY, frames, hints)
  params = jax.tree.map(lambda x: x + 0.1, params)
  painted = net.apply(params, frames, hints)
  assert painted.shape == (1, 2, 16, 16, 12)
  frames[0, 1, 8, 8, 0] += 1  # of place 4, 4
  change = np.abs(net.apply(params, frames, hints) - painted).max((0, -1))
  assert change[0].max() == 0  # no frame sees another
  assert change[1, 4, 4] > 0
  assert change[1, 8:].max() == change[1, :, 8:].max() == 0
  hints[0, 0, 15, 15, 2] += 1
  assert np.abs(net.apply(params, frames, hints) - painted)[0, 0].max() > 0
  told = net.init(KEY, frames, hints, np.array([0]))
  told = [net.apply(told, frames, hints, np.array([k])) for k in (0, 1)]
  assert np.abs(told[0] - told[1]).max() > 0


def test_a_small_discriminator_sees_means_of_cells_and_the_lips(tiny):
  video, mask = tiny[2]['video'], np.zeros_like(tiny[2]['lip_mask'])
  mask[:, :, 9:13, 2:6] = 1
  small = make(discriminator_size=8)._shown(video, mask)
  cells = video[:, :, 4:6, 10:12].mean((2, 3))
  np.testing.assert_allclose(small[:, :, 2, 5], cells, atol=1e-6)
  both = make(discriminator_size=8, discriminator_lips=True)._shown(video, mask)
  np.testing.assert_array_equal(both[..., :3], small)
  np.testing.assert_array_equal(both[..., 3:], video[:, :, 7:15, :8])
  np.testing.assert_array_equal(make()._shown(video, mask), video)


def test_weights_start_by_their_fan_in_where_told():
  he = pytest.approx((2 / (9 * 40)) ** 0.5, rel=0.05)
  normal = pytest.approx(nets.STD, rel=0.1)
  for init, std in (('normal', normal), ('he', he)):
    net = nets.Decoder(16, 8, 'up16', 16, init_kind=init)
    params = net.init(KEY, np.zeros((1, 14, 14, 40), np.float32))['params']
    first, *_, last = (p['kernel'] for n, p in params.items() if 'Conv' in n)
    assert first.std() == std
    assert last.std() == normal


@pytest.mark.parametrize('space', [True, False])
def test_what_stands_still_does_so_to_the_ends(space):
  class Double(nets.Decoder):
    @nets.nn.compact
    def __call__(self, x):
      return self._double(x, 5, True, space)

  x = np.random.default_rng(0).normal(size=(1, 1, 4, 4, 3))
  x = np.repeat(x.astype(np.float32), 3, 1)
  ends = {}
  for hold in (True, False):
    y, _ = Double(hold_ends=hold).init_with_output(KEY, x)
    # Odd and even frames have kernels of their own.
    ends[hold] = np.abs(y[:, :2] - y[:, 2:4]).max()
    ends[hold] += np.abs(y[:, -2:] - y[:, 2:4]).max()
  assert ends[True] < 1e-6 < 1e-3 < ends[False]


def test_a_label_changes_every_layer_of_the_decoder():
  net = nets.Decoder(8, 4, 'up16', 4)
  x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
  label = np.array([0, 1])
  run = lambda params, label: net.apply(params, x, True, label, mutable=[
    'batch_stats'
  ])[0]
  params = net.init(KEY, x, True, label)
  tables = [name for name in params['params'] if name.startswith('Embed')]
  assert len(tables) == sum(n.startswith('Norm') for n in params['params'])
  told = run(params, label)
  plain = run({k: {
    n: p for n, p in v.items() if n not in tables
  } for k, v in params.items()}, None)
  for name in tables:
    still = jax.tree.map(jnp.copy, params)
    still['params'][name]['embedding'] *= 0
    assert np.abs(run(still, label) - told).max() > 0
    params['params'][name]['embedding'] *= 0
  np.testing.assert_allclose(run(params, label), plain, atol=1e-6)


def test_other_lengths_are_blended_in_time(tiny):
  method, state, batch = tiny
  inputs = {'image': batch['video'][:, 0], 'label': batch['label']}
  animate = jax.jit(method.animate, static_argnums=3)
  own = np.asarray(animate(state, inputs, KEY, 8))
  longer = animate(state, inputs, KEY, 15)
  np.testing.assert_allclose(longer[:, ::2], own, atol=1e-6)
  middle = (own[:, :-1] + own[:, 1:]) / 2
  np.testing.assert_allclose(longer[:, 1::2], middle, atol=1e-6)


def test_contrast_by_hand():
  a, b = (1.0, 0.0), (0.6, 0.8)
  vectors = jnp.array([a, b, a])
  value, right = identity_encoder.contrast(vectors, jnp.array([3, 3, 5]), 0.5)
  # Cosines over 0.5: a-b 1.2, a-a' 2, b-a' 1.2; pairs: a->b, b->a.
  first = np.log(np.exp(1.2) + np.exp(2.0)) - 1.2
  second = np.log(2 * np.exp(1.2)) - 1.2
  np.testing.assert_allclose(value, (first + second + 0) / 3, rtol=1e-5)
  assert float(right) == pytest.approx(1 / 3)  # b's nearest is the first a


@pytest.mark.parametrize('changes, message', [
  (dict(eid='vgg'), 'model.eid is .* vgg_face, trained, random'),
  (dict(dec_arch='up4'), 'model.dec_arch .* down4, up16'),
  (dict(use_identity=False, use_spatial=False), 'are both off'),
  (dict(eid_size=20), 'eid_size is 20: 2 blocks make a grid of 10, which up16'),
  (dict(num_frames=7), 'num_frames is 7'),
  (dict(discriminator_size=12), 'model.discriminator_size is 12'),
  (dict(n_id_frames=9), 'n_id_frames is 9. Use 1 to 8'),
  (dict(microbatches=2, norm='batch'), 'Use 1, or model.norm=group'),
])
def test_wrong_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_wrong_number_of_frames_is_named():
  with pytest.raises(ValueError, match='Set data.num_frames to 7'):
    make().init(KEY, data.example_batch(16, 1, 8))


def test_features_of_another_grid_are_named():
  method = make(eid_taps=('relu1_1', 'relu2_1'))
  with pytest.raises(ValueError, match='relu1_1 has 12x12 maps, not 6x6'):
    jax.eval_shape(method.init, KEY, data.example_batch(16, 1, 7))


def test_configs_have_their_own_size_and_frames():
  for config in (mug, frame_folders, synthetic):
    stage = config.get_config('fev_gan').fev_gan
    assert stage.data.image_size == 64 and stage.model.num_frames == 32
    assert (stage.data.num_frames, stage.data.frames) == (31, 'even')
  paper = mug.get_config('fev_gan,paper').fev_gan
  assert paper.optim.generator.lr == 2e-5 and paper.model.eid == 'vgg_face'
  assert (paper.data.name, paper.data.split, paper.train.val_split) == (
    'mug/face-256-black', 'subjects_80', 'subjects_20'
  )


@pytest.mark.parametrize(('norm', 'parts'), (('batch', 1), ('group', 4)))
def test_the_profile_splits_no_batch_that_is_normalized_whole(norm, parts):
  stage = mug.get_config('fev_gan,paper').fev_gan.to_dict()
  stage['model']['norm'] = norm
  settled = methods.settle({'profile': '4gb'}, stage, num_devices=2)
  assert stage['data']['batch_size'] == 8
  assert settled['model']['microbatches'] == parts


def test_nets_from_elsewhere_are_asked_for_and_checked(tiny, tmp_path):
  method, state, _ = tiny
  config = {'stages': ('fev_gan',)}
  with pytest.raises(ValueError, match='init_from.identity_encoder is empty'):
    init_from.load(config, method)
  net = jax.tree.map(lambda x: x + 1, state.params['identity_encoder'])
  new = init_from.put(state, {'identity_encoder': net | {'fc6': {}}})
  same = jax.tree.map(np.array_equal, new.params['identity_encoder'], net)
  assert all(jax.tree.leaves(same))
  with pytest.raises(ValueError, match='conv1_1 .*expected .*3, 3, 3, 2'):
    init_from.put(state, {'identity_encoder': {'conv1_1': {}}})
  method = make(eid='vgg_face')
  np.savez(tmp_path / 'w.npz', **{'conv1_1/bias': np.ones(2)})
  config['init_from'] = {'vgg_face': tmp_path / 'w.npz'}
  nets_found = init_from.load(config, method)
  np.testing.assert_array_equal(
    nets_found['identity_encoder']['conv1_1']['bias'], [1, 1]
  )
  assert init_from.load(config, make(eid='random')) == {}


def test_one_command_trains_the_encoder_and_what_needs_it(
  toy_records, tmp_path, capsys
):
  config = frame_folders.get_config('identity_encoder,fev_gan,tiny').to_dict()
  for name in config['stages']:
    config[name]['data'] |= dict(
      name='frame_folders/none-16', split='everything'
    )
    config[name]['train'] |= dict(
      num_steps=2, ckpt_every=2, val_split='everything', val_clips=1
    )
  states = train.train(config, tmp_path / 'run', toy_records, keep=True)
  learned = states['identity_encoder'].params['identity_encoder']
  taken = states['fev_gan'].params['identity_encoder']
  assert jax.tree.all(jax.tree.map(np.array_equal, learned, taken))
  run = runs.load(tmp_path / 'run')
  assert [stage.name for stage in run.stages] == ['fev_gan']
  clip = run.animate(np.zeros((16, 16, 3), np.uint8), 'happy', num_frames=8)
  assert clip.shape == (1, 8, 16, 16, 3)
  result = evaluate.evaluate(run, 'everything', num_clips=1,
                             directory=toy_records)
  assert result['settings']['notes'] == {'eid': 'trained'}
  assert 'eid trained.\n' in score_report.notes(result)
  again = frame_folders.get_config('fev_gan,tiny').to_dict()
  again['init_from'] = {'identity_encoder': str(tmp_path / 'run')}
  method = runs.make_method(again['fev_gan'], run.config['info'], 16)
  found = init_from.load(again, method)['identity_encoder']
  assert jax.tree.all(jax.tree.map(np.array_equal, learned, found))
  # Training that starts from these nets, judged anew.
  again = config | {'stages': ('fev_gan',)}
  again['fev_gan']['train'] |= {
    'num_steps': 1, 'start_from': str(tmp_path / 'run')
  }
  again['fev_gan']['model']['discriminator_lips'] = True
  again['fev_gan']['optim']['generator']['lr'] = 0.0
  new = train.train(again, tmp_path / 'next', toy_records, keep=True)['fev_gan']
  assert 'note: discriminator starts anew: Conv_0 ' in capsys.readouterr().out
  for net in ('generator', 'identity_encoder'):
    expected = states['fev_gan'].inference_params(net)
    for found in (new.params[net], new.inference_params(net)):
      jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert int(new.step) == 1
  again['fev_gan']['model']['es_width'] = 8
  with pytest.raises(ValueError, match='generator have other shapes'):
    train.train(again, tmp_path / 'wrong', toy_records, keep=True)
