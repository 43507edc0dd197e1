"""Nets that come from elsewhere: frozen ones from a file, a run or an earlier
stage, and those that training starts from."""

import jax
import jax.numpy as jnp
import numpy as np

from hatjax import runs, weights, workdir
from hatjax.nets import vgg


def load(config, method):
  """The frozen nets of a method that are not trained in this run.

  Args:
    config: of it `stages`, and `init_from`, {'vgg_face' or 'vgg19': converted
      file (default: see `weights`), other source: run with a stage of that
      name}.
    method: of its `pretrained`, {net: source}.

  Returns:
    {net: params}, without those that a stage of the config trains.

  Raises:
    ValueError: a source is missing or is not what it should be.
  """
  nets, given = {}, config.get('init_from', {})
  for net, source in getattr(method, 'pretrained', {}).items():
    if source in config['stages']:
      continue
    setting = f'config.init_from.{source}'
    if source in weights.REGISTRY:
      arrays = _read_weights(source, given.get(source), setting)
      nets[net] = vgg.unflatten(arrays)
      continue
    if not given.get(source):
      raise ValueError(
        f'{setting} is empty. Train one, a minute: python -m hatjax.train '
        f'--config <file>:{source} --workdir runs/{source}, and pass '
        f'--{setting}=runs/{source}. Or let this run train it: '
        f'--config <file>:{source},{",".join(config["stages"])}'
      )
    other = workdir.read_other(given[source], source, setting)
    nets[net] = runs.load_stage(given[source], other, source).state.params[net]
  return nets


def _read_weights(name, path, setting):
  """Arrays of a converted file; default: the one that is where it belongs."""
  if not path:
    return weights.load(name)
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return {k: v for k, v in arrays.items() if k[0] != '_'}
  except (OSError, ValueError) as error:
    raise ValueError(f'{setting}: {path} cannot be read: {error}') from error


def trained(config, name):
  """The nets that a stage starts from, its train.start_from naming a run.

  Args:
    config: of this run, with `info`.
    name: of the stage.

  Returns:
    The other run's state of that stage, averaged.

  Raises:
    ValueError: no such run or stage, or other labels.
  """
  folder = config[name]['train']['start_from']
  other = workdir.read_other(
    folder, name, f'config.{name}.train.start_from', config['info']['labels']
  )
  return runs.load_stage(folder, other, name).state.frozen()


def start(state, other, show=print):
  """A state at step 0 with the nets of another one.

  Discriminators of another shape stay as they were drawn, which `show` says.

  Raises:
    ValueError: another net has another shape.
  """
  nets = {}
  for name in state.params.keys() & other.params.keys():
    found, own = (_shapes(s.params[name]) for s in (other, state))
    if found != own and 'discriminator' in name:
      show(f'note: {name} starts anew: {_first_difference(found, own)}.')
      continue
    nets[name] = other.params[name]
  state = put(state, nets)
  averages = {
    net: jax.tree.map(jnp.copy, state.params[net]) for net in state.ema
  }
  if _shapes(state.model_state) == _shapes(other.model_state):
    state = state.replace(model_state=other.model_state)
  return state.replace(ema=averages)


def put(state, nets):
  """A state with these nets in place of its own.

  Raises:
    ValueError: a net of another shape.
  """
  params = dict(state.params)
  for name, net in nets.items():
    # A file may hold more, such as fully-connected layers.
    net = {key: net[key] for key in params[name] if key in net}
    if _shapes(net) != _shapes(params[name]):
      raise ValueError(
        f'The weights for {name} have other shapes than the config says: '
        f'{_first_difference(_shapes(net), _shapes(params[name]))}. Use the '
        'settings that they were trained with.'
      )
    params[name] = net
  return state.replace(params=params)


def _shapes(tree):
  return jax.tree.map(np.shape, tree)


def _first_difference(found, expected):
  for layer in {**expected, **found}:
    a, b = found.get(layer), expected.get(layer)
    if a != b:
      return f'{layer} {a}, expected {b}'
