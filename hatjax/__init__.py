"""hatjax: facial-expression video from a single face photo, in JAX."""


def load(workdir, step=None):
  """Opens a trained run; see `hatjax.runs.load`."""
  from hatjax import runs  # Imported late: `import hatjax` stays light.

  return runs.load(workdir, step)
