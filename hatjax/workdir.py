"""Everything on disk for a run.

    <workdir>/config.json                    config and what the data said
    <workdir>/starts.jsonl                   when it ran, with what; a line each
    <workdir>/<stage>/checkpoints/<step>/    orbax, the last N and the best
    <workdir>/<stage>/checksums.json         of everything in each of them
    <workdir>/<stage>/damaged/<step>/        that could not be read any more
    <workdir>/<stage>/metrics.jsonl          one line per log
    <workdir>/<stage>/losses.png             curves of it
    <workdir>/<stage>/samples/<step>.png, .mp4
    <workdir>/<stage>/tensorboard/

A run may be killed at any moment: files are replaced by renaming, and a
resumed run drops the log lines after its checkpoint.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  BestN,
  LatestN,
)

from hatjax import board, environment, video
from hatjax import state as state_lib

# These settings of the train block may change when a run goes on.
FREE = (
  'num_steps', 'log_every', 'ckpt_every', 'sample_every', 'keep', 'val_clips',
  'on_nan',
)


def read_config(workdir):
  """The dict in <workdir>/config.json.

  Raises:
    ValueError: no run there, or the file is damaged.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    config = json.loads(path.read_text())
    names = dict(config).get('stages', ())
    # They are folders, and must not lead elsewhere.
    if names and all(re.fullmatch(r'\w+', name) for name in names):
      return config
    raise TypeError('it names no stages, or wrong ones')
  except NotADirectoryError:
    raise ValueError(
      f'{workdir} is a file, neither the folder of a run nor an exported '
      'model, whose name ends in .hatjax. Pass one of those.'
    ) from None
  except FileNotFoundError:
    raise ValueError(
      f'{workdir} is not a run: it has no config.json. Train one: python -m '
      f'hatjax.train --config configs/ck_plus.py --workdir {workdir}'
    ) from None
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise ValueError(f'{path} cannot be read: {error}.') from error


def read_other(folder, stage, setting, labels=None):
  """The config of a run that another one builds on.

  Args:
    folder: its workdir.
    stage: that it must have.
    setting: that named it, for the message.
    labels: that it must know; None for any.

  Raises:
    ValueError: it is no run, lacks the stage or knows other labels.
  """
  config = read_config(folder)
  if stage not in config['stages']:
    raise ValueError(
      f'{setting}: {folder} has no stage {stage}. It has: '
      f'{", ".join(config["stages"])}.'
    )
  known = config['info']['labels']
  if labels is not None and known != labels:
    raise ValueError(
      f'{setting}: {folder} knows the labels {", ".join(known)}, these '
      f'records have {", ".join(labels)}. Take a run on the same records.'
    )
  return config


def write_atomically(path, text):
  """Puts text into a file, whole or not at all; OSError leaves the old one."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.write_text(text)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def note_start(workdir, config):
  """Adds a line to starts.jsonl: what the run goes on with from here."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  row = {
    'time': now, 'seed': config.get('seed'),
    'fingerprint': config.get('info', {}).get('fingerprint'),
    'steps': {
      name: max(list_steps(workdir / name), default=0)
      for name in config.get('stages', ())
    },
    'environment': environment.describe(),
  }
  with open(workdir / 'starts.jsonl', 'a') as file:
    file.write(json.dumps(row) + '\n')


def read_starts(workdir):
  """The lines of starts.jsonl as dicts, [] if there is none."""
  return _read_rows(pathlib.Path(workdir) / 'starts.jsonl')


def _read_rows(path):
  """Lines of json as dicts; torn ones are left out."""
  rows = []
  text = path.read_text(errors='replace') if path.exists() else ''
  for line in text.splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      row = json.loads(line)
      rows += [row] if isinstance(row, dict) else []
  return rows


def list_steps(folder):
  """Steps of the checkpoints of a stage, rising, without opening any."""
  found = (pathlib.Path(folder) / 'checkpoints').glob('*')
  return sorted(int(p.name) for p in found if p.name.isdecimal())


def read_checksums(folder):
  """{step: sha256 of the state} of all checkpoints that a stage ever had."""
  try:
    found = json.loads((pathlib.Path(folder) / 'checksums.json').read_text())
    return {int(step): digest for step, digest in found.items()}
  except (OSError, ValueError, AttributeError):  # none, or damaged
    return {}


def write_checksums(folder, sums):
  """The inverse of `read_checksums`."""
  text = json.dumps({str(s): sums[s] for s in sorted(sums)}, indent=1)
  write_atomically(pathlib.Path(folder) / 'checksums.json', text + '\n')


class Damaged(ValueError):
  """A checkpoint cannot be read, or is not what was saved."""


def _flat(tree, prefix=''):
  """{'a.b': value}; sequences compare as lists, as json gives them back."""
  if isinstance(tree, dict):
    dot = prefix + '.' if prefix else ''
    items = [_flat(v, dot + k) for k, v in tree.items()]
    return {k: v for item in items for k, v in item.items()}
  return {prefix: json.loads(json.dumps(tree))}


