"""What was made once and need not be again: files in the user's cache folder.

A file is found by what its content was made from: words of the caller's, the
code of hatjax, packages and devices. Whatever is wrong with one, or with the
folder, it is made again; a run does without a cache, too.
"""

import contextlib
import hashlib
import json
import os
import pathlib

import numpy as np

from hatjax import environment


def folder(name):
  """<the user's cache folder>/hatjax/<name>; $XDG_CACHE_HOME moves it."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'hatjax' / name


def path(place, words):
  """The file for what is made from these words, here, by this code.

  Args:
    place: the folder.
    words: tree that json can hold.

  Returns:
    A path; None if hatjax was edited since it was imported.
  """
  if _digest() != _CODE:
    return None
  words = json.dumps(
    [words, _CODE, environment.machine()], sort_keys=True, default=str
  )
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
  if path is None or sum(x.nbytes for x in arrays.values()) > limit:
    return
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
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
  """Of the code of hatjax as it is on the disk."""
  digest, root = hashlib.sha256(), pathlib.Path(__file__).parent
  for file in sorted(root.rglob('*.py')):
    digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
  return digest.hexdigest()


_CODE = _digest()
