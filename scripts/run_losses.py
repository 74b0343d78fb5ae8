"""Every loss through the real loop: a tiny random model, vLLM in a Ray actor, a reward that can be learned.

    python scripts/run_losses.py                    # all losses, and their table into docs/loss_scores.md
    python scripts/run_losses.py simpo kto          # some, to the screen only

The reward is the share of lower-case letters and spaces among a response's first characters; an untrained tiny model
writes random bytes. Same prompts, seeds and settings for every loss, but for the learning rates in `RATES`: so the
table says that each loss trains in the loop, not which one is best on a real task.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from make_tiny_model import make_tiny_model  # noqa: E402
from online_po.config import Config  # noqa: E402
from online_po.ledger import Ledger  # noqa: E402
from online_po.loop import run_rounds  # noqa: E402
from online_po.loss_configs import LOSS_BY_NAME  # noqa: E402
from online_po.observers import CompositeObserver, PhaseTimer  # noqa: E402
from online_po.parts import Parts  # noqa: E402
from online_po.plan import make_plan  # noqa: E402

PAGE = ROOT / "docs" / "loss_scores.md"
NAMES = [name for name in LOSS_BY_NAME if name != "custom"]
RATES: dict[str, float] = {"sft": 1e-3}
"""Learning rates of losses that the common one does not suit."""
RATE = 3e-3
OPTIONS: dict[str, dict[str, Any]] = {}
"""Options of losses whose defaults are for real tasks."""


def letters(prompt: str, response: str, metadata: dict[str, Any]) -> float:
    """Share of lower-case letters and spaces among the first 40 characters; short responses count as 8."""
    return sum(c.islower() or c == " " for c in response[:40]) / max(8, len(response[:40]))


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a loss made of the tiny model."""

    name: str
    start: float
    """Mean held-out score of the starting model."""
    end: float
    """The same after the last round."""
    low: float
    """Lower end of the difference's 95% interval."""
    high: float
    win_rate: float
    """Share of held-out prompts on which the last policy beats the starting one, ties counted half."""
    seconds: float


def make_config(folder: Path, model: Path, name: str) -> Config:
    """The run of one loss; all runs have the same generator and judge."""
    rows = [{"prompt": f"say something about number {i}"} for i in range(80)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = {"name": name, **OPTIONS.get(name, {})}
    return Config.parse(
        {
            "run": {"name": name, "dir": str(folder), "seed": 7, "keep_checkpoints": 1, "tensorboard": False},
            "model": {"path": str(model)},
            "prompts": {"path": str(prompts), "heldout_size": 32, "max_tokens": 96},
            "loop": {"rounds": 3, "prompts_per_round": 32, "responses_per_prompt": 4},
            "generator": {"max_tokens": 24, "chunk_prompts": 32, "cpu_kv_cache_gib": 0.2, "threads": 1},
            "judge": {"kind": "python", "function": "run_losses:letters"},
            "loss": loss,
            "learner": {
                "learning_rate": RATES.get(name, RATE),
                "global_batch_size": 8,
                "epochs": 2,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "kl_to_start": False,
            },
            "eval": {"every": 3, "responses_per_prompt": 2},
        }
    )


@contextmanager
def actors(config: Config) -> Iterator[tuple[Any, Any]]:
    """(generators, judges) that serve run after run."""
    from actors import cluster
    from actors.generators import GeneratorGroup
    from actors.judges import JudgeGroup

    with ExitStack() as stack:
        cluster.start(config.ray)
        stack.callback(cluster.stop)
        groups: list[Any] = []
        for kind in (GeneratorGroup, JudgeGroup):
            groups.append(kind(config))
            stack.callback(groups[-1].close)
        for group in groups:
            group.ready(300.0)
        yield groups[0], groups[1]


def run_loss(config: Config, generator: Any, judges: Any) -> Score:
    """One run from the starting model to its end; the learner lives in this process."""
    from online_po.learner import TorchLearner

    began = time.perf_counter()
    plan = make_plan(config)
    ledger = Ledger(config.run_dir)
    with ledger.lock(), ThreadPoolExecutor(1) as sampler:
        ledger.begin(config, {})
        learner = TorchLearner(
            config.model, config.learner, config.loss, seed=config.run.seed, rounds=config.loop.rounds
        )
        found = run_rounds(
            Parts(
                config=config,
                ledger=ledger,
                generator=generator,
                judges=judges,
                learner=learner,
                observer=CompositeObserver([]),
                timer=PhaseTimer(ledger.root / "timeline.jsonl"),
                train=plan.train,
                heldout=plan.heldout,
                start=plan.model_path,
                sampler=sampler,
            )
        )
    against = found[-1]["versus_start"]
    return Score(
        name=config.loss[0].name,
        start=found[0]["score"]["mean"],
        end=found[-1]["score"]["mean"],
        low=against["difference"]["low"],
        high=against["difference"]["high"],
        win_rate=against["win_rate"]["mean"],
        seconds=time.perf_counter() - began,
    )


def run_losses(folder: Path, names: Sequence[str]) -> Iterator[Score]:
    """The scores of some losses, one after the other, on one engine."""
    import torch

    model = make_tiny_model(folder / "model")
    configs = [make_config(folder, model, name) for name in names]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with actors(configs[0]) as (generator, judges):
            for config in configs:
                yield run_loss(config, generator, judges)
    finally:
        torch.set_num_threads(threads)


def page(scores: Sequence[Score]) -> str:
    """docs/loss_scores.md."""
    return "\n".join(
        [
            "# Every loss in the loop",
            "",
            "<!-- Written by scripts/run_losses.py from what it measured. -->",
            "",
            (__doc__ or "").split("\n\n")[2].strip(),
            "",
            f"Three rounds of 32 prompts x 4 responses, batches of 8, 2 epochs, learning rate {RATE:g} unless said,",
            "32 held-out prompts x 2 responses, one seed. The interval is over prompts.",
            "",
            "| loss | score at the start | after 3 rounds | difference, 95% interval | win rate | learning rate |",
            "|---|---|---|---|---|---|",
            *(
                f"| `{s.name}` | {s.start:.3f} | {s.end:.3f} | {s.end - s.start:+.3f} [{s.low:+.3f}, {s.high:+.3f}] | "
                f"{s.win_rate:.0%} | {RATES.get(s.name, RATE):g} |"
                for s in scores
            ),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="losses; none: all, and the page is written")
    names = parser.parse_args().names
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"{unknown[0]} is no loss; known: {', '.join(NAMES)}")
    console, scores = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        for score in run_losses(Path(folder), names or NAMES):
            scores.append(score)
            console.print(
                f"{score.name:20} {score.start:.3f} -> {score.end:.3f}  [{score.low:+.3f}, {score.high:+.3f}]  "
                f"{score.seconds:.0f} s"
            )
    table = Table("loss", "start", "end", "95% interval of the difference", "win rate")
    for s in scores:
        table.add_row(s.name, f"{s.start:.3f}", f"{s.end:.3f}", f"[{s.low:+.3f}, {s.high:+.3f}]", f"{s.win_rate:.0%}")
    console.print(table)
    if not names:
        PAGE.write_text(page(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
