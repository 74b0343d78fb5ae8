"""Dynamic sampling (loop.top_up): further prompts in place of those whose responses are all scored alike."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from online_po.cursor import further_prompts
from online_po.errors import ConfigError, NoPairsError
from online_po.judging import is_alike
from online_po.loop import run_rounds
from online_po.parts import Parts
from online_po.sections import LoopConfig
from online_po.tables import PromptRows, prompts_to_table
from online_po.types import Group, JudgeFailure, Judgement
from tests.fakes import FakeGenerator, FakeJudge, make_config, make_prompts
from tests.kills import Killed, killed_at, memory_folder
from tests.test_loop import content, make_parts


class Undecided(FakeJudge):
    """Finds the responses to most prompts alike: to those whose number `share` does not divide."""

    def __init__(self, share: int) -> None:
        super().__init__()
        self.share = share

    def _judge(self, group: Group) -> Judgement:
        told = super()._judge(group)
        if int(group.prompt.id.split("-")[1]) % self.share == 0 or told.scores is None:
            return told
        return Judgement(prompt_id=told.prompt_id, scores=(0.1 + 0.2, 0.3, 0.3))


def make(folder: Path, share: int = 2, **loop: Any) -> Parts:
    sizes = {"rounds": 2, "prompts_per_round": 6, "responses_per_prompt": 3, "top_up": 2.0}
    parts = make_parts(make_config(folder, loop=sizes | loop, judge={"max_failure_rate": 0.5}))
    parts.judges = Undecided(share)
    return parts


def telling(parts: Parts, round_: int) -> int:
    """Prompts of a round that gave a pair."""
    return len(set(parts.ledger.pairs(round_)["prompt_id"].to_pylist()))


def test_a_round_is_filled_up(tmp_path: Path) -> None:
    parts = make(tmp_path)
    run_rounds(parts)
    for round_ in (1, 2):
        prompts = parts.ledger.prompts(round_)
        assert prompts.draws[0] == 6 and 6 < len(prompts) <= 18
        assert len({prompt.id for prompt in prompts}) == len(prompts), "no prompt twice in a round"
        assert telling(parts, round_) >= 6 or len(prompts) == 18
    told = [text for text in parts.observer.messages if "loop.top_up" in text]  # type: ignore[attr-defined]
    drawn = [parts.ledger.prompts(round_).draws for round_ in (1, 2)]
    assert len(told) == sum(len(draws) - 1 for draws in drawn)
    assert f"{drawn[0][1]} further prompts are sampled" in told[0]


def test_rounds_go_on_behind_all_that_was_drawn(tmp_path: Path) -> None:
    parts = make(tmp_path, top_up=0.5)
    run_rounds(parts)
    ids = [prompt.id for round_ in (1, 2) for prompt in parts.ledger.prompts(round_)]
    assert len(ids) == 18 and len(set(ids)) == 18, "of 20 prompts: an epoch is not over"


def test_it_is_bounded(tmp_path: Path) -> None:
    parts = make(tmp_path, share=100, rounds=1, top_up=1.0)  # prompt-0 alone tells its responses apart
    with suppress(NoPairsError):
        run_rounds(parts)
    assert len(parts.ledger.prompts(1)) == 12
    parts = make(tmp_path / "few", share=100, rounds=1, top_up=50.0)
    run_rounds(parts)
    assert len(parts.ledger.prompts(1)) == 20, "all there are"
    assert telling(parts, 1) == 1


def test_without_it_and_without_ties_nothing_is_drawn(tmp_path: Path) -> None:
    for name, share, top_up in (("off", 2, 0.0), ("no ties", 1, 2.0)):
        parts = make(tmp_path / name, share=share, top_up=top_up)
        run_rounds(parts)
        assert parts.ledger.prompts(1).draws == (6,)


@pytest.mark.parametrize("stop", range(8))
def test_a_run_that_was_stopped_has_the_same_rounds(tmp_path: Path, stop: int) -> None:
    whole = make(tmp_path / "whole")
    run_rounds(whole)
    stopped = make(tmp_path / "stopped")
    assert isinstance(stopped.generator, FakeGenerator)
    stopped.generator.fail_after = stop
    with pytest.raises(KeyboardInterrupt):
        run_rounds(stopped)
    again = make(tmp_path / "stopped")
    run_rounds(again)
    assert content(again.ledger.root) == content(whole.ledger.root)


@pytest.mark.parametrize("staleness", [0, 1])
def test_killed_anywhere_it_has_the_same_rounds(staleness: int) -> None:
    """At every fifth fail point, also between what the judge said and the prompts that are drawn for it."""
    with memory_folder() as folder:
        options: dict[str, Any] = {"max_staleness": staleness}
        whole = make(folder / "whole", **options)
        with killed_at(None) as points:
            run_rounds(whole)
        assert any(len(whole.ledger.prompts(round_).draws) > 1 for round_ in (1, 2))
        for place in range(1, len(points), 5):
            parts = make(folder / str(place), **options)
            with pytest.raises(Killed), killed_at(place):
                run_rounds(parts)
            parts.sampler.shutdown()
            again = make(folder / str(place), **options)
            run_rounds(again)
            assert content(again.ledger.root) == content(whole.ledger.root), points[place - 1]


def test_what_the_judge_could_not_judge_is_not_made_up_for(tmp_path: Path) -> None:
    """It would have more to judge, and to fail at."""
    parts = make(tmp_path, share=1)
    parts.judges.fails = {f"prompt-{i}": JudgeFailure(kind="api", message="no") for i in range(0, 20, 4)}  # type: ignore[attr-defined]
    run_rounds(parts)
    assert parts.ledger.prompts(1).draws == (6,)


@pytest.mark.parametrize(
    ("sampled", "alike", "expected"),
    [
        (10, 0, 0),
        (10, 5, 10),  # half of them tell: five missing take ten
        (10, 1, 2),
        (10, 10, 20),  # nothing is known of the rate: all that is allowed
        (20, 10, 0),
        (29, 20, 1),
        (30, 25, 0),  # the bound
    ],
)
def test_how_many(sampled: int, alike: int, expected: int) -> None:
    loop = LoopConfig(prompts_per_round=10, top_up=2.0)  # type: ignore[call-arg]
    assert further_prompts(loop, sampled, alike, available=1000) == expected
    assert further_prompts(loop, sampled, alike, available=sampled) == 0


def test_scores_that_differ_by_rounding_are_alike() -> None:
    assert is_alike(Judgement(prompt_id="a", scores=(0.1 + 0.2, 0.3, 0.3)))
    assert is_alike(Judgement(prompt_id="a", scores=(0.0, 0.0)))
    assert not is_alike(Judgement(prompt_id="a", scores=(0.0, 1e-9)))
    assert not is_alike(Judgement(prompt_id="a", failure=JudgeFailure(kind="api", message="no")))


def test_parts_end_where_draws_do() -> None:
    rows = PromptRows(prompts_to_table(make_prompts(10)), (7, 3))
    assert [list(places) for places in rows.chunks(3)] == [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9]]
    assert [list(places) for places in PromptRows(rows.table).chunks(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": {"strategy": "spin", "chosen_column": "answer"}}, "loop.top_up is 1, but of pairs.strategy: spin"),
        (
            {"loss": {"name": "kto"}, "labels": {"rule": "threshold", "threshold": 0}},
            "loop.top_up is 1, but under labels.rule: thresh",
        ),
        ({"loop": {"top_up": -1}}, "loop.top_up"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **{"loop__top_up": 1.0, **settings})
