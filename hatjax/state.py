"""TrainState: everything that a training step changes, keyed by net name."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
  """Parameters, optimizer and other state of a method.

  Attributes:
    step: int32 [], steps done.
    params: {net name: parameters}.
    opt_state: {net name: optax state}; a net without an entry is frozen.
    model_state: whatever else a method carries from step to step.
    ema: {net name: averaged parameters}; {} if none.
  """

  step: jax.Array
  params: dict
  opt_state: dict
  model_state: dict
  ema: dict

  def apply_gradients(self, tx, **grads):
    """One optimizer update for each named net."""
    params, opt_state = dict(self.params), dict(self.opt_state)
    if jax.default_backend() == 'gpu':
      # cuDNN's gradients are turned over apart, which as one row they must be:
      # in one kernel with the update they take thrice as long, and the state
      # is copied besides.
      rows = jax.tree.map(jnp.ravel, grads)
      rows = jax.lax.optimization_barrier(rows)
      grads = jax.tree.map(lambda g, x: x.reshape(g.shape), grads, rows)
    for net, grad in grads.items():
      updates, opt_state[net] = tx[net].update(
        grad, opt_state[net], params[net]
      )
      params[net] = optax.apply_updates(params[net], updates)
    return self.replace(params=params, opt_state=opt_state)

  def inference_params(self, net):
    """The averaged parameters of a net, or its latest if none are kept."""
    return self.ema.get(net, self.params[net])

  def frozen(self):
    """What inference needs: no optimizer, averaged parameters alone."""
    params = {net: self.inference_params(net) for net in self.params}
    return self.replace(params=params, opt_state={}, ema={})


def create(params, tx, model_state=None, ema=()):
  """A state at step 0.

  Args:
    params: {net name: parameters}.
    tx: {net name: optax transformation}.
    model_state: see TrainState.
    ema: names of the nets whose average is kept.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state={net: t.init(params[net]) for net, t in tx.items()},
    model_state=model_state or {},
    ema={net: jax.tree.map(jnp.copy, params[net]) for net in ema},
  )


def checksum(tree):
  """sha256, as hex, of the name, type, shape and bytes of every array."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not getattr(leaf, 'is_fully_addressable', True):
      leaf = leaf.addressable_data(0)  # of several processes; all are equal
    leaf = np.asarray(leaf)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    digest.update(f'{name} {leaf.dtype} {leaf.shape} '.encode())
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def pmean(tree, axis_name):
  """Mean over devices under pmap; the identity when `axis_name` is None."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


# -- microbatches ------------------------------------------------------------


def split_batch(tree, count):
  """[B, ...] -> [count, B / count, ...].

  Part k has the samples k, k + count, ...: of every device the same number.
  """
  return jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree
  )


def join_batch(tree):
  """[count, B / count, ...] -> [B, ...], the inverse of `split_batch`."""
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree
  )


def accumulate(function, parts):
  """Runs a function on one part of a batch at a time.

  Args:
    function: part -> (tree to average, such as gradients, tree to stack).
    parts: tree of arrays [count, ...].

  Returns:
    (the mean over the parts, the other results stacked [count, ...]).
  """
  count = len(jax.tree.leaves(parts)[0])
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)[0]
  )

  def body(total, part):
    term, row = function(part)
    return jax.tree.map(lambda a, b: a + b / count, total, term), row

  if jax.default_backend() != 'cpu':
    return jax.lax.scan(body, zeros, parts)
  total, rows = zeros, []  # XLA:CPU runs a rolled training step 10x slower.
  for k in range(count):
    part = jax.tree.map(lambda x, k=k: x[k], parts)
    # Only when the part before is done, whose memory is then free.
    part, total = jax.lax.optimization_barrier((part, total))
    total, row = body(total, part)
    rows.append(row)
  return total, jax.tree.map(lambda *x: jnp.stack(x), *rows)
