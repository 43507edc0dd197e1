"""The floors of the package: imports point down, configs stay light."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = 'train generate evaluate benchmark prepare convert app'.split()
FLOORS = (
  dict.fromkeys(COMMANDS, 4) | {'init_from': 3.5, 'foreign': 3.5}
  | {'replay': 3.5}
  | dict.fromkeys(('runs', 'comparison', 'ablation'), 3)
  | dict.fromkeys((
    'methods', 'data', 'parallel', 'workdir', 'validation', 'extractors',
    'score_report',
  ), 2)
  | dict.fromkeys(('nets', 'state', 'face_embedding', 'scores', 'guard'), 1)
  | {
    'cache': 0.3, 'weights': 0.4, 'programs': 1.5,
    'photos': 0.5, 'driving': 2.2, 'sharpening': 2.2, 'remake': 2.5,
    'provenance': 1.5, 'live': 3.5, 'page': 3.7,
    'exported': 3.2, 'export': 3.5,
  }
)
SIDEWAYS = {
  ('video', 'encoders'), ('faces', 'video'),
  ('nets', 'nets'), ('methods', 'methods'),
  ('clips', 'video'), ('sound', 'video'),
  ('records', 'clips'), ('records', 'faces'), ('records', 'video'),
  ('synthetic_faces', 'synthetic_faces'), ('synthetic_faces', 'command'),
  ('synthetic_faces', 'video'),
  ('train', 'prepare'),  # makes the synthetic faces on first use
}


def imported(path):
  """Names under hatjax that a file imports, as ('nets', 'hat_cgan')."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split('.')
      if parts[0] == 'hatjax':
        for alias in node.names:
          yield tuple(parts[1:] + [alias.name])
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith('hatjax.'):
          yield tuple(alias.name.split('.')[1:])


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'hatjax').rglob('*.py')),
  ids=lambda p: str(p.relative_to(ROOT)),
)
def test_imports_point_down(path):
  me = path.relative_to(ROOT / 'hatjax').with_suffix('').parts
  if me == ('__init__',):
    return
  wrong = []
  for name in imported(path):
    mine, theirs = FLOORS.get(me[0], 0), FLOORS.get(name[0], 0)
    if mine > theirs or (me[0], name[0]) in SIDEWAYS - {('nets', 'nets')}:
      continue
    # Nets share only blocks; methods never import one another.
    blocks = ('layers', 'attention', 'norms', 'winograd', 'lowerings')
    if me[0] == name[0] == 'nets' and name[1] in blocks:
      continue
    wrong.append('.'.join(name))
  assert wrong == []


def test_methods_do_not_import_one_another():
  wrong = [
    (path.name, name)
    for path in (ROOT / 'hatjax' / 'methods').glob('*.py')
    if path.name != '__init__.py'
    for name in imported(path) if name[0] == 'methods'
  ]
  assert wrong == []


def test_datasets_and_configs_import_little():
  floor_0 = {'faces', 'video', 'synthetic_faces', 'clips'}
  for path in (ROOT / 'datasets').glob('*.py'):
    assert {name[0] for name in imported(path)} <= floor_0
  allowed = {'ml_collections', 'configs', 'importlib', 'pathlib'}
  for path in (ROOT / 'configs').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        assert {a.name.split('.')[0] for a in node.names} <= allowed, path
      if isinstance(node, ast.ImportFrom):
        assert node.module.split('.')[0] in allowed, path


def test_import_hatjax_is_light():
  heavy = 'import sys, hatjax; print(sorted({"jax", "cv2"} & set(sys.modules)))'
  out = subprocess.run(
    [sys.executable, '-c', heavy], capture_output=True, text=True, cwd=ROOT
  )
  assert out.stdout.strip() == '[]', out.stderr


def test_every_package_is_in_the_wheel():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  listed = project['tool']['setuptools']['packages']
  folders = {
    '.'.join(p.parent.relative_to(ROOT).parts)
    for p in (ROOT / 'hatjax').rglob('__init__.py')
  }
  assert {p for p in listed if '._' not in p} == folders


def test_files_and_functions_are_short():
  for path in (ROOT / 'hatjax').rglob('*.py'):
    assert len(path.read_text().splitlines()) <= 500, path
