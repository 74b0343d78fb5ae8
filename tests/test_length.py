"""Length taken out of scores: against numpy's least squares, and in a round."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_po.errors import ConfigError
from online_po.examples import make_examples
from online_po.judge_configs.base import LengthConfig
from online_po.length import length_slope, without_length
from online_po.loop import run_rounds
from online_po.round import sample_round
from online_po.types import Group, JudgeFailure, Judgement, Policy, Probe, Prompt, Reference, Response
from tests.fakes import FakeJudge, make_config
from tests.test_examples import NO_EVALUATION, PLAIN, summaries
from tests.test_loop import content, make_parts


def judged(*responses, name="p"):
    """A group of (length, score)."""
    prompt = Prompt(id=name, messages=({"role": "user", "content": name},), text=name, token_ids=(1,))
    made = tuple(
        Response(
            index=index, text="x" * length, token_ids=(2,) * length, token_logps=(-1.0,) * length,
            finish_reason="stop", policy_version=0, seed=index,
        )
        for index, (length, _) in enumerate(responses)
    )  # fmt: skip
    scores = tuple(float(score) for _, score in responses)
    return Group(prompt=prompt, responses=made), Judgement(prompt_id=name, scores=scores)


FAILED = (judged((9, 0), (90, 0))[0], Judgement(prompt_id="p", failure=JudgeFailure(kind="error", message="x")))
REGRESS = LengthConfig(regress=True)

rounds = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.floats(-5, 5)), min_size=1, max_size=5), min_size=1, max_size=6
)


@given(rounds)
def test_the_slope_is_least_squares_with_a_mean_for_each_prompt(groups):
    lengths = [length for group in groups for length, _ in group]
    scores = [score for group in groups for _, score in group]
    own = [place for place, group in enumerate(groups) for _ in group]
    of_prompt = np.eye(len(groups))[own]
    found = length_slope(judged(*group) for group in groups)
    if all(len({length for length, _ in group}) == 1 for group in groups):
        assert found is None
        return
    (slope, *_), *_ = np.linalg.lstsq(np.column_stack([lengths, of_prompt]), np.array(scores), rcond=None)
    assert found == pytest.approx(slope, abs=1e-9)


@given(rounds)
def test_no_trend_is_left_and_prompts_keep_their_means(groups):
    pairs = [judged(*group) for group in groups]
    slope = length_slope(pairs)
    adjusted = [(group, without_length(group, judgement, REGRESS, slope)) for group, judgement in pairs]
    assert (length_slope(adjusted) or 0.0) == pytest.approx(0.0, abs=1e-9)
    for (_, before), (_, after) in zip(pairs, adjusted, strict=True):
        assert math.fsum(after.scores) == pytest.approx(math.fsum(before.scores), abs=1e-9)


def test_prompts_that_ask_for_long_answers_are_no_trend():
    pairs = [judged((10, 1), (20, 1)), judged((100, 9), (110, 9), name="q")]
    assert length_slope(pairs) == 0.0


def test_by_hand():
    pairs = [judged((10, 1.0), (30, 3.0)), FAILED, judged((5, 2.0), (5, 7.0))]
    slope = length_slope(pairs)
    assert slope == pytest.approx(0.1)  # of the first group alone: the third has no lengths to tell by
    assert without_length(*pairs[0], REGRESS, slope).scores == (2.0, 2.0)  # equal, not nearly so
    assert without_length(*pairs[2], REGRESS, slope).scores == (2.0, 7.0)
    assert without_length(*FAILED, REGRESS, slope) == FAILED[1]
    penalty = LengthConfig(penalty_per_token=0.5)
    assert without_length(*pairs[0], penalty, None).scores == (-4.0, -12.0)
    assert without_length(*pairs[0], LengthConfig(penalty_per_token=0.5, regress=True), slope).scores == (-3.0, -13.0)


def test_dust_is_no_difference():
    """A judge that gives 0.1 a token, and whose scores have the mean 0, says nothing but length."""
    pair = judged(*[(length, 0.1 * length - 0.7) for length in (3, 6, 7, 12)])
    adjusted = without_length(*pair, REGRESS, length_slope([pair]))
    assert len(set(adjusted.scores)) == 1


# -- in a round ----------------------------------------------------------------------------------------


class LongJudge(FakeJudge):
    """Likes what the response says a little, and its length a lot."""

    def _judge(self, group):
        scores = tuple(float(response.text) + 10 * len(response.token_ids) for response in group.responses)
        return replace(super()._judge(group), scores=scores)


def run(folder, length, interrupted=False):
    """A run's parts, the metrics of its rounds, and all it left."""
    config = make_config(folder, **PLAIN, judge={"length": length})
    while True:
        parts = make_parts(config, 0)
        parts.judges = LongJudge()
        if interrupted:
            parts.generator.fail_after, interrupted = 2, False
        try:
            run_rounds(parts)
            return parts, summaries(parts.ledger), content(parts.ledger.root)
        except KeyboardInterrupt:
            continue


