#!/usr/bin/env bash
# The whole demonstration on one machine, a CPU is enough: environment, model, prompts, run, report.
# Stopped at any point, the same command goes on from there. Settings may follow:
#
#   bash scripts/quickstart.sh [SECTION.KEY=VALUE]...       such as loop.rounds=1 run.name=short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
PATH=$(realpath -m "${ONLINE_PO_VENV:-.venv}")/bin:$PATH
ONLINE_PO_CACHE=${ONLINE_PO_CACHE:-$HOME/.cache/online-po}
ONLINE_PO_CACHE=$(realpath -m "$ONLINE_PO_CACHE")
export PATH ONLINE_PO_CACHE HF_HUB_OFFLINE=1 # nothing here needs a model hub

python scripts/make_demo_model.py
python scripts/make_prompts.py
online-po run configs/quickstart.yaml \
    model.path="$ONLINE_PO_CACHE/smollm2-135m-instruct" \
    prompts.path="$ONLINE_PO_CACHE/quickstart/train.jsonl" \
    prompts.heldout_path="$ONLINE_PO_CACHE/quickstart/heldout.jsonl" \
    "$@"

folder=runs name=quickstart
for setting in "$@"; do
    case $setting in
        run.dir=*) folder=${setting#*=} ;;
        run.name=*) name=${setting#*=} ;;
    esac
done
echo "quickstart: the report is $(realpath -m "$folder/$name/report.html")"
