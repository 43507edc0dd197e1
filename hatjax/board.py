"""Metrics to look at: TensorBoard's file, written at once, and plots.

tensorboardX's own writer is a thread, which dies of a full disk or of a clock
that is set back; the next log would wait for it forever.
"""

import os
import time

import numpy as np


class Board:
  """The file in a folder."""

  def __init__(self, folder):
    # Slow to import; generate does not log.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    folder.mkdir(parents=True, exist_ok=True)
    self._writer = event_file_writer.EventsWriter(str(folder / 'events'))
    self._make, self._event = summary, event_pb2.Event

  def _add(self, step, *summaries):
    for one in summaries:
      self._writer.write_event(
        self._event(summary=one, step=step, wall_time=time.time())
      )
    self._writer.flush()

  def scalars(self, step, row):
    """Adds every number of the dict `row` but 'step'."""
    names = [name for name in row if name != 'step']
    self._add(step, *(self._make.scalar(n, row[n]) for n in names))

  def image(self, step, name, image):
    """Adds uint8 [H, W, 3]."""
    self._add(step, self._make.image(name, image, dataformats='HWC'))

  def close(self):
    """Finishes the file."""
    self._writer.close()


def plot(rows, path):
  """Writes curves of metrics as a picture, a plot per kind.

  Args:
    rows: dicts with step and metrics such as loss/l1.
    path: pathlib.Path of the PNG; left alone where there are no metrics.
  """
  names = sorted({k for row in rows for k in row if '/' in k})
  groups = {}
  for name in names:
    groups.setdefault(_panel(name), []).append(name)
  if not groups:
    return
  from matplotlib import figure  # Slow to import.

  width = 5 * len(groups)
  fig = figure.Figure(figsize=(width, 3.6))
  # Margins in inches: to have them fitted means to draw everything twice.
  fig.subplots_adjust(
    0.6 / width, 0.5 / 3.6, 1 - 0.15 / width, 1 - 0.35 / 3.6, wspace=0.16
  )
  axes = np.atleast_1d(fig.subplots(1, len(groups)))
  for axis, (title, members) in zip(axes, sorted(groups.items())):
    for name in members:
      points = [(row['step'], row[name]) for row in rows if name in row]
      axis.plot(*zip(*points), label=name.split('/', 1)[1], linewidth=1)
    axis.set(title=title, xlabel='step')
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
  temporary = path.with_suffix('.tmp.png')
  fig.savefig(temporary, dpi=110)
  os.replace(temporary, path)


def _panel(name):
  """Which plot a metric belongs to."""
  kind, rest = name.split('/', 1)
  if kind == 'loss':
    return 'discriminators' if 'discriminator' in rest else 'generator'
  if 'alpha' in rest:
    return 'alpha'
  return {'psnr': 'PSNR (dB)', 'val': 'PSNR (dB)'}.get(kind, kind)
