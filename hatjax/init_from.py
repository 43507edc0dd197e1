"""Nets that a method takes frozen: from a file, a run, or an earlier stage."""

import jax
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
    other = workdir.read_config(given[source])
    if source not in other['stages']:
      raise ValueError(
        f'{setting}: {given[source]} has no stage {source}. It has: '
        f'{", ".join(other["stages"])}.'
      )
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


def put(state, nets):
  """A state with these nets in place of its own.

  Raises:
    ValueError: a net of another shape.
  """
  params = dict(state.params)
  for name, net in nets.items():
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    # A file may hold more, such as fully-connected layers.
    net = {key: net[key] for key in params[name] if key in net}
    if shapes(net) != shapes(params[name]):
      raise ValueError(
        f'The weights for {name} have other shapes than the config says: '
        f'{_first_difference(shapes(net), shapes(params[name]))}. Use the '
        'settings that they were trained with.'
      )
    params[name] = net
  return state.replace(params=params)


def _first_difference(found, expected):
  for layer, shapes in expected.items():
    if found.get(layer) != shapes:
      return f'{layer} {found.get(layer)}, expected {shapes}'
