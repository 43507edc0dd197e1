"""Optimizers and learning-rate schedules as optax transforms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ('constant', 'linear', 'cosine', 'epochs')
NAMES = ('adam', 'swats')


def make_tx(
  lr=2e-4, b1=0.5, b2=0.999, eps=1e-8, schedule='constant',
  constant_steps=0, decay_steps=0, warmup_steps=0, steps_per_epoch=1,
  num_steps=0, name='adam', swats_tol=1e-9, swats_relative_tol=0.0,
  switch_at_step=0,
):
  """Adam, or SWATS, with a schedule; lengths are in steps.

  Args:
    lr: learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    schedule: 'constant'; 'linear' or 'cosine' decay to 0 over `decay_steps`
      after `constant_steps`; 'epochs', the released code's staircase, where
      the same two lengths are counted in epochs of `steps_per_epoch`.
    constant_steps: before the decay.
    decay_steps: length of the decay; 0: up to `num_steps`.
    warmup_steps: linear from 0 before all that.
    steps_per_epoch: for 'epochs'.
    num_steps: of the training.
    name: 'adam' or 'swats', which begins as Adam; see `swats`.
    swats_tol: see `swats`.
    swats_relative_tol: see `swats`.
    switch_at_step: see `swats`.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: unknown name or schedule, or a decay without a length.
  """
  if name not in NAMES:
    raise ValueError(
      f'optim.name is {name!r}. Choose one of: {", ".join(NAMES)}.'
    )
  if schedule not in SCHEDULES:
    raise ValueError(
      f'optim.schedule is {schedule!r}. Choose one of: {", ".join(SCHEDULES)}.'
    )
  if schedule in ('linear', 'cosine') and not decay_steps:
    decay_steps = num_steps - constant_steps
  if schedule != 'constant' and decay_steps <= 0:
    raise ValueError(f'optim.schedule {schedule!r} needs decay_steps > 0.')
  if schedule == 'constant':
    rate = optax.constant_schedule(lr)
  elif schedule == 'epochs':
    rate = lambda step: epoch_rate(
      step // steps_per_epoch, lr, constant_steps, decay_steps
    )
  else:
    decay = (
      optax.linear_schedule(lr, 0.0, decay_steps) if schedule == 'linear'
      else optax.cosine_decay_schedule(lr, decay_steps)
    )
    rate = optax.join_schedules(
      [optax.constant_schedule(lr), decay], [constant_steps]
    )
  if warmup_steps:
    plain = rate
    ramp = lambda step: jnp.minimum(1.0, (step + 1) / warmup_steps)
    rate = lambda step: plain(step) * ramp(step)
  if name == 'swats':
    return swats(
      rate, b1, b2, eps, swats_tol, swats_relative_tol, switch_at_step
    )
  return optax.adam(rate, b1=b1, b2=b2, eps=eps)


class SwatsState(NamedTuple):
  """State of `swats`.

  Attributes:
    count: int32 [], updates done.
    mu: first moment; after the switch SGD's velocity.
    nu: second moment.
    mean: [], the running mean of gamma, not yet corrected for its start.
    gamma: [], the SGD rate that would have made the last Adam step.
    rate: [], Lambda: the corrected mean; after the switch SGD's rate.
    base: [], the schedule's rate at the switch.
    switched: int32 [], the update at which it switched; 0 before.
  """

  count: jax.Array
  mu: optax.Updates
  nu: optax.Updates
  mean: jax.Array
  gamma: jax.Array
  rate: jax.Array
  base: jax.Array
  switched: jax.Array


def _dot(a, b):
  parts = jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)
  return sum(jax.tree.leaves(parts))


def swats(
  rate, b1=0.9, b2=0.999, eps=1e-8, tol=1e-9, relative_tol=0.0, at_step=0
):
  """Switches from Adam to SGD with momentum (Keskar & Socher, 2017).

  With p the Adam step and g the gradient, over all parameters of the net,
  gamma = p.p / -p.g is the SGD rate whose step has the projection p on p. The
  switch comes once its corrected running mean Lambda > 0 agrees with it; SGD
  then takes v = b1 v + g, w -= (1 - b1) Lambda v. The schedule keeps acting:
  Lambda is scaled by its rate over that at the switch.

  Args:
    rate: schedule, step -> Adam's learning rate.
    b1: decay of the first moment, and SGD's momentum.
    b2: decay of the second moment and of the mean of gamma.
    eps: added to the root of the second moment.
    tol: |Lambda - gamma| below which it switches.
    relative_tol: the same as a part of Lambda; the larger of both counts.
    at_step: switch at this update, whatever gamma says (if Lambda > 0); 0 for
      never.
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
    return SwatsState(none, zeros(), zeros(), zero, zero, zero, zero, none)

  def adam(grads, state, k):
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    alpha = rate(state.count) * jnp.sqrt(1 - b2**k) / (1 - b1**k)
    step = jax.tree.map(lambda m, v: -alpha * m / (jnp.sqrt(v) + eps), mu, nu)
    slope = -_dot(step, grads)
    # A step across the gradient says nothing of a rate.
    gamma = _dot(step, step) / jnp.where(slope == 0, 1, slope)
    mean = b2 * state.mean + (1 - b2) * gamma
    mean = jnp.where(slope == 0, state.mean, mean)
    corrected = mean / (1 - b2**k)
    close = jnp.abs(corrected - gamma) < jnp.maximum(
      tol, relative_tol * corrected
    )
    due = (k > 1) & (slope != 0) & close
    due |= (at_step > 0) & (k >= at_step)
    due &= corrected > 0
    mu = jax.tree.map(lambda m: jnp.where(due, 0, m), mu)
    return step, SwatsState(
      state.count + 1, mu, nu, mean, gamma, corrected,
      jnp.where(due, rate(state.count), state.base),
      jnp.where(due, state.count + 1, 0),
    )

  def sgd(grads, state, k):
    del k
    decay = rate(state.count) / jnp.where(state.base == 0, 1, state.base)
    mu = jax.tree.map(lambda v, g: b1 * v + g, state.mu, grads)
    step = jax.tree.map(lambda v: -(1 - b1) * state.rate * decay * v, mu)
    return step, state._replace(count=state.count + 1, mu=mu)

  def update(grads, state, params=None):
    del params
    k = (state.count + 1).astype(jnp.float32)
    return jax.lax.cond(state.switched > 0, sgd, adam, grads, state, k)

  return optax.GradientTransformation(init, update)


