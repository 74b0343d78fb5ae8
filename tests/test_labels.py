"""Labels from scores: each rule by value, what lies between is left out, failures are never labels."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_po.example_configs import LabelsConfig
from online_po.labels import build_labels, flip
from online_po.types import JudgeFailure, Judgement
from tests.test_pairs import group


def labels(scores: tuple[float, ...], **config):
    """Index -> desirable or not, or the reason why nothing was labelled."""
    g = group(*range(len(scores)))
    found, skip = build_labels(g, Judgement(prompt_id="p", scores=scores), LabelsConfig(**config))
    assert (skip is None) == bool(found)
    assert all(label.score == scores[label.response.index] and not label.flipped for label in found)
    return {label.response.index: label.desirable for label in found} or skip


def test_threshold_labels_every_response_and_reaches_at_equality():
    assert labels((0.4, 0.5, 0.6), rule="threshold", threshold=0.5) == {0: False, 1: True, 2: True}
    assert labels((1.0,), rule="threshold", threshold=0) == {0: True}
    assert labels((0.0, 0.0), rule="threshold", threshold=0.5) == {0: False, 1: False}


def test_group_mean_leaves_out_what_lies_on_it():
    assert labels((1.0, 2.0, 3.0, 2.0), rule="group_mean") == {0: False, 2: True}
    # In floats the mean of three 0.1 is none of them, and would label all of them undesirable.
    assert sum((0.1,) * 3) / 3 > 0.1
    assert labels((0.1, 0.1, 0.1), rule="group_mean") == "tie"
    # 0.2 lies on the mean as it is meant, in floats a little below or above it.
    assert labels((0.1, 0.2, 0.3), rule="group_mean") == {0: False, 2: True}
    assert labels((-0.3, 0.0, 0.1, 0.2), rule="group_mean") == {0: False, 2: True, 3: True}
    assert labels((0.0, 1e-9), rule="group_mean") == {0: False, 1: True}
    assert labels((0.1 + 0.2, 0.3), rule="group_mean") == labels((0.1 + 0.2, 0.3), rule="top_bottom") == "tie"
    assert labels((0.1 + 0.2, 0.3, 0.1), rule="top_bottom") == {2: False}


def test_top_bottom_takes_whole_shares_and_no_tie_across_their_bounds():
    scores = (1.0, 8.0, 3.0, 4.0, 5.0, 6.0, 7.0, 2.0)
    assert labels(scores, rule="top_bottom", share=0.25) == {0: False, 7: False, 1: True, 6: True}
    assert labels(scores, rule="top_bottom", share=0.1) == {0: False, 1: True}, "one at least"
    assert labels((3.0, 2.0, 1.0), rule="top_bottom", share=0.5) == {0: True, 2: False}, "rounded down"
    # The best two tie with the third: all three are left out, and so is nobody at the bottom.
    assert labels((9.0, 9.0, 9.0, 4.0, 3.0, 2.0), rule="top_bottom", share=0.34) == {4: False, 5: False}
    assert labels((2.0, 2.0, 1.0, 1.0), rule="top_bottom", share=0.5) == {0: True, 1: True, 2: False, 3: False}
    assert labels((1.0, 1.0), rule="top_bottom", share=0.5) == "tie"
    assert labels((2.0, 2.0, 2.0, 1.0, 1.0), rule="top_bottom", share=0.2) == "no_contrast"
    assert len(labels(tuple(range(100)), rule="top_bottom", share=0.29)) == 58, "0.29 x 100 in floats is below 29"


def test_a_failure_is_no_label():
    failed = Judgement(prompt_id="p", failure=JudgeFailure(kind="error", message="x"))
    assert build_labels(group(1, 2), failed, LabelsConfig()) == ([], "judge_failed")


def test_a_flip_turns_the_label_around_and_leaves_the_score():
    (label, _), _ = build_labels(group(1, 2), Judgement(prompt_id="p", scores=(0.0, 1.0)), LabelsConfig())
    turned = flip(label)
    assert (label.desirable, turned.desirable, turned.flipped, turned.score) == (False, True, True, 0.0)
    assert flip(turned) == label


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]), min_size=2, max_size=9),
    rule=st.sampled_from(["group_mean", "top_bottom"]),
    share=st.sampled_from([0.1, 0.25, 0.5]),
)
def test_desirable_ones_score_above_undesirable_ones_and_equal_scores_are_labelled_alike(scores, rule, share):
    config = LabelsConfig(rule=rule, share=share)
    found, _ = build_labels(group(*range(len(scores))), Judgement(prompt_id="p", scores=tuple(scores)), config)
    good = [label.score for label in found if label.desirable]
    bad = [label.score for label in found if not label.desirable]
    assert not good or not bad or min(good) > max(bad)
    labelled = {label.score for label in found}
    assert len(found) == sum(score in labelled for score in scores), "all of a score, or none of it"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rule": "threshold"}, "labels.threshold must be given"),
        ({"rule": "group_mean", "threshold": 1.0}, "labels.threshold is for labels.rule: threshold, not group_mean"),
        ({"share": 0.6}, "share"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LabelsConfig(**config)
