"""Actors killed, stopped, or out of memory in the middle of their work: others do it, with the same results."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.generators import GeneratorGroup
from actors.learners import LearnerGroup
from actors.supervision import Supervisor
from make_tiny_model import make_tiny_model
from online_po.config import Config
from online_po.errors import EngineError, LearnerLostError
from online_po.sections import SamplingConfig
from online_po.types import Policy
from tests.actors.engines import by_chunk, make_config, make_probe, make_request
from tests.fakes import FakeObserver
from tests.learner_setup import collect_logps, make_pairs

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("cluster")]

SAMPLING = SamplingConfig(max_tokens=12)
CHUNKS = [(i, [make_request(2 * i), make_request(2 * i + 1)]) for i in range(6)]


@pytest.fixture(scope="module")
def new(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy(version=1, path=make_tiny_model(tmp_path_factory.mktemp("new"), seed=1))


def token_ids(found: dict[int, Any]) -> dict[int, Any]:
    """By chunk; log-probabilities are left out."""
    return {c: [[r.token_ids for r in g.responses] for g in groups] for c, groups in found.items()}


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def with_limits(config: Config, **limits: float) -> Config:
    return config.model_copy(
        update={
            "limits": config.limits.model_copy(update=limits),
            "ray": config.ray.model_copy(update={"max_restarts": 2}),
        }
    )


class Replicas:
    """Two replicas that hold a policy, and what they sample undisturbed."""

    def __init__(self, config: Config, policy: Policy, base: Path) -> None:
        self.observer = FakeObserver()
        self.group = GeneratorGroup(config, Supervisor(config, self.observer))
        self.group.ready(300)
        self.probe = make_probe(policy, base)
        self.group.sync(policy, self.probe)
        self.whole = by_chunk(self.group.generate(CHUNKS, SAMPLING))

    def sampled(self, meanwhile: Callable[[], None]) -> dict[int, Any]:
        """The same again; `meanwhile` happens after the first answer."""
        answers = self.group.generate(CHUNKS, SAMPLING)
        first = next(answers)
        meanwhile()
        return by_chunk([first, *answers])

    def told(self, what: str) -> str:
        """The one message that has these words."""
        (text,) = [message for message in self.observer.messages if what in message]
        return text

    def slow(self, replica: int, seconds: float) -> None:
        """From now on an engine waits that long before each of its steps."""

        def make_slow(actor: Any) -> None:
            real = actor._engine.generate

            def generate(requests: Any, sampling: Any) -> Iterator[Any]:
                for found in real(requests, sampling):
                    time.sleep(seconds)
                    yield found

            actor._engine.generate = generate

        ray.get(self.group._replicas[replica].actor.__ray_call__.remote(make_slow))


@pytest.fixture(scope="module")
def pair(tiny_model: Path, new: Policy) -> Iterator[Replicas]:
    config = with_limits(make_config(tiny_model, engine="transformers", replicas=2), generate_s=8.0, pulse_s=8.0)
    made = Replicas(config, new, tiny_model)
    yield made
    made.group.close()


@pytest.fixture(autouse=True)
def forgiven(request: pytest.FixtureRequest) -> None:
    """Each test may kill as often as `ray.max_restarts` allows, once what the last one killed is back."""
    if "pair" in request.fixturenames:
        pair = request.getfixturevalue("pair")
        pair.sampled(lambda: None)
        pair.group._supervisor._restarts.clear()
        pair.observer.messages.clear()


def test_a_killed_replicas_chunks_are_sampled_again_by_the_same_weights(pair: Replicas) -> None:
    pair.slow(0, 0.05)
    pid = pid_of(pair.group._replicas[0].actor)
    assert pair.sampled(lambda: os.kill(pid, signal.SIGKILL)) == pair.whole
    again = pair.group.answer(CHUNKS[0][1], SAMPLING, *pair.group._held)  # in other batches: the tokens are the same
    assert token_ids({0: again}) == token_ids({0: pair.whole[0]})
    assert pair.told("died").startswith("generator replica 0 died (its process was killed, or crashed)")
    assert pair.told("is back").endswith(" s and holds policy 1, proved")
    assert pid_of(pair.group._replicas[0].actor) != pid


def test_both_replicas_killed_at_once(pair: Replicas) -> None:
    pids = [pid_of(replica.actor) for replica in pair.group._replicas]
    for number in range(2):
        pair.slow(number, 0.05)
    assert pair.sampled(lambda: [os.kill(pid, signal.SIGKILL) for pid in pids]) == pair.whole


def test_a_replica_that_is_stopped_is_found_by_its_pulse(pair: Replicas) -> None:
    pair.slow(1, 0.2)
    pid = pid_of(pair.group._replicas[1].actor)
    time.sleep(6)  # until it has given a pulse, by which its process is known
    assert pair.sampled(lambda: os.kill(pid, signal.SIGSTOP)) == pair.whole
    assert "no sign of life for" in pair.told("died") and "limits.pulse_s" in pair.told("died")
    # It was given supervision.HEARS_S to end by itself, in which its successor may have done all of the work.
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(30)


def test_an_engine_that_hangs_is_named_and_replaced(pair: Replicas) -> None:
    pair.slow(1, 1000.0)
    assert by_chunk(pair.group.generate(CHUNKS, SAMPLING)) == pair.whole
    assert "generator replica 1 died (it hung: nothing came of `generate` for" in pair.told("died")


def test_an_engine_without_memory_comes_back_with_half_its_sequences(pair: Replicas) -> None:
    def use_up(actor: Any) -> None:
        real = actor._engine.generate

        def generate(requests: Any, sampling: Any) -> Iterator[Any]:
            yield next(real(requests, sampling))
            raise MemoryError("DefaultCPUAllocator: can't allocate memory")

        actor._engine.generate = generate

    ray.get(pair.group._replicas[0].actor.__ray_call__.remote(use_up))
    found = by_chunk(pair.group.generate(CHUNKS, SAMPLING))
    assert token_ids(found) == token_ids(pair.whole)
    assert "with 16 sequences at the same time" in pair.told("ran out of memory")
    assert "generator.max_num_seqs=8`" in pair.told("ran out of memory")
    replica = pair.group._replicas[0]
    assert ray.get(replica.actor.__ray_call__.remote(lambda a: a._engine._config.max_num_seqs)) == 8
    assert pair.group._supervisor._restarts == {}, "that is no death to count"


def test_killed_while_it_takes_new_weights(pair: Replicas, tiny_model: Path) -> None:
    policy, probe = pair.group._held
    start = Policy(version=0, path=tiny_model)

    def wait(actor: Any) -> None:
        load = actor._engine.load
        actor._engine.load = lambda *given: (time.sleep(1000), load(*given))

    pid = pid_of(pair.group._replicas[1].actor)
    ray.get(pair.group._replicas[1].actor.__ray_call__.remote(wait))
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    reports = pair.group.sync(start, make_probe(start, tiny_model))
    assert [(report.replica, report.policy_version) for report in reports] == [(0, 0), (1, 0)]
    pair.group.sync(policy, probe)
    assert by_chunk(pair.group.generate(CHUNKS, SAMPLING)) == pair.whole


def test_one_that_dies_too_often_ends_the_run(tiny_model: Path, new: Policy) -> None:
    group = GeneratorGroup(with_limits(make_config(tiny_model, engine="transformers")))

    def fail(actor: Any) -> None:
        def generate(requests: Any, sampling: Any) -> Iterator[Any]:
            raise RuntimeError("an illegal memory access was encountered")
            yield

        actor._engine.generate = generate

    try:
        group.ready(300)
        group._supervisor._ray = group._supervisor._ray.model_copy(update={"max_restarts": 0})
        ray.get(group._replicas[0].actor.__ray_call__.remote(fail))
        with pytest.raises(EngineError, match=r"generator replica 0 died: its engine failed: RuntimeError: an illegal"):
            list(group.generate(CHUNKS, SAMPLING))
    finally:
        group.close()


# -- the learner -----------------------------------------------------------------------------------

PAIRS = make_pairs(12)


@pytest.mark.parametrize(("ranks", "victim", "sign"), [(1, 0, "KILL"), (2, 0, "KILL"), (2, 1, "KILL"), (2, 1, "STOP")])
def test_a_learner_that_is_started_again_does_the_same(
    tiny_model: Path, tmp_path: Path, ranks: int, victim: int, sign: str
) -> None:
    model = make_tiny_model(tmp_path / "model", kv_heads=2)
    config = Config.parse(
        {
            "run": {"name": "test"},
            "model": {"path": str(model)},
            "prompts": {"path": "prompts.jsonl", "heldout_size": 1},
            "learner": {"ranks": ranks, "threads": 1, "global_batch_size": 4, "learning_rate": 1e-3, "eps": 1e-4},
            "limits": {"pulse_s": 8.0},
        }
    )
    observer = FakeObserver()
    group, start = LearnerGroup(config, Supervisor(config, observer)), Policy(version=0, path=model)
    try:
        group.ready(300)
        reference = collect_logps(group.logps, PAIRS, start)
        whole, probe = list(group.update(1, PAIRS, reference, None)), group.token_logps([5, 6, 7, 8])
        group.load(start, tmp_path)
        pid = pid_of(group._ranks[victim])
        time.sleep(6 * (sign == "STOP"))
        with pytest.raises(LearnerLostError, match=rf"^rank {victim} is dead: ") as lost:
            os.kill(pid, getattr(signal, f"SIG{sign}"))
            list(group.update(1, PAIRS, reference, None))
        assert ("no sign of life" in str(lost.value)) == (sign == "STOP")
        group.restart(lost.value)
        assert observer.messages[-1].startswith("the learner is back after ")
        group.load(start, tmp_path)
        again = list(group.update(1, PAIRS, reference, None))
        times = {"seconds"}
        assert [{k: v for k, v in s.items() if k not in times} for s in again] == [
            {k: v for k, v in s.items() if k not in times} for s in whole
        ]
        assert group.token_logps([5, 6, 7, 8]) == probe
    finally:
        group.close()
