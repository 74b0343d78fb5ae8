"""Who gets which chunk when replicas die: the generator group on a pretended Ray, over many drawn mishaps."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors import cluster, generators
from actors.generators import GeneratorGroup
from actors.replica import EngineMemoryError
from actors.supervision import Supervisor
from online_po.errors import EngineError, SyncError
from online_po.sections import SamplingConfig
from online_po.types import Policy, Probe, Request, SyncReport
from tests.fakes import FakeObserver, make_config, make_prompts

PROBES = {version: Probe(token_ids=(1, 2), token_logps=(-float(version),)) for version in range(3)}
POLICIES = {version: Policy(version=version, path=SimpleNamespace()) for version in range(3)}  # type: ignore[arg-type]
CHUNKS = [(index, [Request(prompt=prompt, seeds=(index,)) for prompt in make_prompts(3)]) for index in range(7)]


class Mishap(Exception):
    """Stands for what went wrong in an actor."""


class FakeRay:
    """What the group asks of Ray. Every call of an actor may kill it, or its engine's memory be too small, as `rng`
    says; `ray.wait` answers in any order that keeps each actor's."""

    def __init__(self, rng: random.Random, deadly: float, hungry: float) -> None:
        self.rng, self.deadly, self.hungry = rng, deadly, hungry
        self.actors: list[FakeActor] = []

    def remote(self, **options: Any) -> Any:
        return lambda cls: self

    def options(self, **options: Any) -> Any:
        return SimpleNamespace(remote=self.make)

    def make(self, number: int, config: Any) -> FakeActor:
        self.actors.append(FakeActor(self, number, config.generator.max_num_seqs))
        return self.actors[-1]

    def wait(self, refs: list[Any], num_returns: int = 1, timeout: float | None = None) -> Any:
        if num_returns > 1 or timeout is not None:
            return refs, []
        first: dict[Any, Any] = {}
        for ref in refs:
            first.setdefault(ref.actor, ref)
        ready = self.rng.choice(list(first.values()))
        return [ready], [ref for ref in refs if ref is not ready]

    def get(self, ref: Any) -> Any:
        found = ref.run()
        if isinstance(found, Exception):
            raise found
        return found


class FakeActor:
    def __init__(self, ray: FakeRay, number: int, sequences: int) -> None:
        self.ray, self.number, self.sequences = ray, number, sequences
        self.dead, self.version, self.calls = False, 0, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: Ref(self, name, args))

    def mishap(self, name: str) -> Exception | None:
        if self.dead or self.ray.rng.random() < self.ray.deadly:
            self.dead = True
            return ActorDiedError()
        if name in ("generate", "answer") and self.sequences > 2 and self.ray.rng.random() < self.ray.hungry:
            return RayTaskError("f", "", EngineMemoryError("out of memory"))
        return None

    def start_(self, held: Any) -> Any:
        return "float32", self.sync_(*held) if held is not None else None

    def sync_(self, policy: Policy, probe: Probe) -> SyncReport:
        unmoved, self.version = False, policy.version
        return SyncReport(
            replica=self.number, policy_version=policy.version, mean_logp_error=0.0, unmoved=unmoved, seconds=0.0
        )

    def answer_(self, requests: Any, sampling: Any, policy: Policy, probe: Probe) -> Any:
        return [(self.version, request.prompt.id, request.seeds) for request in requests], None


class Ref:
    """A call's answer; of `generate`, the stream of them. The call happens when somebody looks."""

    def __init__(self, actor: FakeActor, name: str, args: Any) -> None:
        self.actor, self.name, self.args = actor, name, args
        self.places = list(range(len(args[0]))) if name == "generate" else []
        self.failed: Exception | None = None
        self.ended = False
        self.found: Any = None

    def __iter__(self) -> Ref:
        return self

    def __next__(self) -> Any:
        if not self.places or self.ended:
            raise StopIteration
        error = self.actor.mishap("generate")
        if error is not None:
            self.ended = True
            return SimpleNamespace(run=lambda: error)
        requests, place = self.args[0], self.places.pop(self.actor.ray.rng.randrange(len(self.places)))
        group = (self.actor.version, requests[place].prompt.id, requests[place].seeds)
        return SimpleNamespace(run=lambda: {place: group})

    def run(self) -> Any:
        if self.found is None:
            self.found = self.actor.mishap(self.name) or getattr(self.actor, f"{self.name}_")(*self.args)
        return self.found


