"""Which form convolutions, sums and small attentions take: decided here."""

import contextlib

import jax

LOWERINGS = ('auto', 'plain', 'rewritten')
_lowering = ['auto']


@contextlib.contextmanager
def lowering(name):
  """Chooses how what is traced inside is lowered.

  Args:
    name: 'plain' (the primitives), 'rewritten' (exact forms by stride-1
      convolutions, matrix products and vectors of heads), or 'auto': rewritten
      on CPU, where XLA's strided convolutions are 6x slower.
  """
  if name not in LOWERINGS:
    raise ValueError(f'Unknown lowering {name!r}. Choose one of: {LOWERINGS}.')
  before, _lowering[0] = _lowering[0], name
  try:
    yield
  finally:
    _lowering[0] = before


def rewrites():
  """Whether what is traced now takes the forms that a CPU likes."""
  if _lowering[0] == 'auto':
    return jax.default_backend() == 'cpu'
  return _lowering[0] == 'rewritten'
