"""The papers' ablations: which variants there are, and how each is trained.

Every variant is a run of its own, trained by the ordinary command in a process
of its own: what is done is skipped, what was broken off is resumed.
"""

import pathlib
import subprocess
import sys

# Name -> (method words of the config's argument, settings). The first is what
# the others are compared with; `{base}` is its workdir.
VARIANTS = {
  'base': ('hat_cgan', {}),
  'resnet_6': ('hat_cgan', {'model.net': 'resnet_6'}),
  'resnet_9': ('hat_cgan', {'model.net': 'resnet_9'}),
  'affine_latent': ('hat_cgan', {'model.affine': 'latent'}),
  'affine_spatial': ('hat_cgan', {'model.affine': 'spatial'}),
  'no_lip_patch': (
    'hat_cgan', {'model.lambda_patch': 0.0}
  ),
  'least_squares': ('hat_cgan', {'model.gan_loss': 'least_squares'}),
  'diff': ('video_diffusion', {}),
}
JUDGE = 'judge'  # the face_classifier that names the expressions made


def folders(root):
  """{variant: workdir}."""
  return {name: pathlib.Path(root) / name for name in VARIANTS}


def commands(config, root, num_steps, data_dir=None):
  """What is run, in order.

  Args:
    config: such as 'configs/synthetic.py' or 'configs/synthetic.py:32'.
    root: folder of the runs.
    num_steps: of each variant.
    data_dir: where the records live.

  Returns:
    {name: arguments of hatjax.train}; the judge comes first.
  """
  path, _, words = config.partition(':')
  root, found = pathlib.Path(root), {}
  variants = {JUDGE: ('face_classifier', {})} | VARIANTS
  for name, (method, settings) in variants.items():
    argument = ','.join(filter(None, [method, words]))
    args = [
      '--config', f'{path}:{argument}', '--workdir', str(root / name),
    ]
    if name != JUDGE:
      args.append(f'--config.{method}.train.num_steps={num_steps}')
    if method == 'video_diffusion':
      args.append(f'--config.init_from.hat_cgan={root / "base"}')
    args += [
      f'--config.{method}.{key}={value}' for key, value in settings.items()
    ]
    found[name] = args + (['--data_dir', data_dir] if data_dir else [])
  return found


def train(config, root, num_steps, data_dir=None):
  """Trains all variants, or what is left of them.

  Raises:
    ValueError: one failed; names it and what to type.
  """
  for name, args in commands(config, root, num_steps, data_dir).items():
    print(f'\n{name}: python -m hatjax.train {" ".join(args)}', flush=True)
    done = subprocess.run([sys.executable, '-m', 'hatjax.train', *args])
    if done.returncode:
      raise ValueError(
        f'Training {name} ended with code {done.returncode} (see above). Run '
        'the same command again to go on.'
      )
