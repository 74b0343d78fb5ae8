"""Fail points: each is in the list, and the process dies where it is asked to."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from online_po import fail_points, files
from online_po.fail_points import NAMES, PHASES, VARIABLE, fail_point, label

ROOT = Path(__file__).parents[1]


def calls(name: str) -> set[str]:
    """The first arguments of all calls of a function, or of a method of what is called `parts`."""
    found = set()
    for package in ("online_po", "actors", "judges"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if f"{name}(" in text else ():
                if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("self.") == name:
                    assert isinstance(node.args[0], ast.Constant | ast.JoinedStr), f"{path}:{node.lineno}: no literal"
                    if isinstance(node.args[0], ast.Constant):
                        found.add(node.args[0].value)
    return found


def test_every_point_of_the_source_is_in_the_list_and_the_reverse():
    assert calls("parts.phase") == set(PHASES)
    edges = {f"{phase}.{edge}" for phase in PHASES for edge in ("begin", "end")}
    assert calls("fail_point") == set(NAMES) - edges
    assert len(NAMES) == len(set(NAMES))


def test_a_phase_of_the_loop_has_its_points():
    """The loop and the round go through `Parts.phase`: an observer's own would have none."""
    for name in ("round.py", "loop.py"):
        assert "observer.phase(" not in (ROOT / "online_po" / name).read_text()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, "file.synced"),
        ("rounds/000003/responses/part-00012.parquet", "file.synced@responses"),
        ("rounds/000003/pairs.parquet", "file.synced@pairs.parquet"),
        ("rounds/000003", "file.synced@N"),
    ],
)
def test_labels_say_what_is_written(path, name):
    assert label("file.synced", path and Path(path)) == name


WRITES = """
import sys
from pathlib import Path
from online_po import files
for name in ("a.json", "b.json", "a.json"):
    files.write_json(Path(sys.argv[1]) / name, {"name": name})
    print(name, flush=True)
"""


@pytest.mark.parametrize(
    ("armed", "done", "there"),
    [
        (None, 3, {"a.json", "b.json"}),
        ("file.durable", 0, {"a.json"}),
        ("file.synced:2", 1, {"a.json", "b.json.tmp"}),
        ("file.renamed@b.json", 1, {"a.json", "b.json"}),
        ("file.written@a.json:2", 2, {"a.json", "b.json", "a.json.tmp"}),
        ("file.written@a.json:3", 3, {"a.json", "b.json"}),
        ("commit.hashed", 3, {"a.json", "b.json"}),
    ],
)
def test_the_process_dies_where_it_is_asked_to(tmp_path, armed, done, there):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({VARIABLE: armed} if armed else {})}
    ended = subprocess.run([sys.executable, "-c", WRITES, tmp_path], env=environment, capture_output=True, text=True)
    assert ended.returncode == (0 if done == 3 else -signal.SIGKILL), ended.stderr
    assert ended.stdout.splitlines() == ["a.json", "b.json", "a.json"][:done]
    assert {re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", path.name) for path in tmp_path.iterdir()} == there


def test_what_a_process_starts_lives_on(tmp_path):
    code = "import os, sys, online_po.fail_points as f; sys.exit(f.VARIABLE in os.environ)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, VARIABLE: "learn.step"}).returncode == 0


def test_a_point_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"there is no fail point 'learn.stop'; there are .*learn.step"):
        fail_points.arm("learn.stop:2")


def test_a_watched_process_says_where_it_is(tmp_path):
    seen: list[str] = []
    fail_points.watch(seen.append)
    try:
        files.write_json(tmp_path / "x.json", {"a": 1})
    finally:
        fail_points.watch(None)
    fail_point("learn.step")
    assert seen == [f"file.{stage}@x.json" for stage in ("written", "synced", "renamed", "durable")]
