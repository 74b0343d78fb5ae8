"""Length taken out of a round's scores (`judge.length`). Judgements keep the judge's own scores.

Pure functions of a round's groups and judgements: a resumed run gets what one that never stopped gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from online_po.judge_configs.base import LengthConfig
from online_po.levels import level
from online_po.types import Group, Judgement


def length_slope(judged: Iterable[tuple[Group, Judgement]]) -> float | None:
    """By how much a response's score rises with each of its tokens, within prompts: the least-squares slope of score
    minus the prompt's mean score over length minus the prompt's mean length, all prompts together.

    Groups without scores do not count. None where no prompt has responses of different length.
    """
    products, squares = list[float](), list[float]()
    for group, judgement in judged:
        if judgement.scores is None:
            continue
        lengths = [len(response.token_ids) for response in group.responses]
        mean_length, mean_score = sum(lengths) / len(lengths), math.fsum(judgement.scores) / len(lengths)
        for length, score in zip(lengths, judgement.scores, strict=True):
            products.append((length - mean_length) * (score - mean_score))
            squares.append((length - mean_length) ** 2)
    spread = math.fsum(squares)
    return math.fsum(products) / spread if spread > 0 else None


def without_length(group: Group, judgement: Judgement, config: LengthConfig, slope: float | None) -> Judgement:
    """The judgement with its scores adjusted: first the trend `slope` is taken out around the prompt's mean length,
    then `penalty_per_token` is taken off for each token. Responses of equal length keep the difference of their scores.
    """
    if judgement.scores is None:
        return judgement
    lengths = [len(response.token_ids) for response in group.responses]
    mean, trend = sum(lengths) / len(lengths), slope or 0.0
    taken = [trend * (length - mean) + config.penalty_per_token * length for length in lengths]
    scale = max(map(abs, (*judgement.scores, *taken)))
    scores = [score - off for score, off in zip(judgement.scores, taken, strict=True)]
    return replace(judgement, scores=level(scores, scale))
