"""The real loop with a learner that dies: started again, given back what the round began with, and the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from online_po.errors import EngineError, LearnerLostError, SyncError
from online_po.loop import run_rounds
from online_po.types import Policy
from tests.fakes import FakeLearner, SickLearner, make_config
from tests.test_loop import content, make_parts

NUMBERED = ("load", "update", "save_policy", "save_trainer")


class MortalLearner:
    """Dies once after everything that it can have done since it was started (each step of an update counts), at most
    `times`. Dead, it does nothing but start again, and then it is as new."""

    def __init__(self, learner: FakeLearner, times: int = 1000, restarts: int = 1000) -> None:
        self.learner, self.times, self.restarts = learner, times, restarts
        self.dead, self.done, self.log = False, ((),), list[Any]()
        self.known = {self.done}
        """After what it has died."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.learner, name)

        def call(*args: Any) -> Any:
            self._begin(name, *args)
            found = real(*args)
            self._may_die()
            return found

        def stream(*args: Any) -> Any:
            self._begin(name, *args)
            for each in real(*args):
                yield each
                self._may_die()

        return stream if name in ("update", "logps") else call

    def _begin(self, name: str, *args: Any) -> None:
        assert not self.dead, "asked though it is dead"
        # Rounds and versions tell two rounds' work apart; nothing else does.
        told = args[:1] if name in NUMBERED else ()
        self.log.append((name, *(getattr(arg, "version", arg) for arg in told)))

    def _may_die(self) -> None:
        self.done = (*self.done, self.log[-1])
        if self.done not in self.known and len(self.known) <= self.times:
            self.known.add(self.done)
            self.dead = True
            self.learner.die()
            raise LearnerLostError("rank 0 is dead: killed")

    def restart(self, lost: LearnerLostError) -> None:
        if self.restarts == 0:
            raise EngineError(f"the learner died: {lost}")
        self.restarts -= 1
        self.dead, self.learner.skill, self.done = False, 0.0, ((),)
        self.log.append(("restart",))


SETTING: dict[str, Any] = {
    "loop__rounds": 2,
    "prompts": {"path": "p"},
    "eval": {"every": 0},
    "reference": {"kind": "ema", "alpha": 0.5},
}


def finished(folder: Path, times: int = 0, **setting: Any) -> tuple[dict[str, object], MortalLearner]:
    config = make_config(folder, **(SETTING | setting))
    parts = make_parts(config, heldout=0)
    learner = MortalLearner(SickLearner(config, 2, nonfinite=1.0) if setting else FakeLearner(), times)
    parts.learner = learner
    run_rounds(parts)
    return content(parts.ledger.root), learner


@pytest.mark.parametrize("setting", [{}, {"guards": {"nonfinite": {"action": "roll_back"}}}])
def test_a_learner_that_dies_after_everything_it_does_leaves_the_same_run(tmp_path, setting):
    whole, learner = finished(tmp_path / "whole", **setting)
    assert ("restart",) not in learner.log and (("load", 1) in learner.log) == bool(setting)
    found, mortal = finished(tmp_path / "mortal", 1000, **setting)
    assert found == whole
    assert mortal.log.count(("restart",)) > len(learner.log)
    after = {mortal.log[place + 1] for place, entry in enumerate(mortal.log) if entry == ("restart",)}
    assert after == {("load", 0), ("load", 1)}, "first of all it gets its weights back"
    assert set(learner.log) <= {done[-1] for done in mortal.known if done[-1]}, "it died in each"


def test_too_many_deaths_end_the_run_and_a_resumed_one_goes_on(tmp_path):
    whole, _ = finished(tmp_path / "whole")
    config = make_config(tmp_path / "killed", **SETTING)
    parts = make_parts(config, heldout=0)
    parts.learner = MortalLearner(FakeLearner(), restarts=6)
    with pytest.raises(EngineError, match="the learner died: rank 0 is dead"):
        run_rounds(parts)
    parts.sampler.shutdown()
    again = make_parts(config, heldout=0)
    run_rounds(again)
    assert content(again.ledger.root) == whole


def test_weights_that_do_not_come_back_stop_the_run(tmp_path):
    class Other(FakeLearner):
        def load(self, policy: Policy, trainer_dir: Path) -> None:
            super().load(policy, trainer_dir)
            self.skill += policy.version

    parts = make_parts(make_config(tmp_path, **SETTING), heldout=0)
    parts.learner = MortalLearner(Other())
    with pytest.raises(
        SyncError, match=r"the learner (loaded|was started again to hold) policy 1\b.*, but .* off by up to 1 nats"
    ):
        run_rounds(parts)
