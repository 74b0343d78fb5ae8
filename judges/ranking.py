"""Which pairs of n players are compared. Players are numbers; who wins a tie is of no weight, as samples are alike."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence

from judges.chat import all_of
from online_po.types import Comparison

Compare = Callable[[int, int], Awaitable[Comparison]]
"""Compares two players, the smaller number first."""


async def round_robin(players: Sequence[int], compare: Compare) -> list[Comparison]:
    """All pairs: n (n - 1) / 2 comparisons."""
    return await all_of(compare(a, b) for a, b in itertools.combinations(players, 2))


async def best_worst(players: Sequence[int], compare: Compare) -> list[Comparison]:
    """A knock-out for the best, then one for the worst among those that won nothing: 3 n / 2 - 2 comparisons for an
    even n."""
    made: list[Comparison] = []

    async def knock_out(left: list[int], goes_on: Callable[[Comparison], int]) -> None:
        while len(left) > 1:
            outcomes = await all_of(compare(a, b) for a, b in zip(left[::2], left[1::2], strict=False))
            made.extend(outcomes)
            left = sorted([*map(goes_on, outcomes), *left[len(left) // 2 * 2 :]])

    await knock_out(list(players), _winner)
    winners = {_winner(comparison) for comparison in made}
    await knock_out([player for player in players if player not in winners], _loser)
    return made


async def tournament(players: Sequence[int], compare: Compare) -> list[Comparison]:
    """A merge sort: at most n log2 n comparisons, each of neighbours in the order it ends with among them."""
    made: list[Comparison] = []

    async def beats(a: int, b: int) -> bool:
        comparison = await compare(min(a, b), max(a, b))
        made.append(comparison)
        return _winner(comparison) == a

    async def ranked(some: Sequence[int]) -> list[int]:
        if len(some) < 2:
            return list(some)
        half = len(some) // 2
        left, right = await all_of([ranked(some[:half]), ranked(some[half:])])
        merged: list[int] = []
        while left and right:
            merged.append(left.pop(0) if await beats(left[0], right[0]) else right.pop(0))
        return merged + left + right

    await ranked(players)
    return made


def _winner(comparison: Comparison) -> int:
    return comparison.first if comparison.preference >= 0.5 else comparison.second


def _loser(comparison: Comparison) -> int:
    return comparison.second if comparison.preference >= 0.5 else comparison.first


RANKINGS: dict[str, Callable[[Sequence[int], Compare], Awaitable[list[Comparison]]]] = {
    "round_robin": round_robin,
    "best_worst": best_worst,
    "tournament": tournament,
}
"""By the name of `judge.rank`."""
