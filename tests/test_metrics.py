"""Sampling statistics against hand-derived values; BLEU against NLTK's numbers."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from online_po.metrics import SampleStats, bin_width, distinct_n, histogram, round_means, self_bleu, to_bins
from online_po.types import Comparison, Group, JudgeFailure, Judgement, Prompt, Response


def make_group(
    name: str, lengths: list[int], scores: list[float] | None, truncated: int = 0, tokens: int = 50
) -> tuple[Group, Judgement]:
    prompt = Prompt(id=name, messages=(), text="", token_ids=(1,))
    rng = random.Random(name)
    responses = tuple(
        Response(
            index=i,
            text="",
            token_ids=tuple(rng.randrange(tokens) for _ in range(length)),
            token_logps=(0.0,) * length,
            finish_reason="length" if i < truncated else "stop",
            policy_version=0,
            seed=0,
        )
        for i, length in enumerate(lengths)
    )
    failure = None if scores is not None else JudgeFailure(kind="error", message="down")
    return Group(prompt=prompt, responses=responses), Judgement(
        prompt_id=name, scores=None if scores is None else tuple(scores), failure=failure
    )


def collect(groups: list[tuple[Group, Judgement]], seed: int = 0) -> dict:
    stats = SampleStats(seed)
    for group, judgement in groups:
        stats.add(group, judgement)
    return stats.result()


def test_scores_lengths_and_counts():
    result = collect(
        [
            make_group("a", [2, 4], [0.0, 1.0], truncated=1),
            make_group("b", [6, 8, 10], [0.5, 0.5, 0.5]),
            make_group("c", [100, 100], None),
        ]
    )
    assert (result["groups"], result["failed_groups"], result["responses"]) == (3, 1, 7)
    assert result["response_tokens"] == 230
    assert result["score_mean"] == pytest.approx(2.5 / 5)
    assert result["score_best"] == pytest.approx((1.0 + 0.5) / 2)
    assert result["score_worst"] == pytest.approx((0.0 + 0.5) / 2)
    assert result["score_std"] == pytest.approx(math.sqrt((0.25 + 0.25) / 5))
    assert result["tie_groups"] == 1
    assert result["truncated_share"] == pytest.approx(1 / 7)
    assert result["length_mean"] == pytest.approx(230 / 7)
    assert result["score_histogram"] == {"values": [0.0, 0.5, 1.0], "counts": [1, 3, 1]}
    json.dumps(result, allow_nan=False)


def test_nothing_judged_is_none_not_nan():
    result = collect([make_group("a", [3, 3], None)])
    assert result["score_mean"] is None and result["length_score_correlation"] is None
    assert result["score_histogram"]["counts"] == []
    assert result["length_mean"] == 3.0


def test_consistency_is_of_pairs_that_were_shown_in_both_orders():
    def compared(*said: bool | None) -> list[tuple[Group, Judgement]]:
        group, judgement = make_group("a", [2, 4], [0.0, 1.0])
        found = tuple(Comparison(first=0, second=1, preference=0.0, consistent=one) for one in said)
        return [(group, replace(judgement, comparisons=found))]

    assert collect(compared(True, False, True, None))["order_consistency"] == pytest.approx(2 / 3)
    assert "order_consistency" not in collect(compared(None, None))


def test_length_score_correlation_is_within_prompts():
    # Between prompts long means good; within each prompt long means bad. Only the second is the judge's taste.
    result = collect(
        [make_group("short", [1, 2, 3], [0.3, 0.2, 0.1]), make_group("long", [11, 12, 13], [9.3, 9.2, 9.1])]
    )
    assert result["length_score_correlation"] == pytest.approx(-1.0)
    assert collect([make_group("flat", [1, 2, 3], [1e6 + 0.1] * 3)])["length_score_correlation"] is None
    assert collect([make_group("same", [7, 7], [0.1, 0.3])])["length_score_correlation"] is None


def test_the_diversity_sample_does_not_depend_on_order():
    groups = [make_group(f"p{i}", [12, 15, 9], [0.1, 0.2, 0.3], tokens=10 + i) for i in range(100)]
    names = ("distinct_1", "distinct_2", "self_bleu")
    forward, backward, other = collect(groups), collect(groups[::-1]), collect(groups, seed=1)
    assert [forward[n] for n in names] == pytest.approx([backward[n] for n in names])
    assert forward["distinct_1"] != other["distinct_1"], "another seed takes other groups"


def test_memory_grows_by_numbers_only():
    group, judgement = make_group("a", [40] * 4, [0.1, 0.2, 0.3, 0.4])
    stats = SampleStats(0)
    tracemalloc.start()
    for _ in range(20_000):
        stats.add(group, judgement)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 * 4 * 2 * 8 * 2.5, "two numbers a response, and what arrays keep in reserve"


# Values of nltk 3.10.4: mean over i of sentence_bleu(others, response_i, smoothing_function=method1, epsilon=0.1).
@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9, 9], [7, 2, 3, 8, 5]], 0.35045617489842157),
        ([[1, 2], [1, 2, 3], [5]], 0.1855029691434378),
        ([[1, 2, 3, 4, 5]] * 3, 1.0),
        ([[1, 1, 1, 1, 1, 2], [1, 1, 3, 4], [2, 2, 1, 1, 1]], 0.2117280875389157),
    ],
)
def test_self_bleu_is_nltks(responses, expected):
    assert self_bleu(responses) == pytest.approx(expected, abs=1e-12)


def test_self_bleu_by_hand():
    # Hypothesis 1 2 3 4 9 against 1 2 3 4 5: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty; and the same back.
    assert self_bleu([[1, 2, 3, 4, 9], [1, 2, 3, 4, 5]]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert self_bleu([[1, 2, 3], [4, 5, 6]]) == 0.0
    assert self_bleu([[1, 2, 3], []]) is None


def test_distinct_n_by_hand():
    assert distinct_n([[1, 2, 1], [1, 3]], 1) == pytest.approx(3 / 5)
    assert distinct_n([[1, 2, 1, 2], [1, 3]], 2) == pytest.approx(3 / 4)
    assert distinct_n([[1]], 2) is None


def test_histograms_keep_every_count_and_nest():
    rng = np.random.default_rng(0)
    fine, coarse = histogram(rng.normal(size=500)), histogram(rng.normal(size=900) * 20)
    assert sum(fine["counts"]) == 500 and sum(coarse["counts"]) == 900
    assert len(fine["counts"]) <= 34
    merged = to_bins(fine, coarse["width"])
    assert sum(merged["counts"]) == 500
    values = np.array([-1.5, -0.25, 0.0, 0.24, 3.0])
    assert to_bins(histogram(values), 1.0) == {"width": 1.0, "first": -2, "counts": [1, 1, 2, 0, 0, 1]}
    assert bin_width(0.0, 32.0) == 1.0 and bin_width(0.0, 33.0) == 2.0


def test_round_means_weigh_by_pairs_and_tokens():
    steps = [
        {"loss": 1.0, "entropy": 2.0, "grad_norm": 1.0, "pairs": 3.0, "tokens": 10.0, "seconds": 1.0},
        {"loss": 2.0, "entropy": 4.0, "grad_norm": 3.0, "pairs": 1.0, "tokens": 30.0, "seconds": 2.0, "kl_start": 0.5},
    ]
    assert round_means(steps) == pytest.approx(
        {
            "loss": (3 * 1.0 + 1 * 2.0) / 4,
            "entropy": (10 * 2.0 + 30 * 4.0) / 40,
            "grad_norm": 2.0,
            "pairs": 4.0,
            "tokens": 40.0,
            "seconds": 3.0,
            "kl_start": 0.5,
        }
    )


def test_round_means_of_labels_weigh_each_kind_by_its_own_count():
    steps = [
        {"labels": 4.0, "desirable": 3.0, "undesirable": 1.0, "loss": 1.0, "chosen_reward": 1.0, "chosen_logps": -2.0,
         "rejected_reward": -1.0, "margin": 2.0},
        {"labels": 4.0, "desirable": 1.0, "undesirable": 3.0, "loss": 3.0, "chosen_reward": 5.0, "chosen_logps": -6.0,
         "rejected_reward": 3.0, "margin": 2.0},
        {"labels": 2.0, "desirable": 2.0, "undesirable": 0.0, "loss": 2.0, "chosen_reward": 2.0, "chosen_logps": -3.0},
    ]  # fmt: skip
    assert round_means(steps) == pytest.approx(
        {
            "labels": 10.0,
            "desirable": 6.0,
            "undesirable": 4.0,
            "loss": (4 * 1 + 4 * 3 + 2 * 2) / 10,
            "chosen_reward": (3 * 1 + 1 * 5 + 2 * 2) / 6,
            "chosen_logps": -(3 * 2 + 1 * 6 + 2 * 3) / 6,
            "rejected_reward": (1 * -1 + 3 * 3) / 4,
            "margin": 2.0 - 2.0,
        }
    )
