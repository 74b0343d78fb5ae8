"""From a judged group to preference pairs. Ties and identical responses never make a pair."""

from __future__ import annotations

import itertools
import random
from typing import Literal

from online_po.sections import PairsConfig
from online_po.types import Group, Judgement, Pair, Response

Skip = Literal["judge_failed", "identical", "tie", "below_min_margin"]
"""Why a prompt gave no pair: its judgement failed; the responses that would be paired read the same (a judge
sees text, so the same text in other tokens is the same response); all scores were equal; the gap was below
`pairs.min_margin`."""


def build_pairs(group: Group, judgement: Judgement, config: PairsConfig, seed: int) -> tuple[list[Pair], Skip | None]:
    """The pairs of one group, best margins first, or the reason why there are none.

    `seed` decides the draws of the random strategies; give each group its own.
    """
    if judgement.scores is None:
        return [], "judge_failed"
    scored = list(zip(group.responses, judgement.scores, strict=True))
    if len({response.text for response, _ in scored}) < 2:
        return [], "identical"
    if len({score for _, score in scored}) < 2:
        return [], "tie"
    # Ties keep the order of sampling, which is random already: no judge and no length decides them.
    ranked = sorted(scored, key=lambda item: -item[1])
    usable = [(a, b) for a, b in itertools.combinations(ranked, 2) if _usable(a, b, config.min_margin)]
    if not usable:
        return [], "below_min_margin" if config.min_margin > 0 else "identical"
    chosen = _select(ranked, usable, config, random.Random(seed))
    if not chosen:
        return [], "below_min_margin" if config.min_margin > 0 else "identical"
    return [
        Pair(prompt=group.prompt, chosen=a[0], rejected=b[0], chosen_score=a[1], rejected_score=b[1]) for a, b in chosen
    ], None


Scored = tuple[Response, float]


def _usable(a: Scored, b: Scored, min_margin: float) -> bool:
    return a[1] > b[1] and a[1] - b[1] >= min_margin and a[0].text != b[0].text


def _select(
    ranked: list[Scored], usable: list[tuple[Scored, Scored]], config: PairsConfig, rng: random.Random
) -> list[tuple[Scored, Scored]]:
    match config.strategy:
        case "best_worst":
            # Widest usable gap: the best against the worst, unless those two are the same text.
            return [max(usable, key=_margin)]
        case "best_random":
            best_score = ranked[0][1]
            best = [pair for pair in usable if pair[0][1] == best_score]
            return [rng.choice(best)] if best else []
        case "random":
            return [rng.choice(usable)]
        case "top_bottom_k":
            pairs = [(ranked[i], ranked[-1 - i]) for i in range(config.k)]
            pairs = [pair for pair in pairs if _usable(*pair, config.min_margin)]
        case "all":
            pairs = usable
    pairs = sorted(pairs, key=lambda pair: -_margin(pair))
    return pairs[: config.max_per_prompt]


def _margin(pair: tuple[Scored, Scored]) -> float:
    return pair[0][1] - pair[1][1]
