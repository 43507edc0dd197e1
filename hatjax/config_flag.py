"""The --config flag that commands share: files, arguments, overrides."""

import importlib
import pathlib
import runpy
import sys

from absl import app, flags
from ml_collections import config_flags


def define():
  """Defines --config; its value is a ConfigDict."""
  return config_flags.DEFINE_config_file(
    'config', None,
    'Which data and methods, e.g. configs/ck_plus.py or '
    'configs/ck_plus.py:hat_cgan,tiny. Any setting can be overridden: '
    '--config.hat_cgan.train.num_steps=500',
  )


def parse(argv):
  """absl's parser, with one line for a wrong config or setting."""
  try:
    argv = list(argv)
    _check(argv)
    return app.parse_flags_with_usage(argv)
  except (ValueError, AttributeError, KeyError, TypeError) as error:
    sys.exit(f'error: {str(error).splitlines()[0]}')


def default_workdir():
  """runs/<config and arguments>: configs/a.py:b,c -> runs/a-b-c."""
  flag = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, argument = flag.partition(':')
  parts = [pathlib.Path(path).stem, *filter(None, argument.split(','))]
  return pathlib.Path('runs') / '-'.join(parts)


def _check(argv):
  """Finds the config file; names a setting that it does not have."""
  index = _find(argv)
  if index is None:
    without = '--help', '-help', '-?', '--verify'
    if not any(a.startswith(without) for a in argv):
      raise ValueError(f'Pass --config. {_known()}')
    return
  head, path, argument = _split(argv[index])
  path = resolve(path)
  argv[index] = f'{head}{path}:{argument}' if argument else f'{head}{path}'
  get_config = runpy.run_path(path)['get_config']
  config = get_config(argument) if argument else get_config()
  for option in argv:
    name, _, _ = option.removeprefix('--').partition('=')
    if name.startswith('config.'):
      _check_setting(config, name)


def _find(argv):
  """Where in argv the value of --config stands, or None."""
  for i, word in enumerate(argv):
    if word.startswith('--config='):
      return i
    if word == '--config' and i + 1 < len(argv):
      return i + 1
  return None


def _split(word):
  """'--config=a.py:b' -> ('--config=', 'a.py', 'b')."""
  head = '--config=' if word.startswith('--config=') else ''
  path, _, argument = word.removeprefix(head).partition(':')
  return head, path, argument


def resolve(path):
  """The config file itself, or the one that came with hatjax."""
  if pathlib.Path(path).is_file():
    return path
  folder = _folder()
  inside = folder / pathlib.Path(path).name
  if pathlib.Path(path).parent.name != 'configs' or not inside.is_file():
    raise ValueError(f'No config {path}. {_known()}')
  if folder.name == 'configs':
    sys.path.insert(0, str(folder.parent))
  else:  # Configs import each other by this name.
    sys.modules['configs'] = importlib.import_module('hatjax._configs')
  return str(inside)


def _folder():
  """configs/ of a checkout, hatjax/_configs of a wheel."""
  here = pathlib.Path(__file__).resolve().parent
  packaged = here / '_configs'
  return packaged if packaged.is_dir() else here.parent / 'configs'


def _known():
  names = [
    f'configs/{p.name}' for p in sorted(_folder().glob('*.py'))
    if 'def get_config' in p.read_text()
  ]
  return f'There are: {", ".join(names)}.'


def _check_setting(config, name):
  at = 'config'
  for part in name.split('.')[1:]:
    known = list(config) if hasattr(config, 'keys') else []
    if part not in known:
      raise ValueError(
        f'Unknown setting --{name}. {at} has: {", ".join(known)}.'
      )
    config, at = config[part], f'{at}.{part}'
