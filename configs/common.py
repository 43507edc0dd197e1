"""What every data set's config does with its argument."""

import importlib
import pathlib

import ml_collections

# One file in configs/methods is one method; nothing else needs to know it.
ALIASES = {'hat_cgan_diff': ('hat_cgan', 'video_diffusion')}  # both stages
METHODS = {
  path.stem: importlib.import_module(f'configs.methods.{path.stem}')
  for path in sorted((pathlib.Path(__file__).parent / 'methods').glob('*.py'))
  if path.stem != '__init__'
}

PROFILES = ('4gb',)


def parse(arg, default_size, data, default_stages=('hat_cgan',)):
  """Builds a config from '<methods>,<preset>,<image size>', in any order.

  Args:
    arg: such as 'hat_cgan,reference,64,4gb'; each part may be left out. Several
      methods are the stages of one run, in that order; hat_cgan_diff stands
      for hat_cgan,video_diffusion. A preset that one of them lacks becomes
      its nearest: paper_1x1 is hat_cgan's paper.
    default_size: image side when none is given.
    data: (preset, image_size) -> the data set's part of the data block.
    default_stages: methods when none is named.

  Returns:
    ConfigDict with seed, stages, how to run them, and one block per stage; and
    init_from, {method: folder of a run}, where the first stage refines drafts
    and another run may make them.
  """
  words = [w.strip() for w in arg.split(',') if w.strip()]
  words = [w for word in words for w in ALIASES.get(word, (word,))]
  stages = tuple(w for w in words if w in METHODS) or default_stages
  presets = {p for m in METHODS.values() for p in m.PRESETS}
  named = [w for w in words if w in presets]
  sizes = [int(w) for w in words if w.isdigit()]
  known = (*stages, *named, *PROFILES)
  left = [w for w in words if w not in known and not w.isdigit()]
  if left or len(named) > 1 or len(sizes) > 1:
    raise ValueError(
      f'Config argument {arg!r}: {(left or words)[0]!r} is not understood. '
      f'Methods: {", ".join([*METHODS, *ALIASES])}. '
      f'Presets: {", ".join(sorted(presets))}. '
      f'Profiles: {", ".join(PROFILES)}. A number is the image side.'
    )
  preset = named[0] if named else 'default'
  default_size = getattr(METHODS[stages[-1]], 'IMAGE_SIZE', default_size)
  size = sizes[0] if sizes else (16 if preset == 'tiny' else default_size)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.parallel = 'jit'         # over all devices; or pmap
  # '4gb': bfloat16, recomputation, one clip at a time: for small cards.
  config.profile = next((w for w in words if w in PROFILES), '')
  config.deterministic = False    # two runs on one GPU equal bit for bit
  config.compiler_options = 'auto'  # or none, or 'auto,name=value,...'
  # Of convolutions, in training: plain, aligned or rewritten; '': by the
  # platform. See `python -m hatjax.benchmark --lowering`.
  config.lowering = ''
  config.stages = stages
  if stages[0] == 'video_diffusion':
    config.init_from = dict(hat_cgan='')
  names = [n for s in stages for n in getattr(METHODS[s], 'INIT_FROM', ())]
  if names:
    config.init_from = dict.fromkeys(names, '')
  for name in stages:
    known = METHODS[name].PRESETS
    nearest = preset if preset in known else preset.split('_')[0]
    if any(preset in METHODS[s].PRESETS for s in stages):  # another stage's
      nearest = nearest if nearest in known else 'default'
    config[name] = METHODS[name].get_stage(nearest, size, data(preset, size))
  if 'video_diffusion' in stages[1:] and preset in ('default', 'tiny'):
    config.video_diffusion.model.update(METHODS['video_diffusion'].PAIRED)
  return config
