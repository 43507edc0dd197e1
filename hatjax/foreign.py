"""Other projects' checkpoints -> workdirs that generate and evaluate accept.

Read are the tensors alone (see `torch_files`); nothing in a file is executed.
Layout: PyTorch's OIHW becomes HWIO; a transposed convolution's IOHW as well.
"""

import collections
import json
import pathlib
import runpy

import jax
import numpy as np

from hatjax import config_flag, runs, torch_files, workdir

Found = collections.namedtuple('Found', 'method preset model params stats')


def convert(kind, path, folder, image_size=0, num_frames=10):
  """Writes a workdir.

  Args:
    kind: one of KINDS.
    path: the checkpoint.
    folder: the workdir, which must not be a run yet.
    image_size: side of its pictures; 0 for what the project used.
    num_frames: of its videos, for video_diffusion.

  Returns:
    What the checkpoint is, in a line.

  Raises:
    ValueError: another project's file, or settings that hatjax lacks.
  """
  folder = pathlib.Path(folder)
  if (folder / 'config.json').exists():
    raise ValueError(f'{folder} holds a run already. Choose another --workdir.')
  read, config, size, crop = KINDS[kind]
  try:
    found = read(torch_files.read(path))
  except (KeyError, IndexError) as error:
    raise ValueError(f'{path} is not of {kind}: it lacks {error}.') from (
      error
    )
  size = found.model.pop('image_size', 0) or image_size or size
  file = config_flag.resolve(f'configs/{config}.py')
  make = runpy.run_path(file)['get_config']
  full = json.loads(
    make(f'{found.method},{found.preset},{size}').to_json_best_effort()
  )
  stage = full[found.method]
  stage['model'] |= {**found.model, 'image_size': size}
  if kind == 'video_diffusion':
    stage['data']['num_frames'] = num_frames
  info = {'labels': [], 'trained_labels': [], 'crop': crop, 'fingerprint': ''}
  method = runs.make_method(stage, info, size)
  state = jax.jit(method.init)(jax.random.key(0), runs.example_batch(stage))
  state = _fill(state, found, path)
  with workdir.open_workdir(folder, {**full, 'info': info}):
    disk = workdir.Run(folder / found.method)
    disk.save(0, state)
    disk.close()
  count = sum(x.size for x in jax.tree.leaves(found.params))
  return f'{found.method}, {size}x{size}, {count / 1e6:.1f} M parameters'


def _fill(state, found, path):
  """The state with the found parameters and statistics, shapes compared."""
  params, stats = dict(state.params), state.model_state
  for net, tree in found.params.items():
    params[net] = _matching(tree, params[net], f'{path}: {net}')
  if found.stats:
    kept = dict(stats['batch_stats'])
    for net, tree in found.stats.items():
      kept[net] = _matching(tree, kept[net], f'{path}: {net}')
    stats = {**stats, 'batch_stats': kept}
  ema = {net: jax.tree.map(np.copy, params[net]) for net in state.ema}
  return state.replace(params=params, model_state=stats, ema=ema)


def _matching(tree, wanted, where):
  shapes = lambda tree: {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.shape(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  ours, theirs = shapes(wanted), shapes(tree)
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise ValueError(
        f'{where}/{name} is {theirs.get(name, "absent")}, expected '
        f'{ours.get(name, "absent")}: trained with settings that hatjax does '
        'not know.'
      )
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def _conv(arrays, name, transposed=False):
  """{kernel, bias} of a 2-D convolution (a 3-D one with one time tap)."""
  weight = arrays[f'{name}.weight']
  if weight.ndim == 5:
    weight = weight[:, :, 0]
  weight = weight.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0))
  bias = arrays.get(f'{name}.bias', np.zeros(weight.shape[3], np.float32))
  return {'kernel': weight, 'bias': bias}


def _count(arrays, pattern):
  """How many of 'a.{}.b' are there, from 0 on."""
  n = 0
  while pattern.format(n) in arrays:
    n += 1
  return n


# -- first-order model --------------------------------------------------------


def _normed(arrays, name, conv='conv', norm='norm'):
  """A convolution and its batch norm: (parameters, statistics)."""
  read = lambda key: arrays[f'{name}.{norm}.{key}']
  params = {'BatchNorm_0': {'scale': read('weight'), 'bias': read('bias')}}
  stats = {
    'BatchNorm_0': {'mean': read('running_mean'), 'var': read('running_var')}
  }
  return (
    {conv: _conv(arrays, f'{name}.{conv}'), norm: params}, {norm: stats}
  )


