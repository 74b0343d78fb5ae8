"""From a judged group to preference pairs. Ties and identical responses never make a pair."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from online_po.example_configs import PairsConfig
from online_po.types import GivenResponse, Group, Judgement, Pair, Prompt, Response

Skip = Literal[
    "judge_failed",
    "identical",
    "tie",
    "below_min_margin",
    "length_ratio",
    "same_as_chosen",
    "chosen_too_long",
    "no_contrast",
]
"""Why a prompt gave no example: its judgement failed; the responses that would be paired read the same (a judge sees
text, so the same text in other tokens is the same response); their scores were equal; the gap was below
`pairs.min_margin`; one was more than `pairs.max_length_ratio` times as long as the other; its responses all read as
the given one (spin); the given one is too long for the context (spin); no response was labelled (see
`online_po.labels`)."""

ROUNDING = 1e-12
"""Differences of scores count as equal that differ by less than this share of the larger score."""

Scored = tuple[Response, float]
Candidate = tuple[Scored, Scored]
"""Two responses that may become a pair, the higher score first (or an equal one)."""


def build_pairs(
    group: Group,
    judgement: Judgement,
    config: PairsConfig,
    seed: int,
    rewards: Sequence[float] | None = None,
    scale: float | None = None,
) -> tuple[list[Pair], Skip | None]:
    """The pairs of one group, best margins first, or the reason why there are none.

    `seed` decides the draws of the random strategies; give each group its own. `rewards`: for hardest_reward, the
    implicit reward of each response, in order of `Response.index` (`online_po.implicit_rewards`). `scale`:
    judge.bradley_terry_scale, for the pairs' `preference_probability`.
    """
    if judgement.scores is None:
        return [], "judge_failed"
    scored = list(zip(group.responses, judgement.scores, strict=True))
    # Ties keep the order of sampling, which is random already: no judge and no length decides them.
    ranked = sorted(scored, key=lambda item: -item[1])
    conditions = _conditions(config)
    candidates = [_widest(ranked)] if config.strategy == "best_worst" else []
    if not candidates or not all(passes(*candidates[0]) for _, passes in conditions):
        candidates = _candidates(ranked, config)
    for reason, passes in conditions:
        candidates = [pair for pair in candidates if passes(*pair)]
        if not candidates:
            return [], reason
    return [
        Pair(
            prompt=group.prompt,
            chosen=a[0],
            rejected=b[0],
            chosen_score=a[1],
            rejected_score=b[1],
            preference_probability=None if scale is None else preference_probability(a[1] - b[1], scale),
        )
        for a, b in _select(candidates, config, random.Random(seed), rewards)
    ], None


def preference_probability(margin: float, scale: float) -> float:
    """sigmoid(margin / scale): how likely the response that is `margin` (>= 0) ahead wins, the scores being
    Bradley-Terry rewards (Bradley & Terry 1952, "Rank analysis of incomplete block designs", Biometrika 39)."""
    return 1 / (1 + math.exp(-margin / scale))


def _widest(ranked: list[Scored]) -> Candidate:
    """The first of all candidates with the widest gap. Where it makes a pair, nobody need look at all n^2 of them."""
    gap = _margin((ranked[0], ranked[-1]))
    return ranked[0], next(item for item in ranked if _margin((ranked[0], item)) == gap)


def _candidates(ranked: list[Scored], config: PairsConfig) -> list[Candidate]:
    """All that the strategy looks at, of which ties and the like still have to go."""
    match config.strategy:
        case "best_random":
            best = [item for item in ranked if item[1] == ranked[0][1]]
            worse = [item for item in ranked if item[1] < ranked[0][1]]
            return list(itertools.product(best, worse)) or list(itertools.combinations(ranked, 2))
        case "top_bottom_k":
            return [(ranked[i], ranked[-1 - i]) for i in range(config.k)]
    return list(itertools.combinations(ranked, 2))


def _conditions(config: PairsConfig) -> list[tuple[Skip, Callable[[Scored, Scored], bool]]]:
    """What a pair must fulfil, each with what is said of a group none of whose candidates does."""
    ratio = config.max_length_ratio
    conditions: list[tuple[Skip, Callable[[Scored, Scored], bool]]] = [
        ("identical", lambda a, b: a[0].text != b[0].text),
        ("tie", lambda a, b: _is_below(0, _margin((a, b)), (a, b))),
        ("below_min_margin", lambda a, b: not _is_below(_margin((a, b)), config.min_margin, (a, b))),
    ]
    if ratio is not None:
        conditions.append(("length_ratio", lambda a, b: _alike_in_length(a[0], b[0], ratio)))
    return conditions


def _alike_in_length(a: Response | GivenResponse, b: Response | GivenResponse, ratio: float) -> bool:
    """Whether the longer one has at most `ratio` times the other's tokens."""
    shorter, longer = sorted((len(a.token_ids), len(b.token_ids)))
    return longer <= ratio * shorter


