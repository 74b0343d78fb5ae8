"""What the loop itself costs, with fake parts: seconds a committed round, and one very large round.

    python scripts/bench_loop.py                 # both
    python scripts/bench_loop.py --prompts 20000 # a smaller large round

Prints a table and, with --json, the figures. Goals: at most 50 ms a committed round of 8 prompts x 2
responses; one round of 200,000 prompts x 4 responses at 10,000 responses/s or more within 1 GiB of
memory growth. The large round counts everything the loop does: requests and seeds, both kinds of part
files, pairs, metrics, hashes, commit. The fakes' own time is measured apart and shown.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from rich.console import Console
from rich.table import Table

from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.observers import PhaseTimer
from online_po.parts import Parts
from online_po.sections import GeneratorConfig
from online_po.tables import PromptRows, prompts_to_table
from tests.fakes import FakeGenerator, FakeJudge, FakeLearner, FakeObserver, make_config, make_prompts


class TimedGenerator(FakeGenerator):
    """Knows how long the fake itself took, so that it can be told from the loop."""

    seconds = 0.0

    def _group(self, request, sampling):  # type: ignore[no-untyped-def]
        begin = time.perf_counter()
        group = super()._group(request, sampling)
        self.seconds += time.perf_counter() - begin
        return group


def run(folder: Path, prompts: int, **overrides: object) -> tuple[float, float, float]:
    """(seconds, seconds of those inside the fake generator, GiB of peak memory growth)."""
    config = make_config(folder, eval={"every": 0}, prompts={"path": "p"}, **overrides)
    ledger = Ledger(config.run_dir)
    ledger.begin(config, {})
    generator = TimedGenerator()
    parts = Parts(
        config=config,
        ledger=ledger,
        generator=generator,
        judges=FakeJudge(),
        learner=FakeLearner(),
        observer=FakeObserver(),
        timer=PhaseTimer(ledger.root / "timeline.jsonl"),
        train=PromptRows(prompts_to_table(make_prompts(prompts))),
        heldout=None,
        start=folder,
    )
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    run_rounds(parts)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, generator.seconds, max(0, peak - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="small rounds (8 prompts x 2)")
    parser.add_argument("--prompts", type=int, default=200_000, help="prompts of the large round (x 4 responses)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        loop = {"rounds": args.rounds, "prompts_per_round": 8, "responses_per_prompt": 2}
        chunk = GeneratorConfig.model_fields["chunk_prompts"].default  # the tests' own is smaller than anybody's
        generator = {"chunk_prompts": chunk, "max_tokens": 8}
        seconds, _, _ = run(Path(folder) / "small", 1000, loop=loop, generator=generator)
        figures["ms_per_small_round"] = 1000 * seconds / args.rounds
        loop = {"rounds": 1, "prompts_per_round": args.prompts, "responses_per_prompt": 4}
        generator = {"chunk_prompts": 256, "max_tokens": 32}
        seconds, fake, growth = run(Path(folder) / "large", args.prompts, loop=loop, generator=generator)
        figures["responses_per_s"] = 4 * args.prompts / (seconds - fake)
        figures["memory_growth_gib"] = growth
        figures["fake_generator_share"] = fake / seconds
    table = Table("figure", "value", title=f"{args.rounds} small rounds; one of {args.prompts:,} prompts x 4")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
