"""Pair strategies: ties, identical responses and small margins never make a pair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_po.example_configs import PairsConfig
from online_po.pairs import build_pairs, flip, spin_pairs
from online_po.types import GivenResponse, Group, JudgeFailure, Judgement, Prompt, Response

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


def long_group(*lengths: int) -> Group:
    """Responses of these lengths in tokens, all of other text."""
    made = group(*range(len(lengths)))
    responses = (replace(r, token_ids=(r.index,) * n) for r, n in zip(made.responses, lengths, strict=True))
    return replace(made, responses=tuple(responses))


def indices(scores: tuple[float, ...], tokens: tuple[int, ...] | None = None, seed: int = 0, lengths=(), **config):
    judgement = Judgement(prompt_id="p", scores=scores)
    g = long_group(*lengths) if lengths else group(*(tokens or range(len(scores))))
    rewards = config.pop("rewards", None)
    pairs, skip = build_pairs(g, judgement, PairsConfig(**config), seed, rewards)
    assert (skip is None) == bool(pairs)
    return [(p.chosen.index, p.rejected.index) for p in pairs] or skip


def test_best_worst():
    assert indices((0.1, 0.9, 0.5)) == [(1, 0)]


def test_best_worst_steps_over_identical_text():
    # The best (0) and the worst (1) are the same tokens, which a noisy judge scored differently.
    assert indices((0.9, 0.1, 0.5), tokens=(7, 7, 8)) == [(0, 2)]


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.1 + 0.2, 1.0]), st.integers(1, 4)), min_size=2, max_size=7),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([None, 1.5]),
)
def test_best_worst_is_the_first_of_all_pairs(drawn, min_margin, ratio):
    """The widest gap is tried first, and the others only where that makes no pair."""
    scores, lengths = zip(*drawn, strict=True)
    one, every = (
        indices(scores, lengths=lengths, strategy=strategy, min_margin=min_margin, max_length_ratio=ratio)
        for strategy in ("best_worst", "all")
    )
    assert one == (every if isinstance(every, str) else every[:1])


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


def test_hardest_is_the_smallest_gap_that_is_no_tie_and_reaches_the_margin():
    assert indices((1.0, 0.25, 0.875, 0.25), strategy="hardest") == [(0, 2)]
    assert indices((1.0, 0.25, 0.875), strategy="hardest", min_margin=0.5) == [(2, 1)]
    # Equal gaps are drawn from, so that not always the best responses are paired.
    assert {tuple(indices((1.0, 0.75, 0.5), strategy="hardest", seed=s)[0]) for s in range(50)} == {(0, 1), (1, 2)}


def test_hardest_reward_is_the_smallest_reward_gap_whichever_side_is_ahead():
    scores = (4.0, 3.0, 2.0, 1.0)
    # Gaps: |0 - 5|, |0 - 1.5|, ... ; 1 and 2 are 0.5 apart, the policy prefers the worse one.
    rewards = [0.0, 5.0, 5.5, 1.5]
    assert indices(scores, strategy="hardest_reward", rewards=rewards) == [(1, 2)]
    assert indices(scores, strategy="hardest_reward", rewards=rewards, min_margin=1.5) == [(0, 3)]
    # All rewards alike: the score gap decides.
    assert indices((4.0, 1.0, 3.5), strategy="hardest_reward", rewards=[0.0] * 3) == [(0, 2)]
    # A tie in scores is never taken, however close the rewards are.
    assert indices((1.0, 1.0, 0.0), strategy="hardest_reward", rewards=[0.0, 0.0, 9.0], seed=3)[0][1] == 2


def test_rounding_decides_nothing():
    assert 0.9 - 0.8 < 0.1 and 1 - 2 / 3 > 2 / 3 - 1 / 3
    assert indices((0.9, 0.8), min_margin=0.1) == [(0, 1)]
    assert indices((0.1 + 0.2, 0.3)) == indices((1e6 + 1e-9, 1e6)) == "tie"
    assert indices((1e-300, 0.0)) == indices((1e6 + 1e-3, 1e6)) == [(0, 1)]
    assert indices((0.9, 0.8), min_margin=0.1001) == "below_min_margin"
    # Thirds are equal gaps, though not in floats: either may be drawn.
    for strategy, rewards in (("hardest", None), ("hardest_reward", [0.0] * 3)):
        drawn = {indices((1.0, 2 / 3, 1 / 3), strategy=strategy, rewards=rewards, seed=s)[0] for s in range(50)}
        assert drawn == {(0, 1), (1, 2)}


def test_the_probability_of_a_preference_is_bradley_terrys():
    def probabilities(scale, scores=(2.0, 0.0, 1.0)):
        judgement = Judgement(prompt_id="p", scores=scores)
        pairs, _ = build_pairs(group(1, 2, 3), judgement, PairsConfig(strategy="all"), 0, None, scale)
        return [pair.preference_probability for pair in pairs]

    odds = [math.e**2, math.e, math.e]  # of margins 2, 1 and 1: exp(reward) against exp(reward)
    assert probabilities(1.0) == pytest.approx([x / (1 + x) for x in odds])
    assert probabilities(2.0) == pytest.approx([x**0.5 / (1 + x**0.5) for x in odds])
    assert probabilities(1e-308) == [1.0] * 3 and probabilities(1e308) == pytest.approx([0.5] * 3)
    assert probabilities(None) == [None] * 3


def test_only_pairs_of_like_length_are_usable():
    assert indices((3, 2, 1), lengths=(10, 14, 30)) == [(0, 2)]
    assert indices((3, 2, 1), lengths=(10, 14, 30), max_length_ratio=3) == [(0, 2)]
    assert indices((3, 2, 0), lengths=(10, 14, 31), max_length_ratio=3) == [(1, 2)]
    assert indices((3, 2, 1), lengths=(10, 14, 31), max_length_ratio=1.4) == [(0, 1)]
    assert indices((3, 2, 1), lengths=(10, 14, 31), max_length_ratio=1.2) == "length_ratio"
    assert indices((3, 2, 1), lengths=(0, 1, 1), max_length_ratio=9) == [(1, 2)], "nothing is so many times nothing"
    # best_random keeps to the best one, top_bottom_k to its own pairs.
    assert indices((3, 2, 1), lengths=(10, 99, 99), max_length_ratio=2, strategy="best_random") == "length_ratio"
    assert indices((4, 3, 2, 1), lengths=(1, 9, 9, 2), max_length_ratio=1, strategy="top_bottom_k") == [(1, 2)]


STRATEGIES = ["best_worst", "best_random", "random", "top_bottom_k", "all", "hardest", "hardest_reward"]
GRADES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 1.0])


@settings(max_examples=200, deadline=None)
@given(
    responses=st.lists(st.tuples(GRADES, st.integers(0, 3), st.integers(0, 6)), min_size=4, max_size=7),
    strategy=st.sampled_from(STRATEGIES),
    min_margin=st.sampled_from([0.0, 0.2]),
    ratio=st.sampled_from([None, 1.0, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_whatever_comes_every_pair_is_a_real_preference(responses, strategy, min_margin, ratio, seed):
    scores, texts, lengths = (tuple(column) for column in zip(*responses, strict=True))
    g = long_group(*lengths)
    g = replace(g, responses=tuple(replace(r, text=str(t)) for r, t in zip(g.responses, texts, strict=True)))
    config = PairsConfig(strategy=strategy, min_margin=min_margin, max_length_ratio=ratio)
    judgement = Judgement(prompt_id="p", scores=scores)
    rewards = [float(length % 3) for length in lengths]
    pairs, skip = build_pairs(g, judgement, config, seed, rewards)
    assert (skip is None) == bool(pairs)
    assert pairs == build_pairs(g, judgement, config, seed, rewards)[0], "the same seed, the same pairs"
    for pair in pairs:
        assert pair.chosen.text != pair.rejected.text
        assert pair.margin > 0 and pair.margin >= min_margin - 1e-9
        assert (pair.chosen_score, pair.rejected_score) == (scores[pair.chosen.index], scores[pair.rejected.index])
        if ratio is not None:
            short, long = sorted((len(pair.chosen.token_ids), len(pair.rejected.token_ids)))
            assert long <= ratio * short


def test_a_flip_swaps_the_responses_and_leaves_the_scores_sorted():
    (pair,), _ = build_pairs(group(5, 6), Judgement(prompt_id="p", scores=(0.2, 0.9)), PairsConfig(), 0, None, 0.35)
    flipped = flip(pair)
    assert flipped.preference_probability == pair.preference_probability > 0.5, "an erring judge is as sure"
    assert (flipped.chosen.index, flipped.rejected.index) == (0, 1) == (pair.rejected.index, pair.chosen.index)
    assert (flipped.chosen_score, flipped.rejected_score, flipped.flipped) == (0.9, 0.2, True)
    assert flip(flipped) == pair


def spin(*tokens: int, gold: str = "7", seed: int = 0, max_length: int = 99, lengths=(), **config):
    g = long_group(*lengths) if lengths else group(*tokens)
    config = PairsConfig(strategy="spin", chosen_column="gold", **config)
    pairs, skip = spin_pairs(g, GivenResponse(text=gold, token_ids=(7, 7, 2)), config, seed, max_length)
    assert (skip is None) == bool(pairs)
    for pair in pairs:
        assert pair.chosen.text == gold and pair.chosen_score is pair.rejected_score is pair.margin is None
    return [pair.rejected.index for pair in pairs] or skip


def test_spin_sets_a_given_response_against_own_ones_of_other_text():
    assert {spin(5, 7, 6, seed=s)[0] for s in range(50)} == {0, 2}, "never the one that reads the same"
    assert sorted(spin(5, 7, 6, 5, max_per_prompt=4)) == [0, 2], "no text twice"
    assert len(spin(5, 7, 6, 8, max_per_prompt=2)) == 2
    assert spin(7, 7) == "same_as_chosen"
    assert spin(5, max_length=3) == "chosen_too_long" and spin(5, max_length=4) == [0]
    assert (
        spin(lengths=(6, 7), max_length_ratio=2) == [0] and spin(lengths=(7, 1), max_length_ratio=2) == "length_ratio"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reasons_for_no_pair(strategy):
    assert indices((1.0, 1.0, 1.0, 1.0), strategy=strategy) == "tie"
    assert indices((1.0, 0.0, 0.5, 0.2), tokens=(5, 5, 5, 5), strategy=strategy) == "identical"
    assert indices((1.0, 0.9, 0.8, 0.7), strategy=strategy, min_margin=0.5) == "below_min_margin"
    ratio = {"lengths": (1, 3, 7, 15), "max_length_ratio": 2}
    assert indices((1.0, 0.9, 0.8, 0.7), strategy=strategy, **ratio) == "length_ratio"
    failed = Judgement(prompt_id="p", failure=JudgeFailure(kind="error", message="x"))
    assert build_pairs(group(1, 2), failed, PairsConfig(strategy=strategy), 0) == ([], "judge_failed")


def test_min_margin_is_reached_at_equality():
    assert indices((1.0, 0.5), min_margin=0.5) == [(0, 1)]
