#!/usr/bin/env bash
# Makes .venv in the project's folder and installs hatjax there.
#   bash launch/install.sh [extras]      e.g. cuda, or test,cuda, or test cuda
#   PYTHON=python3.12 bash launch/install.sh
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
  sys.exit('error: hatjax needs Python 3.11 or 3.12, this is %d.%d. Set PYTHON, '
           'e.g. PYTHON=python3.12 bash launch/install.sh' % sys.version_info[:2])
PY
  echo 'Making .venv'
  "${PYTHON:-python3}" -m venv .venv
fi
# Nothing to do where this pyproject.toml is installed already.
extras=$(IFS=,; echo "$*")
stamp=.venv/installed-${extras:-base}
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo 'Installing (a minute or two)'
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -e ".${extras:+[$extras]}"
  touch "$stamp"
fi