def swats_metrics(opt_state):
  """{'swats/<net>_gamma', _rate, _switched}: of the nets that use SWATS."""
  return {
    f'swats/{net}_{key}': jnp.float32(getattr(state, key))
    for net, state in opt_state.items() if isinstance(state, SwatsState)
    for key in ('gamma', 'rate', 'switched')
  }


def epoch_rate(epoch, lr, niter=10_000, niter_decay=100, epoch_count=1):
  """lr (1 - max(0, e + 1 + epoch_count - niter) / (niter_decay + 1)).

  The released code's rule; `epoch` is the number of finished epochs.
  """
  late = jnp.maximum(0, epoch + 1 + epoch_count - niter)
  return lr * (1 - jnp.minimum(late / (niter_decay + 1), 1.0))


def update_ema(average, params, decay, step, every=1):
  """average + (1 - d) (params - average), d = min(decay, (1 + n)/(10 + n)).

  The warm-up keeps the first, random parameters out of the average.

  Args:
    average: tree.
    params: tree of the same shapes.
    decay: in the long run.
    step: which gave `params`, from 0.
    every: steps from one update of the average to the next; n counts them.
  """
  count = step // every
  rate = 1 - jnp.minimum(decay, (1 + count) / (10 + count))

  def update(average, params):
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)

  if every == 1:
    return update(average, params)
  keep = lambda average, params: average
  return jax.lax.cond(step % every == 0, update, keep, average, params)
