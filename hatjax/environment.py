"""What a run was computed with: packages, devices, commit, compiler flags."""

import os
import pathlib
import platform
import subprocess
from importlib import metadata

import jax

PACKAGES = (
  'hatjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain',
  'dm-pix', 'chex', 'einops', 'numpy', 'opencv-python-headless',
)


def describe():
  """A dict that json can hold; equal ones should compute equal bits."""
  return {**machine(), 'commit': _commit()}


def machine():
  """`describe` without the code."""
  device = jax.devices()[0]
  return {
    'packages': {name: _version(name) for name in PACKAGES},
    'python': platform.python_version(),
    'system': f'{platform.system()} {platform.machine()}',
    'devices': f'{jax.device_count()} x {device.device_kind}',
    'platform': f'{device.platform} {device.client.platform_version}',
    'processes': jax.process_count(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'jax_options': {
      k: v for k, v in sorted(os.environ.items())
      if k.startswith(('JAX_', 'FLAX_'))
      and not k.endswith(('_DIR', '_ADDRESS'))
    },
  }


def cores():
  """Those that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # Linux alone knows it.
    return os.cpu_count()


def _version(name):
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'absent'


def _commit():
  """The commit of a checkout, '+' behind it where files differ; '' if none."""
  folder = pathlib.Path(__file__).resolve().parents[1]
  if not (folder / '.git').exists():
    return ''

  def git(*words):
    command = ['git', '-C', str(folder), *words]
    return subprocess.run(
      command, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return ''


def differences(old, new):
  """'jax: 0.10.0 -> 0.10.1' for every entry of `describe` that differs."""
  known = old.get('packages', {})  # Older entries list fewer.
  flat = lambda d: {k: v for k, v in d.items() if k != 'packages'} | {
    k: v for k, v in d.get('packages', {}).items() if k in known
  }
  old, new = flat(old), flat(new)
  return [
    f'{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}'
    for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
  ]
