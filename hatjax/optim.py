"""Optimizers and learning-rate schedules as optax transforms."""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ('constant', 'linear', 'cosine', 'epochs')


def make_tx(
  lr=2e-4, b1=0.5, b2=0.999, eps=1e-8, schedule='constant',
  constant_steps=0, decay_steps=0, warmup_steps=0, steps_per_epoch=1,
):
  """Adam with a schedule; lengths are in steps.

  Args:
    lr: learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    schedule: 'constant'; 'linear' or 'cosine' decay to 0 over `decay_steps`
      after `constant_steps`; 'epochs', the released code's staircase, where
      the same two lengths are counted in epochs of `steps_per_epoch`.
    constant_steps: before the decay.
    decay_steps: length of the decay.
    warmup_steps: linear from 0 before all that.
    steps_per_epoch: for 'epochs'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: unknown schedule, or a decay without a length.
  """
  if schedule not in SCHEDULES:
    raise ValueError(
      f'optim.schedule is {schedule!r}. Choose one of: {", ".join(SCHEDULES)}.'
    )
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
  return optax.adam(rate, b1=b1, b2=b2, eps=eps)


def epoch_rate(epoch, lr, niter=10_000, niter_decay=100, epoch_count=1):
  """lr (1 - max(0, e + 1 + epoch_count - niter) / (niter_decay + 1)).

  The released code's rule; `epoch` is the number of finished epochs.
  """
  late = jnp.maximum(0, epoch + 1 + epoch_count - niter)
  return lr * (1 - jnp.minimum(late / (niter_decay + 1), 1.0))


def update_ema(average, params, decay, step):
  """average + (1 - d) (params - average), d = min(decay, (1 + t)/(10 + t)).

  The warm-up keeps the first, random parameters out of the average.
  """
  rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)
