"""Comparing two run folders: every kind of difference is found and named, clocks are not."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

import compare_runs as module
from compare_runs import compare_runs
from judges.runtime import LocalJudgePool
from online_po import files
from online_po.files import read_parquet, write_parquet
from online_po.loop import run_rounds
from tests.fakes import make_config
from tests.test_loop import ASKED, make_parts

ROUND = Path("rounds/000002")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, with a judge cache, and a file of tensors for a policy."""
    parts = make_parts(make_config(tmp_path_factory.mktemp("one"), judge=ASKED, loop__rounds=2))
    save = parts.learner.save_policy

    def with_tensors(round_, policy):
        save(round_, policy)
        save_file({"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(2)}, policy / "w.safetensors", {"format": "pt"})
        return {}

    parts.learner.save_policy = with_tensors
    parts.judges = LocalJudgePool(parts.config.judge, parts.ledger.judge_cache)
    run_rounds(parts)
    parts.judges.close()
    return parts.ledger.root


@pytest.fixture
def other(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "other" / "fake")


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def cells(column: str, row: int, value: object):
    def change(path: Path) -> None:
        table = read_parquet(path)
        values = table[column].to_pylist()
        values[row] = value
        place = table.schema.get_field_index(column)
        field = table.schema.field(place)
        write_parquet(path, table.set_column(place, field, pa.array(values, field.type)))

    return change


def last_bit(path: Path) -> None:
    table = read_parquet(path)
    value = table["chosen"][1].as_py()
    cells("chosen", 1, torch.tensor(value).nextafter(torch.tensor(9.0)).item())(path)


def another_note(path: Path) -> None:
    table = read_parquet(path)
    write_parquet(path, table.replace_schema_metadata({**table.schema.metadata, b"notes": b"{}"}))


def one_element(path: Path) -> None:
    tensors = load_file(path)
    tensors["b"][1, 0] += 2.0
    save_file(tensors, path, {"format": "pt"})


def another_shape(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors | {"b": tensors["b"].view(3, 2)}, path, {"format": "pt"})


def verdict(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE answers SET value = '7.0' WHERE key = (SELECT min(key) FROM answers)")
        connection.commit()


def field(name: str, value: object):
    def change(path: Path) -> None:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1][name] = value
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return change


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (ROUND / "pairs.parquet", cells("chosen_score", 3, 0.5), r"row 3, column chosen_score: \d.* there, 0.5 here"),
        (ROUND / "reference_logps.parquet", last_bit, "row 1, column chosen: "),
        (ROUND / "pairs.parquet", another_note, "metadata notes: .* there, .* here"),
        (ROUND / "policy/w.safetensors", one_element, r"tensor b of F32 \[2, 3\]: byte \d+ of 24 differs"),
        (ROUND / "policy/w.safetensors", another_shape, r"tensor b: .*2, 3.* there, .*3, 2.* here"),
        (ROUND / "eval.json", lambda p: rewrite(p, '"prompts": 4,\n "resp', '"prompts": 5,\n "resp'), "prompts: 4 the"),
        (ROUND / "metrics.jsonl", field("loss", 1.5), r"\[2\].loss: .* there, 1.5 here"),
        (Path("config.yaml"), lambda p: rewrite(p, "seed: 0", "seed: 1"), "run.seed: 0 there, 1 here"),
        (Path("judge_cache.sqlite"), verdict, "question .*: .* there, .*7.0.* here"),
        (ROUND / "judged.json", Path.unlink, "only in .*one"),
        (ROUND / "policy.tmp", Path.touch, "only in .*other"),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else str(value),
)
def test_a_difference_is_found_and_named(finished, other, name, change, what):
    change(other / name)
    found = {d.file: d.what for d in compare_runs(finished, other) if "committed" not in d.what}
    assert list(found) == [str(name)]
    assert re.search(what, found[str(name)]), found


def test_clocks_and_places_are_no_difference(finished, other):
    field("wall_seconds", 1e6)(other / ROUND / "metrics.jsonl")
    field("judge_calls", 0)(other / ROUND / "metrics.jsonl")
    rewrite(other / "config.yaml", "name: fake", "name: elsewhere")
    (other / "timeline.jsonl").write_text("")
    (other / "lock.owner.json").write_text("{}")
    with closing(sqlite3.connect(other / "judge_cache.sqlite")) as connection:
        connection.execute("UPDATE answers SET cost = 3")
        connection.commit()
    found = [d for d in compare_runs(finished, other) if d.file != str(ROUND / "metrics.jsonl")]
    assert found == []


def test_nan_equals_nan(tmp_path):
    table = pa.table({"x": [float("nan"), 1.0]})
    for name in ("a", "b"):
        files.write_parquet(tmp_path / name, table)
    assert module.compare_parquet(tmp_path / "a", tmp_path / "b") is None


def test_a_committed_file_that_changed_is_found_even_where_both_runs_have_it(finished, other):
    (other / ROUND / "policy/skill.json").write_text("7")
    (found,) = compare_runs(other, other)[:1]
    assert found.file == str(ROUND / "policy/skill.json") and "not what was committed" in found.what
    (other / ROUND / "policy/w.safetensors").unlink()
    assert any("committed, but not in" in d.what for d in compare_runs(other, other))
    shutil.rmtree(other / ROUND / "policy")  # as pruning does
    assert compare_runs(other, other) == []


def test_the_command_says_how_many_files_differ(finished, other):
    script = [sys.executable, module.__file__, finished]
    same = subprocess.run([*script, finished], capture_output=True, text=True)
    assert same.returncode == 0 and same.stdout.startswith("0 of ")
    (other / ROUND / "judged.json").unlink()
    unlike = subprocess.run([*script, other], capture_output=True, text=True)
    assert unlike.returncode == 1 and unlike.stdout.startswith(f"{ROUND / 'judged.json'}: only in")
    nothing = subprocess.run([*script, other.parent], capture_output=True, text=True)
    assert nothing.returncode == 2 and "not a run folder" in nothing.stderr
