"""Generator replicas: chunks of work for whoever is free, weights with proof, a new actor in place of one that died."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors import cluster
from actors.engines import check_engine, environment
from actors.replica import EngineMemoryError, GeneratorReplica, one_line
from actors.supervision import PULSE_GROUP, ActorLostError, Supervisor, death
from online_po.config import Config
from online_po.errors import EngineError, OnlinePOError, PolicyGoneError, SyncError, is_out_of_memory
from online_po.sections import SamplingConfig
from online_po.types import Group, Policy, Probe, Request, SyncReport

IN_FLIGHT = 2
"""Chunks given to a replica: one running, one waiting, so that an engine never waits for the driver."""
CLOSE_TIMEOUT_S = 5.0


@dataclass(eq=False, kw_only=True)
class _Replica:
    """One actor; another one may come in its place."""

    number: int
    actor: Any
    sequences: int
    """Its generator.max_num_seqs."""
    held: tuple[Policy, Probe] | None
    """What it loads as it starts, after the starting model."""
    starting: Any
    why: str | None
    """Why the actor before it died; None for the first one."""
    made: float = field(default_factory=time.monotonic)
    ready: bool = False
    report: SyncReport | None = None
    """On `held`, once it is ready."""

    @property
    def name(self) -> str:
        return f"generator replica {self.number}"


@dataclass(eq=False, kw_only=True)
class _Chunk:
    """What an engine is asked for at once."""

    index: int
    requests: Sequence[Request]
    made: set[int] = field(default_factory=set)
    """Places of which the groups were given on."""


class GeneratorGroup:
    """Implements `online_po.protocols.Generator` over `generator.replicas` actors.

    A replica that dies, hangs, or whose engine fails (to load weights, too) is replaced by a new actor, which loads
    what the replicas hold and proves it before anything of it counts; what it had in hand is handed out again, whole
    chunks, so that the same batches give the same responses. One that runs out of memory comes back with half of
    `generator.max_num_seqs`. All of it may happen in any thread.

    Construction returns at once; `ready` waits for the engines. Raises ConfigError if the engine is not installed.
    `supervisor`: the run's; None: one of its own.
    """

    def __init__(self, config: Config, supervisor: Supervisor | None = None) -> None:
        check_engine(config)
        self._supervisor = supervisor or Supervisor(config)
        self._place = cluster.placement(config)
        memory = config.generator.gpu_memory_utilization or self._place.engine_memory
        self._config = _with_generator(config, gpu_memory_utilization=memory)
        variables = environment(config, cluster.cores())
        variables |= {} if self._place.generator else {"CUDA_VISIBLE_DEVICES": ""}
        # Engines share the cores by `generator.threads`; Ray's own count would keep actors waiting.
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "runtime_env": {"env_vars": variables}}
        self._actor = ray.remote(**options, concurrency_groups=PULSE_GROUP)(GeneratorReplica)
        self._tolerance = config.generator.sync_tolerance
        self._lock = threading.RLock()
        self._held: tuple[Policy, Probe] | None = None
        """What the replicas hold, or are about to."""
        self._proved: Probe | None = None
        """What replicas were proved on last."""
        self._start: Probe | None = None
        """The same of the starting model, which an engine begins with; None: not known."""
        self._closed = False
        self._replicas = [
            self._make(number, config.generator.max_num_seqs) for number in range(config.generator.replicas)
        ]

    def _make(self, number: int, sequences: int, why: str | None = None) -> _Replica:
        """A new actor, which starts."""
        config = _with_generator(self._config, max_num_seqs=sequences)
        actor = self._actor.options(**self._place.options("generator", number)).remote(number, config)
        self._supervisor.watch.add(f"generator replica {number}", actor)
        return _Replica(
            number=number,
            actor=actor,
            sequences=sequences,
            held=self._held,
            starting=actor.start.remote(self._held),
            why=why,
        )

    def ready(self, timeout: float) -> None:
        """Waits until every engine holds the starting model. Raises EngineError on failure or after `timeout` s."""
        deadline = time.monotonic() + timeout
        for number in range(len(self._replicas)):
            while True:
                replica = self._replicas[number]
                done, _ = ray.wait([replica.starting], timeout=max(0.0, deadline - time.monotonic()))
                if not done:
                    raise EngineError(
                        f"generator replica {number} was not ready in time; raise ray.startup_timeout_s "
                        f"({self._config.ray.startup_timeout_s:g}), or see that the cluster has the CPUs and GPUs "
                        "asked for"
                    )
                try:
                    self._prove(replica)
                    break
                except ActorLostError as lost:
                    self._replace(replica, lost)

    def generate(
        self, chunks: Iterable[tuple[int, Sequence[Request]]], sampling: SamplingConfig
    ) -> Iterator[tuple[int, dict[int, Group]]]:
        """See `online_po.protocols.Generator`. Raises EngineError if a replica fails too often."""
        # A config subclass would travel with all its fields; only how to sample matters.
        settings = SamplingConfig(**{name: getattr(sampling, name) for name in SamplingConfig.model_fields})
        source = (_Chunk(index=index, requests=requests) for index, requests in chunks)
        again: deque[_Chunk] = deque()
        # Shallowest queues first, so that two chunks go to two replicas.
        free = deque(list(range(len(self._replicas))) * IN_FLIGHT)
        running: dict[Any, tuple[_Replica, _Chunk]] = {}  # by the stream of answers

        def hand_out() -> None:
            while free and (chunk := again.popleft() if again else next(source, None)) is not None:
                replica = self._replicas[free.popleft()]
                running[replica.actor.generate.remote(chunk.requests, settings)] = replica, chunk

        hand_out()
        while running:
            (stream,), _ = ray.wait(list(running), num_returns=1)
            replica, chunk = running[stream]
            found: dict[int, Group] | None
            try:
                self._prove(replica)  # at once, for one that was ready before: it has answered
                ref = next(stream, None)
                found = self._get(replica, ref) if ref is not None else None
            except ActorLostError as lost:
                self._replace(replica, lost)
                gone = [stream for stream, (owner, _) in running.items() if owner is replica]
                again.extendleft(running.pop(stream)[1] for stream in reversed(gone))
                free.extend([replica.number] * len(gone))
                hand_out()
                continue
            if found is None:
                del running[stream]
                free.append(replica.number)
                hand_out()
            elif new := {place: group for place, group in found.items() if place not in chunk.made}:
                chunk.made |= new.keys()
                yield chunk.index, new
        # A caller that stops listening leaves what was handed out to finish unheard. Cancelling it is no
        # gain: Ray 2.60 then waits 30 s for the missing call and fails the ones behind it.

    def sync(self, policy: Policy, probe: Probe, start: Probe | None = None) -> list[SyncReport]:
        """See `online_po.protocols.Generator`. Replicas load side by side. EngineError if one fails too often."""
        with self._lock:
            self._held, self._start = (policy, probe), start or self._start
            asked = [(replica, replica.actor.sync.remote(policy, probe)) for replica in self._replicas]
        try:
            reports = [self._synced(replica, ref, policy, probe) for replica, ref in asked]
        except OnlinePOError:
            with self._lock:
                self._held = None  # whoever starts now does not look for it
            raise
        self._proved = probe
        if policy.version == 0:
            self._start = probe
        return reports

    def _synced(self, replica: _Replica, ref: Any, policy: Policy, probe: Probe) -> SyncReport:
        """What a replica said of the weights that it was asked to load, or one in its place that began with them."""
        try:
            self._prove(replica)
            report: SyncReport = self._get(replica, ref)
            self._require(report, policy, probe, self._said)
            return report
        except PolicyGoneError as gone:
            if replica.ready:
                raise
            lost = ActorLostError(str(gone), counts=False)  # it was to begin with a policy before this one
        except ActorLostError as error:
            lost = error
        found = self._replace_until_proved(replica, lost).report
        assert found is not None
        return found

    def answer(
        self, requests: Sequence[Request], sampling: SamplingConfig, policy: Policy, probe: Probe
    ) -> list[Group]:
        """One group a request, in order, by a policy's weights, whichever the replicas hold, and hold again afterwards.
        From any thread, also while `generate` is under way: it comes between chunks. Raises EngineError, SyncError."""
        share = -(-len(requests) // len(self._replicas))
        parts = [requests[start : start + share] for start in range(0, len(requests), share)]
        asked = [
            (r, r.actor.answer.remote(part, sampling, policy, probe))
            for r, part in zip(self._replicas, parts, strict=False)
        ]
        groups: list[Group] = []
        for part, (replica, ref) in zip(parts, asked, strict=True):
            while True:
                try:
                    self._prove(replica)
                    found, report = self._get(replica, ref)
                    break
                except ActorLostError as lost:
                    replica = self._replace(replica, lost)
                    ref = replica.actor.answer.remote(part, sampling, policy, probe)
            if report is not None:
                self._require(report, policy, probe, self._said)
            groups += found
        return groups

    @property
    def _said(self) -> Probe | None:
        """The probe under what replicas hold: what they were proved on, or begin with."""
        return self._proved or self._start

    def _require(self, report: SyncReport, policy: Policy, probe: Probe, before: Probe | None) -> None:
        """Raises SyncError unless a replica holds the policy's weights; `before`: what the learner said of those it
        held before."""
        assert self._tolerance is not None, "ready() comes first"
        # Written so that a NaN fails.
        if report.policy_version != policy.version or not report.mean_logp_error <= self._tolerance:
            raise SyncError(
                f"generator replica {report.replica} should hold policy {policy.version} and says it holds "
                f"{report.policy_version}, but its log-probabilities of the probe differ from the learner's by "
                f"{report.mean_logp_error:.4g} nats on average (generator.sync_tolerance is {self._tolerance:g}); "
                "the weights did not arrive whole. Should they have, and the types differ, raise "
                "generator.sync_tolerance"
            )
        # Where types differ, the rounding hides small updates: old weights could pass for the new ones.
        if report.unmoved and (before is None or before.token_logps != probe.token_logps):
            raise SyncError(
                f"generator replica {report.replica} should hold policy {policy.version}, but says of the probe, "
                "bit for bit, what it said before the sync: the weights did not arrive. Report this with the "
                "versions in run.json; generator.engine: transformers takes weights in another way"
            )

    def _replace_until_proved(self, replica: _Replica, lost: ActorLostError) -> _Replica:
        while True:
            replica = self._replace(replica, lost)
            try:
                self._prove(replica)
                return replica
            except ActorLostError as again:
                lost = again

    def _replace(self, replica: _Replica, lost: ActorLostError) -> _Replica:
        """The actor that has taken a replica's place; started here, unless another thread did. Raises EngineError where
        that happened too often, or nothing more can be done about memory."""
        with self._lock:
            if self._closed:
                raise EngineError("the run is ending")
            if self._replicas[replica.number] is not replica:
                return self._replicas[replica.number]
            sequences = replica.sequences
            if lost.memory and (replica.sequences > 1 or not lost.counts):
                sequences = self._fewer(replica, lost)
            if lost.counts:
                self._supervisor.lost(replica.name, str(lost))
            self._supervisor.end(replica.actor)
            self._replicas[replica.number] = self._make(replica.number, sequences, why=str(lost))
            return self._replicas[replica.number]

    def _fewer(self, replica: _Replica, lost: ActorLostError) -> int:
        """Half of the sequences that a replica decoded at the same time. Raises EngineError where that is one."""
        if replica.sequences == 1:
            raise EngineError(
                f"{replica.name} runs out of memory with a single sequence: {lost}. Give it more "
                "(generator.gpu_memory_utilization, generator.cpu_kv_cache_gib), and go on with `online-po run CONFIG "
                "section.key=value`; a new run can have a lower generator.max_tokens or prompts.max_tokens. What was "
                "finished is kept"
            )
        fewer = replica.sequences // 2
        self._supervisor.tell(
            f"{replica.name} ran out of memory with {replica.sequences} sequences at the same time ({lost}); it is "
            f"started again with {fewer}. To go on with that after a stop: `online-po run CONFIG "
            f"generator.max_num_seqs={fewer}`"
        )
        return fewer

    def _prove(self, replica: _Replica) -> None:
        """Waits until a replica has started and, where it takes another's place, holds what that one held. Raises
        ActorLostError if it does not start, SyncError if it holds anything else."""
        if replica.ready:
            return
        dtype, report = self._get(replica, replica.starting)
        with self._lock:
            if replica.ready:
                return
            if self._config.generator.sync_tolerance is None:
                exact = dtype == "float32" and self._config.learner.compute_dtype == "float32"
                self._tolerance = 1e-3 if exact else 0.15
            if report is not None and replica.held is not None:
                self._require(report, *replica.held, self._start)
            replica.report, replica.ready = report, True
            if replica.why is not None:
                holds = "" if replica.held is None else f" and holds policy {replica.held[0].version}, proved"
                self._supervisor.back(replica.name, replica.why, time.monotonic() - replica.made, holds)

    def close(self) -> None:
        """Ends the actors; safe after a failed start. One that is busy is given a few seconds."""
        with self._lock:
            self._closed = True
        ray.wait(
            [r.actor.close.remote() for r in self._replicas], num_returns=len(self._replicas), timeout=CLOSE_TIMEOUT_S
        )
        for replica in self._replicas:
            self._supervisor.end(replica.actor)

    def _get(self, replica: _Replica, ref: Any) -> Any:
        """An actor's answer, or its error as ours. Raises ActorLostError where it can give none, or after which its
        engine is in no known state: any error of one that had started, but for weights that are not those asked for."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, EngineMemoryError):
                raise ActorLostError(str(error.cause), memory=True, counts=False) from None
            if isinstance(error.cause, EngineError) and (replica.ready or replica.why is not None):
                raise ActorLostError(str(error.cause)) from None
            if isinstance(error.cause, OnlinePOError):
                raise error.cause from None
            raise ActorLostError(f"its engine failed: {one_line(error.cause)}") from error
        except RayError as error:
            cause = self._supervisor.why(replica.actor, death(error))
            raise ActorLostError(cause, memory=is_out_of_memory(error)) from error


def _with_generator(config: Config, **settings: Any) -> Config:
    """A config with other settings of its generator."""
    return config.model_copy(update={"generator": config.generator.model_copy(update=settings)})
