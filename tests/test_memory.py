"""Memory: the machine's, or what control groups leave of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from online_po.memory import memory

MIB = 2**20


def lay_out(root: Path, cgroup: str, folders: dict[str, dict[str, str]]) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, files in folders.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(text + "\n")


def v2(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": f"anon 7\ninactive_file {cache}"}


def v1(limit: int, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"inactive_file 7\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


@pytest.mark.parametrize(
    ("cgroup", "folders"),
    [
        ("0::/\n", {".": v2(str(64 * MIB), 40 * MIB, 16 * MIB)}),
        # A job's own group inside a larger one; the host's path, of which only the mount is seen; version 1.
        ("0::/slurm/job\n", {".": {}, "slurm": v2("max", MIB), "slurm/job": v2(str(64 * MIB), 24 * MIB)}),
        ("0::/a/b\n", {"a": v2(str(64 * MIB), 40 * MIB), "a/b": v2(str(80 * MIB), 40 * MIB - 24 * MIB, 0)}),
        ("4:memory:/docker/1\n0::/\n", {"memory": v1(64 * MIB, 40 * MIB, 16 * MIB)}),
        ("4:cpu,memory:/x\n", {"memory": v1(2**63 - 4096, 0), "memory/x": v1(64 * MIB, 24 * MIB)}),
    ],
)
def test_a_limit_counts(tmp_path, cgroup, folders):
    lay_out(tmp_path, cgroup, folders)
    found = memory(tmp_path)
    assert found.total == 64 * MIB
    assert found.available == (24 if "a/b" in folders else 40) * MIB


@pytest.mark.parametrize("folders", [{}, {".": v2("max", 5)}, {"memory": v1(2**63 - 4096, 5)}])
def test_without_a_limit_it_is_the_machine_s(tmp_path, folders):
    lay_out(tmp_path, "0::/\n", folders)
    assert memory(tmp_path).total == psutil.virtual_memory().total
    assert memory(tmp_path).available > 0


def test_more_used_than_allowed_leaves_nothing(tmp_path):
    lay_out(tmp_path, "0::/\n", {".": v2(str(MIB), 2 * MIB)})
    assert memory(tmp_path).available == 0