@pytest.fixture
def make(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make_group(seed: int, deadly: float, hungry: float, **ray_section: Any) -> Any:
        config = make_config(
            tmp_path, generator__replicas=3, generator__engine="transformers", generator__max_num_seqs=64,
            ray={"max_restarts": 10_000, **ray_section},
        )  # fmt: skip
        fake, observer = FakeRay(random.Random(seed), 0.0, 0.0), FakeObserver()
        monkeypatch.setattr(generators, "ray", fake)
        monkeypatch.setattr(cluster, "gpu_count", lambda: 0)
        supervisor = Supervisor(config, observer)
        supervisor.watch = SimpleNamespace(  # type: ignore[assignment]
            add=lambda who, actor: None, why=lambda actor: None, remove=lambda actor: None
        )
        monkeypatch.setattr("actors.supervision.end", lambda actor, pulse: setattr(actor, "dead", True))
        group = GeneratorGroup(config, supervisor)
        group.ready(1)
        fake.deadly, fake.hungry = deadly, hungry
        return group, fake, observer

    return make_group


def test_nothing_is_lost_or_twice_whoever_dies_when(make):
    restarts = 0
    for seed in range(60):
        group, fake, observer = make(seed, deadly=0.06, hungry=0.02)
        for version in (0, 1, 2):
            reports = group.sync(POLICIES[version], PROBES[version])
            assert [(r.replica, r.policy_version) for r in reports] == [(n, version) for n in range(3)]
            made = [
                ((index, place), found)
                for index, groups in group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8))
                for place, found in groups.items()
            ]
            assert Counter(key for key, _ in made) == {(i, p): 1 for i, chunk in CHUNKS for p in range(len(chunk))}
            assert dict(made) == {
                (i, p): (version, request.prompt.id, request.seeds)
                for i, chunk in CHUNKS
                for p, request in enumerate(chunk)
            }
            requests = [request for _, chunk in CHUNKS for request in chunk]
            answers = group.answer(requests, SamplingConfig(max_tokens=8), POLICIES[version], PROBES[version])
            assert answers == [(version, request.prompt.id, request.seeds) for request in requests]
        restarts += len(observer.restarts)
        assert len(fake.actors) >= 3 + len(observer.restarts)
        assert all(actor.dead for actor in fake.actors if actor not in [r.actor for r in group._replicas])
    assert restarts > 200


def test_an_engine_is_halved_until_it_has_memory_enough(make):
    group, fake, observer = make(1, deadly=0.0, hungry=1.0)
    group.sync(POLICIES[0], PROBES[0])
    list(group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8)))
    assert [replica.sequences for replica in group._replicas] == [2, 2, 2]
    assert group._supervisor._restarts == {}
    assert sum("ran out of memory with 64 sequences" in text for text in observer.messages) == 3
    fake.actors[-1].sequences = group._replicas[2].sequences = 1
    with pytest.raises(
        EngineError, match=r"^generator replica \d runs out of memory with a single sequence: .*max_tok"
    ):
        for replica in group._replicas:
            replica.actor.sequences, replica.sequences = 64, 1
        list(group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8)))


def test_a_replica_that_dies_again_and_again_ends_the_run(make):
    group, fake, _ = make(1, deadly=0.0, hungry=0.0, max_restarts=4)
    group.sync(POLICIES[0], PROBES[0])
    fake.deadly = 1.0
    with pytest.raises(EngineError, match=r"generator replica \d was started again 4 times within 12000 s"):
        list(group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8)))


def test_a_replica_that_comes_back_with_other_weights_stops_the_run(make, monkeypatch):
    group, fake, _ = make(1, deadly=0.0, hungry=0.0)
    group.sync(POLICIES[1], PROBES[1])
    fake.actors[0].dead = True
    monkeypatch.setattr(FakeActor, "sync_", lambda self, policy, probe: SyncReport(
        replica=self.number, policy_version=policy.version, mean_logp_error=0.5, unmoved=False, seconds=0.0
    ))  # fmt: skip
    with pytest.raises(SyncError, match=r"generator replica 0 should hold policy 1"):
        list(group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8)))