def differences(old, new):
  """'a.b: 1 -> 2' for every setting that differs and may not."""
  old, new = _flat(old), _flat(new)
  free = lambda key: key.split('.')[-2:-1] == ['train'] and (
    key.split('.')[-1] in FREE
  )
  keys = sorted(k for k in old.keys() | new.keys() if not free(k))
  return [
    f'{k}: {old.get(k, "absent")!r} -> {new.get(k, "absent")!r}'
    for k in keys if old.get(k) != new.get(k)
  ]


@contextlib.contextmanager
def open_workdir(workdir, config):
  """Creates or resumes a run; holds its lock.

  Args:
    workdir: folder of the run.
    config: plain dict of everything that defines the run.

  Yields:
    pathlib.Path of the workdir.

  Raises:
    ValueError: not writable, held by another process, or another config.
  """
  workdir = pathlib.Path(workdir)
  if jax.process_index():  # The first process holds the lock for all.
    yield workdir
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / '.lock', 'w')
  except OSError as error:
    raise ValueError(
      f'Cannot write to {workdir}: {error.strerror}. Choose another folder '
      'with --workdir.'
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(
        f'{workdir} is in use by another process. Wait for it, or choose '
        'another --workdir.'
      ) from None
    path = workdir / 'config.json'
    if path.exists():
      found = differences(read_config(workdir), config)
      if found:
        shown = '; '.join(found[:5]) + (
          f'; and {len(found) - 5} more' if len(found) > 5 else ''
        )
        raise ValueError(
          f'{workdir} holds a run with another config ({shown}). Choose '
          'another --workdir, or set these back.'
        )
    write_atomically(path, json.dumps(config, indent=2) + '\n')
    note_start(workdir, config)
    yield workdir


class _Manager(ocp.CheckpointManager):
  """Opens a folder although the scores of a checkpoint are damaged."""

  def metrics(self, step):
    try:
      return dict(super().metrics(step) or {})
    except (ValueError, TypeError):
      print(
        f'warning: the scores of {self.directory}/{step} are damaged.',
        file=sys.stderr,
      )
      return {}


class Run:
  """One stage of a run on disk.

  Args:
    folder: <workdir>/<stage>.
    keep: checkpoints kept besides the best.
    read_only: for generate and evaluate; nothing is created.
  """

  def __init__(self, folder, keep=3, read_only=False):
    self.folder = pathlib.Path(folder)
    # Checkpoints are everybody's work, the logs the first process's.
    self._writes_logs = jax.process_index() == 0
    self._board = self._saving = None
    self._read_only = read_only
    if read_only and not (self.folder / 'checkpoints').is_dir():
      raise ValueError(
        f'{self.folder} has no checkpoints yet. Train further: run '
        'hatjax.train with the same config and workdir.'
      )
    if not read_only:
      (self.folder / 'samples').mkdir(parents=True, exist_ok=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of read_only itself
    self._manager = self._open_manager(keep, read_only)
    logging.set_verbosity(verbosity)

  def _open_manager(self, keep, read_only):
    by_score = lambda metrics: metrics.get('val/psnr', -np.inf)
    return _Manager(
      (self.folder / 'checkpoints').absolute(),
      item_handlers=ocp.StandardCheckpointHandler(),  # to know the metadata
      options=ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([
          LatestN(n=keep), BestN(n=1, get_metric_fn=by_score),
        ]),
        best_fn=by_score,
        # It measures with a clock that may be set while it saves.
        async_options=ocp.options.AsyncOptions(timeout_secs=10**9),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
      ),
    )

  def steps(self):
    """Steps that have a checkpoint, rising."""
    return sorted(self._manager.all_steps())

  def latest_step(self):
    """The newest checkpoint's step, or None."""
    return self._manager.latest_step()

  def best_step(self):
    """The step of the best validation PSNR among those kept."""
    return self._manager.best_step()

  def restore(self, abstract_state, step=None, unchecked=False):
    """The state at `step`, or None if there is no checkpoint.

    Without a step the newest is taken that can be read and is what was saved;
    damaged ones are named on stderr and, if this may write, moved aside.

    Args:
      abstract_state: shapes and types.
      step: of the checkpoint.
      unchecked: take it as it is, whatever was saved there.

    Raises:
      Damaged: it cannot be read, is of another config, or has other bits
        than were saved.
      ValueError: no such step.
    """
    if step is not None and step not in self.steps():
      raise ValueError(
        f'{self.folder} has no checkpoint {step}. It has: '
        f'{", ".join(map(str, self.steps()))}.'
      )
    if step is not None:
      return self._restore(abstract_state, step, unchecked)
    damaged = []
    for candidate in reversed(self.steps()):
      try:
        state = self._restore(abstract_state, candidate, unchecked)
      except Damaged as error:
        damaged.append((candidate, error))
        continue
      # Only now: what fails for all of them is no damage.
      for other, error in damaged:
        print(f'warning: {error} Going on from {candidate}.', file=sys.stderr)
        self._move_aside(other)
      return state
    if damaged:
      raise damaged[0][1]
    return None

  def _restore(self, abstract_state, step, unchecked):
    name = f'Checkpoint {self.folder}/checkpoints/{step}'
    try:
      found = self._shape_differences(abstract_state, step)
      if not found:
        state = self._manager.restore(
          step, args=ocp.args.StandardRestore(abstract_state)
        )
    except Exception as error:  # orbax raises many kinds for a damaged one.
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise Damaged(f'{name} cannot be read ({reason[:200]}).') from error
    if found:
      # Or its list of arrays is damaged: then an earlier one will fit.
      raise Damaged(f'{name} is of another config: {found[0]}.')
    saved = read_checksums(self.folder).get(step)
    if not unchecked and saved not in (None, state_lib.checksum(state)):
      raise Damaged(f'{name} is not what was saved: its checksum differs.')
    return state

  def _move_aside(self, step):
    if self._read_only or not self._writes_logs:
      return
    target = self.folder / 'damaged' / str(step)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    os.replace(self.folder / 'checkpoints' / str(step), target)
    self._manager.reload()

  def _shape_differences(self, abstract_state, step):
    """Compared first: orbax would fill or crop silently."""
    flat = lambda tree: {
      jax.tree_util.keystr(path, simple=True, separator='/'): tuple(x.shape)
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    metadata = self._manager.item_metadata(step)
    saved = flat(getattr(metadata, 'tree', metadata))
    wanted = flat(abstract_state)
    return [
      f'{key} is {saved.get(key, "absent")} there and '
      f'{wanted.get(key, "absent")} here'
      for key in sorted(saved.keys() | wanted.keys())
      if saved.get(key) != wanted.get(key)
    ]

  def save(self, step, state, scores=None):
    """Saves in the background; a checkpoint is complete or not there.

    Raises:
      ValueError: the disk said no; earlier checkpoints stay.
    """
    self.wait()
    self._saving = step
    try:
      # Before the checkpoint: one without a checksum is believed.
      if self._writes_logs:
        sums = read_checksums(self.folder) | {step: state_lib.checksum(state)}
        write_checksums(self.folder, sums)
      self._manager.save(
        step, args=ocp.args.StandardSave(state),
        metrics={k: float(v) for k, v in (scores or {}).items()}, force=True,
      )
    except Exception as error:
      raise self._save_error(error) from error

  def wait(self):
    """Until the last save is on disk."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._save_error(error) from error

  def _save_error(self, error):
    reason = str(error).strip().splitlines()[0][:200] or type(error).__name__
    kept = ', '.join(map(str, self.steps())) or 'none'
    return ValueError(
      f'Checkpoint {self._saving} could not be saved in {self.folder} '
      f'({reason}). '
      f'Earlier ones are intact: {kept}. Free some space and run again.'
    )

  def close(self):
    """Finishes the saves and the logs."""
    self.wait()
    self._manager.close()
    if self._board is not None:
      self._board.close()

  # -- logs ----------------------------------------------------------------

  def history(self):
    """Lines of metrics.jsonl as dicts; a torn last line is left out."""
    return _read_rows(self.folder / 'metrics.jsonl')

  def forget_after(self, step):
    """Drops log lines after `step`, which a resumed run writes again."""
    path = self.folder / 'metrics.jsonl'
    if path.exists() and self._writes_logs:
      rows = [row for row in self.history() if row['step'] <= step]
      text = ''.join(json.dumps(row) + '\n' for row in rows)
      write_atomically(path, text)

  def log(self, step, scalars):
    """Appends host scalars to metrics.jsonl and TensorBoard."""
    if not self._writes_logs:
      return
    row = {'step': step} | {k: float(v) for k, v in scalars.items()}
    with open(self.folder / 'metrics.jsonl', 'a') as file:
      file.write(json.dumps(row) + '\n')
    self._tensorboard().scalars(step, row)

  def _tensorboard(self):
    if self._board is None:
      self._board = board.Board(self.folder / 'tensorboard')
    return self._board

  def sample(self, step, clips, fps=12):
    """Writes samples/<step>.png (real frames over generated) and .mp4.

    Args:
      step: names the files.
      clips: list of (real, generated) or (real, draft, generated), all uint8
        [T, H, W, 3].
      fps: of the mp4.
    """
    if not self._writes_logs:
      return
    rows = [video.strip(x) for clip in clips for x in clip]
    strip = video.stack_rows(rows)
    path = self.folder / 'samples' / f'{step:08d}'
    path.with_suffix('.png').write_bytes(video.encode_png(strip))
    longest = max(len(clip[0]) for clip in clips)
    hold = lambda x: np.concatenate([x, x[-1:].repeat(longest - len(x), 0)])
    rows = np.stack([np.concatenate([*map(hold, c)], 2) for c in clips])
    video.write_video(path.with_suffix('.mp4'), video.tile(rows), fps)
    self._tensorboard().image(step, 'samples', strip)

  def plot_losses(self):
    """losses.png: curves of metrics.jsonl, as the paper's figures 9 and 10."""
    if self._writes_logs:
      board.plot(self.history(), self.folder / 'losses.png')
