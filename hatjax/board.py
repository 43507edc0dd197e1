"""TensorBoard's file, written at once.

tensorboardX's own writer is a thread, which dies of a full disk or of a clock
that is set back; the next log would wait for it forever.
"""

import time


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
