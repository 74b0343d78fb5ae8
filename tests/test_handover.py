"""Generators take a policy while its round is still being written; nothing is kept of it before the round is."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from online_po.errors import Interrupted, LearnerLostError, OnlinePOError
from online_po.handover import Handover
from online_po.loop import run_rounds
from online_po.parts import Parts
from online_po.round import request
from online_po.types import Policy, Probe
from tests.fakes import make_config
from tests.test_loop import content, make_parts


def begin(folder: Path, every: int, **changes: Any) -> Parts:
    """A run that evaluates, or has nothing to evaluate on."""
    if every:
        return make_parts(make_config(folder, **changes))
    return make_parts(make_config(folder, prompts={"path": "p"}, eval={"every": 0}, **changes), heldout=0)


class Watched:
    """What one round leaves (`what`: save_trainer or save_policy) is not written before generators have sampled with
    the new policy."""

    def __init__(self, parts: Parts, round_: int, what: str = "save_trainer") -> None:
        self.parts, self.round, self.sampled = parts, round_, threading.Event()
        self.save, self.generate = getattr(parts.learner, what), parts.generator.generate
        self.files: list[str] = []
        self.judged: list[int] = []
        setattr(parts.learner, what, self.write)
        parts.generator.generate = self.watch

    def watch(self, chunks, sampling):
        for item in self.generate(chunks, sampling):
            if self.parts.generator.version == self.round:
                self.sampled.set()
            yield item

    def write(self, round_, folder):
        if round_ == self.round:
            judged = len(self.parts.judges.judged)
            assert self.sampled.wait(20)
            self.parts.stopping.wait(0.3)  # and now they wait, too
            self.judged = [judged, len(self.parts.judges.judged)]
            root = self.parts.ledger.root
            self.files = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and folder not in p.parents]
        return self.save(round_, folder)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("shares", "what"), [(True, "save_policy"), (True, "save_trainer"), (False, "save_trainer")])
def test_nothing_is_kept_or_judged_before_the_commit(tmp_path, every, staleness, shares, what):
    """With weights in memory generators need not even wait for the policy to be written."""
    parts, plain = (begin(tmp_path / name, every, loop__max_staleness=staleness, loop__rounds=4) for name in "ab")
    parts.learner.shares, plain.learner.shares = shares, not shares
    watched = Watched(parts, 2, what)
    run_rounds(parts)
    ahead = f"rounds/{3 + staleness:06d}"
    assert [name for name in watched.files if name.startswith(ahead)] in ([], [f"{ahead}/prompts.parquet"])
    assert not [name for name in watched.files if name.startswith("rounds/000002/eval")]
    assert staleness or watched.judged[0] == watched.judged[1]  # else the round before it may still be judged
    run_rounds(plain)
    assert content(parts.ledger.root) == content(plain.ledger.root)


def test_the_last_policy_is_evaluated_while_its_round_is_written(tmp_path):
    parts = make_parts(make_config(tmp_path))
    watched = Watched(parts, 3)
    summaries = run_rounds(parts)
    assert [summary["policy_version"] for summary in summaries] == [0, 1, 2, 3]
    assert not [name for name in watched.files if name.startswith("rounds/000003/eval")]


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("what", ["save_policy", "save_trainer"])
def test_a_policy_that_is_trained_again_is_taken_again(tmp_path, every, what):
    """To other last bits: what was sampled with the first one is thrown away."""
    parts = begin(tmp_path, every)
    watched = Watched(parts, 2, what)
    save, update, died = watched.save, parts.learner.update, []

    def dies(round_, folder):
        if round_ == 2 and not died:
            died.append(parts.learner.skill)
            raise LearnerLostError("killed")
        return save(round_, folder)

    def drifts(round_, *args):
        yield from update(round_, *args)
        parts.learner.skill += 1e-6 * (round_ == 2 and bool(died))

    watched.save, parts.learner.update = dies, drifts
    run_rounds(parts)
    assert [e[1] for e in parts.generator.log if e[0] == "sync"].count(2) == 2
    skill = parts.ledger.committed(2).probe.token_logps[0]
    assert skill == pytest.approx(died[0] + 1e-6, abs=1e-12)
    # The fakes' responses say what the policy's skill was.
    prompts, again = parts.ledger.prompts(3), make_parts(make_config(tmp_path / "again"))
    again.generator.sync(parts.ledger.policy(2, parts.start), parts.ledger.committed(2).probe)
    (part, *_), chunk = prompts.chunks(3), list(prompts)[:3]
    stored = parts.ledger.responses(3, 0, chunk)
    asked = [(0, [request(parts.config, prompt, "sample", 3) for prompt in chunk])]
    made = {
        place: group
        for _, found in again.generator.generate(asked, parts.config.generator)
        for place, group in found.items()
    }
    assert [g.responses for g in stored] == [made[place].responses for place in range(3)] and part.start == 0


@pytest.mark.parametrize("staleness", [0, 1])
def test_answers_that_come_after_a_policy_was_taken_back_are_thrown_away(tmp_path, staleness):
    """The generators' first answer comes only when the round is being trained again."""
    parts = begin(tmp_path, 1, loop__max_staleness=staleness, loop__rounds=4, checkpoint__keep=None)
    generate, save, update = parts.generator.generate, parts.learner.save_trainer, parts.learner.update
    asked, lost = threading.Event(), threading.Event()
    heard: list[bool] = []

    def late(chunks, sampling):
        for item in generate(chunks, sampling):
            if parts.generator.version == 2 and not heard:
                asked.set()
                heard.append(lost.wait(20))
            yield item

    def dies(round_, folder):
        if round_ == 2 and not lost.is_set():
            assert asked.wait(20)
            threading.Timer(0.3, lost.set).start()  # while the policy is taken back
            raise LearnerLostError("killed")
        return save(round_, folder)

    def drifts(round_, *args):
        yield from update(round_, *args)
        parts.learner.skill += 1e-6 * (round_ == 2 and asked.is_set())

    parts.generator.generate, parts.learner.save_trainer, parts.learner.update = late, dies, drifts
    run_rounds(parts)
    assert heard == [True]
    assert [e[1] for e in parts.generator.log if e[0] == "sync"].count(2) == 2
    # The fakes' responses say the skill that they were sampled with.
    texts = [row["text"] for row in parts.ledger.evaluation(2).to_pylist()]
    skill = parts.ledger.committed(2).probe.token_logps[0]
    again = make_parts(make_config(tmp_path / "again"))
    again.generator.sync(parts.ledger.policy(2, parts.start), parts.ledger.committed(2).probe)
    asks = [(0, [request(parts.config, prompt, "evaluate", 0) for prompt in parts.heldout])]
    made = {i: g for _, found in again.generator.generate(asks, parts.config.eval_sampling) for i, g in found.items()}
    assert (
        texts == [r.text for _, group in sorted(made.items()) for r in group.responses]
        and skill == again.generator.skill
    )


