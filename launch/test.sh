#!/usr/bin/env bash
# Makes .venv, installs hatjax with what its tests need, runs them.
#   bash launch/test.sh [arguments of pytest]
#   PYTHON=python3.12 bash launch/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
  sys.exit('hatjax needs Python 3.11 or 3.12, this is %d.%d. Set PYTHON to '
           'one, e.g. PYTHON=python3.12 bash launch/test.sh'
           % sys.version_info[:2])
PY
  "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
