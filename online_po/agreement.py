"""How far several judges agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from online_po.levels import level
from online_po.types import Judgement


def krippendorff_alpha(ratings: Sequence[Sequence[float | None]]) -> float | None:
    """Krippendorff's alpha for interval data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    `ratings`: a row a judge, a column a unit; None where a judge did not rate. 1: they agree; 0: as chance would have
    it; below: they contradict each other. None where it is not defined: no unit with two ratings, or all ratings equal.
    Time and memory grow with the number of ratings alone.
    """
    table = np.array([[math.nan if value is None else value for value in row] for row in ratings], dtype=np.float64)
    if table.size == 0:
        return None
    counts = (~np.isnan(table)).sum(axis=0)
    table, counts = table[:, counts >= 2], counts[counts >= 2]  # a rating alone in its unit is compared with none
    total = int(counts.sum())
    if total == 0:
        return None
    values = table[~np.isnan(table)]
    if values.min() == values.max():
        return None
    expected = 2 * total * float(((values - values.mean()) ** 2).sum()) / (total * (total - 1))
    # The squares of all differences within a unit sum to 2 m times those to its mean.
    spread = np.nansum((table - np.nanmean(table, axis=0)) ** 2, axis=0)
    observed = float((2 * counts * spread / (counts - 1)).sum()) / total
    return 1 - observed / expected


def shared_ranks(scores: Sequence[float]) -> tuple[float, ...]:
    """Ranks from 0 (worst) to 1 (best); equal scores share the mean of theirs. One score alone gets 1/2."""
    n = len(scores)
    if n == 1:
        return (0.5,)
    below = [sum(other < score for other in scores) for score in scores]
    alike = [sum(other == score for other in scores) for score in scores]
    return tuple((b + (a - 1) / 2) / (n - 1) for b, a in zip(below, alike, strict=True))


class Agreement:
    """Agreement of an ensemble's members in a round, group by group as they come."""

    def __init__(self) -> None:
        self._ranks: dict[str, list[float]] = {}

    def add(self, judgement: Judgement) -> None:
        """Counts the members' scores; also of groups without a label because they disagree."""
        for member in judgement.members or ():
            scale = max(map(abs, member.scores))
            self._ranks.setdefault(member.name, []).extend(shared_ranks(level(member.scores, scale)))

    def result(self) -> dict[str, float | None]:
        """judge_agreement: Krippendorff's alpha of the members' ranks of the responses to one prompt, over the round.
        Ranks, as their scores have no common unit. Nothing where no judge has members."""
        return {"judge_agreement": krippendorff_alpha(list(self._ranks.values()))} if self._ranks else {}
