"""Several judges as one."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from judges.protocol import Judge, JudgeError, failed, scored
from online_po.agreement import shared_ranks
from online_po.judge_configs import Ensemble
from online_po.levels import level
from online_po.pairs import ROUNDING
from online_po.types import Group, Judgement, MemberScores

Scores = tuple[float, ...]
"""One judge's scores of a prompt's responses."""


class EnsembleJudge:
    """Asks all members at once. Where one of them fails, the group fails, with its kind of failure and its name: the
    others' word alone would be another judge's verdict. The members' own scores are kept in `Judgement.members`."""

    def __init__(self, config: Ensemble, judges: Sequence[Judge]) -> None:
        self._config = config
        self.members = list(zip(member_names(config), judges, strict=True))

    async def judge(self, group: Group) -> Judgement:
        verdicts = await asyncio.gather(*(judge.judge(group) for _, judge in self.members), return_exceptions=True)
        members = []
        # In the members' order, so that which failure is told does not depend on which came first.
        for (name, _), verdict in zip(self.members, verdicts, strict=True):
            if isinstance(verdict, JudgeError):
                raise JudgeError(verdict.kind, f"{name}: {verdict}") from verdict
            if isinstance(verdict, BaseException):
                raise verdict
            if verdict.failure is not None:
                raise JudgeError(verdict.failure.kind, f"{name}: {verdict.failure.message}")
            assert verdict.scores is not None
            members.append(MemberScores(name=name, scores=verdict.scores))
        table = [member.scores for member in members]
        share = disagreement(table)
        if share > self._config.max_disagreement:
            told = f"{share:.0%} of member pairs disagree, above judge.max_disagreement = "
            judgement = failed(group, "abstained", f"{told}{self._config.max_disagreement:g}")
        else:
            judgement = scored(group, combine(table, self._config), _notes(members))
        return replace(judgement, members=tuple(members))


def member_names(config: Ensemble) -> list[str]:
    """Their kinds, numbered where there are several of one."""
    kinds = [member.judge.kind for member in config.members]
    seen, many = Counter[str](), Counter(kinds)
    names = []
    for kind in kinds:
        seen[kind] += 1
        names.append(f"{kind} {seen[kind]}" if many[kind] > 1 else kind)
    return names


def _notes(members: Sequence[MemberScores]) -> list[str]:
    """For each response what each member gave it."""
    rows = zip(*(member.scores for member in members), strict=True)
    names = [member.name for member in members]
    return [" · ".join(f"{name} {score:.4g}" for name, score in zip(names, row, strict=True)) for row in rows]


def combine(table: Sequence[Scores], config: Ensemble) -> Scores:
    """(members, responses) scores -> one score a response. Differences that are rounding alone are none."""
    table = [level(row, max(map(abs, row))) for row in table]
    weights = [member.weight for member in config.members]
    match config.combine:
        case "weighted_mean":
            rows = [normalised(row, config.normalise) for row in table]
            total = math.fsum(weights)
            means = [
                math.fsum(w * s for w, s in zip(weights, column, strict=True)) / total for column in _columns(rows)
            ]
            return _settled(means, rows)
        case "rank_average":
            rows = [shared_ranks(row) for row in table]
            return _settled([math.fsum(column) / len(rows) for column in _columns(rows)], rows)
        case "majority":
            return copeland(table, weights)
        case "minimum":
            return _minimum(table, config)
        case "in_order":
            return in_order(table, [member.min_gap for member in config.members])
        case _:
            assert_never(config.combine)


def normalised(scores: Scores, how: str) -> Scores:
    """A member's scores of one prompt's responses on a common scale.

    zscore: minus their mean, over their standard deviation; all 0 where they are equal. minmax: from 0 (worst) to 1
    (best); all 1/2 where they are equal. none: as they are.
    """
    if how == "none":
        return scores
    low, high = min(scores), max(scores)
    if low == high:  # after `level`: equal but for rounding
        return (0.0 if how == "zscore" else 0.5,) * len(scores)
    # To [0, 1] first: no sum or square of large scores. Halved where even their range is none of floats.
    part = 1.0 if math.isfinite(high - low) else 0.5
    shares = tuple((score * part - low * part) / (high * part - low * part) for score in scores)
    if how == "minmax":
        return shares
    mean = math.fsum(shares) / len(shares)
    deviation = math.sqrt(math.fsum((share - mean) ** 2 for share in shares) / len(shares))
    return tuple((share - mean) / deviation for share in shares)


