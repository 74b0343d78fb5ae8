"""Trying a judge on known pairs: the pairs, what is said of the judge, the bounds, calibration in the loop."""

from __future__ import annotations

import json
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from online_po.config import Config
from online_po.errors import ConfigError
from online_po.judge_configs import Ensemble, LlmPairwise, Python, RewardModel, Rules
from online_po.judge_trials import (
    KNOWN_PAIRS,
    assess,
    better,
    describe,
    has_fallen,
    known_pairs,
    require_trial,
    trial_groups,
)
from online_po.loop import run_rounds
from online_po.types import Comparison, JudgeFailure, Judgement
from tests.fakes import FakeJudge, make_config
from tests.test_loop import make_parts

LLM = LlmPairwise(model="m", api_key_env=None)


def judged(pairs, says, **more):
    """Judgements in which the response that `says` picks (chosen, rejected, first, or None for a tie) scores 1."""
    found = []
    for place, (pair, group) in enumerate(zip(pairs, trial_groups(pairs), strict=True)):
        best = {"chosen": better(place), "rejected": 1 - better(place), "first": 0, None: -1}[says(pair)]
        found.append(Judgement(prompt_id=group.prompt.id, scores=tuple(float(i == best) for i in (0, 1)), **more))
    return found


def compared(consistent):
    return Comparison(first=0, second=1, preference=1.0, consistent=consistent)


def test_the_pairs_that_come_with_the_package_are_fair():
    pairs = known_pairs(LLM)
    assert len(pairs) == len(KNOWN_PAIRS.read_text(encoding="utf-8").splitlines()) >= 20
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs)
    assert 0.4 <= longer / len(pairs) <= 0.6, "length alone must not pass"
    assert assess(pairs, judged(pairs, lambda _: "first")).accuracy == 0.5, "nor must place"


def test_groups_hold_the_better_response_where_better_says():
    pairs = known_pairs(LLM)
    for place, (pair, group) in enumerate(zip(pairs, trial_groups(pairs), strict=True)):
        assert [r.index for r in group.responses] == [0, 1]
        assert group.responses[better(place)].text == pair.chosen
        assert group.responses[1 - better(place)].text == pair.rejected
        assert list(group.prompt.messages) == [{"role": "user", "content": pair.messages[0]["content"]}]