def test_off_it_leaves_the_row_and_the_scores_alone(tmp_path):
    parts, rows, _ = run(tmp_path, {})
    assert not any(name.startswith(("length_slope", "length_penalty", "judge_agreement")) for name in rows[1])
    assert all(
        len(row["chosen_token_ids"]) >= len(row["rejected_token_ids"]) for row in parts.ledger.pairs(1).to_pylist()
    )


@pytest.mark.parametrize("length", [{"regress": True}, {"penalty_per_token": 10.0}])
def test_pairs_are_made_of_adjusted_scores_and_the_judges_own_are_kept(tmp_path, length):
    parts, rows, _ = run(tmp_path, length)
    slope = rows[1].get("length_slope", 10.0)
    assert slope == pytest.approx(10.0, abs=0.1)
    assert rows[1].get("length_penalty") == length.get("penalty_per_token")
    assert ("length_slope" in rows[1]) == ("regress" in length)
    pairs = parts.ledger.pairs(1).to_pylist()
    assert any(len(row["chosen_token_ids"]) < len(row["rejected_token_ids"]) for row in pairs)
    said = {}
    size = parts.config.generator.chunk_prompts
    prompts = parts.ledger.prompts(1)
    for part, begin in enumerate(range(0, len(prompts), size)):
        groups = parts.ledger.responses(1, part, prompts[begin : begin + size])
        for group, judgement in zip(groups, parts.ledger.judgements(1, part), strict=True):
            for response, score in zip(group.responses, judgement.scores, strict=True):
                assert score == float(response.text) + 10 * len(response.token_ids)  # its own
                said[group.prompt.id, response.index] = score
    for row in pairs:
        gap = said[row["prompt_id"], row["chosen_index"]] - said[row["prompt_id"], row["rejected_index"]]
        longer = len(row["chosen_token_ids"]) - len(row["rejected_token_ids"])
        assert row["margin"] == pytest.approx(gap - slope * longer)
        assert row["chosen_score"] > row["rejected_score"]
    # What the judge likes is still to be seen.
    assert rows[1]["length_score_correlation"] > 0.9


def test_a_stopped_and_resumed_run_takes_out_the_same(tmp_path):
    *_, whole = run(tmp_path / "whole", {"regress": True})
    *_, resumed = run(tmp_path / "resumed", {"regress": True}, interrupted=True)
    assert resumed == whole


def test_labels_are_made_of_adjusted_scores(tmp_path):
    loss = {"name": "kto"}
    settings = {**NO_EVALUATION, "loss": loss, "labels": {"rule": "group_mean"}}
    parts = make_parts(make_config(tmp_path, **settings, judge={"length": {"regress": True}}), 0)
    parts.judges = LongJudge()
    parts.generator.sync(Policy(version=0, path=tmp_path), Probe(token_ids=(1, 2), token_logps=(0.0,)))
    sample_round(parts, 1)
    examples, metrics = make_examples(parts, 1, parts.ledger.prompts(1), Reference(round=0))
    lengths = [len(row["response_token_ids"]) for row in examples.to_pylist()]
    labels = [row["label"] for row in examples.to_pylist()]
    assert metrics["length_slope"] == pytest.approx(10.0, abs=0.1)
    assert abs(np.corrcoef(lengths, labels)[0, 1]) < 0.5


def test_without_scores_it_is_refused(tmp_path):
    pairs = {"strategy": "spin", "chosen_column": "gold"}
    with pytest.raises(ConfigError, match="judge.length has no effect with pairs.strategy: spin"):
        make_config(tmp_path, **PLAIN, pairs=pairs, judge={"length": {"regress": True}})
