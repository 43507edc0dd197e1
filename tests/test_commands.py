"""Every command: --help, pipes, exit codes, and no chatter."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COMMANDS = (
  'train', 'generate', 'evaluate', 'benchmark', 'prepare', 'convert', 'app',
  'synthetic_faces',
)


@pytest.fixture(scope='module')
def helps():
  """{command: (exit code, stdout, stderr)}, asked for all at once."""
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  started = {
    name: subprocess.Popen(
      [sys.executable, '-m', f'hatjax.{name}', '--help'], cwd=ROOT, text=True,
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) for name in COMMANDS
  }
  return {
    name: (*reversed(process.communicate()), process.returncode)
    for name, process in started.items()
  }


@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_short_and_has_an_example(helps, name):
  err, out, code = helps[name]
  assert (code, err) == (0, '')
  assert f'python -m hatjax.{name} ' in out
  lines = out.splitlines()
  assert len(lines) <= 130 and max(map(len, lines)) <= 100
  # Groups of options under a heading each.
  assert re.search(r'^[a-z].*:$', out, re.M)
  assert '--helpfull' not in out and str(ROOT) not in out


def test_a_reader_may_leave_early():
  # Of a process that writes more than a pipe holds.
  code = (
    'import sys\nfrom hatjax import command\n'
    'def main():\n  for i in range(10**5): print(i)\n'
    'sys.exit(command.run(main))'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, cwd=ROOT, text=True,
  )
  assert process.stdout.readline() == '0\n'
  process.stdout.close()
  assert process.stderr.read() == ''
  assert process.wait() == 141


@pytest.mark.parametrize('words, code, message', [
  ('generate --workdir nowhere --image nowhere.jpg', 1, 'nowhere is not a run'),
  ('generate --workdir nowhere', 2, '--image'),
  ('train --config configs/nothing.py', 1, 'There are: configs/ck_plus.py'),
  ('app --workdir nowhere', 1, 'nowhere is not a run'),
  ('convert export --workdir nowhere', 1, 'nowhere is not a run'),
  ('prepare nothing', 2, 'Choose one of'),
])
def test_wrong_calls_end_with_one_line(words, code, message):
  pytest.importorskip('gradio') if words.startswith('app') else None
  done = subprocess.run(
    [sys.executable, '-m', f'hatjax.{words.split()[0]}', *words.split()[1:]],
    cwd=ROOT, capture_output=True, text=True,
  )
  assert done.returncode == code and done.stdout == ''
  assert message in done.stderr and 'Traceback' not in done.stderr
