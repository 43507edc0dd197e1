"""The papers' ablations: which variants there are, and how each is trained.

Every variant is a run of its own, trained by the ordinary command in a process
of its own: what is done is skipped, what was broken off is resumed.
"""

import pathlib
import subprocess
import sys

from hatjax import workdir

# Method -> variant -> (method trained, settings). The first variant is what the
# others are compared with.
VARIANTS = {
  'hat_cgan': {
    'base': ('hat_cgan', {}),
    'resnet_6': ('hat_cgan', {'model.net': 'resnet_6'}),
    'resnet_9': ('hat_cgan', {'model.net': 'resnet_9'}),
    'affine_latent': ('hat_cgan', {'model.affine': 'latent'}),
    'affine_spatial': ('hat_cgan', {'model.affine': 'spatial'}),
    'no_lip_patch': ('hat_cgan', {'model.lambda_patch': 0.0}),
    'least_squares': ('hat_cgan', {'model.gan_loss': 'least_squares'}),
    'diff': ('video_diffusion', {}),
  },
  # Table 3 of the paper.
  'fev_gan': {
    'base': ('fev_gan', {}),
    'no_spatial_encoder': ('fev_gan', {'model.use_spatial': False}),
    'no_identity_encoder': ('fev_gan', {'model.use_identity': False}),
  },
}
ENCODER = 'identity_encoder'  # FEV-GAN's, where VGG-Face is not at hand
JUDGE = 'judge'  # the face_classifier that names the expressions made


def folders(config, root):
  """{variant: workdir}."""
  root = pathlib.Path(root)
  return {name: root / name for name in VARIANTS[_parse(config)[1]]}


def default_root(config):
  """Folder of the runs where none is given."""
  return pathlib.Path('runs', f'ablation_{_parse(config)[1]}')


def _parse(config):
  """(config's file, method, whether it trains its encoder, other words)."""
  path, _, words = config.partition(':')
  words = [w.strip() for w in words.split(',') if w.strip()]
  default = 'fev_gan' if ENCODER in words else 'hat_cgan'
  method = next((w for w in words if w in VARIANTS), default)
  rest = [w for w in words if w not in (method, ENCODER)]
  return path, method, ENCODER in words, rest


def commands(config, root, num_steps, data_dir=None):
  """What is run, in order.

  Args:
    config: such as 'configs/synthetic.py' or 'configs/synthetic.py:32'; with
      'identity_encoder,fev_gan' those of FEV-GAN, which share one encoder.
    root: folder of the runs.
    num_steps: of each variant.
    data_dir: where the records live.

  Returns:
    {name: arguments of hatjax.train}; the judge comes first.
  """
  path, ablated, encodes, words = _parse(config)
  root, found = pathlib.Path(root), {}
  variants = {JUDGE: ('face_classifier', {})} | VARIANTS[ablated]
  for name, (method, settings) in variants.items():
    methods = [ENCODER, method] if encodes and name == 'base' else [method]
    args = [
      '--config', f'{path}:{",".join([*methods, *words])}',
      '--workdir', str(root / name),
    ]
    if name != JUDGE:
      args.append(f'--config.{method}.train.num_steps={num_steps}')
    if method == 'video_diffusion':
      args.append(f'--config.init_from.hat_cgan={root / "base"}')
    if encodes and method == 'fev_gan' and name != 'base':
      args.append(f'--config.init_from.{ENCODER}={root / "base"}')
    args += [
      f'--config.{method}.{key}={value}' for key, value in settings.items()
    ]
    found[name] = args + (['--data_dir', data_dir] if data_dir else [])
  return found


def train(config, root, num_steps, data_dir=None):
  """Trains all variants, or what is left of them.

  Raises:
    ValueError: one failed or was stopped; names it and what to type.
  """
  root = pathlib.Path(root)
  for name, args in commands(config, root, num_steps, data_dir).items():
    print(f'\n{name}: python -m hatjax.train {" ".join(args)}', flush=True)
    done = subprocess.run([sys.executable, '-m', 'hatjax.train', *args])
    if done.returncode:
      raise ValueError(
        f'Training {name} ended with code {done.returncode} (see above). Run '
        'the same command again to go on.'
      )
    _check_done(name, root / name)


def _check_done(name, folder):
  """One that was stopped has saved and ends well, but must not be compared."""
  config = workdir.read_config(folder)
  for stage in config['stages']:
    step = max(workdir.list_steps(folder / stage), default=0)
    last = config[stage]['train']['num_steps']
    if step < last:
      raise ValueError(
        f'Training {name} was stopped at step {step} of {last} of {stage}. Run '
        'the same command again to go on.'
      )
