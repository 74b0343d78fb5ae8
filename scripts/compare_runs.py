#!/usr/bin/env python3
"""Compare every file of two run folders, but for clocks: do they hold the same run, bit for bit?

Compared are the cells of parquet files, the bytes of tensors, the fields of JSON, and the verdicts in the judge cache.
Left out is what depends on time, on where the folder lies, or on how often the run was stopped: seconds, counts of
judge calls, the report and telemetry. That committed files are what their commit says is checked too.

    python scripts/compare_runs.py runs/one runs/other

Says the first difference of each file by row and column, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

LEFT_OUT = ("lock", "lock.owner.json", "lock.takeover.*", "timeline.jsonl", "report.html", "tensorboard/*")
"""Telemetry, and what a process that was killed may leave: nothing that a run reads."""
CLOCKS = {
    "metrics.jsonl": {"seconds", "phase_seconds", "wall_seconds", "idle_seconds", "sha256"},
    "run.json": {"created", "sha256"},
    "config.yaml": {"dir", "name"},
}
"""File -> fields that depend on when or where a run was made, and hashes of such."""
JUDGING = ("calls", "hits", "retries", "prompt_tokens", "response_tokens", "cost", "cut", "failed_calls", "latency_")
"""Metrics judge_*: what was really asked, which is more after a kill, or less."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two runs first differ in one file."""

    file: str
    """Path inside the run folder."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def compare_runs(first: Path, second: Path) -> list[Difference]:
    """The first difference of each file, in order of their paths; none where the folders hold the same run."""
    mine, other = _files(first), _files(second)
    found = [Difference(name, f"only in {first if name in mine else second}") for name in mine ^ other]
    for name in mine & other:
        what = _comparison(name)(first / name, second / name)
        if what is not None:
            found.append(Difference(name, what))
    found += [*_broken_commits(first), *_broken_commits(second)]
    return sorted(found, key=lambda difference: difference.file)


def _files(root: Path) -> set[str]:
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in files if not any(path.match(pattern) for pattern in LEFT_OUT)}


def _comparison(name: str) -> Callable[[Path, Path], str | None]:
    match Path(name).suffix:
        case ".parquet":
            return compare_parquet
        case ".safetensors":
            return compare_tensors
        case ".json" | ".jsonl" | ".yaml":
            return compare_fields
        case ".sqlite":
            return compare_answers
    return compare_bytes


# -- kinds of files --------------------------------------------------------------------------------


def compare_parquet(first: Path, second: Path) -> str | None:
    """Columns and their types, metadata, then cell by cell: floats to the last bit, NaN equals NaN."""
    a, b = pq.read_table(first), pq.read_table(second)
    for x, y in zip_longest(a.schema, b.schema):
        if x != y:
            return f"columns: {x} there, {y} here"
    # Not the tables' own: what a writer adds at the end is in the file's alone.
    notes, other = (pq.read_metadata(path).metadata or {} for path in (first, second))
    for key in sorted((notes.keys() | other.keys()) - {b"ARROW:schema", b"sha256"}):
        if notes.get(key) != other.get(key):
            return f"metadata {key.decode()}: {_short(notes.get(key))} there, {_short(other.get(key))} here"
    if a.num_rows != b.num_rows:
        return f"{a.num_rows} rows there, {b.num_rows} here"
    places = []
    for column, name in enumerate(a.column_names):
        cells = zip(a[name].to_pylist(), b[name].to_pylist(), strict=True)
        row = next((row for row, (x, y) in enumerate(cells) if repr(x) != repr(y)), None)
        if row is not None:
            places.append((row, column, name))
    if not places:
        same = first.read_bytes() == second.read_bytes()
        return None if same else "the same cells, in other bytes"
    row, _, name = min(places)
    return f"row {row}, column {name}: {_short(a[name][row].as_py())} there, {_short(b[name][row].as_py())} here"


def compare_tensors(first: Path, second: Path) -> str | None:
    """Names, types and shapes, then bytes."""
    (a, a_data), (b, b_data) = _tensors(first), _tensors(second)
    if a.keys() != b.keys():
        return f"tensors {sorted(a.keys() ^ b.keys())[:3]} are in one only"
    for name in sorted(a):
        kinds = [
            {k: v for k, v in header[name].items() if k != "data_offsets"} if name != "__metadata__" else header[name]
            for header in (a, b)
        ]
        if kinds[0] != kinds[1]:
            return f"tensor {name}: {kinds[0]} there, {kinds[1]} here"
        if name == "__metadata__":
            continue
        x, y = (data[slice(*header[name]["data_offsets"])] for header, data in ((a, a_data), (b, b_data)))
        if x != y:
            byte = next(i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q)
            return f"tensor {name} of {kinds[0]['dtype']} {kinds[0]['shape']}: byte {byte} of {len(x)} differs"
    return None


def _tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def compare_fields(first: Path, second: Path) -> str | None:
    """JSON, JSON lines or YAML, without clocks."""
    a, b = _fields(first), _fields(second)
    return next(_unlike(a, b, ""), None)


def _fields(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        value = yaml.safe_load(text)
    elif path.suffix == ".jsonl":
        value = [json.loads(line) for line in text.splitlines()]
    else:
        value = json.loads(text)
    if path.name == "COMMIT.json":  # it hashes a file with clocks in it, and itself
        value["files"].get("metrics.jsonl", {}).clear()
        del value["sha256"]
    return _without_clocks(value, CLOCKS.get(path.name, set()))


def _without_clocks(value: Any, clocks: set[str]) -> Any:
    if isinstance(value, list):
        return [_without_clocks(item, clocks) for item in value]
    if not isinstance(value, dict):
        return value
    asked = tuple(f"judge_{name}" for name in JUDGING)
    return {
        key: _without_clocks(item, clocks)
        for key, item in value.items()
        if key not in clocks and not key.startswith(asked)
    }


def _unlike(a: Any, b: Any, where: str) -> Iterator[str]:
    """The fields that differ, by their path."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key in a and key in b:
                yield from _unlike(a[key], b[key], f"{where}.{key}" if where else key)
            else:
                yield f"{where}.{key}: only {'there' if key in a else 'here'}"
    elif isinstance(a, list) and isinstance(b, list):
        for place, (x, y) in enumerate(zip_longest(a, b)):
            yield from _unlike(x, y, f"{where}[{place}]")
    elif repr(a) != repr(b):
        yield f"{where or 'value'}: {_short(a)} there, {_short(b)} here"


