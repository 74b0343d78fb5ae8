"""Where a run's time went: seconds of each phase, and what no phase covers.

    python scripts/bench_phases.py runs/quickstart

Reads the run's timeline.jsonl, of one process from start to end (a run that was resumed has gaps). The model's own work
is what no loop could do without: generate, judge, evaluate, reference log-probabilities and learn; the rest is what the
loop adds. Phases that overlap others are counted once, for the model's work first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from online_po.run_view import read_timeline

MODEL = ("generate", "judge", "evaluate", "reference", "learn")
Interval = tuple[float, float]


def covered(intervals: list[Interval]) -> float:
    """Seconds that some interval covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def budget(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase, those of the model's work, those that no phase covers (idle), and in all (wall)."""
    phases: dict[str, list[Interval]] = {}
    for event in events:
        if "phase" in event:
            interval = event["start"], event["start"] + event["seconds"]
            phases.setdefault(event["phase"], []).append(interval)
    every = [interval for intervals in phases.values() for interval in intervals]
    wall = max(end for _, end in every) - min(start for start, _ in every)
    model = covered([interval for name in MODEL for interval in phases.get(name, [])])
    found = {name: covered(intervals) for name, intervals in phases.items()}
    return found | {"idle": wall - covered(every), "model": model, "wall": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    events = [event for event in read_timeline(args.run / "timeline.jsonl") if event is not None]
    if not events:
        parser.error(f"{str(args.run)!r} has no timeline.jsonl")
    found = budget(events)
    wall, start = found["wall"], found.get("start", 0.0)
    table = Table("phase", "seconds", "share", title=str(args.run))
    for name, seconds in sorted(found.items(), key=lambda item: -item[1]):
        if name not in ("model", "wall"):
            table.add_row(name, f"{seconds:.2f}", f"{seconds / wall:.2%}")
    table.add_section()
    table.add_row("the model's work", f"{found['model']:.2f}", f"{found['model'] / wall:.2%}")
    added = wall - start - found["model"]
    table.add_row("start-up", f"{start:.2f}", f"{start / wall:.2%}")
    table.add_row("what the loop adds", f"{added:.2f}", f"{added / wall:.2%}")
    table.add_row("all", f"{wall:.2f}", "")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