def _minimum(table: Sequence[Scores], config: Ensemble) -> Scores:
    """The worst score each response gets. Normalised, a member that sees no difference has no say: its neutral score
    would cap what the others see."""
    if config.normalise == "none":
        return tuple(min(column) for column in _columns(table))
    rows = [normalised(row, config.normalise) for row in table if min(row) < max(row)]
    if not rows:
        return (0.0,) * len(table[0])
    return _settled([min(column) for column in _columns(rows)], rows)


def copeland(table: Sequence[Scores], weights: Sequence[float]) -> Scores:
    """Share of the other responses that each one beats, half for each draw (Copeland 1951). Of two responses that one
    wins which has the higher score by members of more weight; members that see no difference between them abstain."""
    n = len(table[0])
    if n == 1:
        return (0.5,)
    wins = [0.0] * n
    for i, j in itertools.combinations(range(n), 2):
        signs = [_order(row, i, j) for row in table]
        balance = math.fsum(weight * sign for weight, sign in zip(weights, signs, strict=True))
        first = 0.5 if abs(balance) <= ROUNDING * math.fsum(weights) else float(balance > 0)
        wins[i] += first
        wins[j] += 1 - first
    return tuple(won / (n - 1) for won in wins)


def in_order(table: Sequence[Scores], gaps: Sequence[float]) -> Scores:
    """The first judge decides; the next one among responses between which it sees no difference; and so on.

    "Less than `gap` apart" is no equality: it may hold of a and b and of b and c, and not of a and c. So each judge
    cuts the responses into classes from the best one down: in the first are all less than `gap` below the best, in the
    second all less than `gap` below the best of the others, and so on. All of one class go to the next judge. Which is
    in the best class, is exact; of two others less than `gap` apart, a class may end between them.
    Scores are shared ranks from 0 to 1 in the order that comes of it.
    """
    classes = [list(range(len(table[0])))]
    for row, gap in zip(table, gaps, strict=True):
        classes = [part for members in classes for part in _cut(members, row, gap)]
    place = {index: -number for number, members in enumerate(classes) for index in members}
    return shared_ranks([place[index] for index in range(len(table[0]))])


def _cut(members: list[int], row: Scores, gap: float) -> list[list[int]]:
    """Responses in classes by their scores, the best class first."""
    classes: list[list[int]] = []
    for index in sorted(members, key=lambda index: -row[index]):
        below = row[classes[-1][0]] - row[index] if classes else 0.0
        # 0.9 - 0.8 is a gap of 0.1.
        if classes and (below == 0 or below < gap - ROUNDING * max(map(abs, row))):
            classes[-1].append(index)
        else:
            classes.append([index])
    return classes


def disagreement(table: Sequence[Scores]) -> float:
    """Share of pairs of members of which one has a response better and the other has it worse than another, averaged
    over the prompt's pairs of responses. A member that sees no difference disagrees with nobody."""
    table = [level(row, max(map(abs, row))) for row in table]
    opposed, compared = 0, 0
    for i, j in itertools.combinations(range(len(table[0])), 2):
        for one, other in itertools.combinations(table, 2):
            compared += 1
            opposed += _order(one, i, j) * _order(other, i, j) < 0
    return opposed / compared if compared else 0.0


def _order(row: Scores, i: int, j: int) -> int:
    """1 where i is the better one, -1 where j is, else 0."""
    return (row[i] > row[j]) - (row[i] < row[j])


def _columns(rows: Sequence[Scores]) -> list[tuple[float, ...]]:
    return list(zip(*rows, strict=True))


def _settled(scores: Sequence[float], rows: Sequence[Scores]) -> Scores:
    """Sums of what is in `rows`, without their rounding."""
    return level(scores, max(abs(value) for row in rows for value in row))
