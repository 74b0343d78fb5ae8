"""Named points where a test kills the process: what a run can die of anywhere, at a place that can be asked for.

Nothing happens unless the environment says `ONLINE_PO_FAIL_POINT=name[@kind][:nth]`: the process then ends by SIGKILL
when it comes to the point for the nth time (the first unless said), as if the machine had stopped there. `kind` is
what is being written, see `label`. The variable is taken out of the environment, so that processes that this one
starts live on.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

VARIABLE = "ONLINE_PO_FAIL_POINT"

PHASES = ("generate", "judge", "pair", "reference", "learn", "save", "commit", "sync", "evaluate", "calibrate")
"""Phases of `online_po.parts.Parts.phase`, each with a point before and one after it."""

NAMES = (
    *(f"{phase}.{edge}" for phase in PHASES for edge in ("begin", "end")),
    # inside a start
    "start.begin",
    "start.end",
    "preflight.judged",
    "restore.loaded",
    "sweep.removed",
    "sweep.dropped",
    # inside a round
    "learn.step",
    "learner.policy_saved",
    "refresh.begin",
    "commit.hashed",
    "evaluate.judged",
    "prune.begin",
    "prune.end",
    # inside a roll-back
    "roll_back.begin",
    "roll_back.end",
    "roll_back.loaded",
    # inside the write of a file, whatever it holds
    "file.written",
    "file.synced",
    "file.renamed",
    "file.durable",
    # inside the write of a folder
    "folder.written",
    "folder.synced",
    "folder.cleared",
    "folder.renamed",
    "folder.durable",
    # inside the removal, or the move, of a folder
    "remove.renamed",
    "remove.done",
    "move.renamed",
    "move.durable",
    # where the judge cache is opened by the run, and inside a transaction
    "judge_cache.opened",
    "judge_cache.prepared",
    "judge_cache.written",
    "judge_cache.committed",
)
"""Every point there is. Those on files and folders are as many as there are kinds of them."""

_visit: Callable[[str], None] | None = None


def fail_point(name: str, path: Path | None = None) -> None:
    """A point where the process may be killed; `path`: what is being written."""
    if _visit is not None:
        _visit(label(name, path))


def label(name: str, path: Path | None = None) -> str:
    """`name@kind`: a point and what is written there. Parts go by their folder's name, numbers are left out:
    file.synced@responses, file.synced@COMMIT.json, move.renamed@N."""
    if path is None:
        return name
    kind = path.parent.name if path.name.startswith("part-") else path.name
    return f"{name}@{re.sub('[0-9]+', 'N', kind)}"


def watch(visit: Callable[[str], None] | None) -> None:
    """Calls `visit` with the label of every point that this process comes to; None: no more."""
    global _visit
    _visit = visit


def arm(wanted: str) -> None:
    """Kills this process at a point: `name[@kind][:nth]`. Without a kind, every kind counts. Raises ValueError for a
    point that is not there."""
    where, _, nth = wanted.partition(":")
    name = where.partition("@")[0]
    if name not in NAMES:
        raise ValueError(f"{VARIABLE}: there is no fail point {name!r}; there are {', '.join(NAMES)}")
    left = int(nth or 1)

    def visit(reached: str) -> None:
        nonlocal left
        if where in (reached, reached.partition("@")[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    watch(visit)


if VARIABLE in os.environ:
    arm(os.environ.pop(VARIABLE))
