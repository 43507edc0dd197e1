"""The wheel holds what a clone holds."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import ROOT


def test_extras_are_those_the_readme_tells_of():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = project['optional-dependencies']
  assert set(extras) == {
    'cuda', 'tpu', 'app', 'convert', 'test', 'reference',
  }
  text = (ROOT / 'README.md').read_text()
  for extra in ('cuda', 'tpu', 'app', 'test'):
    assert f"'.[{extra}]'" in text
  # Nothing without a lowest version, but what JAX's own extras decide.
  bare = [x for x in project['dependencies'] if '>=' not in x]
  assert bare == []


@pytest.mark.slow
def test_a_wheel_prepares_trains_and_generates(tmp_path):
  source, site, here = (tmp_path / x for x in ('source', 'site', 'here'))
  for name in ('hatjax', 'configs', 'datasets'):
    shutil.copytree(ROOT / name, source / name)
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source / name)
  here.mkdir()
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
  subprocess.run([*pip, 'wheel', '--no-deps', '-w', tmp_path, source],
                 check=True)
  (wheel,) = tmp_path.glob('hatjax-*.whl')
  subprocess.run([*pip, 'install', '--no-deps', '--target', site, wheel],
                 check=True)
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {
    'PYTHONPATH': str(site), 'TFDS_DATA_DIR': str(here / 'records'),
  }

  def python(*words):
    done = subprocess.run(
      [sys.executable, *words], cwd=here, env=environment,
      capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

  assert str(site) in python('-c', 'import hatjax; print(hatjax.__file__)')
  python('-m', 'hatjax.prepare', 'synthetic', '--num_identities', '12',
         '--num_frames', '4')
  train = 'configs/synthetic.py:tiny'
  settings = {
    'data.name': 'synthetic/128-i12-f4-s0', 'train.num_steps': 2,
    'train.ckpt_every': 2, 'train.sample_every': 2, 'train.log_every': 1,
  }
  python('-m', 'hatjax.train', '--config', train, '--workdir', 'run', *(
    f'--config.hat_cgan.{key}={value}' for key, value in settings.items()
  ))
  out = python(
    '-m', 'hatjax.generate', '--workdir', 'run', '--split', 'test',
    '--num_images', '1', '--label', 'happy', '--num_frames', '3', '--out',
    'a.gif',
  )
  assert out == 'a.gif\n' and (here / 'a.gif').stat().st_size > 100