def test_only_judges_of_responses_in_general_are_tried_on_the_packages_pairs(tmp_path):
    assert known_pairs(Rules()) == [] == known_pairs(Python(function="a:b"))
    assert known_pairs(RewardModel(path=str(tmp_path)))
    rules, llm = {"kind": "rules"}, {"kind": "llm_score", "model": "m"}
    assert known_pairs(Ensemble(members=(rules, llm))) == []
    assert known_pairs(Ensemble(members=(llm, llm)))
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "constraints": [1]}))
    (pair,) = known_pairs(Rules(gold=str(gold)))
    assert pair.metadata == {"constraints": [1]} and trial_groups([pair])[0].prompt.metadata == pair.metadata


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"judge.gold .*holds no pairs"),
        ('{"prompt": "p", "chosen": "a"}', r"judge.gold .*line 1 has no 'rejected'"),
        ('{"prompt": "p", "chosen": 3, "rejected": "b"}', r"line 1: 'chosen' is neither text"),
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', r"line 1: 'chosen' and 'rejected' are the same text"),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 1}',
            r"line 1: 'chosen' and 'rejected' are of the same score",
        ),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "b", "rejected": "a"}',
            r"line 2: 'chosen' and 'rejected' stand the other way round in .*line 1",
        ),
    ],
)
def test_gold_that_is_no_gold_is_refused(tmp_path, text, words):
    (tmp_path / "gold.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        known_pairs(Rules(gold=str(tmp_path / "gold.jsonl")))


def test_gold_may_be_a_table_and_a_column_is_missed_by_its_name(tmp_path):
    (tmp_path / "gold.csv").write_text("prompt,chosen,rejected\n6 x 7,42,41\n")
    table = tmp_path / "gold.parquet"
    (pair,) = known_pairs(Rules(gold=str(tmp_path / "gold.csv")))
    assert (pair.chosen, pair.rejected) == ("42", "41")
    pq.write_table(pa.table({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"], "of": [date(2025, 1, 2)]}), table)
    (pair,) = known_pairs(Rules(gold=str(table)))
    assert trial_groups([pair])[0].prompt.metadata == {"of": "2025-01-02"}
    (tmp_path / "gold.csv").write_text("question,chosen,rejected\n6 x 7,42,41\n")
    with pytest.raises(ConfigError, match=r"judge.gold .*row 1 has no 'prompt', only question, chosen, rejected"):
        known_pairs(Rules(gold=str(tmp_path / "gold.csv")))


def test_one_order_says_nothing_of_consistency():
    pairs = known_pairs(LLM)
    one = (Comparison(first=0, second=1, preference=1, consistent=None),)
    assert assess(pairs, judged(pairs, lambda _: "chosen", comparisons=one)).consistency is None


def test_what_is_said_of_a_judge():
    pairs = known_pairs(LLM)
    right = assess(pairs, judged(pairs, lambda _: "chosen"))
    assert (right.accuracy, right.ties, right.failures, right.consistency) == (1.0, 0, {}, None)
    assert right.longer == 0.5
    assert assess(pairs, judged(pairs, lambda _: "rejected")).accuracy == 0.0
    tied = assess(pairs, judged(pairs, lambda _: None))
    assert (tied.accuracy, tied.ties, tied.longer) == (0.5, len(pairs), None)
    longer = assess(pairs, judged(pairs, lambda p: "chosen" if len(p.chosen) > len(p.rejected) else "rejected"))
    assert longer.longer == 1.0 and "the longer one in 100% of its decisions" in describe(longer)
    answers = judged(
        pairs, lambda _: "chosen", comparisons=(Comparison(first=0, second=1, preference=1, consistent=True),)
    )
    answers[0] = Judgement(prompt_id="x", failure=JudgeFailure(kind="timeout", message="too slow"))
    failed = assess(pairs, answers)
    assert failed.accuracy == pytest.approx(23 / 24) and failed.failures == {"timeout": 1} and failed.consistency == 1.0


def test_a_judge_below_a_bound_is_refused_with_the_reason():
    pairs = known_pairs(LLM)
    tied = assess(pairs, judged(pairs, lambda _: None))
    with pytest.raises(
        ConfigError, match=r"got 50% of 24 pairs .*right \(24 ties count half\), below judge.preflight.min_acc"
    ):
        require_trial(LLM, tied)
    require_trial(LlmPairwise(model="m", preflight={"min_accuracy": 0}), tied)
    dead = [Judgement(prompt_id="x", failure=JudgeFailure(kind="transport", message="wrong key"))] * len(pairs)
    for bound in (0.6, 0):  # nothing is known of a judge that never answers: it is not "below a bound"
        with pytest.raises(ConfigError, match=r"failed on 24 of 24 pairs .*24 x transport.*last message: 'wrong key'"):
            require_trial(LlmPairwise(model="m", preflight={"min_accuracy": bound}), assess(pairs, dead))
    answers = judged(
        pairs, lambda _: "chosen", comparisons=(Comparison(first=0, second=1, preference=1, consistent=False),)
    )
    with pytest.raises(ConfigError, match=r"same in both orders of 0% .*min_consistency = 0.5"):
        require_trial(LlmPairwise(model="m", preflight={"min_consistency": 0.5}), assess(pairs, answers))


def test_the_bounds_of_calibration_are_checked_at_parse_time(tmp_path):
    config = {"run": {"name": "r"}, "model": {"path": "m"}, "prompts": {"path": "p"}}
    with pytest.raises(ConfigError, match=r"judge.calibration.every is set, so judge.gold must name pairs"):
        Config.parse(config | {"judge": {"calibration": {"every": 2}}})
    with pytest.raises(ConfigError, match=r"judge.calibration.max_drop has an effect only with"):
        Config.parse(config | {"judge": {"gold": "g", "calibration": {"max_drop": 0.2}}})


def test_a_fall_by_the_bound_itself_is_no_alarm():
    assert not has_fallen(0.8, 0.7, 0.1) and has_fallen(0.8, 0.69, 0.1) and not has_fallen(0.5, 1.0, 0.1)


class DriftingJudge(FakeJudge):
    """Gets known pairs right until the third round, then wrong."""

    def submit(self, groups, round_=0, occasion=""):
        versions = {response.policy_version for group in groups for response in group.responses}
        self.occasions.append((round_, occasion, versions))
        self.tie = bool(occasion) and round_ >= 3
        return super().submit(groups, round_)

    occasions: list


def test_a_judge_that_drifts_is_told_of_while_the_run_goes_on(tmp_path):
    gold = tmp_path / "gold.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "2", "rejected": "1"} for i in range(4)]
    gold.write_text("\n".join(map(json.dumps, rows)))
    judge = {"gold": str(gold), "calibration": {"every": 2, "max_drop": 0.2}}
    config = make_config(tmp_path, loop__rounds=4, judge=judge)
    parts, said = make_parts(config), []
    parts.judges = DriftingJudge()
    parts.judges.occasions = []
    parts.known = known_pairs(config.judge)
    parts.observer.message = said.append
    run_rounds(parts)
    found = {r: parts.ledger.judge_trial(r) for r in range(5)}
    assert [found[r] is None for r in range(5)] == [False, True, False, True, False]
    assert found[0]["accuracy"] == 1.0 and found[2]["accuracy"] == 1.0 and not found[2]["alarm"]
    assert found[4]["accuracy"] == 0.5 and found[4]["alarm"]
    (alarm,) = (text for text in said if text.startswith("ALARM"))
    assert "fell by 50% since the run began, more than judge.calibration.max_drop = 0.2" in alarm
    # By the policy of now, where the judge is the policy.
    tried = [(round_, versions) for round_, occasion, versions in parts.judges.occasions if occasion]
    assert (4, "calibration 4", {4}) in parts.judges.occasions and tried == [(2, {2}), (4, {4})]
