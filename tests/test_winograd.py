"""Minimal filters, and both forms of their transpose."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from test_numerics import normal

from hatjax.nets import layers, lowerings, winograd


@pytest.mark.parametrize('r, m', [*winograd.TILES.items(), (3, 2)])
def test_minimal_filters_are_convolutions(r, m):
  a, g, b = winograd.minimal_filter(m, r)
  x, k = np.random.default_rng(0).normal(size=(2, m + r - 1))
  y = a @ ((g @ k[:r]) * (b @ x))
  np.testing.assert_allclose(y, np.correlate(x, k[:r], 'valid'), rtol=1e-5)


@pytest.mark.parametrize('transposed', (False, True))
def test_small_tiles_are_large_ones(transposed):
  x, w = normal(0, 2, 9, 8, 5), normal(1, 3, 3, 5, 5)

  def run(tile):
    form = lambda x, w: winograd.correlate(x, w, transposed, tile)
    y, pull = jax.vjp(form, x, w)
    return y, *pull(y)

  for one, other in zip(run(2), run(4)):
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize('count, channels, k, tile', [
  (8, (256, 256), 3, 2), (8, (512, 128), 3, 2), (8, (128, 128), 3, 0),
  (3, (512, 512), 3, 0), (16, (128, 128), 3, 4), (16, (64, 64), 2, 4),
  (8, (256, 256), 2, 0), (16, (64, 64), 7, 0), (16, (32, 64), 3, 0),
])
def test_few_pixels_have_small_tiles(count, channels, k, tile):
  x = np.zeros((count, 8, 8, channels[0]), np.float32)
  with lowerings.lowering('rewritten'):
    assert layers._tile(x, count * 64, k, *channels) == tile
  with lowerings.lowering('plain'):
    assert layers._tile(x, count * 64, k, *channels) == 0


@pytest.mark.parametrize('ours, known, x, w', [
  (winograd.product, jnp.matmul, (4, 6, 3), (4, 3, 5)),
  (layers.project, jnp.matmul, (2, 6, 3), (3, 5)),
  (winograd.correlate, None, (2, 9, 8, 3), (3, 3, 3, 5)),
])
def test_gradients_of_a_kernel_are_not_turned(ours, known, x, w):
  """What turns one over comes after devices have summed it."""
  x, w = normal(0, *x), normal(1, *w)
  for dtype in (jnp.float32, jnp.bfloat16) if known else (jnp.float32,):
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    grads = jax.grad(lambda x, w: (ours(x, w) ** 2).sum(), (0, 1))
    assert [g.dtype for g in grads(x, w)] == [dtype, dtype]
    text = str(jax.make_jaxpr(grads)(x, w))
    turned = '0, 2, 1' if w.ndim > 2 else '1, 0'
    assert 'dot_general' in text
    assert not re.search(rf'transpose\[permutation=\({turned}\)', text)
  x, w = normal(2, *x.shape), normal(3, *w.shape)
  if known:
    others = jax.grad(lambda x, w: (known(x, w) ** 2).sum(), (0, 1))
    for one, other in zip(grads(x, w), others(x, w)):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


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
