"""hatjax: facial-expression video from a single face photo, in JAX."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from hatjax import runs

# Before JAX starts: no chatter about GPUs that a machine does not have.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

__version__ = '0.1.0'


def load(workdir: str | os.PathLike, step: int | None = None) -> 'runs.Run':
  """Opens a trained run; see `hatjax.runs.load`.

  Args:
    workdir: its folder, or a file that `hatjax.convert export` made.
    step: which checkpoint of its last stage; default the latest.

  Raises:
    ValueError: no run there, no checkpoint, or one of another config.
  """
  # Imported late: `import hatjax` stays light.
  if str(workdir).endswith('.hatjax'):
    from hatjax import exported

    return exported.load(workdir)
  from hatjax import runs

  return runs.load(workdir, step)
