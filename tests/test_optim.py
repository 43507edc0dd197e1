"""Optimizers, schedules and averages of parameters by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hatjax import optim


def test_released_learning_rate_staircase():
  # lr (1 - max(0, e + 2 - 10000) / 101): full until 9998, 0 at 10099.
  rates = [float(optim.epoch_rate(e, 2e-4)) for e in (0, 9998, 9999, 10099)]
  np.testing.assert_allclose(
    rates, [2e-4, 2e-4, 2e-4 * 100 / 101, 0], atol=1e-12
  )


def test_make_tx_is_adam_by_hand():
  tx = optim.make_tx(lr=0.1, b1=0.5, b2=0.999, eps=0.0)
  state = tx.init(jnp.array(1.0))
  update, state = tx.update(jnp.array(3.0), state)
  np.testing.assert_allclose(update, -0.1, rtol=1e-5)  # g / |g|
  # m = (0.25 * 3 + 0.5 * 1) / 0.75; v = (0.999 * 9 + 1) / 1.999
  update, state = tx.update(jnp.array(1.0), state)
  expected = -0.1 * (1.25 / 0.75) / np.sqrt((0.999 * 9 + 1) / 1.999)
  np.testing.assert_allclose(update, expected, rtol=1e-4)


@pytest.mark.parametrize('length', [{'decay_steps': 2}, {'num_steps': 4}])
def test_linear_schedule_ends_at_zero_and_bad_ones_are_refused(length):
  tx = optim.make_tx(schedule='linear', constant_steps=2, **length)
  params, state, sizes = jnp.ones(()), None, []
  state = tx.init(params)
  for _ in range(5):
    update, state = tx.update(jnp.ones(()), state)
    sizes.append(float(-update) / 2e-4)
  np.testing.assert_allclose(sizes, [1, 1, 1, 0.5, 0], atol=1e-4)
  with pytest.raises(ValueError, match='cosine'):
    optim.make_tx(schedule='cosin')
  with pytest.raises(ValueError, match='decay_steps'):
    optim.make_tx(schedule='linear')


def test_ema_warm_up_by_hand():
  # d = min(0.9, 1/10) at t = 0: 0 + 0.9 (1 - 0); then d = 2/11.
  average = optim.update_ema(jnp.zeros(()), jnp.ones(()), 0.9, jnp.array(0))
  np.testing.assert_allclose(average, 0.9, rtol=1e-6)
  average = optim.update_ema(average, jnp.zeros(()), 0.9, jnp.array(1))
  np.testing.assert_allclose(average, 0.9 * 2 / 11, rtol=1e-6)


def test_ema_of_every_third_step():
  average, seen = jnp.zeros(()), []
  for step in range(1, 8):
    average = jax.jit(optim.update_ema, static_argnums=4)(
      average, jnp.float32(step), 0.5, jnp.array(step), 3
    )
    seen.append(float(average))
  # d = min(0.5, 2/11) at step 3, min(0.5, 3/12) at step 6.
  third = 3 * 9 / 11
  sixth = third + (6 - third) * 9 / 12
  expected = [0, 0, third, third, third, sixth, sixth]
  np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_optimizer_and_adam_of_optax_agree_on_two_parameters():
  grads = {'a': jnp.array([1.0, -2.0])}
  mine, reference = optim.make_tx(), optax.adam(2e-4, 0.5, 0.999)
  a, _ = mine.update(grads, mine.init(grads))
  b, _ = reference.update(grads, reference.init(grads))
  np.testing.assert_allclose(a['a'], b['a'])
