"""What step checkpoints (checkpoint.every_steps) cost: one round's update with them and without, in turn.

    python scripts/bench_checkpoints.py                                   # a model of 15 M weights, all trained
    python scripts/bench_checkpoints.py --model FOLDER --every 2 8 --lora # a model of yours, an adapter

Shares of an update without them are shown. `held up`: what the learner spends on copying its state and on waiting for
the write before, measured directly. `wall`, `processor`: whole updates compared (medians), which also counts what
writing and hashing in the background take; where other work is on the machine, wall is noise and processor less so.
A step makes 8 pairs of 2 x 128 tokens unless told otherwise: what a checkpoint costs grows with the weights alone, what
a step costs with its tokens too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from make_tiny_model import make_tiny_model
from online_po.learner import TorchLearner
from online_po.loss_configs import LOSS_BY_NAME
from online_po.sections import LearnerConfig, ModelConfig
from online_po.step_checkpoints import StepPlan
from online_po.tables import PAIR_SCHEMA
from online_po.types import Policy


class Timed(TorchLearner):
    """Knows how long checkpoints held it up."""

    held_up = 0.0

    def _save_step(self, *args):  # type: ignore[no-untyped-def]
        begin = time.perf_counter()
        super()._save_step(*args)
        self.held_up += time.perf_counter() - begin


def make_pairs(count: int, tokens: int) -> pa.Table:
    """Pairs of which each side has so many tokens, half of them the prompt's."""
    rng = np.random.default_rng(0)
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    rows = [{name: rng.integers(4, 250, tokens // 2).tolist() for name in names} for _ in range(count)]
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)


def measure(
    learner: Timed, start: Policy, pairs: pa.Table, folder: Path, every: int | None
) -> tuple[float, float, float]:
    """Seconds of an update: by the clock, of those held up, and of all processors."""
    learner.load(start, folder)
    learner.held_up = 0.0
    begin, processor = time.perf_counter(), time.process_time()
    for _ in learner.update(1, pairs, None, None, plan=StepPlan(folder=folder / "steps", every=every)):
        pass
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    shutil.rmtree(folder / "steps", ignore_errors=True)
    return seconds, learner.held_up, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; else one of 15 M weights is made")
    parser.add_argument("--lora", action="store_true", help="train an adapter (rank 16)")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4], help="checkpoint.every_steps (%(default)s)")
    parser.add_argument("--steps", type=int, default=9, help="steps of an update (%(default)s)")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of one side of a pair (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="updates of each kind (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where checkpoints go: a folder on the disk that a run would use")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    pairs = make_pairs(args.pairs * args.steps, args.tokens)
    lora = {"rank": 16} if args.lora else None
    config = LearnerConfig.model_validate({"global_batch_size": args.pairs, "lora": lora})
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        model = args.model or make_tiny_model(folder / "model", hidden=512, layers=8)
        losses = [LOSS_BY_NAME["simpo"]()]  # type: ignore[call-arg]
        learner = Timed(ModelConfig.model_validate({"path": str(model)}), config, losses, seed=0, rounds=1)
        start = Policy(version=0, path=model)
        measure(learner, start, pairs.slice(0, args.pairs), folder, 1)  # warm-up
        kinds: list[int | None] = [None, *args.every]
        times: dict[int | None, list[tuple[float, float, float]]] = {every: [] for every in kinds}
        for _ in range(args.repeats):
            for every in kinds:  # in turn, so that what else the machine does meets all of them
                times[every].append(measure(learner, start, pairs, folder, every))
        trained = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    medians = {every: [statistics.median(values) for values in zip(*times[every], strict=True)] for every in kinds}
    wall, _, processor = medians[None]
    title = f"{trained / 1e6:.1f} M trained weights, {args.steps} steps, {torch.get_num_threads()} threads"
    table = Table("every_steps", "update, s", "held up", "wall", "processor", title=title)
    figures: dict[str, dict[str, float]] = {}
    for every, (seconds, held_up, busy) in medians.items():
        shares = {"held_up": held_up / wall, "wall": seconds / wall - 1, "processor": busy / processor - 1}
        figures[str(every)] = {"seconds": seconds, **shares}
        table.add_row(str(every), f"{seconds:.2f}", *(f"{share:+.1%}" for share in shares.values()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
