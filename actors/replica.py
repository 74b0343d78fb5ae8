"""One generator replica: the Ray actor around an engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import ray

from actors import cluster
from actors.engines import Engine, check_engine, make_engine
from actors.shared_weights import shared_tensors
from actors.supervision import Progress, Pulse
from online_po import cpu
from online_po.config import Config
from online_po.errors import EngineError, OnlinePOError, SyncError, is_out_of_memory
from online_po.sections import SamplingConfig
from online_po.types import Group, Policy, Probe, Request, SyncReport

SAME_WEIGHTS = 1e-3
"""How far, in nats, a replica may be from what it said of the probe before other weights were in its place."""


class EngineMemoryError(EngineError):
    """An engine ran out of memory, or of KV cache, while it sampled."""


class GeneratorReplica:
    """The actor: one engine. Built empty, so that a failing start is an answer and not a dead actor."""

    def __init__(self, replica: int, config: Config) -> None:
        self._replica, self._config = replica, config
        self._engine: Engine
        self._held: tuple[Policy, Probe] | None = None
        """What it samples with; None before the first sync."""
        self._last: tuple[tuple[int, ...], list[float]] | None = None
        """The probe that the engine was asked last, and what it said of it under the weights it has."""
        self._lost: OnlinePOError | None = None
        """Why it does not hold what it samples with."""
        self._progress = Progress()

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> Pulse:
        return self._progress.pulse()

    def start(self, held: tuple[Policy, Probe] | None) -> tuple[str, SyncReport | None]:
        """Loads the starting model, and then what it is to hold, if that is known. Returns the engine's dtype and the
        report on what it holds. Raises EngineError or ConfigError."""
        with self._progress.at("start"):
            self._start()
        return self._engine.dtype, self.sync(*held) if held is not None else None

    def _start(self) -> None:
        config = self._config
        check_engine(config)
        cpu.use_onednn_products()  # this process does nothing else
        try:
            self._engine = make_engine(config)
        except EngineError as error:
            raise EngineError(f"{error}{cluster.log_of_this_process()}") from error
        except OnlinePOError:
            raise
        except Exception as error:  # whatever a model library raises, the user needs one line and the replica
            raise EngineError(
                f"generator replica {self._replica} could not start: {one_line(error)}{cluster.log_of_this_process()}"
            ) from error

    @ray.method(num_returns="streaming")
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[dict[int, Group]]:
        if self._lost is not None:
            raise self._lost
        with self._progress.at("generate"):
            yield from self._sample(requests, sampling)

    def _sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[dict[int, Group]]:
        """What the engine gives; raises EngineMemoryError where it runs out of memory."""
        try:
            for found in self._engine.generate(requests, sampling):
                self._progress.tick()
                if found:
                    yield found
        except Exception as error:  # libraries raise many types here
            if is_out_of_memory(error):
                raise EngineMemoryError(one_line(error)) from error
            raise

    def sync(self, policy: Policy, probe: Probe) -> SyncReport:
        """Loads the weights and tells what is held; the verdict is the driver's. EngineError if nothing loads."""
        with self._progress.at("sync"):
            report, self._said = self._load(policy, probe)
        # Without the memory: before it is loaded again, for `answer`, its round is committed.
        self._held, self._lost = (replace(policy, shared=None), probe), None
        return report

    def answer(
        self, requests: Sequence[Request], sampling: SamplingConfig, policy: Policy, probe: Probe
    ) -> tuple[list[Group], SyncReport | None]:
        """One group a request, by that policy's weights. Where it holds others, these are loaded for it, with a report,
        and the others put back. Raises SyncError, then and for all that it is asked later, if others come back."""
        if self._lost is not None:
            raise self._lost
        if policy.version == self._engine.version:
            return self._answer(requests, sampling), None
        try:
            with self._progress.at("sync"):
                report, _ = self._load(policy, probe)
            return self._answer(requests, sampling), report
        finally:
            with self._progress.at("sync"):
                self._put_back(policy.version)

    def _put_back(self, answered: int) -> None:
        """Loads what it samples with; nothing more is sampled or answered if that fails."""
        if self._held is None:
            return
        what = (
            f"generator replica {self._replica} answered as policy {answered}, but is not policy "
            f"{self._held[0].version} again"
        )
        self._lost = EngineError(what)
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
        with self._progress.at("answer"):
            for found in self._sample(requests, sampling):
                groups |= found
        return [groups[place] for place in range(len(requests))]

    def _load(self, policy: Policy, probe: Probe) -> tuple[SyncReport, list[float]]:
        """The report, and the logps of the probe. Raises EngineError, after which the engine is in no known state, and
        PolicyGoneError, after which it holds what it held."""
        started = time.perf_counter()
        tensors = shared_tensors(policy)
        before = None
        if policy.version != self._engine.version:
            if self._last is None or self._last[0] != probe.token_ids:
                self._last = probe.token_ids, self._engine.token_logps(probe.token_ids)
            before = self._last[1]
        self._last = None
        try:
            self._engine.load(policy, tensors)
        except Exception as error:  # whatever a model library raises, the user needs the replica and the folder
            raise EngineError(
                f"generator replica {self._replica} could not load policy {policy.version} from "
                f"{str(policy.path)!r}: {one_line(error)}"
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
        self._last = probe.token_ids, held
        return report, held

    def close(self) -> None:
        """Ends the engine and whatever processes it has; nothing where it never started."""
        if hasattr(self, "_engine"):
            self._engine.close()


def one_line(error: BaseException | None) -> str:
    """Type and last line of an error: what a person can act on."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
