"""Pair strategies: ties, identical responses and small margins never make a pair."""

from __future__ import annotations

import pytest

from online_po.pairs import build_pairs
from online_po.sections import PairsConfig
from online_po.types import Group, JudgeFailure, Judgement, Prompt, Response

PROMPT = Prompt(id="p", messages=({"role": "user", "content": "q"},), text="q", token_ids=(1,), metadata={})


def group(*tokens: int) -> Group:
    return Group(
        prompt=PROMPT,
        responses=tuple(
            Response(
                index=i,
                text=str(t),
                token_ids=(t,),
                token_logps=(-0.5,),
                finish_reason="stop",
                policy_version=0,
                seed=i,
            )
            for i, t in enumerate(tokens)
        ),
    )


def indices(scores: tuple[float, ...], tokens: tuple[int, ...] | None = None, seed: int = 0, **config: object):
    judgement = Judgement(prompt_id="p", scores=scores)
    g = group(*(tokens or range(len(scores))))
    pairs, skip = build_pairs(g, judgement, PairsConfig(**config), seed)
    assert (skip is None) == bool(pairs)
    return [(p.chosen.index, p.rejected.index) for p in pairs] or skip


def test_best_worst():
    assert indices((0.1, 0.9, 0.5)) == [(1, 0)]


def test_best_worst_steps_over_identical_text():
    # The best (0) and the worst (1) are the same tokens, which a noisy judge scored differently.
    assert indices((0.9, 0.1, 0.5), tokens=(7, 7, 8)) == [(0, 2)]


def test_random_strategies_only_draw_real_preferences_and_draw_them_all():
    scores = (0.2, 0.8, 0.8, 0.5)
    best = {tuple(indices(scores, seed=s, strategy="best_random")[0]) for s in range(100)}
    assert best == {(1, 0), (2, 0), (1, 3), (2, 3)}
    drawn = {tuple(indices(scores, seed=s, strategy="random")[0]) for s in range(200)}
    assert drawn == best | {(3, 0)}


def test_top_bottom_k():
    assert indices((4, 3, 2, 1), strategy="top_bottom_k", k=2) == [(0, 3), (1, 2)]
    assert indices((4, 3, 3, 1), strategy="top_bottom_k", k=2) == [(0, 3)]
    assert indices((4, 3, 2, 1), strategy="top_bottom_k", k=2, max_per_prompt=1) == [(0, 3)]


def test_all_pairs_largest_margin_first():
    assert indices((3, 1, 2), strategy="all") == [(0, 1), (0, 2), (2, 1)]
    assert indices((3, 1, 2), strategy="all", max_per_prompt=2) == [(0, 1), (0, 2)]
    assert indices((3, 3, 2), strategy="all") == [(0, 2), (1, 2)]


@pytest.mark.parametrize("strategy", ["best_worst", "best_random", "random", "top_bottom_k", "all"])
def test_reasons_for_no_pair(strategy):
    assert indices((1.0, 1.0, 1.0, 1.0), strategy=strategy) == "tie"
    assert indices((1.0, 0.0, 0.5, 0.2), tokens=(5, 5, 5, 5), strategy=strategy) == "identical"
    assert indices((1.0, 0.9, 0.8, 0.7), strategy=strategy, min_margin=0.5) == "below_min_margin"
    failed = Judgement(prompt_id="p", failure=JudgeFailure(kind="error", message="x"))
    assert build_pairs(group(1, 2), failed, PairsConfig(strategy=strategy), 0) == ([], "judge_failed")


def test_min_margin_is_reached_at_equality():
    assert indices((1.0, 0.5), min_margin=0.5) == [(0, 1)]