def test_only_the_starts_own_weights_may_look_unmoved_in_a_new_engine(make, monkeypatch):
    """A resumed run's policy may be the starting model, bit for bit, where guards left all of its steps out."""
    monkeypatch.setattr(FakeActor, "sync_", lambda self, policy, probe: SyncReport(
        replica=self.number, policy_version=policy.version, mean_logp_error=0.0, unmoved=True, seconds=0.0
    ))  # fmt: skip
    for start in (None, PROBES[0]):
        group, _, _ = make(1, deadly=0.0, hungry=0.0)
        with pytest.raises(SyncError, match="replica 0 should hold policy 2, .* the weights did not arrive"):
            group.sync(POLICIES[2], PROBES[2], start=start)
    group, fake, _ = make(1, deadly=0.0, hungry=0.0)
    assert len(group.sync(POLICIES[2], PROBES[2], start=PROBES[2])) == 3
    fake.actors[0].dead = True  # so is one in its place
    assert list(group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8)))


def engine_error(words: str) -> Exception:
    return RayTaskError("f", "", EngineError(words))


def test_one_that_could_not_start_on_weights_that_are_gone_is_given_the_new_ones(make, monkeypatch):
    group, _, observer = make(1, deadly=0.0, hungry=0.0)
    group.sync(POLICIES[0], PROBES[0])
    group.sync(POLICIES[1], PROBES[1])
    start = FakeActor.start_
    monkeypatch.setattr(
        FakeActor, "start_",
        lambda self, held: engine_error("no policy 1") if held and held[0].version == 1 else start(self, held),
    )  # fmt: skip
    group._replace(group._replicas[0], generators.ActorLostError("killed"))
    assert [report.policy_version for report in group.sync(POLICIES[2], PROBES[2])] == [2, 2, 2]
    assert [who for who, *_ in observer.restarts] == ["generator replica 0"]


def test_weights_that_nobody_can_load_end_the_run_after_some_restarts(make, monkeypatch):
    group, fake, _ = make(1, deadly=0.0, hungry=0.0, max_restarts=2)
    monkeypatch.setattr(FakeActor, "sync_", lambda *args: engine_error("could not load policy 1"))
    monkeypatch.setattr(FakeActor, "start_", lambda self, held: self.sync_() if held else ("float32", None))
    with pytest.raises(EngineError, match=r"replica 0 was started again 2 times .* died: could not load policy 1\."):
        group.sync(POLICIES[1], PROBES[1])
    assert len(fake.actors) == 5


def test_an_engine_that_fails_while_it_samples_is_replaced(make, monkeypatch):
    group, fake, observer = make(1, deadly=0.0, hungry=0.0)
    group.sync(POLICIES[0], PROBES[0])
    sick = fake.actors[1]
    healthy = FakeActor.mishap
    monkeypatch.setattr(
        FakeActor, "mishap",
        lambda self, name: engine_error("a request is still running") if self is sick else healthy(self, name),
    )  # fmt: skip
    made = [found for _, groups in group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8)) for found in groups]
    assert len(made) == 21 and "still running" in observer.messages[0] and sick.dead


def test_one_that_the_machine_had_no_memory_for_has_less_to_do_and_is_counted(make):
    group, _, observer = make(1, deadly=0.0, hungry=0.0, max_restarts=1)
    lost = generators.ActorLostError("its machine was running out of memory", memory=True)
    assert group._replace(group._replicas[0], lost).sequences == 32
    assert "32" in observer.messages[0] and "it is started again" in observer.messages[1]
    with pytest.raises(EngineError, match="was started again 1 times"):
        group._replace(group._replicas[0], lost)


def test_a_closed_group_starts_nothing_again(make):
    group, fake, _ = make(1, deadly=0.0, hungry=0.0)
    group.sync(POLICIES[0], PROBES[0])
    answers = group.generate(iter(CHUNKS), SamplingConfig(max_tokens=8))
    next(answers)
    group.close()
    with pytest.raises(EngineError, match="the run is ending"):
        list(answers)
    assert len(fake.actors) == 3
