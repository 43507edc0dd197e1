"""glibc's heap, from which XLA:CPU takes what a step needs for a while.

Two habits of it cost up to a quarter of a step, and these functions ask for
others. They do nothing where another libc is, or where the user has settings of
malloc's own (MALLOC_...) or loads something first, which may be another malloc.
"""

import ctypes
import os
import platform

# Names and numbers of malloc.h. Only the first arena grows without mmap.
_OPTIONS = {
  'M_ARENA_MAX': (-8, 1), 'M_MMAP_MAX': (-4, 0),
  'M_TRIM_THRESHOLD': (-1, -1),  # never
}
# Bytes. Smaller holes are found at once; larger ones are what a step needs.
_SMALL, _LARGE, _LARGEST = 1 << 10, 1 << 20, 1 << 28


class _Info(ctypes.Structure):
  """mallinfo2: `keepcost` is what is free at the end of the heap."""

  _fields_ = [(name, ctypes.c_size_t) for name in (
    'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks',
    'uordblks', 'fordblks', 'keepcost',
  )]


def _libc():
  """None where the heap is not ours to change."""
  mine = any(name.startswith('MALLOC_') for name in os.environ)
  mine |= bool(os.environ.get('LD_PRELOAD'))
  if mine or platform.libc_ver()[0] != 'glibc':
    return None
  libc = ctypes.CDLL(None)
  libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_size_t
  libc.free.argtypes, libc.free.restype = [ctypes.c_size_t], None
  libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_size_t
  return libc


def keep_freed():
  """Asks for freed memory to be kept rather than handed back.

  XLA:CPU allocates a step's intermediates anew every time. glibc maps such
  large blocks freshly, and the kernel clears them page by page.
  """
  if libc := _libc():
    for option, value in _OPTIONS.values():
      libc.mallopt(option, value)


def fill_holes():
  """Takes, for good, the small pieces that are free between others.

  Compiling leaves them by the ten thousand. glibc sorts them by size, in lists
  that it walks whenever a thread of the step needs a little memory, one thread
  at a time: a tenth of all CPU time. Their pages go back to the system.
  """
  libc = _libc()
  if libc is None or not hasattr(libc, 'mallinfo2'):
    return
  libc.mallinfo2.restype = _Info
  info = libc.mallinfo2()
  end, left = libc.sbrk(0) - info.keepcost, info.fordblks - info.keepcost

  def take(size):
    """What is free between others, in blocks of that size."""
    nonlocal left  # Other threads free more meanwhile, which is not for us.
    taken = []
    while left >= size and (block := libc.malloc(size)):
      if block >= end:
        libc.free(block)
        break
      taken.append(block)
      left -= size
    return taken

  large, size = [], _LARGEST
  while size > _LARGE:
    large += take(size)
    size -= size // 16
  libc.malloc_trim(0)
  while size > _SMALL:
    take(size)
    size -= size // 16
  for block in large:
    libc.free(block)
