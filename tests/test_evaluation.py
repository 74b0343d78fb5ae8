"""Held-out statistics: pairing, ties, failures, intervals."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from online_po.evaluation import bootstrap, summarise
from online_po.tables import EVAL_SCHEMA


def table(scores: dict[str, list[float | None]], tokens: int = 10, reason: str = "stop") -> pa.Table:
    rows = [
        {
            "prompt_id": prompt_id,
            "prompt": [{"role": "user", "content": prompt_id}],
            "index": index,
            "text": "x",
            "score": score,
            "tokens": tokens,
            "finish_reason": reason,
            "rationale": None,
            "failure": "timeout: too slow" if score is None else None,
        }
        for prompt_id, values in scores.items()
        for index, score in enumerate(values)
    ]
    return pa.Table.from_pylist(rows, schema=EVAL_SCHEMA)


def sums(rows: pa.Table, start: pa.Table | None = None, previous: pa.Table | None = None) -> dict:
    return summarise(rows, policy_version=3, start=start, previous=previous, samples=1000, seed=0)


def test_wins_ties_and_losses_are_by_prompt():
    start = table({"a": [0.0, 1.0], "b": [0.2, 0.2], "c": [1.0, 1.0], "d": [0.0, 0.0]})
    rows = table({"d": [1.0, 0.0], "c": [0.5, 0.5], "b": [0.3, 0.2], "a": [1.0, 0.0]})
    comparison = sums(rows, start)["versus_start"]
    assert (comparison["wins"], comparison["ties"], comparison["losses"]) == (2, 1, 1)
    assert comparison["win_rate"]["mean"] == pytest.approx(2.5 / 4)
    assert comparison["difference"]["mean"] == pytest.approx((0.5 - 0.5 + 0.05 + 0.0) / 4)


def test_the_same_scores_in_another_order_tie_exactly():
    values = [0.1, 0.2, 0.3, 0.7, 1e-9]
    comparison = sums(table({"a": values}), table({"a": values[::-1]}))["versus_start"]
    assert (comparison["wins"], comparison["ties"], comparison["losses"]) == (0, 1, 0)


def test_a_failed_judgement_is_left_out_on_both_sides_and_counted():
    start = table({"a": [0.0], "b": [None], "c": [0.0], "gone": [0.0]})
    rows = table({"a": [1.0], "b": [1.0], "c": [None]})
    summary = sums(rows, start)
    assert (summary["prompts"], summary["failed_prompts"], summary["failures"]) == (3, 1, {"timeout": 1})
    assert summary["score"]["mean"] == 1.0, "the failure is no score of 0"
    comparison = summary["versus_start"]
    assert (comparison["prompts"], comparison["left_out"], comparison["wins"]) == (1, 3, 1)


def test_all_failed_gives_no_numbers():
    summary = sums(table({"a": [None]}), table({"a": [1.0]}))
    assert summary["score"] is None
    assert summary["versus_start"]["win_rate"] is None
    assert not summary["versus_start"]["better"] and not summary["versus_start"]["worse"]
    json.dumps(summary, allow_nan=False)


def test_better_and_worse_need_an_interval_that_excludes_zero():
    rng = np.random.default_rng(0)
    start = {f"p{i}": [float(rng.normal())] for i in range(60)}
    up = {name: [value[0] + 0.5 + float(rng.normal()) * 0.1] for name, value in start.items()}
    same = {name: [value[0] + float(rng.normal())] for name, value in start.items()}
    better = sums(table(up), table(start))["versus_start"]
    worse = sums(table(start), table(up))["versus_start"]
    unclear = sums(table(same), table(start))["versus_start"]
    assert (better["better"], better["worse"]) == (True, False)
    assert (worse["better"], worse["worse"]) == (False, True)
    assert (unclear["better"], unclear["worse"]) == (False, False)


def test_one_prompt_gives_no_interval_and_no_verdict():
    comparison = sums(table({"a": [1.0]}), table({"a": [0.0]}))["versus_start"]
    assert comparison["difference"] == {"mean": 1.0, "low": None, "high": None}
    assert not comparison["better"]


def test_lengths_and_truncation():
    summary = sums(table({"a": [1.0], "b": [1.0]}, tokens=7, reason="length"))
    assert summary["length_mean"] == 7.0 and summary["truncated_share"] == 1.0
    assert summary["versus_start"] is None and summary["policy_version"] == 3


def test_bootstrap_covers_the_normal_interval_and_repeats():
    values = np.random.default_rng(1).normal(size=2000)
    found = bootstrap(values, 4000, seed=3)
    assert found == bootstrap(values, 4000, seed=3)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap(np.array([]), 100, seed=0) is None


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(200):
        found = bootstrap(rng.exponential(size=60), 400, seed)
        hits += found["low"] <= 1.0 <= found["high"]
    assert 0.88 <= hits / 200 <= 0.99
