"""Generator replicas: one Ray actor per engine, chunks of work for whoever is free, and weights with proof."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors import cluster
from actors.engines import Engine, check_engine, environment, make_engine
from online_po.config import Config
from online_po.errors import EngineError, OnlinePOError, SyncError
from online_po.sections import SamplingConfig
from online_po.types import Group, Policy, Probe, Request, SyncReport

IN_FLIGHT = 2
"""Chunks given to a replica: one running, one waiting, so that an engine never waits for the driver."""
CLOSE_TIMEOUT_S = 5.0
SAME_WEIGHTS = 1e-3
"""How far, in nats, a replica may be from what it said of the probe before other weights were in its place."""
SHARE = {1: 0.85, 2: 0.4, 3: 0.3}
"""`generator.gpu_memory_utilization: null`, by how many actors hold the engine's GPU."""


class GeneratorReplica:
    """The actor: one engine. Built empty, so that a failing start is an answer and not a dead actor."""

    def __init__(self, replica: int, config: Config) -> None:
        self._replica, self._config = replica, config
        self._engine: Engine
        self._held: tuple[Policy, Probe] | None = None
        """What it samples with; None before the first sync."""
        self._lost: SyncError | None = None

    def start(self) -> str:
        """Loads the starting model. Returns the engine's dtype. Raises EngineError or ConfigError."""
        config = self._config
        check_engine(config)
        try:
            self._engine = make_engine(config)
        except EngineError as error:
            raise EngineError(f"{error}{cluster.log_of_this_process()}") from error
        except OnlinePOError:
            raise
        except Exception as error:  # whatever a model library raises, the user needs one line and the replica
            raise EngineError(
                f"generator replica {self._replica} could not start: {_one_line(error)}{cluster.log_of_this_process()}"
            ) from error
        return self._engine.dtype

    @ray.method(num_returns="streaming")
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[dict[int, Group]]:
        if self._lost is not None:
            raise self._lost
        yield from self._engine.generate(requests, sampling)

    def sync(self, policy: Policy, probe: Probe) -> SyncReport:
        """Loads the weights and tells what is held; the verdict is the driver's. Raises SyncError if nothing loads."""
        report, self._said = self._load(policy, probe)
        self._held, self._lost = (policy, probe), None
        return report

    def answer(
        self, requests: Sequence[Request], sampling: SamplingConfig, policy: Policy, probe: Probe
    ) -> tuple[list[Group], SyncReport | None]:
        """One group a request, by that policy's weights. Where it holds others, these are loaded for it, with a report,
        and the others put back. Raises SyncError, then and for all that it is asked later, if they do not come back."""
        if self._lost is not None:
            raise self._lost
        if policy.version == self._engine.version:
            return self._answer(requests, sampling), None
        try:
            report, _ = self._load(policy, probe)
            return self._answer(requests, sampling), report
        finally:
            self._put_back(policy.version)

    def _put_back(self, answered: int) -> None:
        """Loads what it samples with; nothing more is sampled or answered if that fails."""
        if self._held is None:
            return
        what = (
            f"generator replica {self._replica} answered as policy {answered}, but is not policy "
            f"{self._held[0].version} again"
        )
        self._lost = SyncError(what)
        _, said = self._load(*self._held)
        gaps = [abs(now - then) for now, then in zip(said, self._said, strict=True)]
        off = sum(gaps) / len(gaps)
        if not off <= SAME_WEIGHTS:  # written so that a NaN fails
            self._lost = SyncError(
                f"{what}: log-probabilities of the probe are off by {off:.4g} nats on average. Set judge.policy: "
                "current, and report this with the versions in run.json"
            )
            raise self._lost
        self._lost = None

    def _answer(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Group]:
        groups: dict[int, Group] = {}
        for found in self._engine.generate(requests, sampling):
            groups |= found
        return [groups[place] for place in range(len(requests))]

    def _load(self, policy: Policy, probe: Probe) -> tuple[SyncReport, list[float]]:
        """The report, and the logps of the probe. Raises SyncError."""
        started = time.perf_counter()
        before = None if policy.version == self._engine.version else self._engine.token_logps(probe.token_ids)
        try:
            self._engine.load(policy)
        except Exception as error:  # whatever a model library raises, the user needs the replica and the folder
            raise SyncError(
                f"generator replica {self._replica} could not load policy {policy.version} from "
                f"{str(policy.path)!r}: {_one_line(error)}"
            ) from error
        held = self._engine.token_logps(probe.token_ids)
        gaps = [abs(mine - theirs) for mine, theirs in zip(held, probe.token_logps, strict=True)]
        report = SyncReport(
            replica=self._replica,
            policy_version=self._engine.version,
            mean_logp_error=sum(gaps) / len(gaps),
            unmoved=held == before,
            seconds=time.perf_counter() - started,
        )
        return report, held

    def close(self) -> None:
        """Ends the engine and whatever processes it has; nothing where it never started."""
        if hasattr(self, "_engine"):
            self._engine.close()


