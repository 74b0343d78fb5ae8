"""Held-out evaluation by judges whose scores order the responses to one prompt and say nothing beyond it."""

from __future__ import annotations

import pytest

from online_po.errors import JudgeFailureRateError
from online_po.heldout import Duels
from online_po.loop import run_rounds
from online_po.tables import evaluation_to_table
from online_po.types import JudgeFailure, Judgement
from tests.fakes import FakeJudge, make_config, make_prompts
from tests.judges.groups import make_group
from tests.test_loop import make_parts

RANKS = {"kind": "ensemble", "members": [{"kind": "rules"}, {"kind": "rules"}], "combine": "rank_average"}
FAILED = JudgeFailure(kind="timeout", message="no answer")


class Recording(FakeJudge):
    """Also keeps the groups that it was shown."""

    def __init__(self):
        super().__init__()
        self.groups = []

    def submit(self, groups, round_=0, occasion=""):
        self.groups += groups
        return super().submit(groups, round_, occasion)


def run(tmp_path, judge, **overrides):
    parts = make_parts(make_config(tmp_path, judge=judge, **overrides))
    parts.judges = Recording()
    run_rounds(parts)
    return parts


def test_each_response_is_judged_beside_the_starts(tmp_path):
    parts = run(tmp_path, RANKS, eval={"responses_per_prompt": 2})
    tables = [parts.ledger.evaluation(version).to_pylist() for version in range(4)]
    assert {row["score"] for row in tables[0]} == {0.5}
    start = {(row["prompt_id"], row["index"]): row["text"] for row in tables[0]}
    for table in tables[1:]:
        assert len(table) == 8
        for row in table:
            before = float(start[row["prompt_id"], row["index"]])
            assert row["score"] == (float(row["text"]) > before)  # the same seed: never the same value but by the skill
    heldout = {prompt.id for prompt in parts.heldout}
    duels = [group for group in parts.judges.groups if group.prompt.id in heldout]
    assert len(duels) == 3 * 8  # nobody is asked about the start's own
    for own, other in (group.responses for group in duels):
        assert (own.index, other.index, other.policy_version) == (0, 1, 0) and own.policy_version > 0
        assert len(other.token_ids) > 0
    summary = parts.ledger.evaluation_summary(3)
    assert summary["against_start"] and summary["score"]["mean"] == summary["versus_start"]["win_rate"]["mean"] == 1.0


def test_other_judges_score_each_response_alone(tmp_path):
    parts = run(tmp_path, {"kind": "rules"})
    assert not parts.ledger.evaluation_summary(1)["against_start"]
    assert {row["score"] for row in parts.ledger.evaluation(0).to_pylist()} != {0.5}


@pytest.mark.parametrize(
    ("settings", "relative"),
    [
        ({}, True),
        ({"normalise": "minmax"}, True),
        ({"normalise": "none"}, False),
        ({"combine": "minimum", "normalise": "none"}, False),
        ({"combine": "in_order"}, True),
        ({"combine": "majority"}, True),
    ],
)
def test_ensembles_that_weigh_within_a_prompt(tmp_path, settings, relative):
    judge = {"kind": "ensemble", "members": [{"kind": "rules"}, {"kind": "rules"}], **settings}
    assert make_config(tmp_path, judge=judge).judge.relative == relative


def test_a_comparing_member_compares(tmp_path):
    members = [{"kind": "rules"}, {"kind": "llm_pairwise", "model": "m"}]
    judge = {"kind": "ensemble", "members": members, "normalise": "none"}
    assert make_config(tmp_path, judge=judge).judge.relative


def test_a_response_as_good_is_a_tie_and_a_failure_is_none():
    group = make_group("one", "two")
    start = evaluation_to_table([group], [Judgement(prompt_id=group.prompt.id, scores=(0.5, 0.5))])
    duels = Duels(start)
    first, second = duels.groups(group)
    assert [r.text for r in second.responses] == ["two", "two"] and first.prompt == group.prompt
    tied = Judgement(prompt_id=group.prompt.id, scores=(3.0, 3.0), rationales=("of mine", "of the other"))
    lost = Judgement(prompt_id=group.prompt.id, scores=(-1.0, 3.0), rationales=("worse", "better"))
    assert duels.outcome(group, [tied, lost]) == Judgement(
        prompt_id=group.prompt.id, scores=(0.5, 0.0), rationales=("of mine", "worse")
    )
    failed = Judgement(prompt_id=group.prompt.id, failure=FAILED)
    assert duels.outcome(group, [tied, failed]) == failed


def test_failures_are_counted_as_failures(tmp_path):
    parts = make_parts(make_config(tmp_path, judge=RANKS))
    parts.judges.fails = {make_prompts(24)[-1].id: FAILED}
    with pytest.raises(JudgeFailureRateError, match=r"failed on 1 of 4 groups \(1 x timeout\)"):
        run_rounds(parts)
