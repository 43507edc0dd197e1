"""A run whose last stage sharpens whatever the stages before it make."""

import itertools

import numpy as np

from hatjax import parallel, video

BATCH = 8  # frames sharpened at once


class Sharpened:
  """What `hatjax.load` gives for a run that ends in super-resolution.

  It is used like the run of the stages before it, whose attributes it has;
  what comes out is sharpened, and `scale` times as large.

  Args:
    run: a Run without that stage, or None where it is the only one.
    stage: the stage.
    config: of the whole run.
  """

  def __init__(self, run, stage, config):
    self._run, self.stage = run, stage
    self.config, self.step = config, int(stage.state.step)
    method = stage.method
    self._sharpen = parallel.jit(lambda state, x: video.to_uint8(
      method.sharpen(state, video.to_float(x))
    ))
    self.image_size, self.method, self.state = method.input_size, method, (
      stage.state
    )
    if run is None:
      self.stages, self.labels = (stage,), ()
      self.crop = config['info']['crop']

  def __getattr__(self, name):
    if name.startswith('_') or self._run is None:
      raise AttributeError(name)
    return getattr(self._run, name)

  @property
  def video_stages(self):
    """All stages, this one last."""
    before = self._run.stages if self._run is not None else ()
    return (*before, self._stage)

  def sharpen(self, frames):
    """Yields frames uint8 [s S, s S, 3] for frames uint8 [S, S, 3]."""
    frames = iter(frames)
    while batch := list(itertools.islice(frames, BATCH)):
      full = np.stack(batch + batch[-1:] * (BATCH - len(batch)))
      sharp = self._sharpen(self.stage.state, full)
      yield from np.asarray(sharp)[: len(batch)]

  def animate(self, images, label=None, **options):
    """See `runs.Run.animate`."""
    if self._run is None:
      raise ValueError(
        f'This run has no stage before {self.stage.name}: it sharpens videos '
        'and makes none from a face. Pass --video clip.mp4.'
      )
    return self._clips(self._run.animate(images, label, **options))

  def animate_noise(self, *args, **options):
    """See `runs.Run.animate_noise`."""
    return self._clips(self._run.animate_noise(*args, **options))

  def refine(self, frames, label=None, **options):
    """See `runs.Run.refine`; where no stage refines, it only sharpens."""
    run = self._run
    if run is not None and 'draft' in run.method.reads:
      frames = run.refine(frames, label, **options)
    return self.sharpen(frames)

  def _clips(self, clips):
    frames = [list(self.sharpen(clip)) for clip in clips]
    return np.stack([np.stack(clip) for clip in frames])
