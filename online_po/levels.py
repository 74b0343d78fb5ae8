"""Scores that are equal but for rounding."""

from __future__ import annotations

from collections.abc import Sequence

from online_po.pairs import ROUNDING


def level(scores: Sequence[float], scale: float) -> tuple[float, ...]:
    """The scores, those that follow one another by no more than rounding of numbers as large as `scale` made equal.

    Sums and differences of scores leave dust that a comparison would take for a verdict; near zero it is not small
    beside the result.
    """
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    levelled, last = list(scores), None
    for index in order:
        if last is not None and scores[index] - scores[last] <= ROUNDING * scale:
            levelled[index] = levelled[last]
        last = index
    return tuple(levelled)
