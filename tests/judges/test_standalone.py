"""Judging a file without a run."""

from __future__ import annotations

import datetime
import gc
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from judges.standalone import judge_file
from online_po.config import read_judge
from online_po.errors import BudgetError, ConfigError, JudgeFailureRateError, LedgerError
from online_po.judge_configs import LlmPairwise, Python, Rules
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


def test_a_failure_is_no_label_and_too_many_are_an_error(source):
    judged, rows = judge(Python(function=f"{HERE}:no_f"), source)
    assert [row["scores"] for row in rows] == [[2, 1, 4], [2], None, [1, 2]]
    assert rows[2]["failure"] == {"kind": "error", "message": "response 1: ValueError: f"}
    assert judged.failures == {"error": 1}
    judged.require_few_failures(0.25)
    with pytest.raises(JudgeFailureRateError, match=r"failed on 1 of 4 rows, more than judge.max_failure_rate = 0.2"):
        judged.require_few_failures(0.2)


def test_rows_with_more_columns_than_are_judged(tmp_path):
    path = tmp_path / "in.jsonl"
    both = {"prompt": "p", "response": "aaa", "chosen": "bb", "rejected": "c"}
    again = {"prompt": "q", "response": "a", "scores": [9], "rationales": ["old"], "failure": {"kind": "timeout"}}
    path.write_text(json.dumps(both) + "\n" + json.dumps(again) + "\n")
    judged, rows = judge(Python(function=f"{HERE}:length"), path)
    assert judged.accuracy is None and judged.failures == {}
    assert rows == [both | {"scores": [3]}, {"prompt": "q", "response": "a", "scores": [1]}]


def test_values_that_json_has_not(tmp_path):
    path = tmp_path / "in.parquet"
    table = {"prompt": ["p"], "response": ["a"], "when": [datetime.date(2020, 1, 2)]}
    pq.write_table(pa.table(table), path)
    _, rows = judge(Python(function=f"{HERE}:length"), path)
    assert rows == [{"prompt": "p", "response": "a", "when": "2020-01-02", "scores": [1]}]
    pq.write_table(pa.table(table | {"image": [b"x"]}), path)
    with pytest.raises(ConfigError, match="row 1 holds a bytes, which cannot be handed to a judge"):
        judge(Python(function=f"{HERE}:length"), path)


def test_a_spent_budget_says_so_and_nothing_else(source, caplog):
    with caplog.at_level("ERROR"), pytest.raises(BudgetError, match="judge.budget.calls = 3 is spent"):
        judge(Python(function=f"{HERE}:length_async", budget={"calls": 3}), source)
    gc.collect()  # tasks that were dropped complain when they are collected
    assert caplog.records == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p"}, r"line 2 has none of 'responses', 'response' and 'chosen'"),
        ({"prompt": "p", "responses": "text"}, r"line 2: 'responses' is 'text', not a list of texts"),
        ({"prompt": "p", "response": 3}, r"line 2: 'response' is a int, not text"),
        ({"response": "x"}, r"line 2 has no 'prompt'"),
        ({"prompt": "p", "chosen": "x"}, r"line 2 has no 'rejected'"),
        ({"prompt": "p", "response": "x", "note": "\ud83d"}, r"line 2 holds .ud83d, one half of a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_before_any_is(tmp_path, row, words):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=words):
        judge(Python(function=f"{HERE}:length"), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_what_a_judge_needs_of_its_rows(source):
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


def test_a_cache_has_one_writer_at_a_time(source):
    with FileLock(source.with_name("cache.sqlite.lock")), pytest.raises(LedgerError, match=r"cache.sqlite' is in use"):
        judge(Python(function=f"{HERE}:length"), source)
    judge(Python(function=f"{HERE}:length"), source)