def _hourglass(arrays, name):
  """(parameters, statistics, halvings, width, widest)."""
  down = name + '.encoder.down_blocks.{}.conv.weight'
  count, params, stats = _count(arrays, down), {}, {}
  for i in range(count):
    params[f'down_{i}'], stats[f'down_{i}'] = _normed(
      arrays, f'{name}.encoder.down_blocks.{i}'
    )
    up = f'up_{count - 1 - i}'
    params[up], stats[up] = _normed(
      arrays, f'{name}.decoder.up_blocks.{i}'
    )
  widths = [len(arrays[down.format(i)]) for i in range(count)]
  return params, stats, count, widths[0] // 2, max(widths)


def _scale(arrays, name):
  """s of the anti-aliased shrinking, from its kernel's side."""
  weight = arrays.get(f'{name}.down.weight')
  return 1 if weight is None else (weight.shape[-1] - 1) // 4 + 1


def read_fomm(arrays):
  """The first-order motion model (vox-cpk.pth.tar, vox-adv-cpk.pth.tar)."""
  generator, stats, model = _fomm_generator(arrays)
  features, kept, blocks, width, widest = _hourglass(
    arrays, 'kp_detector.predictor'
  )
  detector = {'features': features, 'maps': _conv(arrays, 'kp_detector.kp')}
  jacobian = 'kp_detector.jacobian.weight' in arrays
  if jacobian:
    detector['jacobians'] = _conv(arrays, 'kp_detector.jacobian')
  dense = 'generator.dense_motion_network'
  hourglass, moved, motion_blocks, motion_width, most = _hourglass(
    arrays, f'{dense}.hourglass'
  )
  masks = _conv(arrays, f'{dense}.mask')
  if f'{dense}.occlusion.weight' in arrays:
    hidden = _conv(arrays, f'{dense}.occlusion')
  else:  # All is visible.
    hidden = {
      'kernel': np.zeros_like(masks['kernel'][..., :1]), 'bias': np.full(1, 30.)
    }
  masks = {k: np.concatenate([masks[k], hidden[k]], -1) for k in masks}
  model |= dict(
    num_keypoints=detector['maps']['kernel'].shape[-1], jacobian=jacobian,
    keypoint_blocks=blocks, keypoint_width=width, motion_blocks=motion_blocks,
    motion_width=motion_width, max_width=max(widest, most),
    keypoint_scale=_scale(arrays, 'kp_detector'),
    motion_scale=_scale(arrays, dense), perceptual='pyramid',
  )
  return Found(
    'motion_transfer', 'reference', model,
    {
      'keypoint_detector': detector, 'generator': generator,
      'dense_motion': {'hourglass': hourglass, 'masks': masks},
    },
    {
      'keypoint_detector': {'features': kept}, 'generator': stats,
      'dense_motion': {'hourglass': moved},
    },
  )


def _fomm_generator(arrays):
  """(parameters, statistics, settings)."""
  params, stats = {}, {}
  params['first'], stats['first'] = _normed(arrays, 'generator.first')
  halvings = _count(arrays, 'generator.down_blocks.{}.conv.weight')
  for i in range(halvings):
    for part in ('down', 'up'):
      ours, theirs = f'{part}_{i}', f'{part}_blocks'
      params[ours], stats[ours] = _normed(arrays, f'generator.{theirs}.{i}')
  residual = _count(arrays, 'generator.bottleneck.r{}.conv1.weight')
  for i in range(residual):
    block, kept = {}, {}
    for n in (1, 2):
      one, statistics = _normed(
        arrays, f'generator.bottleneck.r{i}', f'conv{n}', f'norm{n}'
      )
      block |= {f'conv_{n}': one[f'conv{n}'], f'norm_{n}': one[f'norm{n}']}
      kept[f'norm_{n}'] = statistics[f'norm{n}']
    params[f'residual_{i}'], stats[f'residual_{i}'] = block, kept
  params['last'] = _conv(arrays, 'generator.final')
  width = params['first']['conv']['kernel'].shape[-1]
  return params, stats, dict(
    width=width, num_down=halvings, num_residual=residual, norm='batch'
  )


# -- AffineGAN ----------------------------------------------------------------


