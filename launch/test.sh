#!/usr/bin/env bash
# Makes .venv, installs hatjax with what its tests need, runs them.
#   bash launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
