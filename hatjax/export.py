"""A run as one file that needs none of the methods' code; see `exported`.

Every function that animating calls (`encode`, `decode`, ...) is traced by
`jax.export` for any number of faces and, where the method allows it, frames,
for CPU, CUDA and TPU at once, each with the convolutions that suit it.
"""

import hashlib
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

import hatjax
from hatjax import exported, runs
from hatjax import state as state_lib
from hatjax.nets import lowerings

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export(folder, path, step=None):
  """Writes a run as one file.

  Args:
    folder: the workdir.
    path: of the file, such as model.hatjax.
    step: which checkpoint; default the latest.

  Returns:
    The manifest, a dict.

  Raises:
    ValueError: no run there, or one that makes no videos.
    OSError: the file cannot be written.
  """
  run = runs.load(folder, step)
  stages = list(run.stages)
  if hasattr(run, 'sharpen') and run.stage not in stages:
    stages.append(run.stage)
  info = run.config['info']
  manifest = {
    'format': exported.FORMAT, 'stages': [], 'platforms': list(PLATFORMS),
    'info': {k: info[k] for k in exported.INFO if k in info},
    'step': run.step,
    'versions': {'hatjax': hatjax.__version__, 'jax': jax.__version__,
                 'numpy': np.__version__},
  }
  members = {}
  for stage in stages:
    block = run.config.get(stage.name, {}).get('data', {})
    entry, weights, programs = _stage(stage, block.get('num_frames', 0))
    manifest['stages'].append(entry)
    members[f'{stage.name}/weights.npz'] = _npz(weights)
    for name, program in programs.items():
      members[f'{stage.name}/{name}.stablehlo'] = bytes(program.serialize())
  manifest['sha256'] = {
    name: hashlib.sha256(data).hexdigest() for name, data in members.items()
  }
  members['manifest.json'] = json.dumps(manifest, indent=2).encode()
  exported.write(pathlib.Path(path), members)
  return manifest


def _npz(weights):
  data = io.BytesIO()
  np.savez(data, **weights)  # Arrays alone: nothing in it is ever executed.
  return data.getvalue()


def _stage(stage, num_frames):
  """(manifest entry, {name: weights}, {name: Exported}) of a stage."""
  method, state = stage.method, jax.device_get(stage.state.frozen())
  own = getattr(method, 'window', 0) or getattr(method, 'num_frames', 0)
  facts = {
    name: getattr(method, name)
    for name in exported.FACTS if hasattr(method, name)
  } | {
    'reads': list(method.reads), 'num_frames': own or num_frames,
    'checkpoint': state_lib.checksum(state.params),
  }
  kept = {'params': state.params, 'model_state': state.model_state}
  leaves, tree = jax.tree.flatten_with_path(kept)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in leaves
  }

  def whole(weights):
    # What no function reads is not in the weights, nor in the program.
    values = [weights.get(name, value) for name, value in arrays.items()]
    return state.replace(**jax.tree.unflatten(tree, values))

  shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in (
    arrays.items()
  )}
  functions, used = _functions(method, facts, state), set()
  order = sorted(shapes)
  for function, args in functions.values():
    call = _lowered('plain', function, whole)
    jaxpr = jax.make_jaxpr(call)(shapes, *args).jaxpr
    read = {id(x) for step in jaxpr.eqns for x in step.invars}
    used |= {k for k, x in zip(order, jaxpr.invars) if id(x) in read}
  shapes = {name: shapes[name] for name in used}
  programs = {
    name: _trace(function, whole, shapes, args)
    for name, (function, args) in functions.items()
  }
  weights = {name: arrays[name] for name in used}
  profile = state.model_state.get('profile', {})  # of intensity over time
  weights |= {f'profile/{k}': np.asarray(v) for k, v in profile.items()}
  return {'name': stage.name, **facts}, weights, programs


def _lowered(how, function, whole):
  """(weights, ...) -> function(state, ...), lowered in one way."""

  def call(weights, *args):
    with lowerings.lowering(how):
      return function(whole(weights), *args)

  return call


def _trace(function, whole, shapes, args):
  """Exported of function(state, *args), the state from flat weights."""

  def program(weights, *args):
    return jax.lax.platform_dependent(
      weights, *args, cpu=_lowered('rewritten', function, whole),
      default=_lowered('aligned', function, whole),
    )

  make = jax_export.export(jax.jit(program), platforms=PLATFORMS)
  return make(shapes, *args)


def _functions(method, facts, state):
  """{name: (function of (state, ...), shapes of the rest)} that a run calls.

  Random keys travel as their data, uint32 [2].
  """
  b, t, n = jax_export.symbolic_shape('b, t, n')
  size, key = method.image_size, _shape((2,), jnp.uint32)
  inputs = {'image': _shape((b, size, size, 3))}
  if 'label' in method.reads:
    inputs['label'] = _shape((b,), jnp.int32)
  if hasattr(method, 'sharpen'):
    side = method.input_size
    return {'sharpen': (method.sharpen, (_shape((n, side, side, 3)),))}
  if not hasattr(method, 'encode'):
    frames = facts['num_frames']
    if 'draft' in method.reads:
      if 'image' not in method.reads:
        del inputs['image']
      clip = _shape((b, frames, size, size, 3))
      inputs |= {'draft': clip, 'noise': clip}

    def animate(state, inputs, key):
      key = jax.random.wrap_key_data(key)
      return method.animate(state, inputs, key, frames)

    return {'animate': (animate, (inputs, key))}
  with lowerings.lowering('plain'):
    context = jax.eval_shape(method.encode, state, inputs)
  functions = {'encode': (method.encode, (inputs,))}
  if 'driving' not in method.reads:

    def decode(state, context, chunk, key):
      return method.decode(
        state, context, chunk, jax.random.wrap_key_data(key)
      )

    return functions | {'decode': (decode, (context, _shape((b, t)), key))}
  frames = _shape((n, size, size, 3))
  with lowerings.lowering('plain'):
    points = jax.eval_shape(method.keypoints, state, frames)
  points = {k: _shape((b, t, *x.shape[1:])) for k, x in points.items()}
  return functions | {
    'keypoints': (method.keypoints, (frames,)),
    'render': (method.render, (context, points)),
  }


def _shape(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)
