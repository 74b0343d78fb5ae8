"""Held-out statistics: mean score, win rates, differences, each with a 95% interval over prompts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa

_RESAMPLED_AT_ONCE = 1 << 20
"""Draws held in memory at once (8 bytes each)."""


class Interval(TypedDict):
    """A mean over prompts and its 95% bootstrap interval; the bounds are None for fewer than two prompts."""

    mean: float
    low: float | None
    high: float | None


class Comparison(TypedDict):
    """One policy against another, prompt by prompt."""

    prompts: int  # prompts judged on both sides: the ones compared
    left_out: int  # prompts with a failed judgement on either side, or that only one side has
    wins: int
    ties: int
    losses: int
    win_rate: Interval | None  # share of prompts won, a tie counting half, in [0, 1]
    difference: Interval | None  # mean of (own score - other's score)
    better: bool  # the difference's interval lies above zero
    worse: bool  # the difference's interval lies below zero


class EvalSummary(TypedDict):
    """Held-out evaluation of one policy: what `eval.json` holds."""

    policy_version: int  # the round whose weights were evaluated; 0 is the starting model
    prompts: int
    responses: int
    failed_prompts: int  # prompts whose judgement failed: no part of any score here
    failures: dict[str, int]  # failed prompts by kind
    score: Interval | None  # mean over prompts of the prompt's mean score
    against_start: bool  # scores are outcomes of duels with the start's responses, see `online_po.heldout.Duels`
    length_mean: float | None  # tokens
    truncated_share: float | None
    versus_start: Comparison | None
    versus_previous: Comparison | None
    attempt: NotRequired[int]  # of the round that made the policy; `online_po.heldout` adds this and `guards`
    guards: NotRequired[list[dict[str, Any]]]  # what guards saw, see `online_po.guards.Finding`


def summarise(
    rows: pa.Table,
    *,
    policy_version: int,
    start: pa.Table | None,
    previous: pa.Table | None,
    samples: int,
    seed: int,
    against_start: bool = False,
) -> dict[str, Any]:
    """Sums up one policy's evaluation, as the fields of `EvalSummary`.

    It is compared with the starting policy's evaluation and the previous one's, None where there is none.
    The tables are in `online_po.tables.EVAL_SCHEMA`, one row a response. Intervals are percentile bootstraps
    (Efron 1979) of `samples` resamples over prompts: prompts are the independent draws, responses to one
    prompt are not. Comparisons are paired by prompt id: a prompt is won, tied or lost by the mean score of
    its responses on each side.
    """
    scores, failures = prompt_scores(rows)
    lengths = rows["tokens"].to_numpy()
    reasons = rows["finish_reason"].to_pylist()
    summary: EvalSummary = {
        "policy_version": policy_version,
        "prompts": len(scores) + sum(failures.values()),
        "responses": rows.num_rows,
        "failed_prompts": sum(failures.values()),
        "failures": failures,
        "score": bootstrap(np.array(list(scores.values())), samples, seed),
        "against_start": against_start,
        "length_mean": float(lengths.mean()) if len(lengths) else None,
        "truncated_share": reasons.count("length") / len(reasons) if reasons else None,
        "versus_start": None if start is None else compare(rows, start, samples, seed),
        "versus_previous": None if previous is None else compare(rows, previous, samples, seed),
    }
    return dict(summary)


def prompt_scores(rows: pa.Table) -> tuple[dict[str, float], dict[str, int]]:
    """(prompt id -> mean score of its responses, failed prompts counted by kind) of an evaluation table."""
    scores: dict[str, list[float | None]] = defaultdict(list)
    kinds: dict[str, str] = {}
    columns = [rows[name].to_pylist() for name in ("prompt_id", "score", "failure")]
    for prompt_id, score, failure in zip(*columns, strict=True):
        scores[prompt_id].append(score)
        if score is None:
            kinds[prompt_id] = (failure or "unknown").partition(":")[0]
    # fsum rounds once: two sides with the same scores in another order tie exactly.
    means = {
        prompt_id: math.fsum(s for s in values if s is not None) / len(values)
        for prompt_id, values in scores.items()
        if prompt_id not in kinds
    }
    return means, dict(sorted(Counter(kinds.values()).items()))


def compare(rows: pa.Table, other: pa.Table, samples: int, seed: int) -> Comparison:
    """`rows` against `other`, paired by prompt id; see `summarise`."""
    own_scores, _ = prompt_scores(rows)
    other_scores, _ = prompt_scores(other)
    everyone = set(rows["prompt_id"].to_pylist()) | set(other["prompt_id"].to_pylist())
    shared = [prompt_id for prompt_id in own_scores if prompt_id in other_scores]
    gaps = np.array([own_scores[i] - other_scores[i] for i in shared])
    difference = bootstrap(gaps, samples, seed)
    low, high = (difference["low"], difference["high"]) if difference else (None, None)
    return {
        "prompts": len(shared),
        "left_out": len(everyone) - len(shared),
        "wins": int((gaps > 0).sum()),
        "ties": int((gaps == 0).sum()),
        "losses": int((gaps < 0).sum()),
        "win_rate": bootstrap((np.sign(gaps) + 1) / 2, samples, seed),
        "difference": difference,
        "better": low is not None and low > 0,
        "worse": high is not None and high < 0,
    }


def bootstrap(values: np.ndarray, samples: int, seed: int) -> Interval | None:
    """Mean of (P,) values and its 95% percentile bootstrap interval; None for no values.

    The same values, in the same order, with the same seed give the same interval.
    """
    if not len(values):
        return None
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    at_once = max(1, _RESAMPLED_AT_ONCE // len(values))
    for begin in range(0, samples, at_once):
        draws = rng.integers(0, len(values), (min(at_once, samples - begin), len(values)))
        means[begin : begin + len(draws)] = values[draws].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


def best_version(scores: Mapping[int, float]) -> int | None:
    """The policy version with the highest mean held-out score, the oldest of equals; None without any.

    `scores`: version -> mean, oldest first."""
    return max(scores, key=lambda version: scores[version], default=None)


def early_stop(scores: Mapping[int, float], patience: int, min_gain: float) -> int | None:
    """The policy version at which a run ends early: the last of `patience` evaluations on end that were no more than
    `min_gain` above the best before them; None while there is none. `scores`: version -> mean, oldest first."""
    best, waited = -math.inf, 0
    for version, score in scores.items():
        if score > best + min_gain:
            best, waited = score, 0
            continue
        waited += 1
        if waited >= patience:
            return version
    return None
