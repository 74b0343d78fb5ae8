#!/usr/bin/env bash
# Everything that CI checks: lint, format, types, tests. Arguments go to pytest:
#
#   bash scripts/test.sh [-m "not slow"] [tests/test_pairs.py] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then # the tests compare bits, of CPU builds
    export ONLINE_PO_BACKEND=cpu ONLINE_PO_VENV=${ONLINE_PO_VENV:-.venv-cpu} CUDA_VISIBLE_DEVICES=
fi
bash scripts/setup.sh
PATH=$(realpath -m "${ONLINE_PO_VENV:-.venv}")/bin:$PATH
export PATH HF_HUB_OFFLINE=1 # nothing here needs a model hub

# As modules: a script in an environment remembers the folder it was made in, and a checkout may be moved.
python -m ruff check
python -m ruff format --check
python -m mypy
python scripts/make_demo_model.py # the quickstart's model is made as on a new machine, and looked at
if (($#)); then
    exec python -m pytest "$@"
fi
alone="vllm or distributed" # engines, Ray and groups of processes: one test at a time
python -m pytest -m "not ($alone)" --numprocesses 2 --dist loadfile
python -m pytest -m "$alone"
