"""Judging a file without a run."""

from __future__ import annotations

import asyncio
import datetime
import json
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from judges.runtime import LocalJudgePool
from judges.standalone import judge_file
from online_po.config import read_judge
from online_po.errors import BudgetError, ConfigError, JudgeFailureRateError, LedgerError
from online_po.judge_configs import Ensemble, LlmPairwise, Python, Rules, SelfScore
from online_po.judge_configs.base import BudgetConfig
from tests.judges import groups

HERE = groups.__name__
ROWS = [
    {"prompt": "p", "responses": ["aa", "b", "cccc"], "target": 1},
    {"prompt": [{"role": "user", "content": "q"}], "response": "dd"},
    {"prompt": "r", "chosen": "eeee", "rejected": "f"},
    {"prompt": "s", "chosen": "g", "rejected": "hh"},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def judge(config, source, **more):
    out = source.with_name("out.jsonl")
    judged = judge_file(config, source, out, source.with_name("cache.sqlite"), **more)
    return judged, [json.loads(line) for line in out.open()]


def test_rows_come_back_with_their_scores_in_order(source):
    seen = []
    judged, rows = judge(Python(function=f"{HERE}:length"), source, on_progress=lambda *at: seen.append(at))
    assert [row["scores"] for row in rows] == [[2, 1, 4], [2], [4, 1], [1, 2]]
    assert [{key: row[key] for key in old} for row, old in zip(rows, ROWS, strict=True)] == ROWS
    assert (judged.rows, judged.failures, judged.accuracy) == (4, {}, 0.5) and seen[-1] == (4, 4)


def test_what_was_judged_is_not_asked_again(source, tmp_path, monkeypatch):
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    config = Python(function=f"{HERE}:noted")
    first, rows = judge(config, source)
    calls = (tmp_path / "calls").read_text()
    assert calls.count("\n") == 8
    assert judge(config, source) == (first, rows) and (tmp_path / "calls").read_text() == calls


def test_what_a_run_asked_is_not_asked_again(tmp_path, monkeypatch):
    """A file has no token ids, and judges that read text have no use for them."""
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    config, cache = Python(function=f"{HERE}:noted"), tmp_path / "cache.sqlite"
    group = groups.make_group("yes", "perhaps", metadata={"answer": "yes"})
    pool = LocalJudgePool(config, cache)
    pool.submit([group], 1).result()
    pool.close()
    row = {"prompt": list(group.prompt.messages), "responses": ["perhaps", "yes"], "answer": "yes"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    _, (said,) = judge(config, tmp_path / "in.jsonl")
    assert said["scores"] == [7, 3] and (tmp_path / "calls").read_text().count("\n") == 2


def test_a_failure_is_no_label_and_too_many_are_an_error(source):
    judged, rows = judge(Python(function=f"{HERE}:no_f"), source)
    assert [row["scores"] for row in rows] == [[2, 1, 4], [2], None, [1, 2]]
    assert rows[2]["failure"] == {"kind": "error", "message": "response 1: ValueError: f"}
    assert judged.failures == {"error": 1}
    judged.require_few_failures(0.25)
    replace(judged, rows=100, failures={"error": 29}).require_few_failures(0.29)
    with pytest.raises(JudgeFailureRateError, match=r"failed on 1 of 4 rows, more than judge.max_failure_rate = 0.2"):
        judged.require_few_failures(0.2)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p"}, r"line 2 has none of 'responses', 'response' and 'chosen'"),
        ({"prompt": "p", "responses": "text"}, r"line 2: 'responses' is 'text', not a list of texts"),
        ({"prompt": "p", "response": 3}, r"line 2: 'response' is a int, not text"),
        ({"response": "x"}, r"line 2 has no 'prompt'"),
        ({"prompt": "p", "chosen": "x"}, r"line 2 has no 'rejected'"),
        ({"prompt": "p", "response": "x", "note": "\ud83d"}, r"line 2 holds .ud83d, one half of a surrogate pair"),
        ({"prompt": " ", "response": "x"}, r"line 2 has no 'prompt', or an empty one"),
        ({"prompt": "p", "response": "x", "chosen": "x", "rejected": "y"}, r"line 2 has 'response' and 'chosen'; keep"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_before_any_is(tmp_path, row, words):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=words):
        judge(Python(function=f"{HERE}:length"), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_files_that_cannot_be_read_or_written(source, tmp_path):
    config = Python(function=f"{HERE}:length")
    with pytest.raises(ConfigError, match=r"the one to judge; choose another name"):
        judge_file(config, source, source, tmp_path / "cache.sqlite")
    assert [json.loads(line) for line in source.open()] == ROWS
    source.write_text("\n")
    with pytest.raises(ConfigError, match=r"holds no rows; give rows with prompt and responses"):
        judge(config, source)
    pq.write_table(pa.table({"promt": ["p"], "response": ["x"]}), tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match=r"row 1 has no 'prompt', or an empty one"):
        judge(config, tmp_path / "in.parquet")
    pq.write_table(pa.table({"prompt": ["p"], "response": ["x"], "blob": [b"\xff"]}), tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match=r"row 1: column 'blob' holds a bytes"):
        judge(config, tmp_path / "in.parquet")


def test_tables_come_back_as_json(tmp_path):
    when = datetime.date(2025, 1, 2)
    table = pa.table({"prompt": ["p"], "response": ["x"], "when": [when], "rate": [math.nan]})
    pq.write_table(table, tmp_path / "in.parquet")
    _, rows = judge(Python(function=f"{HERE}:length"), tmp_path / "in.parquet")
    assert rows == [{"prompt": "p", "response": "x", "when": "2025-01-02", "rate": None, "scores": [1]}]
    (tmp_path / "in.csv").write_text("prompt,response\n6 x 7,42\n")
    assert judge(Python(function=f"{HERE}:length"), tmp_path / "in.csv")[1][0]["scores"] == [2]


def test_a_file_that_was_judged_may_be_judged_again(source):
    """What was said before is neither kept beside what is said now, nor handed to the judge."""
    _, failed = judge(Python(function=f"{HERE}:no_f"), source)
    again = source.with_name("again.jsonl")
    again.write_text("".join(json.dumps(row) + "\n" for row in failed))
    _, rows = judge(Python(function=f"{HERE}:length"), again)
    assert [row["scores"] for row in rows] == [[2, 1, 4], [2], [4, 1], [1, 2]]
    assert not any("failure" in row for row in rows)


def test_what_a_judge_needs_of_its_rows(source):
    with pytest.raises(ConfigError, match=r"line 1: judge.kind: rules reads the prompt column"):
        judge(Ensemble(members=({"kind": "rules"}, {"kind": "rules"})), source)
    with pytest.raises(ConfigError, match=r"line 1: judge.kind: rules reads the prompt column"):
        judge(Rules(), source)
    with pytest.raises(ConfigError, match=r"line 2 has one response, but judge.kind: llm_pairwise compares"):
        judge(LlmPairwise(model="m", api_key_env=None, base_url="http://127.0.0.1:1/v1"), source)


def test_the_section_is_read_from_any_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("judge: {kind: python, function: 'a:b'}\nmodel: {path: nowhere}\n")
    assert read_judge(path, ["judge.workers=2"]) == Python(function="a:b", workers=2)
    path.write_text("model: {}\n")
    with pytest.raises(ConfigError, match="has no section judge:"):
        read_judge(path)
    path.write_text("judge: {kind: pyton}\n")
    with pytest.raises(ConfigError, match=r"judge.kind is 'pyton', which is no judge; did you mean 'python'"):
        read_judge(path)


async def never(prompt, response, metadata):
    await asyncio.sleep(1000)


def test_what_is_still_being_judged_when_it_ends_is_told_so():
    pool = LocalJudgePool(Python(function=f"{__name__}:never"))
    future = pool.submit([groups.make_group("a", "b")])
    with pytest.raises(TimeoutError):
        future.result(0.2)
    pool.close()
    assert future.cancelled(), "not left waiting for ever"


def test_a_spent_budget_ends_it_and_a_higher_one_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    config = Python(function=f"{HERE}:noted", budget={"calls": 3})
    with pytest.raises(BudgetError, match=r"judge.budget.calls = 3 is spent"):
        judge(config, source)
    assert (tmp_path / "calls").read_text().count("\n") == 3 and not source.with_name("out.jsonl").exists()
    judge(config.model_copy(update={"budget": BudgetConfig(calls=8)}), source)
    assert (tmp_path / "calls").read_text().count("\n") == 8


def test_a_judge_that_only_a_run_has(source):
    with pytest.raises(ConfigError, match=r"judge.kind is self_score, the run's own policy, which only a run has"):
        judge(SelfScore(), source)
    left = sorted(path.name for path in source.parent.iterdir())
    assert left == ["cache.sqlite", "cache.sqlite.lock", "in.jsonl"], "the cache is closed: one plain file"


def test_a_cache_has_one_writer_at_a_time(source):
    with FileLock(source.with_name("cache.sqlite.lock")), pytest.raises(LedgerError, match=r"cache.sqlite' is in use"):
        judge(Python(function=f"{HERE}:length"), source)
    judge(Python(function=f"{HERE}:length"), source)
