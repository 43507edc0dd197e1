#!/usr/bin/env bash
# Makes .venv, installs hatjax with what its tests need, runs them.
#   bash launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
# In CI the page is tried in a browser; elsewhere where there is one.
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && ! command -v chromium \
    >/dev/null && command -v apt-get >/dev/null; then
  timeout 180 sh -c 'apt-get update -qq &&
    apt-get install -y -qq --no-install-recommends chromium' >/dev/null 2>&1 ||
    echo 'note: no Chromium, the page is not tried in a browser' >&2
fi
bash launch/install.sh test,app
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