class GeneratorGroup:
    """Implements `online_po.protocols.Generator` over `generator.replicas` actors.

    Construction returns at once; `ready` waits for the engines. Raises ConfigError if the engine is not installed.
    """

    def __init__(self, config: Config) -> None:
        check_engine(config)
        self._config = config
        place = cluster.placement(config)
        memory = (
            config.generator.gpu_memory_utilization
            or SHARE[len(place.together) if "generator" in place.together else 1]
        )
        settings = config.generator.model_copy(update={"gpu_memory_utilization": memory})
        config = config.model_copy(update={"generator": settings})
        variables = environment(config, cluster.cores()) | ({} if place.generator else {"CUDA_VISIBLE_DEVICES": ""})
        # Engines share the cores by `generator.threads`; Ray's own count would keep actors waiting.
        actor = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(GeneratorReplica)
        self._actors = [
            actor.options(**place.options("generator", replica)).remote(replica, config)
            for replica in range(config.generator.replicas)
        ]
        self._started = [a.start.remote() for a in self._actors]
        self._tolerance = config.generator.sync_tolerance
        self._proved: Probe | None = None

    def ready(self, timeout: float) -> None:
        """Waits until every engine holds the starting model. Raises EngineError on failure or after `timeout` s."""
        deadline = time.monotonic() + timeout
        for replica, ref in enumerate(self._started):
            dtype = self._get(replica, ref, max(0.0, deadline - time.monotonic()))
            if self._config.generator.sync_tolerance is None:
                exact = dtype == "float32" and self._config.learner.compute_dtype == "float32"
                self._tolerance = 1e-3 if exact else 0.15

    def generate(
        self, chunks: Iterable[tuple[int, Sequence[Request]]], sampling: SamplingConfig
    ) -> Iterator[tuple[int, dict[int, Group]]]:
        """See `online_po.protocols.Generator`. Raises EngineError if a replica fails."""
        # A config subclass would travel with all its fields; only how to sample matters.
        settings = SamplingConfig(**{name: getattr(sampling, name) for name in SamplingConfig.model_fields})
        source = iter(chunks)
        # Shallowest queues first, so that two chunks go to two replicas.
        free = deque(list(range(len(self._actors))) * IN_FLIGHT)
        running: dict[Any, tuple[int, int]] = {}  # stream of answers -> (replica, chunk index)

        def hand_out() -> None:
            while free and (chunk := next(source, None)) is not None:
                index, requests = chunk
                replica = free.popleft()
                running[self._actors[replica].generate.remote(requests, settings)] = replica, index

        hand_out()
        while running:
            (stream,), _ = ray.wait(list(running), num_returns=1)
            replica, index = running[stream]
            ref = next(stream, None)
            if ref is not None:
                yield index, self._get(replica, ref, None)
                continue
            del running[stream]
            free.append(replica)
            hand_out()
        # A caller that stops listening leaves what was handed out to finish unheard. Cancelling it is no
        # gain: Ray 2.60 then waits 30 s for the missing call and fails the ones behind it.

    def sync(self, policy: Policy, probe: Probe) -> list[SyncReport]:
        """See `online_po.protocols.Generator`. Replicas load side by side."""
        refs = [a.sync.remote(policy, probe) for a in self._actors]
        reports: list[SyncReport] = [self._get(replica, ref, None) for replica, ref in enumerate(refs)]
        for report in reports:
            self._require(report, policy, probe)
        self._proved = probe
        return reports

    def answer(
        self, requests: Sequence[Request], sampling: SamplingConfig, policy: Policy, probe: Probe
    ) -> list[Group]:
        """One group a request, in order, by a policy's weights, whichever the replicas hold, and hold again afterwards.
        From any thread, also while `generate` is under way: it comes between chunks. Raises EngineError, SyncError."""
        share = -(-len(requests) // len(self._actors))
        parts = [requests[start : start + share] for start in range(0, len(requests), share)]
        refs = [a.answer.remote(part, sampling, policy, probe) for a, part in zip(self._actors, parts, strict=False)]
        groups: list[Group] = []
        for replica, ref in enumerate(refs):
            found, report = self._get(replica, ref, None)
            if report is not None:
                self._require(report, policy, probe)
            groups += found
        return groups

    def _require(self, report: SyncReport, policy: Policy, probe: Probe) -> None:
        """Raises SyncError unless a replica holds the policy's weights."""
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
        if report.unmoved and (self._proved is None or self._proved.token_logps != probe.token_logps):
            raise SyncError(
                f"generator replica {report.replica} should hold policy {policy.version}, but says of the probe, "
                "bit for bit, what it said before the sync: the weights did not arrive. Report this with the "
                "versions in run.json; generator.engine: transformers takes weights in another way"
            )

    def close(self) -> None:
        """Ends the actors; safe after a failed start. One that is busy is given a few seconds."""
        ray.wait([a.close.remote() for a in self._actors], num_returns=len(self._actors), timeout=CLOSE_TIMEOUT_S)
        for a in self._actors:
            ray.kill(a)

    def _get(self, replica: int, ref: Any, timeout: float | None) -> Any:
        """An actor's answer, or its error as ours."""
        try:
            return ray.get(ref, timeout=timeout)
        except GetTimeoutError as error:
            raise EngineError(
                f"generator replica {replica} was not ready in time; raise ray.startup_timeout_s "
                f"({self._config.ray.startup_timeout_s:g}), or see that the cluster has the CPUs and GPUs asked for"
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, OnlinePOError):
                raise error.cause from None
            raise EngineError(f"generator replica {replica} failed: {_one_line(error.cause)}") from error
        except RayActorError as error:
            raise EngineError(
                f"generator replica {replica} died (out of memory, or killed from outside); what was finished is kept, "
                f"resume to go on: {_one_line(error)}"
            ) from error
        except RayError as error:
            raise EngineError(f"generator replica {replica} could not be reached: {_one_line(error)}") from error


def _one_line(error: BaseException | None) -> str:
    """Type and last line of an error: what a person can act on."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
