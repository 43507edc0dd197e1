"""A model in one file: `hatjax.load('model.hatjax')`, as a run of its own.

The file is a zip: manifest.json; per stage weights.npz (arrays, no pickle) and
one serialized StableHLO program per function of the method, for any number of
faces. None of the methods' code is read: an `Exported` stands for a method
wherever `runs`, `driving` and `sharpening` call one.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from hatjax import intensity, parallel, runs, sharpening, warp
from hatjax import state as state_lib

FORMAT = 1
ENDING = '.hatjax'
INFO = ('labels', 'trained_labels', 'crop', 'background')
# What the programs' callers ask of a method besides its functions.
FACTS = (
  'image_size', 'input_size', 'num_labels', 'strength', 'num_sample_steps',
  'window', 'mode', 'scale',
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Exported:
  """Stands for a method; its functions are those in `programs`.

  Attributes:
    facts: what its manifest entry says.
    programs: {name: jax.export.Exported}.
    strength: of a refinement; only that of the export can be had.
    num_sample_steps: the same.
  """

  facts: dict[str, Any]
  programs: dict[str, jax_export.Exported]
  strength: float = 0.0
  num_sample_steps: int = 0

  def __getattr__(self, name):
    # Only what the class lacks comes here: encode, keypoints, render, ...
    if name in ('facts', 'programs'):
      raise AttributeError(name)
    if name in self.facts:
      return self.facts[name]
    if name in self.programs:
      return getattr(self, f'_{name}')
    raise AttributeError(name)

  def sweep_alpha(
    self, state, label, num_frames, sweep='linear', alpha_max=1.0
  ):
    """Intensities [B, T] for int32 labels [B]; see `intensity.sweep`."""
    row = label if self.num_labels else jnp.zeros_like(label)
    profile = state.model_state['profile']
    return intensity.sweep(sweep, num_frames, alpha_max, profile, row)

  def _call(self, name, state, *args):
    return self.programs[name].call(state.params, *args)

  def _encode(self, state, inputs, rng=None):
    inputs = {k: inputs[k] for k in self.reads if k in inputs}
    return self._call('encode', state, inputs)

  def _decode(self, state, context, chunk, rng=None):
    return self._call('decode', state, context, chunk, _data(rng))

  def _keypoints(self, state, frames):
    return self._call('keypoints', state, frames)

  def _render(self, state, context, points):
    return self._call('render', state, context, points)

  def _sharpen(self, state, frames):
    return self._call('sharpen', state, frames)

  def animate(self, state, inputs, rng, num_frames):
    """Clips [B, T, H, W, 3] in [-1, 1]; see the method that was exported."""
    fixed = self.facts
    if 'encode' in self.programs:
      raise ValueError('Call encode and decode, as runs.Run does.')
    if 'draft' not in self.reads:
      clip = self._call('animate', state, inputs, _data(rng))
      return warp.blend_frames(clip, num_frames)
    mine = (self.strength, self.num_sample_steps)
    if mine != (fixed['strength'], fixed['num_sample_steps']):
      raise ValueError(
        f'This model was exported to refine at {fixed["strength"]} in '
        f'{fixed["num_sample_steps"]} steps. Leave --refine and '
        '--num_sample_steps out (or --refine 0), or use the --workdir.'
      )
    missing = set(self.reads) - set(inputs)
    if missing or num_frames != fixed['num_frames']:
      wanted = ', '.join(sorted(missing)) or f'{fixed["num_frames"]} frames'
      raise ValueError(f'This exported model needs: {wanted}.')
    inputs = {k: inputs[k] for k in (*self.reads, 'noise')}
    return self._call('animate', state, inputs, _data(rng))


def _data(rng):
  return jax.random.key_data(jax.random.key(0) if rng is None else rng)


def write(path, members):
  """Writes {name: bytes} as one file, whole or not at all."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(temporary, 'w') as file:
      for name, data in members.items():
        # One date for all: the same run gives the same bytes.
        file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data,
                      zipfile.ZIP_DEFLATED)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def load(path):
  """Opens an exported model.

  Returns:
    A `runs.Run`, or where it sharpens a `sharpening.Sharpened`.

  Raises:
    ValueError: no such file, damaged, or of another format or JAX.
  """
  try:
    with zipfile.ZipFile(path) as file:
      manifest = json.loads(file.read('manifest.json'))
      members = {name: file.read(name) for name in manifest['sha256']}
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} is not an exported model ({error}). Make one: python -m '
      'hatjax.convert export --workdir <run> --out model.hatjax'
    ) from error
  if manifest['format'] != FORMAT:
    raise ValueError(
      f'{path} has format {manifest["format"]}, this hatjax reads {FORMAT}. '
      'Export it again.'
    )
  for name, digest in manifest['sha256'].items():
    if hashlib.sha256(members[name]).hexdigest() != digest:
      raise ValueError(f'{path} is damaged: {name} has another checksum.')
  for entry in manifest['stages']:  # it goes into the videos' metadata
    if not re.fullmatch('([0-9a-f]{64})?', str(entry.get('checkpoint', ''))):
      raise ValueError(
        f'{path} is damaged: a checkpoint in its manifest is no SHA-256. '
        'Export it again.'
      )
  parallel.start_process()
  return _run(manifest, members)


def _run(manifest, members):
  stages, config = [], {'info': manifest['info']}
  for entry in manifest['stages']:
    name = entry['name']
    with np.load(io.BytesIO(members[f'{name}/weights.npz'])) as file:
      arrays = {key: jax.device_put(file[key]) for key in file.files}
    profile = {
      key.removeprefix('profile/'): arrays.pop(key)
      for key in list(arrays) if key.startswith('profile/')
    }
    programs = {
      member.partition('/')[2].removesuffix('.stablehlo'):
        jax_export.deserialize(bytearray(data))
      for member, data in members.items()
      if member.startswith(f'{name}/') and member.endswith('.stablehlo')
    }
    method = Exported(
      facts={**entry, 'reads': tuple(entry['reads'])}, programs=programs,
      strength=entry.get('strength', 0.0),
      num_sample_steps=entry.get('num_sample_steps', 0),
    )
    state = state_lib.TrainState(
      step=manifest['step'], params=arrays, opt_state={},
      model_state={'profile': profile}, ema={},
    )
    config[name] = {'data': {'num_frames': entry['num_frames']}}
    stages.append(runs.Stage(name, method, state))
  config['stages'] = [stage.name for stage in stages]
  if 'sharpen' not in stages[-1].method.programs:
    return runs.Run(config, stages)
  run = runs.Run(config, stages[:-1]) if stages[:-1] else None
  return sharpening.Sharpened(run, stages[-1], config)
