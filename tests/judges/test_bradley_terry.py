import itertools
import math
import random

import numpy as np
import pytest

from judges.bradley_terry import PRIOR, strengths


def likelihood(theta, comparisons):
    """Written out once more, term by term: what `strengths` says it maximises."""

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    total = 0.0
    for first, second, p in comparisons:
        gap = theta[first] - theta[second]
        total += p * log_sigmoid(gap) + (1 - p) * log_sigmoid(-gap)
    return total + sum(PRIOR / len(theta) * (log_sigmoid(t) + log_sigmoid(-t)) for t in theta)


def by_brute_force(players, comparisons):
    """Coordinate search with ever smaller steps: slow, and without a derivative."""
    theta, size = [0.0] * players, 1.0
    while size > 1e-8:
        before = likelihood(theta, comparisons)
        for i in range(players):
            for step in (size, -size):
                moved = [*theta[:i], theta[i] + step, *theta[i + 1 :]]
                if likelihood(moved, comparisons) > likelihood(theta, comparisons):
                    theta = moved
        if likelihood(theta, comparisons) == before:
            size /= 2
    return theta


@pytest.mark.parametrize("seed", range(5))
def test_against_brute_force(seed):
    rng = random.Random(seed)
    players = rng.randint(2, 5)
    pairs = [pair for pair in itertools.combinations(range(players), 2) if rng.random() < 0.8]
    comparisons = [(a, b, rng.choice([0.0, 0.5, 1.0, rng.random()])) for a, b in pairs]
    assert strengths(players, comparisons) == pytest.approx(by_brute_force(players, comparisons), abs=1e-3)


def test_two_players():
    # 1 - s(2x) = PRIOR / 2 * (2 s(x) - 1), solved by hand for x
    (x, y) = strengths(2, [(0, 1, 1.0)])
    assert x == -y == pytest.approx(1.286545)
    assert 1 - 1 / (1 + math.exp(-2 * x)) == pytest.approx(PRIOR / 2 * (2 / (1 + math.exp(-x)) - 1), abs=1e-6)


@pytest.mark.parametrize("players", [1, 2, 5, 40])
def test_ties_alone_are_exact_ties(players):
    ties = [(a, b, 0.5) for a, b in itertools.combinations(range(players), 2)]
    assert strengths(players, ties) == [0.0] * players


def test_a_circle_is_a_tie():
    assert strengths(3, [(0, 1, 1.0), (1, 2, 1.0), (0, 2, 0.0)]) == [0.0] * 3


def test_equal_records_are_exactly_equal():
    # 0 beats all, 3 loses to all, 1 and 2 tie: whatever rounding does on the way, 1 and 2 are one.
    comparisons = [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0), (1, 2, 0.5), (1, 3, 1.0), (2, 3, 1.0)]
    for seed in range(10):
        random.Random(seed).shuffle(comparisons)
        theta = strengths(4, comparisons)
        assert theta[0] > theta[1] == theta[2] > theta[3]


@pytest.mark.parametrize("players", [3, 10, 64])
def test_decisions_without_contradiction_stand(players):
    rng = random.Random(players)
    order = list(range(players))
    rng.shuffle(order)
    pairs = [pair for pair in itertools.combinations(range(players), 2) if rng.random() < 0.3]
    theta = strengths(players, [(a, b, float(order[a] < order[b])) for a, b in pairs])
    assert np.isfinite(theta).all()
    for a, b in pairs:
        better, worse = (a, b) if order[a] < order[b] else (b, a)
        assert theta[better] > theta[worse] + 1
