"""What was made once and need not be again: files in the user's cache folder.

A file is found by what its content was made from: words of the caller's and the
code of hatjax. Whatever is wrong with one, or with the folder, it is made
again; a run does without a cache, too.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time

import numpy as np

_HOUR = 3600.0
_SPARE = 4  # times a file's size must be free


def folder(name):
  """<the user's cache folder>/hatjax/<name>; $XDG_CACHE_HOME moves it."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'hatjax' / name


def path(place, words):
  """The file for what is made from these words by this code.

  Args:
    place: the folder.
    words: tree that json can hold.

  Returns:
    A path; None if hatjax was edited since this module was imported.
  """
  if _CODE is None or _digest() != _CODE:
    return None
  words = json.dumps([words, _CODE], sort_keys=True, default=str)
  name = hashlib.sha256(words.encode()).hexdigest()
  return pathlib.Path(place) / f'{name}.npz'


def load(path):
  """The arrays in a file by name; None if it is not there, or damaged."""
  if path is None:
    return None
  try:
    with np.load(path) as file:  # a zip archive, which knows its checksums
      arrays = dict(file)
  except Exception:  # damaged files raise anything
    return None
  with contextlib.suppress(OSError):  # a folder may be there to read only
    os.utime(path)
  return arrays


def save(path, arrays, limit):
  """Writes a file for `load`, where that can be done.

  Args:
    path: as `path` gives it; None does nothing.
    arrays: {name: NumPy array}.
    limit: bytes that the folder may hold; files not used for longest go first.
  """
  size = sum(x.nbytes for x in arrays.values())
  if path is None or size > limit:
    return
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    # For its owner alone: the faces may have been given on conditions.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in path.parent.glob('*.part'):  # by processes that were killed
      if left.stat().st_mtime < time.time() - _HOUR:
        left.unlink()
    if shutil.disk_usage(path.parent).free < _SPARE * size:
      return  # Checkpoints may need it.
    with part.open('wb') as file:
      np.savez(file, **arrays)
    os.replace(part, path)
    files = sorted(path.parent.glob('*.npz'), key=os.path.getmtime)
    total = sum(file.stat().st_size for file in files)
    for file in files[:-1]:
      if total <= limit:
        break
      total -= file.stat().st_size
      file.unlink()
  except OSError:  # No cache is worth a run.
    pass
  finally:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)


def _digest():
  """Of the code of hatjax as it is on the disk; None if it is in motion."""
  digest, root = hashlib.sha256(), pathlib.Path(__file__).parent
  try:
    for file in sorted(root.rglob('[!.]*.py')):
      digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
  except OSError:
    return None
  return digest.hexdigest()


_CODE = _digest()
