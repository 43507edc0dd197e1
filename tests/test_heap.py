"""What glibc's heap is asked for, and what that changes."""

import ctypes
import os
import platform
import subprocess
import sys

import jax
import pytest

from hatjax import heap, parallel

pytestmark = pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='only glibc is asked'
)


@pytest.mark.parametrize('users_own', (False, True))
def test_steps_reuse_memory_rather_than_map_it_anew(users_own):
  # The product's 32 MiB left side is 8192 pages, cleared when first touched.
  # While small blocks lie in its hole a step needs another, not forty in a row.
  code = '''
import resource, jax, jax.numpy as jnp
from hatjax import parallel
parallel.start_process()
step = jax.jit(lambda x: jnp.outer(x, jnp.sin(x)) @ jnp.stack(4 * [x], 1))
x = jnp.ones(2896)
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(40):
  step(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(b - a for a, b in zip(faults, faults[1:])))
'''
  mine = {'MALLOC_MMAP_THRESHOLD_': '131072'} if users_own else {}
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True,
    env={**os.environ, **mine},
  )
  assert (int(out.stdout) > 4000) == users_own, out.stdout


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'mallinfo2'), reason='glibc before 2.33'
)
@pytest.mark.parametrize('users_own', (False, True))
def test_small_holes_are_filled_and_large_ones_left(users_own):
  code = '''
import ctypes
from hatjax import heap
heap.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_size_t
libc.free.argtypes, libc.mallinfo2.restype = [ctypes.c_size_t], heap._Info
large = libc.malloc(40 << 20)
blocks = [libc.malloc(1100 + 48 * (k % 2000)) for k in range(20_000)]
for block in [large, *blocks[::2]]:
  libc.free(block)
before = libc.mallinfo2()
heap.fill_holes()
after = libc.mallinfo2()
again, piece = libc.malloc(38 << 20), libc.malloc(30_000)
print(before.ordblks, after.ordblks)
print(piece in blocks[::2], again == large)
'''
  mine = {'MALLOC_ARENA_MAX': '1'} if users_own else {}
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True,
    env={**os.environ, **mine},
  ).stdout.split()
  before, after = map(int, out[:2])
  assert before > 10_000
  assert (after > 10_000) == users_own
  # Where the next ones go: one into a small hole or not, one into the large.
  assert out[2] == str(users_own)
  assert users_own or out[3] == 'True'


def test_a_long_compilation_is_followed_by_the_filling(monkeypatch):
  calls = []
  monkeypatch.setattr(heap, 'fill_holes', lambda: calls.append(1))
  parallel._listen()
  step = lambda k: jax.jit(lambda x: x + k)(1.5).block_until_ready()
  step(2.25)
  assert not calls  # It was short.
  monkeypatch.setattr(parallel, 'LONG', 0.0)
  step(3.75)
  assert calls == [1]
