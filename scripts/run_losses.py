"""Every loss through the real loop: a tiny random model, vLLM in a Ray actor, a reward that can be learned.

    python scripts/run_losses.py                    # all losses, and their table into docs/loss_scores.md
    python scripts/run_losses.py simpo kto          # some, to the screen only

The reward is the share of lower-case letters and spaces among a response's first characters; an untrained tiny model
writes random bytes. Prompts, seeds and settings are the same for every loss, options their defaults, learning rates as
given: so the table says that each loss trains in the loop, not which one is best on a real task.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # for judge processes too

from online_po.loop import evaluations  # noqa: E402
from online_po.loss_configs import LOSS_BY_NAME  # noqa: E402
from tiny_runs import bench  # noqa: E402

PAGE = ROOT / "docs" / "loss_scores.md"
NAMES = [name for name in LOSS_BY_NAME if name != "custom"]
RATES: dict[str, float] = {"sft": 5e-4, "orpo": 1e-3}
"""Learning rates of losses that the common one does not suit: the likelihood of a few tokens is learned too fast. Each
out of three that were tried, on two seeds."""
RATE = 3e-3


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


def run_losses(folder: Path, names: Sequence[str]) -> Iterator[Score]:
    """The scores of some losses, one after the other, on one engine."""
    with bench(folder) as runs:
        for name in names:
            began = time.perf_counter()
            rate = {"learning_rate": RATES.get(name, RATE)}
            found = evaluations(runs.run(runs.config(name, loss={"name": name}, learner=rate)))
            against = found[-1]["versus_start"]
            yield Score(
                name=name,
                start=found[0]["score"]["mean"],
                end=found[-1]["score"]["mean"],
                low=against["difference"]["low"],
                high=against["difference"]["high"],
                win_rate=against["win_rate"]["mean"],
                seconds=time.perf_counter() - began,
            )


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
