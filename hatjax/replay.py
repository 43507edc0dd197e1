"""Computes the last steps of a run again and compares, bit for bit."""

import json
import pathlib
import shutil
import tempfile

from hatjax import environment, workdir


def verify(train, folder, num_steps=None, data_dir=None, show=print):
  """Replays the end of every stage of a run and compares the checkpoints.

  A stage starts from a copy of one of its checkpoints (or from nothing, where
  that is early enough) in a folder of its own; the run itself is only read.

  Args:
    train: function(config, folder, data_dir); see `hatjax.train`.
    folder: workdir of the run.
    num_steps: how many steps at least, of every stage; default: from the
      checkpoint before the newest.
    data_dir: where the records live.
    show: takes a line.

  Returns:
    Whether all that was compared is equal.

  Raises:
    ValueError: no run there, or nothing to compare.
  """
  config = workdir.read_config(folder)
  if num_steps is not None and num_steps < 1:
    raise ValueError(f'--verify_steps is {num_steps}. It must be at least 1.')
  folder, equal = pathlib.Path(folder), True
  _show_environment(folder, show)
  for number in range(len(config['stages'])):
    with tempfile.TemporaryDirectory(prefix='hatjax-verify-') as copy:
      stage = _Replay(folder, pathlib.Path(copy), config, number, num_steps)
      equal &= stage.is_intact(show) and stage.run(train, data_dir, show)
  return equal


def _show_environment(folder, show):
  starts = workdir.read_starts(folder)
  found = environment.differences(
    starts[-1]['environment'] if starts else {}, environment.describe()
  )
  if starts and found:
    show(f'note: this is not what it was trained with ({"; ".join(found)}).')


class _Replay:
  """One stage: from which checkpoint, up to which, compared where."""

  def __init__(self, folder, copy, config, number, num_steps):
    self.name = config['stages'][number]
    self.folder, self.copy, self.config = folder, copy, config
    self.number = number
    self.kept = workdir.list_steps(folder / self.name)
    self.sums = workdir.read_checksums(folder / self.name)
    if not self.kept:
      raise ValueError(
        f'{folder / self.name} has no checkpoints yet. Train further first.'
      )
    if not self.sums:
      raise ValueError(
        f'{folder / self.name} has no checksums: it is older than they are.'
      )
    self.last = self.kept[-1]
    wanted = self.last - num_steps if num_steps else self.last - 1
    self.first = max([s for s in self.kept if s <= wanted], default=0)

  def is_intact(self, show):
    """Whether the newest checkpoint is the one that was saved."""
    bad = [
      step for step in self.kept
      if self.sums.get(step) not in (None, self._stored(step))
    ]
    for step in bad:
      show(
        f'{self.name}: parts at checkpoint {step}: it is not what was saved '
        'there.'
      )
    return not bad

  def _stored(self, step):
    from hatjax import runs, state

    config = self.config
    found = runs.load_stage(
      self.folder, config, self.name, step, unchecked=True
    )
    return state.checksum(found.state)

  def run(self, train, data_dir, show):
    """Replays; whether every checksum on the way is the same."""
    for name in self.config['stages'][: self.number]:
      self._take(name, workdir.list_steps(self.folder / name)[-1])
    if self.first:
      self._take(self.name, self.first)
    config = json.loads(json.dumps(self.config))
    config['stages'] = config['stages'][: self.number + 1]
    config.pop('info')
    block = config[self.name]['train']
    block |= {
      'num_steps': self.last, 'keep': 1, 'sample_every': 10**9,
    }
    train(config, self.copy, data_dir)
    again = workdir.read_checksums(self.copy / self.name)
    common = [s for s in sorted(again) if s > self.first and s in self.sums]
    parted = [s for s in common if again[s] != self.sums[s]]
    steps = f'{self.name}: steps {self.first + 1} to {self.last}'
    if parted:
      before = max([s for s in common if s < parted[0]], default=self.first)
      show(f'{steps}: part between checkpoints {before} and {parted[0]}.')
    else:
      shown = ', '.join(map(str, common))
      show(f'{steps}: equal, bit for bit (checkpoints {shown}).')
    return not parted

  def _take(self, name, step):
    """Copies one checkpoint and its checksum."""
    target = self.copy / name / 'checkpoints' / str(step)
    shutil.copytree(self.folder / name / 'checkpoints' / str(step), target)
    sums = workdir.read_checksums(self.folder / name)
    workdir.write_checksums(
      self.copy / name, {s: d for s, d in sums.items() if s == step}
    )
