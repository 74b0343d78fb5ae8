"""Rounds that go on after a step checkpoint, with the real learner: bit for bit as if they had never been stopped.

Several ranks: test_learner_ranks.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from online_po import files, step_checkpoints
from online_po.errors import OnlinePOError
from online_po.learner import TorchLearner
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.loss_configs import LOSS_BY_NAME
from online_po.parts import Parts
from online_po.sections import LoraConfig, ModelConfig
from online_po.step_checkpoints import StepPlan, newest_whole
from online_po.types import Policy, Reference
from tests.fakes import make_config
from tests.learner_setup import collect_logps, learner_config, make_labels, make_learner, make_pairs, save, start
from tests.test_loop import make_parts
from tests.test_roll_back_learner import AnyGenerator

pytestmark = pytest.mark.usefixtures("one_thread")

DROPOUT = LoraConfig(rank=4, dropout=0.3)
# Losses that go over a step twice, keep running means, or read other prompts' responses.
CASES = {
    "full": (None, ("sigmoid",), make_pairs(20)),
    "lora": (DROPOUT, ("sigmoid",), make_pairs(20)),
    "full, means": (None, ("bco_pair", "beta_dpo"), make_pairs(20)),
    "lora, labels": (DROPOUT, ("kto", "bco"), make_labels(20)),
}


def state_of(learner: Any, folder: Path) -> dict[str, bytes]:
    """Every byte that the learner would commit."""
    save(learner, 2, folder / "policy", folder / "trainer")
    return {path.parent.name + path.name: path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def timeless(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if name != "seconds"} for step in steps]


@pytest.mark.parametrize("case", list(CASES))
def test_stopped_after_any_step_a_round_ends_the_same(tiny_model: Path, tmp_path: Path, case: str) -> None:
    lora, names, examples = CASES[case]
    config = learner_config(lora=lora, epochs=2, weight_decay=0.01)
    before = Policy(version=1, path=tmp_path / "policy", is_adapter=lora is not None)

    def make() -> Any:
        losses = [LOSS_BY_NAME[name]() for name in names]  # type: ignore[call-arg]
        return TorchLearner(ModelConfig(path=str(tiny_model)), config, losses, seed=7, rounds=3)

    learner = make()
    reference = collect_logps(learner.logps, examples, start(tiny_model))
    list(learner.update(1, examples, reference, None))
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")

    def update(learner: Any, folder: str, every: int | None) -> Iterator[dict[str, float]]:
        after, damaged = newest_whole(tmp_path / folder)
        assert not damaged
        plan = StepPlan(folder=tmp_path / folder, every=every, after=after)
        yield from plan.metrics
        yield from learner.update(2, examples, reference, reference, [None] * len(names), False, plan)

    steps = timeless(list(update(learner, "none", None)))
    expected = state_of(learner, tmp_path / "whole")
    assert len(steps) == 6 and not (tmp_path / "none").exists()
    again = make()
    stops = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (4, 3), (4, 5)]
    for every, stop in stops if names == ("sigmoid",) else stops[3::3]:
        folder = f"steps-{every}-{stop}"
        learner.load(before, tmp_path / "trainer")
        begun = update(learner, folder, every)
        for _ in range(stop):
            next(begun)
        begun.close()
        after, _ = newest_whole(tmp_path / folder)
        assert (after.step if after else 0) == stop // every * every
        again.load(before, tmp_path / "trainer")
        assert timeless(list(update(again, folder, every))) == steps
        assert state_of(again, tmp_path / f"state-{every}-{stop}") == expected, f"stopped after step {stop}"


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_what_is_written_late_is_the_state_of_its_step(
    tiny_model: Path, tmp_path: Path, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, free = step_checkpoints._write, threading.Event()
    monkeypatch.setattr(step_checkpoints, "_write", lambda *args: (free.wait(30), write(*args)))
    found = {}
    for name, ahead in (("late", 1), ("at once", 0)):
        learner = make_learner(tiny_model, learner_config(lora=lora, epochs=2), "simpo")
        plan = StepPlan(folder=tmp_path / name, every=2)
        update = learner.update(1, make_pairs(20), None, None, plan=plan)
        for _ in range(2 + ahead):
            next(update)
        free.set()
        update.close()
        names = ("policy.safetensors", "optimizer.safetensors", "trainer.json")
        found[name] = [(tmp_path / name / "000002" / file).read_bytes() for file in names]
        free.clear()
    assert found["late"] == found["at once"]


def test_a_step_of_another_format_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    learner = make_learner(tiny_model, learner_config(), "simpo")
    update = learner.update(1, make_pairs(20), None, None, plan=StepPlan(folder=tmp_path, every=1))
    next(update)
    update.close()
    after, _ = newest_whole(tmp_path)
    assert after is not None
    state = json.loads((after.folder / "trainer.json").read_text())
    (after.folder / "trainer.json").write_text(json.dumps(state | {"format": 1}))
    plan = StepPlan(folder=tmp_path, every=1, after=after)
    with pytest.raises(
        OnlinePOError, match=r"000001' holds the state of step 1, order 2, format 1, not of step 1, order 2, format \d"
    ):
        next(learner.update(1, make_pairs(20), None, None, plan=plan))


class Stopped(Exception):
    pass


class Stopping:
    """The real learner; it stops in one round when three of its steps are made, and not before they are written."""

    def __init__(self, learner: TorchLearner, round_: int) -> None:
        self.learner, self.round = learner, round_

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def update(self, round_: int, *args: Any) -> Iterator[dict[str, float]]:
        with closing(self.learner.update(round_, *args)) as steps:
            for step, metrics in enumerate(steps, 1):
                yield metrics
                if round_ == self.round and step == 3:
                    raise Stopped


@pytest.mark.parametrize(
    ("lora", "reference"),
    [(None, {"kind": "ema", "alpha": 0.5}), ({"rank": 4}, {"kind": "kl", "above": 0.02})],
    ids=["full", "lora"],
)
def test_a_run_stopped_in_every_round_ends_the_same(
    tiny_model: Path, tmp_path: Path, lora: dict[str, Any] | None, reference: dict[str, Any]
) -> None:
    """Through the loop, with references that move, betas that are controlled and running means."""

    learner: list[TorchLearner] = []  # one serves: what a new process would do first is to load

    def make(name: str) -> Parts:
        config = make_config(
            tmp_path / name,
            model={"path": str(tiny_model)},
            learner=learner_config(lora=lora, threads=1, global_batch_size=2).model_dump(mode="json"),
            loss=[{"name": "sigmoid"}, {"name": "bco_pair", "weight": 0.5}],
            beta_control={"target_kl": 0.01},
            reference=reference,
            checkpoint={"keep": None, "every_steps": 1},
        )
        parts = make_parts(config)
        parts.generator = AnyGenerator()
        if not learner:
            learner.append(TorchLearner(config.model, config.learner, config.loss, seed=0, rounds=3))
        parts.learner = learner[0]
        parts.learner.load(start(tiny_model), tmp_path)
        return parts

    whole = make("whole")
    run_rounds(whole)
    for stop in (1, 2, 3):
        parts = make("stopped")
        parts.learner = Stopping(parts.learner, stop)  # type: ignore[arg-type]
        with pytest.raises(Stopped):
            run_rounds(parts)
        parts.sampler.shutdown()
    again = make("stopped")
    run_rounds(again)
    assert "round 3 trains on after step 3" in again.observer.messages  # type: ignore[attr-defined]
    assert weights_and_steps(again.ledger) == weights_and_steps(whole.ledger)


def weights_and_steps(ledger: Ledger) -> dict[str, Any]:
    """Of every round: the files of its weights, its trainer's and its data, and what its steps measured."""
    found: dict[str, Any] = {}
    for round_ in (1, 2, 3):
        for name, about in ledger.committed(round_).files.items():
            if name != "metrics.jsonl":
                found[f"{round_}/{name}"] = about["sha256"]
        rows = files.read_json_lines(ledger.round_dir(round_) / "metrics.jsonl")
        found[f"{round_}/steps"] = timeless(rows[:-1])
        found[f"{round_}/round"] = {k: v for k, v in rows[-1].items() if "seconds" not in k}
        found[f"{round_}/next"] = (ledger.committed(round_).beta_scale, ledger.committed(round_).reference)
    assert len(found["1/steps"]) > 3 and found["3/next"] != (1.0, Reference(round=0))
    return found