def _select(
    usable: list[Candidate], config: PairsConfig, rng: random.Random, rewards: Sequence[float] | None
) -> list[Candidate]:
    match config.strategy:
        case "best_worst":
            # Widest usable gap: the best against the worst, unless those two are the same text.
            return [max(usable, key=_margin)]
        case "best_random" | "random":
            return [rng.choice(usable)]
        case "hardest":
            return [_hardest(usable, rng)]
        case "hardest_reward":
            assert rewards is not None
            gaps = [abs(rewards[a[0].index] - rewards[b[0].index]) for a, b in usable]
            smallest = min(gaps)
            return [_hardest([pair for pair, gap in zip(usable, gaps, strict=True) if gap == smallest], rng)]
    return sorted(usable, key=lambda pair: -_margin(pair))[: config.max_per_prompt]


def _hardest(usable: list[Candidate], rng: random.Random) -> Candidate:
    """One with the smallest score gap. Grades leave many equal gaps; the first would always be the one between the best
    responses."""
    smallest = min(map(_margin, usable))
    return rng.choice([pair for pair in usable if not _is_below(smallest, _margin(pair), pair)])


def _margin(pair: Candidate) -> float:
    return pair[0][1] - pair[1][1]


def _is_below(gap: float, other: float, pair: Candidate) -> bool:
    """Whether a gap of scores is below another by more than rounding: 0.9 - 0.8 is not below 0.1, nor is 0 below that
    of 0.1 + 0.2 and 0.3."""
    return gap < other - ROUNDING * max(abs(pair[0][1]), abs(pair[1][1]))


def spin_pairs(
    group: Group, given: GivenResponse, config: PairsConfig, seed: int, max_length: int
) -> tuple[list[Pair], Skip | None]:
    """SPIN's pairs (Chen et al. 2024, arXiv 2401.01335): a given response against the policy's own.

    The rejected ones are drawn by `seed` from the group's distinct responses, but for those that read as the given
    one: one of them, or `pairs.max_per_prompt`. No score decides anything. `max_length`: tokens of prompt and given
    response that the context holds.
    """
    if len(group.prompt.token_ids) + len(given.token_ids) > max_length:
        return [], "chosen_too_long"
    own: dict[str, Response] = {}
    for response in group.responses:
        if response.text != given.text:
            own.setdefault(response.text, response)
    if not own:
        return [], "same_as_chosen"
    usable = list(own.values())
    if config.max_length_ratio is not None:
        usable = [response for response in usable if _alike_in_length(given, response, config.max_length_ratio)]
    if not usable:
        return [], "length_ratio"
    rng = random.Random(seed)
    drawn = rng.sample(usable, min(len(usable), config.max_per_prompt or 1))
    return [_spin_pair(group.prompt, given, rejected) for rejected in drawn], None


def _spin_pair(prompt: Prompt, given: GivenResponse, rejected: Response) -> Pair:
    return Pair(prompt=prompt, chosen=given, rejected=rejected, chosen_score=None, rejected_score=None)


def flip(pair: Pair) -> Pair:
    """The pair as a judge that errs would have given it: the responses swap sides, and the two scores do not, so that
    the chosen one still has the higher score, the margin stays above zero, and the probability of the preference above
    1/2. (Were it turned around with the responses, soft SPPO, which is symmetric, would undo the flip.)

    For finding out how much label noise a loss stands (Chowdhury et al. 2024, arXiv 2403.00409, flip labels at a
    known rate); see `pairs.flip_rate`.
    """
    assert isinstance(pair.chosen, Response), "only responses that were scored are flipped"
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, flipped=not pair.flipped)
