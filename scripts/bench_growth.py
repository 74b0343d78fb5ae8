"""How time and memory grow: of a round with the number of its prompts, of the learner with lengths and model size.

    python scripts/bench_growth.py                       # all axes, up to a million prompts
    python scripts/bench_growth.py --axes prompts length --most 100000

Each point is a process of its own. A round runs with fake parts (the fakes' own time is taken off), so that it is the
loop that is measured; the learner is the real one on random models and random tokens. The exponent is the slope of log
time, or of log memory growth, over log size in the upper half of the points, by least squares: 1 is linear. Nothing but
attention (`length`, at its upper end) should be above it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from own_process import measure

AXES: dict[str, tuple[str, list[int]]] = {
    "prompts": ("prompts of a round x 2 responses (fakes)", [100, 1_000, 10_000, 100_000, 1_000_000]),
    "responses": ("responses to each of 1,000 prompts (fakes)", [2, 4, 8, 16, 32, 64]),
    "tokens": ("most tokens of a response, 5,000 x 2 (fakes)", [8, 32, 128, 512]),
    "length": ("tokens of a response (learner)", [64, 128, 256, 512, 1024]),
    "branches": ("responses that share a prompt (learner)", [2, 4, 8, 16, 32]),
    "size": ("weights of the model (learner)", [64, 128, 256, 512]),
}


def of_a_round(axis: str, size: int) -> tuple[float, float, float]:
    from bench_loop import run

    loop = {"rounds": 1, "prompts_per_round": 1000, "responses_per_prompt": 2}
    generator = {"chunk_prompts": 256, "max_tokens": 8}
    match axis:
        case "prompts":
            loop["prompts_per_round"] = size
        case "responses":
            loop["responses_per_prompt"] = size
        case "tokens":
            loop["prompts_per_round"], generator["max_tokens"] = 5000, size
    with tempfile.TemporaryDirectory() as folder:
        seconds, fake, growth = run(Path(folder), loop["prompts_per_round"], loop=loop, generator=generator)
    return size, seconds - fake, growth


def of_a_learner(axis: str, size: int) -> tuple[float, float, float]:
    """Seconds of an optimizer step: the least of three after a first one."""
    import pyarrow as pa
    import torch

    from bench_learner import peak_gib, reset_peak
    from make_tiny_model import make_tiny_model
    from online_po.learner import TorchLearner
    from online_po.loss_configs import LOSS_BY_NAME
    from online_po.sections import LearnerConfig, ModelConfig
    from online_po.tables import PAIR_SCHEMA

    hidden = size if axis == "size" else 256
    length = size if axis == "length" else 128
    pairs = (size if axis == "branches" else 2) // 2
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(4, 384, count).tolist()

    rows = []
    for _ in range(4 * 4):  # four steps of four prompts
        prompt = tokens(64)
        for _ in range(pairs):
            sides = {"chosen_token_ids": tokens(length), "rejected_token_ids": tokens(length)}
            rows.append({"prompt_token_ids": prompt} | sides)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", hidden=hidden, layers=8, max_length=2048)
        given = {"global_batch_size": 4 * pairs, "examples_together": pairs, "micro_batch_tokens": 2048}
        losses = [LOSS_BY_NAME["simpo"]()]  # type: ignore[call-arg]
        source = ModelConfig.model_validate({"path": str(model)})
        learner = TorchLearner(source, LearnerConfig.model_validate(given), losses, seed=0, rounds=1)
        weights = sum(p.numel() for p in learner.model.parameters())
        reset_peak()
        before = peak_gib()
        torch.set_num_threads(2)
        table = pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)
        _, *steps = [step["seconds"] for step in learner.update(1, table, None, None)]
    return weights if axis == "size" else size, min(steps), peak_gib() - before


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log value over log size."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--most", type=int, default=1_000_000, help="prompts of a round (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task.read_text())
        measured = of_a_learner if "(learner)" in AXES[task["axis"]][0] else of_a_round
        args.out.write_text(json.dumps({"found": measured(task["axis"], task["size"])}))
        return
    console, figures = Console(), dict[str, Any]()
    points = [(axis, size) for axis in args.axes for size in AXES[axis][1] if axis != "prompts" or size <= args.most]
    for axis, size in track(points, "measuring", console=console):
        figures.setdefault(axis, []).append(measure(__file__, {"axis": axis, "size": size})["found"])
    table = Table("axis", "size", "seconds", "GiB", "exponent of time", "of memory")
    for axis, found in figures.items():
        sizes, seconds, memory = (list(column) for column in zip(*found, strict=True))
        for i, (size, spent, held) in enumerate(found):
            ends = ["", ""]
            if i == len(found) - 1:
                # Small points are mostly what a process costs once.
                upper = slice(-max(2, math.ceil(len(found) / 2)), None)
                ends = [f"{exponent(sizes[upper], values[upper]):.2f}" for values in (seconds, memory)]
            label = AXES[axis][0] if i == 0 else ""
            table.add_row(label, f"{size:,.0f}", f"{spent:.3f}", f"{held:.3f}", *ends, end_section=i == len(found) - 1)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
