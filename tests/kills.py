"""Kills in the test's own process: an exception that nothing catches, at a fail point."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from online_po import fail_points


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it but the test."""


@contextmanager
def killed_at(point: int | None = None) -> Iterator[list[str]]:
    """Inside the block Killed is raised at the `point`-th fail point and at all after it, in any thread; None: never.
    Gives the labels of those that were passed."""
    passed: list[str] = []

    def visit(label: str) -> None:
        passed.append(label)
        if point is not None and len(passed) >= point:
            raise Killed

    fail_points.watch(visit)
    try:
        yield passed
    finally:
        fail_points.watch(None)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: no fsync to wait for."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