def read_affinegan(arrays):
  """AffineGAN's generator (latest_net_G.pth): U-Net or ResNet."""
  arrays = {k.removeprefix('module.'): v for k, v in arrays.items()}
  if any(k.endswith('running_mean') for k in arrays):
    raise ValueError('AffineGAN with batch norm is not known to hatjax.')
  read = _affine_unet if 'model.down_base.0.weight' in arrays else (
    _affine_resnet
  )
  params, model = read(arrays)
  model |= dict(head='direct', affine='latent', num_labels=0)
  return Found('hat_cgan', 'reference', model, {'generator': params}, {})


def _affine_unet(arrays):
  level = lambda n: 'model' + '.sub' * n
  depth = 1
  while f'{level(depth)}.down_base.1.weight' in arrays:
    depth += 1
  params = {'base_encoder': {}, 'residual_encoder': {}, 'decoder': {}}
  for n in range(depth):
    at = 1 if n else 0
    for ours, theirs in (
      ('base_encoder', 'down_base'), ('residual_encoder', 'down_res')
    ):
      params[ours][f'Conv_{n}'] = _conv(arrays, f'{level(n)}.{theirs}.{at}')
    params['decoder'][f'Conv_{depth - 1 - n}'] = _conv(
      arrays, f'{level(n)}.up_all.1', transposed=True
    )
  width = len(arrays['model.down_base.0.weight'])
  size = 2**depth
  return params, dict(net=f'unet_{size}', width=width, image_size=size)


def _affine_resnet(arrays):
  blocks = 0
  while f'down_base.{10 + blocks}.conv_block.1.weight' in arrays:
    blocks += 1
  # After the pads, norms and activations, and the dropout if there is one.
  second = 6 if 'down_base.10.conv_block.6.weight' in arrays else 5
  names = ['1', '4', '7']
  for n in range(blocks):
    names += [f'{10 + n}.conv_block.{i}' for i in (1, second)]
  params = {
    ours: {
      f'Conv_{i}': _conv(arrays, f'{theirs}.{name}')
      for i, name in enumerate(names)
    } for ours, theirs in (
      ('base_encoder', 'down_base'), ('residual_encoder', 'down_res')
    )
  }
  params['decoder'] = {
    'Conv_0': _conv(arrays, 'up_all.0', transposed=True),
    'Conv_1': _conv(arrays, 'up_all.3', transposed=True),
    'Conv_2': _conv(arrays, 'up_all.7'),
  }
  width = len(arrays['down_base.1.weight'])
  return params, dict(net=f'resnet_{blocks}', width=width)


# -- video diffusion ----------------------------------------------------------


def read_video_diffusion(arrays):
  """video-diffusion-pytorch: a Trainer's model-N.pt, or a plain state dict.

  The averaged weights are taken where both are there.
  """
  ends = [k for k in arrays if k.endswith('init_conv.weight')]
  if not ends:
    raise KeyError('init_conv.weight')
  prefix = min(ends, key=lambda k: not k.startswith('ema')).removesuffix(
    'init_conv.weight'
  )
  steps = arrays.get(f'{prefix.removesuffix("denoise_fn.")}betas')
  arrays = {
    k.removeprefix(prefix): v for k, v in arrays.items()
    if k.startswith(prefix)
  }
  if 'null_cond_emb' in arrays:
    raise ValueError('A model with text conditions is not known to hatjax.')
  return _unet3d(arrays, 1000 if steps is None else len(steps))


