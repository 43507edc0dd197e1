"""Guards a training run against losses and gradients that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np

ACTIONS = ('stop', 'skip')  # the setting train.on_nan
KEY = 'guard'  # of a step's finding among its metrics
MOST = 100  # dropped steps in a row, after which nothing is to be hoped for


def judge(state, metrics):
  """What is not finite after a step; inside jit.

  A gradient that is not finite shows in the parameters or the optimizer.

  Args:
    state: TrainState after the step.
    metrics: {name: scalar} of the step.

  Returns:
    int32 []: 0 if all is finite, else n for the n-th metric by name, or one
    more than there are for the state.
  """
  floats = [
    x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  parts = [metrics[name] for name in sorted(metrics)] + [floats]
  bad = jnp.stack([
    jnp.logical_not(jnp.stack(
      [jnp.isfinite(x).all() for x in jax.tree.leaves(part)]
    ).all())
    for part in parts
  ])
  return jnp.where(bad.any(), 1 + bad.argmax(), 0).astype(jnp.int32)


def keep_if_finite(code, new, old):
  """`new` where `code` is 0, else `old`; two trees."""
  return jax.tree.map(lambda a, b: jnp.where(code == 0, a, b), new, old)


class Watch:
  """Reads the findings of many steps at once, when the host waits anyway.

  Args:
    action: one of ACTIONS.
    step: steps done when it begins.
  """

  def __init__(self, action, step):
    self.action, self.skipped, self._good = action, 0, step
    self._codes, self._step = [], step

  def add(self, codes):
    """Takes the findings of the next steps: device arrays, not waited for."""
    self._codes.extend(codes)

  def look(self, names):
    """Counts the dropped steps, or raises.

    Args:
      names: of the metrics.

    Raises:
      ValueError: a step was not finite and the run is to stop; or MOST steps
        in a row were not.
    """
    codes = [np.atleast_1d(c) for c in jax.device_get(self._codes)]
    codes = np.concatenate(codes) if codes else np.zeros(0, int)
    self._codes = []
    for code in codes:
      self._step += 1
      if code == 0:
        self._good = self._step
        continue
      names = sorted(names)
      what = names[code - 1] if code <= len(names) else 'A gradient'
      if self.action == 'stop':
        raise ValueError(f'{what} became nan at step {self._step}.')
      self.skipped += 1
      if self._step - self._good >= MOST:
        raise ValueError(
          f'{what} was nan in all of the last {MOST} steps, up to step '
          f'{self._step}.'
        )
