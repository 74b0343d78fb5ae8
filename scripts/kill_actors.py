#!/usr/bin/env python3
"""Kills a run's actors while they work, and compares what the run leaves with an undisturbed one.

    python scripts/kill_actors.py FOLDER [--kills 20] [--seed 0] [--engine transformers] [--replicas 2] [--ranks 1]

Two runs of a tiny model on real Ray, one round for each kill of a kind. In the second one every kind of actor (engine,
judge process, learner rank) is killed so often by SIGKILL at times drawn by seed, most of them in the middle of a call.
Prints a table; exits with 1 where anything of the final ledgers differs, a response is missing or there twice, a kind
of actor was killed less often than asked for, or something was killed and never came back (see `not_back`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from compare_runs import compare_runs
from make_tiny_model import make_tiny_model

KINDS = {"generator": "GeneratorReplica", "judge": "_JudgeWorker", "learner": "_Rank"}
"""Actors by the class that Ray names their processes after."""
JUDGE = '''
import time

def letters(prompt, response, metadata):
    """Share of lower-case letters and spaces; slow enough to be caught at it."""
    time.sleep(0.05)
    return sum(c.islower() or c == " " for c in response) / max(8, len(response))
'''
STARTING = {"__init__", "start", "ready", "rendezvous", "pulse"}
"""Calls that are no work; a pulse is felt while an actor does any, or none."""
PATIENCE_S = 300.0
"""So long the killer waits for an actor of a kind to be at work."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One actor that was killed."""

    kind: str
    call: str
    """What it was at; empty between two calls."""
    pid: int


