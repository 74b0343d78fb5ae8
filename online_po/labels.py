"""From a judged group to responses labelled desirable or undesirable, for losses of single responses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import assert_never

from online_po.example_configs import LabelsConfig
from online_po.pairs import ROUNDING, Skip
from online_po.types import Group, Judgement, Label


def build_labels(group: Group, judgement: Judgement, config: LabelsConfig) -> tuple[list[Label], Skip | None]:
    """The labelled responses of one group in order of their index, or the reason why there are none.

    threshold: every response; desirable where its score is at least `labels.threshold`.
    group_mean: desirable above the mean score of the group, undesirable below; what lies on it is left out.
    top_bottom: desirable among the best `labels.share` of the group, undesirable among the worst. Of responses with
    the same score, of which some lie inside the share and some outside, none is labelled.
    """
    if judgement.scores is None:
        return [], "judge_failed"
    rounding = ROUNDING * max(map(abs, judgement.scores))
    desirable = _desirable(judgement.scores, config, rounding)
    labels = [
        Label(prompt=group.prompt, response=response, desirable=good, score=score)
        for response, score, good in zip(group.responses, judgement.scores, desirable, strict=True)
        if good is not None
    ]
    if labels:
        return labels, None
    return [], "tie" if max(judgement.scores) - min(judgement.scores) <= rounding else "no_contrast"


def _desirable(scores: tuple[float, ...], config: LabelsConfig, rounding: float) -> list[bool | None]:
    """For each score whether it is desirable; None: left out. `rounding`: scores no further apart are equal."""
    match config.rule:
        case "threshold":
            assert config.threshold is not None
            return [score >= config.threshold for score in scores]
        case "group_mean":
            mean = math.fsum(scores) / len(scores)
            # Of 0.1, 0.2 and 0.3 the second lies on the mean, though not in floats.
            return [None if abs(score - mean) <= rounding else score > mean for score in scores]
        case "top_bottom":
            count = max(1, int(config.share * len(scores) + 1e-9))  # 0.29 x 100 is 29
            ranked = sorted(scores)
            # The worst score outside the bottom, the best one outside the top: nobody who ties with it is inside.
            above, below = ranked[count], ranked[-1 - count]
            return [
                True if score - below > rounding else False if above - score > rounding else None for score in scores
            ]
        case _:
            assert_never(config.rule)


def flip(label: Label) -> Label:
    """The label turned around, as one given by mistake; see `pairs.flip_rate`."""
    return replace(label, desirable=not label.desirable, flipped=not label.flipped)
