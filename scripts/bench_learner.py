"""The learner alone: response tokens trained per second and peak memory, with shared prompts, plain rows, and TRL.

    python scripts/bench_learner.py --model FOLDER                       # ours both ways, and TRL where it is installed
    python scripts/bench_learner.py --model FOLDER --trl-python PYTHON   # TRL of another environment
    python scripts/bench_learner.py --model FOLDER --profiles equal_2 long_prompt_8 --modes full

Each measurement is a process of its own on the same random token ids; they take turns, so that what else the machine
does meets all of them. Optimizer steps of 8 pairs are timed after a first one; reference log-probabilities are there
before, in all. A prompt has k responses, which make k / 2 pairs. TRL's DPOTrainer runs without gradient checkpointing
(its fastest here), 8 pairs a device batch: once as its users start it, once in a process that has what our ranks'
processes have (`online_po.cpu`: allocator, matrix products). Memory is the process's peak during the steps, weights
and optimizer included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from own_process import MeasurementError, measure

PAIRS = 8
"""Of an optimizer step."""
MIXED = ((24, 400), (16, 200))
"""Least and most tokens of a prompt, and of a response."""
SHAPES = {
    "equal": ((128, 128), (128, 128)),
    "short_prompt": ((32, 32), (224, 224)),
    "long_prompt": ((512, 512), (64, 64)),
    "mixed": MIXED,
}
PROFILES = ["equal_2", *(f"{shape}_{k}" for shape in ("short_prompt", "long_prompt", "mixed") for k in (2, 4, 8))]
KINDS = {"shared": True, "plain": False}
TRL = ("trl", "trl tuned")
"""As its users start it, and in a process like ours."""


def make_pairs(profile: str, steps: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """`PAIRS` pairs for each step, prompt after prompt."""
    shape, k = profile.rsplit("_", 1)
    prompt_lengths, response_lengths = SHAPES[shape]
    rng, rows = np.random.default_rng(0), list[dict[str, list[int]]]()

    def tokens(lengths: tuple[int, int]) -> list[int]:
        return rng.integers(100, vocabulary, rng.integers(lengths[0], lengths[1] + 1)).tolist()

    while len(rows) < PAIRS * steps:
        prompt = tokens(prompt_lengths)
        for _ in range(int(k) // 2):
            sides = {side: tokens(response_lengths) for side in ("chosen_token_ids", "rejected_token_ids")}
            rows.append({"prompt_token_ids": prompt} | sides)
    return rows


def reset_peak() -> None:
    """From here on `peak_gib` counts."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step but the first, response tokens of each, and peak memory, of our learner."""
    import pyarrow as pa
    import torch

    from online_po import cpu
    from online_po.learner import TorchLearner
    from online_po.loss_configs import LOSS_BY_NAME
    from online_po.sections import LearnerConfig, ModelConfig
    from online_po.tables import PAIR_SCHEMA
    from online_po.types import Policy

    torch.set_num_threads(task["threads"])
    cpu.use_onednn_products()
    pairs = pa.Table.from_pylist(task["pairs"], schema=PAIR_SCHEMA)
    settings = {"global_batch_size": PAIRS, "micro_batch_tokens": task["micro_batch_tokens"]}
    settings["compute_dtype"] = task["dtype"]
    lora = {"rank": 16} if task["mode"] == "lora" else None
    config = LearnerConfig.model_validate(settings | {"lora": lora, "prefix_sharing": KINDS[task["kind"]]})
    model = ModelConfig.model_validate({"path": task["model"]})
    losses = [LOSS_BY_NAME["sigmoid"]()]  # type: ignore[call-arg]
    learner = TorchLearner(model, config, losses, seed=0, rounds=1)
    reference = {side: np.zeros(len(pairs), dtype=np.float32) for side in ("chosen", "rejected")}
    for batch in learner.logps(pairs, Policy(version=0, path=Path(task["model"]))):
        for side, values in reference.items():
            values[batch["row"]] = batch[side]
    reset_peak()
    steps = list(learner.update(1, pairs, reference, None))
    return {
        "seconds": [step["seconds"] for step in steps[1:]],
        "tokens": [step["tokens"] for step in steps[1:]],
        "peak_gib": peak_gib(),
    }


