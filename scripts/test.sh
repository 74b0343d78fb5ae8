#!/usr/bin/env bash
# Everything that CI checks: lint, format, types, tests. Arguments go to pytest:
#
#   bash scripts/test.sh [-m "not slow"] [tests/test_pairs.py] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
PATH=$(realpath -m "${ONLINE_PO_VENV:-.venv}")/bin:$PATH
export PATH HF_HUB_OFFLINE=1 # nothing here needs a model hub

python scripts/make_demo_model.py
ruff check
ruff format --check
mypy
pytest "$@"
