"""How much memory this process may use: the machine's, or what its container or job is allowed, if less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes."""

    total: int
    """What this process could use at most."""
    available: int
    """What it could use now without others giving way."""


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Files of one version of control groups."""

    controller: str
    """How /proc/self/cgroup names the hierarchy."""
    folder: str
    limit: str
    used: str
    cache: str
    """Entry of memory.stat: page cache counted as used, which is given back when it is needed."""


_VERSIONS = (
    _Names(controller="", folder=".", limit="memory.max", used="memory.current", cache="inactive_file"),
    _Names(
        controller="memory",
        folder="memory",
        limit="memory.limit_in_bytes",
        used="memory.usage_in_bytes",
        cache="total_inactive_file",
    ),
)


def memory(root: Path = Path("/")) -> Memory:
    """What the machine has, and what the control groups of this process (version 2 or 1) leave of it.

    `root`: where /proc and /sys are, for tests.
    """
    machine = psutil.virtual_memory()
    limits = list(_limits(root))
    return Memory(
        total=min([machine.total, *(limit for limit, _ in limits)]),
        available=max(0, min([machine.available, *(limit - used for limit, used in limits)])),
    )


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of this process's control group and of those around it, where they have a limit."""
    paths: dict[str, str] = {}
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        paths |= {controller: path for controller in controllers.split(",")}
    for names in _VERSIONS:
        base = root / "sys/fs/cgroup" / names.folder
        # In a container the path may be the host's, of which only the mount itself is seen.
        inner = base / paths.get(names.controller, "/").strip("/")
        for folder in [inner, *inner.parents][: len(inner.parts) - len(base.parts) + 1]:
            limit = folder / names.limit
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                yield int(text), _used(folder, names)


def _used(folder: Path, names: _Names) -> int:
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / names.used).read_text()) - int(stat.get(names.cache, 0))