def compare_answers(first: Path, second: Path) -> str | None:
    """A judge cache: the verdict on each question that was answered, without what it cost."""
    a, b = _answers(first), _answers(second)
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            return f"question {key.hex()[:16]}: {_short(a.get(key))} there, {_short(b.get(key))} here"
    return None


def _answers(path: Path) -> dict[bytes, tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT key, judge, value, rationale, cut FROM answers")
        return {key: tuple(rest) for key, *rest in rows}


def compare_bytes(first: Path, second: Path) -> str | None:
    """Byte by byte."""
    a, b = first.read_bytes(), second.read_bytes()
    if a == b:
        return None
    byte = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"byte {byte} differs ({len(a)} bytes there, {len(b)} here)"


# -- commits ---------------------------------------------------------------------------------------


def _broken_commits(root: Path) -> Iterator[Difference]:
    """Committed files that are not what their commit says. Weights may be gone whole: old ones are pruned."""
    for commit in sorted(root.glob("rounds/*/COMMIT.json")):
        folder = commit.parent
        for name, entry in json.loads(commit.read_text(encoding="utf-8"))["files"].items():
            path = folder / name
            if not path.exists():
                if len(Path(name).parts) > 1 and not (folder / Path(name).parts[0]).exists():
                    continue
                yield Difference(str(path.relative_to(root)), f"committed, but not in {root}")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                yield Difference(str(path.relative_to(root)), f"in {root} it is not what was committed")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("first", type=Path, help="a run folder")
    parser.add_argument("second", type=Path, help="another one")
    args = parser.parse_args()
    for folder in (args.first, args.second):
        if not (folder / "run.json").exists():
            parser.error(f"{str(folder)!r} is not a run folder (it has no run.json)")
    found = compare_runs(args.first, args.second)
    for difference in found:
        print(difference)
    print(f"{len(found)} of {len(_files(args.first) | _files(args.second))} files differ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
