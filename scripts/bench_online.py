"""The whole loop against TRL's OnlineDPOTrainer: judged pairs trained per second.

    python scripts/bench_online.py --model FOLDER --trl-python PYTHON

Same model, prompts, judge (a Python function), two responses a prompt, token limits, temperature and optimizer batch.
Ours runs fully online (a sync after each optimizer step, as TRL) and semi-online (after four); each round is committed
to disk, which TRL does not do. TRL generates with transformers in the training process, and trains without gradient
checkpointing: what was fastest for it here; once as its users start it, once in a process that has what our learners'
processes have (`online_po.cpu`: allocator, matrix products). What is timed begins after a first round, or step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from bench_learner import TRL, faster_trl, process_settings
from own_process import MeasurementError, measure

KINDS = {"online": 1, "semi-online": 4}
"""Optimizer steps between syncs."""


def score(prompt: list[dict[str, str]], response: str, metadata: dict[str, Any]) -> float:
    """The judge: how many different words, a little less for each letter. Ties are rare."""
    words = response.lower().split()
    return len(set(words)) - 1e-3 * len(response)


def ours(task: dict[str, Any]) -> dict[str, float]:
    """Pairs and seconds of the rounds but the first, and where the seconds went."""
    from online_po import Config, run

    steps, batch = KINDS[task["kind"]], task["batch"]
    rounds = 1 + max(1, task["steps"] // steps)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "run": {"name": "bench", "dir": folder, "tensorboard": False},
            "model": {"path": task["model"]},
            "prompts": {"path": task["prompts"], "max_tokens": task["prompt_tokens"]},
            "loop": {"rounds": rounds, "prompts_per_round": batch * steps, "responses_per_prompt": 2},
            "generator": {
                "temperature": task["temperature"],
                "max_tokens": task["max_tokens"],
                "chunk_prompts": batch * steps,
                "dtype": task["generator_dtype"],
            },
            "judge": {"kind": "python", "function": "bench_online:score"},
            "pairs": {"strategy": "best_worst"},
            "loss": {"name": "sigmoid", "beta": 0.1},
            "reference": {"kind": "fixed"},
            "learner": {
                "global_batch_size": batch,
                "micro_batch_tokens": task["micro_batch_tokens"],
                "lora": {"rank": 16} if task["mode"] == "lora" else None,
                "compute_dtype": task["dtype"],
            },
            "eval": {"every": 0},
        }
        run(Config.parse(config))
        files = sorted(Path(folder).glob("bench/rounds/*/metrics.jsonl"))
        rounds_made = [json.loads(path.read_text().splitlines()[-1]) for path in files]
    timed = [row for row in rounds_made if row["round"] > 1]
    found = {"pairs": sum(row["pairs"] for row in timed), "seconds": sum(row["wall_seconds"] for row in timed)}
    for row in timed:
        for phase, seconds in (row["phase_seconds"] | {"idle": row["idle_seconds"]}).items():
            found[f"{phase}_s"] = found.get(f"{phase}_s", 0.0) + seconds
    return found


def measured(task: dict[str, Any], trl_python: str) -> dict[str, Any]:
    """What a process of its own found. Raises MeasurementError."""
    scripts = str(Path(__file__).parent.absolute())
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([scripts, os.environ.get("PYTHONPATH", "")])}
    if task["kind"] not in TRL:
        return measure(__file__, task, variables=variables)
    variables |= process_settings(task["kind"], task["threads"])
    return measure(f"{scripts}/trl_speed.py", task, trl_python, variables)


def show(figures: list[dict[str, Any]]) -> Table:
    table = Table("mode", "", "pairs", "seconds", "pairs/s", "against TRL", "seconds by phase")
    for row in figures:
        base = faster_trl([r for r in figures if r["mode"] == row["mode"]], "pairs_per_s")
        ratio = f"{row['pairs_per_s'] / base['pairs_per_s']:.2f}x" if base is not None else ""
        phases = ", ".join(
            f"{name[:-2]} {row[name]:.1f}" for name in row if name.endswith("_s") and name[:5] != "pairs"
        )
        cells = (row["mode"], row["kind"], f"{row['pairs']:.0f}", f"{row['seconds']:.1f}", f"{row['pairs_per_s']:.3f}")
        table.add_row(*cells, ratio, phases)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--prompts", type=Path, help="JSONL with a column prompt; default: the quickstart's")
    parser.add_argument("--kinds", nargs="+", choices=[*TRL, *KINDS], default=[*TRL, *KINDS])
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimizer step (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a response (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the learners")
    parser.add_argument("--generator-dtype", choices=["float32", "bfloat16"], default="float32", help="of our engine")
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
    figures, console, failed = list[dict[str, Any]](), Console(), False
    with tempfile.TemporaryDirectory() as folder:
        prompts = args.prompts
        if prompts is None:
            prompts = Path(folder) / "prompts" / "train.jsonl"
            command = [sys.executable, str(Path(__file__).with_name("make_prompts.py")), "--out", str(prompts.parent)]
            subprocess.run(command, check=True, capture_output=True)
        for mode in args.modes:
            for kind in args.kinds:
                task = {
                    "kind": kind,
                    "mode": mode,
                    "model": str(args.model.absolute()),
                    "prompts": str(prompts.absolute()),
                    "prompt_tokens": 128,
                    "max_tokens": args.max_tokens,
                    "temperature": 0.8,
                    "batch": args.batch,
                    "steps": args.steps,
                    "dtype": args.dtype,
                    "generator_dtype": args.generator_dtype,
                    "threads": args.threads,
                    "micro_batch_tokens": args.micro_batch_tokens,
                }
                began = time.perf_counter()
                try:
                    with console.status(f"{mode}, {kind}"):
                        found = measured(task, args.trl_python)
                except MeasurementError as error:
                    console.print(f"{mode}, {kind}: {error.output or error}", markup=False)
                    failed = True
                    continue
                figures.append({"mode": mode, "kind": kind, "pairs_per_s": found["pairs"] / found["seconds"], **found})
                console.print(f"{mode}, {kind}: {time.perf_counter() - began:.0f} s in all")
                if args.json:
                    args.json.write_text(json.dumps(figures, indent=1))
    console.print(show(figures))
    if failed:
        raise SystemExit("some measurements failed, see above")


if __name__ == "__main__":
    main()
