"""Room on the disk, asked for before it is needed: a run that could not save what it computes stops before it does."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from online_po.errors import DiskError
from online_po.ledger import WEIGHT_FOLDERS, Ledger

LOOK_BACK = 3
"""So many committed rounds tell what the next one takes."""
SPARE = 1.1
"""Rounds are not all alike."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RoundBytes:
    """What one round takes in the run folder."""

    weights: int = 0
    """Policy, optimizer state, perhaps a reference."""
    data: int = 0
    """All else that stays."""
    steps: int = 0
    """Step checkpoints, which go with the commit."""


def round_bytes(ledger: Ledger, before: int, expected: RoundBytes) -> RoundBytes:
    """What a round will take: the most of the latest committed rounds before it, or without any what is expected."""
    taken = []
    for round_ in range(max(1, before - LOOK_BACK), before):
        if ledger.is_committed(round_):
            files = ledger.committed(round_).files.items()
            weights = sum(file["bytes"] for name, file in files if name.split("/")[0] in WEIGHT_FOLDERS)
            taken.append((weights, sum(file["bytes"] for _, file in files) - weights))
    if not taken:
        return expected
    weights, data = (max(sizes) for sizes in zip(*taken, strict=True))
    return RoundBytes(weights=weights, data=data, steps=expected.steps)


def require_room(ledger: Ledger, round_: int, expected: RoundBytes, *, weights_only: bool = False) -> None:
    """Raises DiskError where the disk has less room than the round will take besides what it has taken already."""
    need = round_bytes(ledger, round_, expected)
    folder = ledger.round_dir(round_)
    made = sum(map(_size, folder.rglob("*")))
    data = 0.0 if weights_only else max(0.0, SPARE * (need.data + need.steps) - made)
    wanted, free = SPARE * need.weights + data, shutil.disk_usage(ledger.root).free
    if wanted > free:
        raise DiskError(
            f"round {round_} needs about {wanted / MIB:,.1f} MiB in {str(ledger.root)!r} (weights and optimizer state "
            f"{SPARE * need.weights / MIB:,.1f} MiB), but {free / MIB:,.1f} MiB are free; what was finished is kept: "
            "free some space and resume, or lower checkpoint.keep: `online-po run CONFIG checkpoint.keep=N`"
        )


def _size(path: Path) -> int:
    """Bytes of a file; 0 for folders, and where it is renamed meanwhile by who samples."""
    with suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0
