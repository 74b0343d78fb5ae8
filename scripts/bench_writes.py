#!/usr/bin/env python3
"""What durable writes cost a run: the share of its time that goes into writing, hashing and syncing the run folder.

    python scripts/bench_writes.py configs/quickstart.yaml [section.key=value ...]

Runs the config as `online-po run` does, and measures in the process that drives it. Counted is all time inside the
write of a file or a folder of the run, from its beginning to its fsync and rename, and a commit with its hashes; the
learner's own writing of weights is in it. Too much is counted rather than too little: pairs are built while their file
is open.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from online_po import files, launch
from online_po.config import Config
from online_po.console import ConsoleObserver
from online_po.fail_points import label
from online_po.ledger import Ledger

seconds: defaultdict[str, float] = defaultdict(float)
counts: Counter[str] = Counter()
_inside = threading.local()


@contextmanager
def counted(what: str) -> Iterator[None]:
    """Counts the time of the block, unless it is inside another one of its thread."""
    if getattr(_inside, "already", False):
        yield
        return
    _inside.already, begin = True, time.perf_counter()
    try:
        yield
    finally:
        _inside.already = False
        seconds[what] += time.perf_counter() - begin
        counts[what] += 1


def wrapped(write: Callable[[Path], AbstractContextManager[Path]]) -> Callable[[Path], AbstractContextManager[Path]]:
    """`files.atomic`, or `files.atomic_folder`, counted."""

    @contextmanager
    def counting(path: Path) -> Iterator[Path]:
        with counted(re.sub(".*@", "", label("", path))), write(path) as temporary:
            yield temporary

    return counting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    config = Config.from_yaml(args.config, args.overrides)
    commit, weights = Ledger.commit, Ledger.weights

    def counted_commit(ledger: Ledger, *given: Any, **named: Any) -> Any:
        with counted("COMMIT.json"):
            return commit(ledger, *given, **named)

    @contextmanager
    def counted_weights(ledger: Ledger, round_: int, part: str) -> Iterator[tuple[Path, dict[str, str]]]:
        with counted(part), weights(ledger, round_, part) as given:
            yield given

    files.atomic, files.atomic_folder = wrapped(files.atomic), wrapped(files.atomic_folder)  # type: ignore[assignment]
    Ledger.commit, Ledger.weights = counted_commit, counted_weights  # type: ignore[method-assign,assignment]
    begin = time.perf_counter()
    launch.run(config, [ConsoleObserver()])
    wall = time.perf_counter() - begin
    table = Table("what", "times", "share of the run", title=f"durable writes in {wall:.0f} s")
    for what, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(what, str(counts[what]), f"{spent / wall:.3%}")
    table.add_section()
    table.add_row("all", str(sum(counts.values())), f"{sum(seconds.values()) / wall:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