def make_run(folder: Path, rounds: int, engine: str, replicas: int, ranks: int, model: Path) -> Path:
    """A run's config and everything it names, in a folder, but for the prompts, which lie beside it."""
    folder.mkdir(parents=True)
    (folder / "letters_judge.py").write_text(JUDGE)
    rows = [{"prompt": f"say something about number {i}"} for i in range(40)]
    prompts = folder.parent / "prompts.jsonl"  # one file for both runs, whose configs are compared
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator: dict[str, Any] = {"engine": engine, "replicas": replicas, "max_tokens": 32, "chunk_prompts": 2}
    if engine == "vllm":
        generator["cpu_kv_cache_gib"] = 0.2
    config = {
        "run": {"name": "run", "dir": str(folder), "seed": 3, "tensorboard": False},
        "model": {"path": str(model)},
        "prompts": {"path": str(prompts), "heldout_size": 4, "max_tokens": 96},
        "loop": {"rounds": rounds, "prompts_per_round": 8, "responses_per_prompt": 2},
        "generator": {**generator, "threads": 1},
        "judge": {"kind": "python", "function": "letters_judge:letters", "concurrency": 2},
        "learner": {
            "learning_rate": 1e-4, "global_batch_size": 2, "epochs": 2, "threads": 1, "ranks": ranks,
        },
        "eval": {"every": 5},
        "ray": {"max_restarts": 10_000},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start_run(config: Path) -> subprocess.Popen[str]:
    """The run, in a process of its own."""
    with (config.parent / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "online_po.cli", "run", str(config)],
            cwd=config.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def actors_of(run: int) -> dict[str, list[tuple[psutil.Process, str]]]:
    """Kind -> (process, the call it is at) of the actors that a run started; `run`: its process id."""
    found: dict[str, list[tuple[psutil.Process, str]]] = {kind: [] for kind in KINDS}
    for process in psutil.Process(run).children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
        except psutil.Error:  # it ended meanwhile
            continue
        for kind, name in KINDS.items():
            if match := re.match(rf"ray::{name}(?:\.(\w+))?", title):
                found[kind].append((process, match[1] or ""))
    return found


def kill_one(run: subprocess.Popen[str], kind: str, rng: random.Random, at_work: bool = True) -> Kill | None:
    """Kills an actor of a kind; `at_work`: in the middle of a call, once it has started. None where the run ended."""
    delay, deadline = rng.uniform(0, 0.03), time.monotonic() + PATIENCE_S
    while run.poll() is None and time.monotonic() < deadline:
        actors = actors_of(run.pid)[kind]
        if at_work:
            actors = [(process, call) for process, call in actors if call and call not in STARTING]
        if actors:
            time.sleep(delay)
            process, call = rng.choice(actors)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
            return Kill(kind=kind, call=call, pid=process.pid)
        time.sleep(0.003)
    return None


def kill_actors(run: subprocess.Popen[str], kills: int, seed: int) -> list[Kill]:
    """Kills each kind of actor so often while a run goes on, three of four times in the middle of a call."""
    rng = random.Random(seed)
    made: list[Kill] = []
    for _ in range(kills):
        for kind in rng.sample(list(KINDS), len(KINDS)):
            kill = kill_one(run, kind, rng, at_work=rng.random() < 0.75)
            if kill is None:
                return made
            made.append(kill)
            time.sleep(rng.uniform(0, 2))
    return made


def responses(run: Path) -> Counter[tuple[str, str, int]]:
    """How often each response is there, by (round, prompt, index)."""
    found: Counter[tuple[str, str, int]] = Counter()
    for path in run.glob("rounds/*/responses/*.parquet"):
        table = pq.read_table(path, columns=["prompt_id", "index"])
        found.update((path.parts[-3], row["prompt_id"], row["index"]) for row in table.to_pylist())
    return found


def restarts(run: Path) -> list[dict[str, Any]]:
    """What the timeline says of actors that were started again."""
    lines = [json.loads(line) for line in (run / "timeline.jsonl").open()]
    return [line for line in lines if "restart" in line]


def not_back(
    kills: Sequence[Kill], again: Sequence[dict[str, Any]], kills_each: int, actors: dict[str, int]
) -> list[str]:
    """What is wrong with kills and restarts. `actors`: how many there are of a kind.

    Each kind must have been killed so often, and what was killed at work must have come back. Kills of what was still
    starting need not have a restart each: a place is back once, however often it was killed on the way. Nor the last
    kill of each actor, after which the run may have ended without it; and a learner comes back whole, so that one
    restart may be for a kill of each of its ranks."""
    wrong = []
    for kind in KINDS:
        own = [kill for kill in kills if kill.kind == kind]
        back = sum(kind in line["restart"] for line in again)
        at_work = sum(bool(kill.call) and kill.call not in STARTING for kill in own)
        needed = math.ceil((at_work - actors[kind]) / (actors[kind] if kind == "learner" else 1))
        if len(own) < kills_each:
            wrong.append(f"{kind}: {len(own)} kills instead of {kills_each}")
        if back < needed:
            wrong.append(f"{kind}: {at_work} were killed at work, but only {back} came back")
    return wrong


def table(kills: Sequence[Kill], again: Sequence[dict[str, Any]]) -> str:
    """Kind, kills, those in the middle of a call (by call), restarts, and how long a restart took."""
    lines = [
        "| actor | kills | in the middle of | restarts | seconds until back, median (max) |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        own = [kill for kill in kills if kill.kind == kind]
        calls = Counter(kill.call for kill in own if kill.call)
        seconds = [float(line["seconds"]) for line in again if kind in line["restart"]]
        took = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"
        at = ", ".join(f"{call} {count}" for call, count in calls.most_common()) or "-"
        lines.append(f"| {kind} | {len(own)} | {at} | {len(seconds)} | {took} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = make_tiny_model(args.folder / "model")
    runs, made_kills = {}, list[Kill]()
    for name in ("whole", "killed"):
        config = make_run(args.folder / name, args.kills, args.engine, args.replicas, args.ranks, model)
        began, process = time.monotonic(), start_run(config)
        kills = kill_actors(process, args.kills, args.seed) if name == "killed" else []
        if process.wait():
            print((config.parent / "log").read_text()[-3000:])
            return 1
        runs[name], made_kills = config.parent / "run", kills
        print(f"{name}: {time.monotonic() - began:.0f} s, {len(kills)} kills", flush=True)
    print(table(made_kills, restarts(runs["killed"])))
    actors = {"generator": args.replicas, "judge": 1, "learner": args.ranks}
    missing = not_back(made_kills, restarts(runs["killed"]), args.kills, actors)
    for what in missing:
        print(what)
    wrong = compare_runs(runs["whole"], runs["killed"])
    for difference in wrong:
        print(difference)
    made = responses(runs["killed"])
    expected = responses(runs["whole"])
    print(f"files that differ: {len(wrong)}")
    print(f"responses: {len(made)} of {len(expected)}, more than once: {sum(n > 1 for n in made.values())}")
    return int(bool(wrong or missing) or made != expected or set(made.values()) != {1})


if __name__ == "__main__":
    sys.exit(main())
