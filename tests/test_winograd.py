"""Minimal filters, and both forms of their transpose."""

import jax
import jax.export
import numpy as np
import pytest
from test_numerics import normal

from hatjax.nets import winograd


@pytest.mark.parametrize('r', winograd.TILES)
def test_minimal_filters_are_convolutions(r):
  m = winograd.TILES[r]
  a, g, b = winograd.minimal_filter(m, r)
  x, k = np.random.default_rng(0).normal(size=(2, m + r - 1))
  y = a @ ((g @ k[:r]) * (b @ x))
  np.testing.assert_allclose(y, np.correlate(x, k[:r], 'valid'), rtol=1e-5)


@pytest.mark.parametrize('count', (1, 2, 3))
def test_a_padded_convolution_is_the_transpose(count, monkeypatch):
  x, w = normal(0, count, 9, 8, 5), normal(1, 2, 2, 3, 5)

  def run():
    form = lambda x, w: winograd.correlate(x, w, transposed=True)
    y, pull = jax.vjp(form, x, w)
    return str(jax.make_jaxpr(form)(x, w)), (y, *pull(y))

  program, (y, *grads) = run()
  assert y.shape == (count, 10, 9, 3)
  monkeypatch.setattr(winograd, 'PADDED', 8)
  other_program, others = run()
  assert (program == other_program) == (count > 2)  # for one or two pictures
  for one, other in zip((y, *grads), others):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


def test_an_exported_transpose_takes_any_number_of_pictures(monkeypatch):
  monkeypatch.setattr(winograd, 'PADDED', 8)
  w = normal(1, 2, 2, 3, 5)
  form = jax.jit(lambda x: winograd.correlate(x, w, transposed=True))
  shape = jax.export.symbolic_shape('n, 9, 8, 5')
  program = jax.export.export(form)(jax.ShapeDtypeStruct(shape, 'float32'))
  for count in (1, 3):
    x = normal(0, count, 9, 8, 5)
    np.testing.assert_allclose(program.call(x), form(x), atol=1e-4)
