"""Shares, balance and draws: right in number, without repeats, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from online_po.example_mix import balanced, draw, wanted


def test_shares_are_of_the_whole_round():
    assert wanted(80, 0.2, 0) == (20, 0)
    assert wanted(50, 0.25, 0.25) == (25, 25)
    assert wanted(10, 0, 0) == (0, 0) == wanted(0, 0.5, 0.4)


@given(own=st.integers(1, 5000), replay=st.integers(0, 49), seed=st.integers(0, 49))
def test_shares_come_out_within_one_example(own, replay, seed):
    replayed, seeds = wanted(own, replay / 100, seed / 100)
    total = own + replayed + seeds
    assert abs(replayed - total * replay / 100) <= 1 and abs(seeds - total * seed / 100) <= 1


@settings(deadline=None)
@given(
    domains=st.lists(st.sampled_from("abc"), max_size=60),
    ratio=st.sampled_from([1.0, 1.5, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_no_domain_keeps_more_than_its_ratio_and_none_loses_more_than_it_must(domains, ratio, seed):
    kept = balanced(domains, ratio, seed)
    assert (kept == balanced(domains, ratio, seed)).all()
    before, after = Counter(domains), Counter(np.array(domains)[kept].tolist())
    most = int(ratio * min(before.values(), default=0))
    assert after == {domain: min(count, most) for domain, count in before.items()}


def test_which_ones_a_large_domain_keeps_is_drawn():
    domains = ["big"] * 20 + ["small"] * 5
    kept = {tuple(np.flatnonzero(balanced(domains, 1, seed)).tolist()) for seed in range(30)}
    assert len(kept) > 25 and all(set(range(20, 25)) <= set(rows) for rows in kept)
    assert {row for rows in kept for row in rows} == set(range(25)), "everyone has a chance"


@given(size=st.integers(0, 50), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_a_draw_is_without_repeats_and_a_beginning_of_a_longer_one(size, share, seed):
    count = int(share * size)
    drawn = draw(seed, size, count).tolist()
    assert len(set(drawn)) == count and set(drawn) <= set(range(size))
    assert draw(seed, size, size).tolist()[:count] == drawn