def process_settings(kind: str, threads: int) -> dict[str, str]:
    """Variables of a process that measures."""
    from online_po import cpu

    if kind == "trl":
        return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return cpu.variables(threads)


def faster_trl(rows: list[dict[str, Any]], rate: str) -> dict[str, Any] | None:
    """The faster of TRL's rows; None where it did not run."""
    return max((row for row in rows if row["kind"] in TRL), key=lambda row: row[rate], default=None)


def has_trl(python: str) -> bool:
    return subprocess.run([python, "-c", "import trl"], capture_output=True).returncode == 0


def show(figures: list[dict[str, Any]]) -> Table:
    """Each kind beside the faster TRL of its profile, where it ran, else beside plain rows."""
    table = Table("profile", "mode", "", "response tokens/s", "speed", "peak, GiB", "memory")
    for row in figures:
        others = [r for r in figures if (r["profile"], r["mode"]) == (row["profile"], row["mode"])]
        base = faster_trl(others, "tokens_per_s") or others[-1]
        table.add_row(
            row["profile"],
            row["mode"],
            row["kind"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}x",
            f"{row['peak_gib']:.2f}",
            f"{row['peak_gib'] / base['peak_gib']:.2f}x",
            end_section=row is others[-1],
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=PROFILES, help="default: all")
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *TRL], default=[*KINDS, *TRL], help="default: all")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="processes of each kind (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix work")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="learner.micro_batch_tokens (%(default)s)")
    parser.add_argument("--trl-python", default=sys.executable, help="a Python that has TRL")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        args.out.write_text(json.dumps(ours(json.loads(args.task.read_text()))))
        return
    if args.model is None:
        parser.error("--model is needed: a folder that transformers loads")
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    with_trl = has_trl(args.trl_python)
    pythons = dict.fromkeys(KINDS, sys.executable) | (dict.fromkeys(TRL, args.trl_python) if with_trl else {})
    kinds = {kind: python for kind, python in pythons.items() if kind in args.kinds}
    if left := [kind for kind in args.kinds if kind not in kinds]:
        print(f"left out, as {args.trl_python} has no TRL: {', '.join(left)}")
    if not kinds:
        parser.error("nothing is left to measure; give --trl-python a Python that has TRL")
    cases = [(profile, mode) for profile in args.profiles for mode in args.modes]
    figures, console, failed = list[dict[str, Any]](), Console(), False
    for profile, mode in track(cases, "measuring", console=console):
        task: dict[str, Any] = {
            "model": str(args.model.absolute()),
            "pairs": make_pairs(profile, args.steps + 1, vocabulary),
            "batch": PAIRS,
            "mode": mode,
            "dtype": args.dtype,
            "threads": args.threads,
            "micro_batch_tokens": args.micro_batch_tokens,
        }
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(args.repeats):
            for kind, python in kinds.items():
                script = str(Path(__file__).with_name("trl_speed.py")) if kind in TRL else __file__
                variables = {"HF_HUB_OFFLINE": "1"} | process_settings(kind, args.threads)
                try:
                    found[kind].append(measure(script, task | {"kind": kind}, python, variables))
                except MeasurementError as error:
                    console.print(f"{profile}, {mode}, {kind}: {error.output or error}", markup=False)
                    failed = True
        rows = []
        for kind, runs in found.items():
            if rates := [t / s for run in runs for t, s in zip(run["tokens"], run["seconds"], strict=True)]:
                row = {"profile": profile, "mode": mode, "kind": kind, "tokens_per_s": statistics.median(rates)}
                rows.append(row | {"peak_gib": max(run["peak_gib"] for run in runs)})
        figures += rows
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))
        console.print(show(rows))
    console.rule("all")
    console.print(show(figures))
    if failed:
        raise SystemExit("some measurements failed, see above")


if __name__ == "__main__":
    main()