@pytest.mark.timeout(60)
def test_asked_to_stop_and_without_its_learner_it_stops(tmp_path):
    parts = make_parts(make_config(tmp_path))
    watched = Watched(parts, 2)

    def dies(round_, folder):
        if round_ != 2:
            return watched.kept(round_, folder)
        parts.stop.ask()
        raise LearnerLostError("killed")

    watched.kept, watched.save = watched.save, dies
    with pytest.raises(Interrupted):
        run_rounds(parts)
    assert parts.ledger.last_committed() == 1


def test_asked_to_stop_while_the_round_is_written_it_keeps_the_round_and_nothing_beyond(tmp_path):
    parts = make_parts(make_config(tmp_path))
    watched = Watched(parts, 1)
    save = watched.save

    def stopped(round_, folder):
        parts.stop.ask()
        return save(round_, folder)

    watched.save = stopped
    with pytest.raises(Interrupted):
        run_rounds(parts)
    assert parts.ledger.last_committed() == 1 and parts.ledger.evaluation_summary(1) is None
    again = make_parts(parts.config)
    run_rounds(again)
    whole = make_parts(make_config(tmp_path / "whole"))
    run_rounds(whole)
    assert content(again.ledger.root) == content(whole.ledger.root)


def test_who_waits_hears_how_it_ended():
    def handover() -> Handover:
        return Handover(Policy(version=1, path=None), Probe(token_ids=(1, 2), token_logps=(0.0,)))

    def ends() -> None:
        raise OnlinePOError("the run is ending")

    with ThreadPoolExecutor(1) as pool:
        one = handover()
        waiting = pool.submit(one.wait, lambda: None)
        one.settle()
        waiting.result(10)
        one.withdraw()  # too late
        one.wait(lambda: None)
        other = handover()
        waiting = pool.submit(other.wait, lambda: None)
        other.withdraw()
        with pytest.raises(OnlinePOError, match="policy 1 is trained again"):
            waiting.result(10)
        with pytest.raises(OnlinePOError, match="ending"):
            handover().wait(ends)
