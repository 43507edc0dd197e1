"""Which form convolutions, sums and small attentions take: decided here."""

import contextlib

import jax

LOWERINGS = ('auto', 'plain', 'aligned', 'rewritten')
_lowering = ['auto']


@contextlib.contextmanager
def lowering(name):
  """Chooses how what is traced inside is lowered.

  Args:
    name: 'plain' (the primitives), 'aligned' (the same, but channels are padded
      to multiples of 8 or, where they are fewer, gathered from neighbours, and
      the smallest pictures are matrix products, as tensor cores like it),
      'rewritten' (exact forms by stride-1 convolutions, matrix
      products and vectors of heads), or 'auto': rewritten on CPU, where XLA's
      strided convolutions are 6x slower, aligned elsewhere; '' is 'auto'.
  """
  name = name or 'auto'
  if name not in LOWERINGS:
    raise ValueError(f'Unknown lowering {name!r}. Choose one of: {LOWERINGS}.')
  before, _lowering[0] = _lowering[0], name
  try:
    yield
  finally:
    _lowering[0] = before


def form():
  """The form, one of LOWERINGS but 'auto', of what is traced now."""
  if _lowering[0] == 'auto':
    return 'rewritten' if jax.default_backend() == 'cpu' else 'aligned'
  return _lowering[0]


def rewrites():
  """Whether what is traced now takes the forms that a CPU likes."""
  return form() == 'rewritten'
