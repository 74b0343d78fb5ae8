"""Scores out of comparisons: log-strengths of the Bradley-Terry model (Bradley & Terry 1952)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DECIMALS = 6
"""Strengths are rounded to this: what only float rounding tells apart is a tie."""
PRIOR = 0.25
"""Virtual wins, and as many losses, against an opponent of strength 0, shared by all players."""
MAX_STEPS = 200


def strengths(players: int, comparisons: Sequence[tuple[int, int, float]]) -> list[float]:
    """(first, second, probability that first wins), ... -> one log-strength a player; sigmoid of the gap of two is the
    chance that the one beats the other.

    The maximum of the likelihood with a symmetric prior: each player has won and lost PRIOR / players games against
    an opponent of strength 0, so that who won all its games has a finite strength. So light a prior never turns a
    decision around: where all comparisons are decisive and contradict one another nowhere, each winner is stronger
    than its loser. A player's strength does not depend on the order of the comparisons.
    """
    first = np.array([c[0] for c in comparisons], dtype=np.int64)
    second = np.array([c[1] for c in comparisons], dtype=np.int64)
    won = np.array([c[2] for c in comparisons], dtype=np.float64)
    prior = PRIOR / players

    def value(theta: np.ndarray) -> float:
        gap = theta[first] - theta[second]
        # log sigmoid(x) = -log(1 + exp(-x))
        own = -(won * np.logaddexp(0, -gap) + (1 - won) * np.logaddexp(0, gap)).sum()
        return float(own - prior * (np.logaddexp(0, -theta) + np.logaddexp(0, theta)).sum())

    theta = np.zeros(players)
    for _ in range(MAX_STEPS):
        expected = _sigmoid(theta[first] - theta[second])
        gradient = prior * (1 - 2 * _sigmoid(theta))
        np.add.at(gradient, first, won - expected)
        np.add.at(gradient, second, expected - won)
        if np.abs(gradient).max() < 1e-11:
            break
        weight = expected * (1 - expected)
        hessian = np.diag(2 * prior * _sigmoid(theta) * _sigmoid(-theta))
        np.add.at(hessian, (first, first), weight)
        np.add.at(hessian, (second, second), weight)
        np.add.at(hessian, (first, second), -weight)
        np.add.at(hessian, (second, first), -weight)
        step = np.linalg.solve(hessian, gradient)
        # Newton's step, halved until it gains: far out the likelihood is nearly straight.
        size, before = 1.0, value(theta)
        while size > 1e-9 and not value(theta + size * step) >= before:
            size /= 2
        theta = theta + size * step
    return [round(float(x), DECIMALS) + 0.0 for x in theta]  # + 0.0: no negative zero


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