def _unet3d(arrays, steps):
  levels = _count(arrays, 'downs.{}.0.block1.proj.weight')
  bias = arrays['time_rel_pos_bias.relative_attention_bias.weight']
  heads = bias.shape[1]
  attend = lambda name, inner, turn: _attention(
    arrays, name, inner, heads, turn
  )
  in_time = lambda name: {'Heads_0': attend(name, 'fn.fn.fn', True)}
  params = {
    'Dense_0': _dense(arrays, 'time_mlp.1'),
    'Dense_1': _dense(arrays, 'time_mlp.3'), 'frame_bias': bias,
    'conv_in': {'Conv_0': _conv(arrays, 'init_conv')},
    'attention_in': in_time('init_temporal_attn'),
    'block_out': _block(arrays, 'final_conv.0'),
    'conv_out': _dense(arrays, 'final_conv.1'),
    'middle': {
      'ResBlock_0': _block(arrays, 'mid_block1'),
      'ResBlock_1': _block(arrays, 'mid_block2'),
      'SpatialAttention_0': {
        'Heads_0': attend('mid_spatial_attn', 'fn.fn.fn', False)
      },
      'TemporalAttention_0': in_time('mid_temporal_attn'),
    },
  }
  for i in range(levels):
    for ours, theirs in (
      (f'down_{i}', f'downs.{i}'), (f'up_{i}', f'ups.{levels - 1 - i}')
    ):
      params[ours] = {
        'ResBlock_0': _block(arrays, f'{theirs}.0'),
        'ResBlock_1': _block(arrays, f'{theirs}.1'),
        'SpatialAttention_0': {
          'Heads_0': attend(f'{theirs}.2', 'fn.fn', False)
        },
        'TemporalAttention_0': in_time(f'{theirs}.3'),
      }
    if i < levels - 1:
      params[f'halve_{i}'] = {'Conv_0': _conv(arrays, f'downs.{i}.4')}
    if i:
      name = f'ups.{levels - 1 - i}.4'
      params[f'double_{i}'] = {'Conv_0': _conv(arrays, name, True)}
  dim = arrays['time_mlp.1.weight'].shape[1]
  width = lambda i: len(arrays[f'downs.{i}.0.block1.proj.weight'])
  projection = arrays['init_temporal_attn.fn.fn.fn.to_qkv.weight']
  model = dict(
    dim=dim, dim_mults=tuple(width(i) // dim for i in range(levels)),
    heads=heads, head_dim=len(projection) // (3 * heads), patch=1,
    norm='rms' if 'downs.0.0.block1.norm.gamma' in arrays else 'group',
    num_noise_steps=steps, num_sample_steps=steps, mode='noise',
  )
  return Found(
    'video_diffusion', 'reference', model, {'denoiser': params}, {}
  )


def _dense(arrays, name):
  """{kernel, bias} of a linear layer or a 1x1x1 convolution."""
  weight = arrays[f'{name}.weight']
  weight = weight.reshape(weight.shape[:2]).T
  return {'kernel': weight, 'bias': arrays[f'{name}.bias']}


def _block(arrays, name):
  """A residual block; its linear layers are the condition's, the skip's."""
  params = {}
  for i in (0, 1):
    params[f'Conv_{i}'] = {'Conv_0': _conv(arrays, f'{name}.block{i + 1}.proj')}
    norm = f'{name}.block{i + 1}.norm'
    if f'{norm}.gamma' in arrays:
      params[f'Norm_{i}'] = {'scale': arrays[f'{norm}.gamma'].ravel()}
    else:
      params[f'Norm_{i}'] = {
        'scale': arrays[f'{norm}.weight'], 'bias': arrays[f'{norm}.bias']
      }
  there = [n for n in ('mlp.1', 'res_conv') if f'{name}.{n}.weight' in arrays]
  for i, part in enumerate(there):
    params[f'Dense_{i}'] = _dense(arrays, f'{name}.{part}')
  return params


def _attention(arrays, name, inner, heads, turn):
  """An attention's projections and norm.

  `turn`: it has rotary positions. Released pairs are neighbours (2 i, 2 i + 1),
  ours (i, i + D / 2): the columns of q and k change places.
  """
  weight = arrays[f'{name}.{inner}.to_qkv.weight']
  channels = weight.shape[1]
  kernel = weight.reshape(3, heads, -1, channels)
  if turn:
    pairs = np.concatenate([kernel[:2, :, 0::2], kernel[:2, :, 1::2]], 2)
    kernel = np.concatenate([pairs, kernel[2:]])
  out = arrays[f'{name}.{inner}.to_out.weight']
  params = {
    'qkv': kernel.reshape(-1, channels).T,
    'out': out.reshape(out.shape[:2]).T,
    'LayerNorm_0': {'scale': arrays[f'{name}.fn.norm.gamma'].ravel()},
  }
  if f'{name}.{inner}.to_out.bias' in arrays:
    params['bias'] = arrays[f'{name}.{inner}.to_out.bias']
  return params


# Kind -> (reader, config, side where the file does not say, how it crops).
KINDS = {
  'fomm': (read_fomm, 'voxceleb', 256, 'given'),
  'affinegan': (read_affinegan, 'frame_folders', 128, 'none'),
  'video_diffusion': (read_video_diffusion, 'frame_folders', 64, 'none'),
}
