"""Ranks that stand still or run out of memory, on real Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.learners import LearnerGroup
from actors.supervision import Supervisor
from make_tiny_model import make_tiny_model
from online_po.config import Config
from online_po.errors import EngineError, LearnerLostError, LearnerMemoryError
from online_po.types import Policy
from tests.fakes import FakeObserver, make_config
from tests.learner_setup import collect_logps, make_pairs, save

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("cluster")]
PAIRS = make_pairs(12)


class Two:
    """Two ranks, and what their observer heard."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.model = make_tiny_model(folder / "model", kv_heads=2)
        config = Config.parse(
            {
                "run": {"name": "test"},
                "model": {"path": str(self.model)},
                "prompts": {"path": "prompts.jsonl", "heldout_size": 1},
                "learner": {"ranks": 2, "threads": 1, "global_batch_size": 4, "learning_rate": 1e-3, "eps": 1e-4},
                "limits": limits,
            }
        )
        self.observer = FakeObserver()
        self.group = LearnerGroup(config, Supervisor(config, self.observer))
        self.group.ready(300)
        self.start = Policy(version=0, path=self.model)
        self.reference = collect_logps(self.group.logps, PAIRS, self.start)

    def on_rank_1(self, change: Callable[[Any], None]) -> None:
        ray.get(self.group._ranks[1].__ray_call__.remote(change))

    def train(self) -> list[dict[str, float]]:
        return list(self.group.update(1, PAIRS, self.reference, None))


def test_ranks_that_stand_still_are_all_named(tmp_path: Path) -> None:
    two = Two(tmp_path, step_s=6.0)

    def sleep(rank: Any) -> None:
        rank.learner._stepper.take = lambda *args: time.sleep(1000)

    try:
        two.on_rank_1(sleep)
        with pytest.raises(
            LearnerLostError, match=r"^ranks 0, 1 stand still in `update`: it hung.*limits\.step_s is 6"
        ):
            two.train()
    finally:
        two.group.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_the_machine_had_no_memory_for_is_counted_and_has_less_to_do(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its processes."""
    begun: list[int] = []
    monkeypatch.setattr(LearnerGroup, "_start", lambda self: begun.append(self._micro_batch_tokens))
    monkeypatch.setattr(LearnerGroup, "_ready", lambda self, timeout: None)
    monkeypatch.setattr(LearnerGroup, "close", lambda self: None)
    config = make_config(tmp_path, learner__ranks=ranks, learner__micro_batch_tokens=100, ray={"max_restarts": 2})
    observer = FakeObserver()
    group = LearnerGroup(config, Supervisor(config, observer))
    killed = LearnerLostError("rank 0 is dead: its machine was running out of memory", memory=True)
    group.restart(killed)
    group._held_tokens = 30  # it has halved them itself meanwhile
    group.restart(killed)
    group.restart(LearnerLostError("rank 1 ran out of memory", memory=True, smaller=6))
    assert begun == [100, 50, 15, 6]
    assert "its micro-batches hold 50 tokens instead of 100" in observer.messages[0]
    with pytest.raises(EngineError, match="the learner was started again 2 times"):
        group.restart(killed)


def test_ranks_without_memory_begin_again_with_less_to_do_at_once(tmp_path: Path) -> None:
    two = Two(tmp_path)

    def no_memory(rank: Any) -> None:
        def fail(*args: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        rank.learner.scorer.register_forward_pre_hook(fail)

    def no_memory_for_one(rank: Any) -> None:
        rank.learner._scoring.micro_batch_tokens = 1
        no_memory(rank)

    def no_memory_to_save(rank: Any) -> None:
        def fail(*args: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        rank.learner.held.gathered = fail

    try:
        whole = two.train()
        two.group.load(two.start, tmp_path)
        two.on_rank_1(no_memory)
        with pytest.raises(LearnerLostError, match=r"^round 1, step 1 of 3: rank 1 ran out of memory") as lost:
            two.train()
        two.group.restart(lost.value)
        assert two.group._supervisor._restarts == {}, "that is no death to count"
        (told,) = [text for text in two.observer.messages if "its micro-batches hold" in text]
        two.group.load(two.start, tmp_path)
        again = two.train()
        assert f"hold {again[0]['micro_batch_tokens']:.0f} tokens instead of 4096" in told
        for step, other in zip(whole, again, strict=True):
            assert other["loss"] == pytest.approx(step["loss"], rel=1e-4)
        two.group.load(two.start, tmp_path)
        two.on_rank_1(no_memory_for_one)
        with pytest.raises(LearnerLostError, match="with one example of .* tokens in a micro-batch") as lost:
            two.train()
        two.group.restart(lost.value)
        assert two.group._supervisor._restarts == {}
        assert two.observer.messages[-2].endswith("its ranks recompute activations from here on")
        two.group.load(two.start, tmp_path)
        for step, other in zip(whole, two.train(), strict=True):
            assert other["loss"] == pytest.approx(step["loss"], rel=1e-4) and other["recomputes"] == 1
        two.on_rank_1(no_memory_to_save)
        with pytest.raises(
            LearnerMemoryError, match=r"out of memory in `save_policy` \(OutOfMemoryError: CUDA.*learner\.lora"
        ):
            save(two.group, 1, tmp_path / "policy", tmp_path / "trainer")
    finally:
        two.group.close()
