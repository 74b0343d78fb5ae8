"""Judge processes: Ray actors that score groups while the driver goes on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors import cluster
from actors.engines import variables
from actors.supervision import PULSE_GROUP, Progress, Pulse, Supervisor, death
from actors.vllm_reward import load_reward_model
from judges.asking import Asker
from judges.calls import describe
from judges.runtime import build_judge, close_judge, judge_groups, remembers, shown
from judges.store import JudgeStore, disown, prepare, release
from online_po import cpu
from online_po.config import Config
from online_po.errors import BudgetError, EngineError, OnlinePOError
from online_po.judge_configs import JudgeBase
from online_po.ledger import Ledger
from online_po.types import Group, Judgement


@dataclass(eq=False, kw_only=True)
class _Process:
    """One judge process; another one may come in its place."""

    number: int
    actor: Any
    owner: str
    """What it is called in the judge cache: no two processes of a run are the same."""
    load: int = 0
    """Groups it was asked about and has not answered."""


@dataclass(eq=False, kw_only=True)
class _Asked:
    """Groups that are to be judged together."""

    groups: list[Group]
    round: int
    occasion: str
    answer: Future[list[Judgement]] = field(default_factory=Future)


class JudgeGroup:
    """A `protocols.JudgePool` over `judge.workers` processes; work goes to the one with the fewest groups.

    The actors start when this is made; `ready` waits for them. A judge's error is a JudgeFailure of its group. A judge
    process that dies or hangs is replaced by a new one, and what it had not answered is asked again; past
    `ray.max_restarts` futures raise EngineError. Judges that remember share the run's judge cache, which is made here:
    LedgerError if it cannot be. `supervisor`: the run's; None: one of its own.
    """

    def __init__(self, config: Config, supervisor: Supervisor | None = None) -> None:
        self._config, self._supervisor = config, supervisor or Supervisor(config)
        count = config.judge.workers
        self._place = cluster.placement(config)
        options: dict[str, Any] = {"num_cpus": config.ray.judge_cpus, "max_restarts": 0}
        if config.judge.holds_model:
            threads = int(config.ray.judge_cpus) or cluster.cores() // count
            passed = variables(threads, keeps_memory=not self._place.judge)
            passed |= {} if self._place.judge else {"CUDA_VISIBLE_DEVICES": ""}
            options["runtime_env"] = {"env_vars": passed}
        self._actor = ray.remote(**options, concurrency_groups=PULSE_GROUP)(_JudgeWorker)
        # Where the driver finds the user's module, a judge process must find it too.
        self._search_path = [os.path.abspath(folder) for folder in [os.getcwd(), *sys.path]]
        self._cache: Path | None = None
        if remembers(config.judge):
            self._cache = Ledger(config.run_dir.absolute()).judge_cache
            prepare(self._cache, nodes=sum(node["Alive"] for node in ray.nodes()))
        self._lock = threading.Lock()
        self._made = 0
        self._closed = False
        self._starting: _Process | None = None
        """What starts in a dead one's place."""
        # Answers come in a thread of Ray's, which must not wait for a process to start.
        self._restarting = ThreadPoolExecutor(1, thread_name_prefix="judge-restarts")
        self._processes = [self._make(number) for number in range(count)]

    def _make(self, number: int) -> _Process:
        self._made += 1
        owner = f"judge process {number}, the {self._made}. made"
        actor = self._actor.options(**self._place.options("judge", number)).remote(
            self._config.judge, self._search_path, self._cache, owner
        )
        self._supervisor.watch.add(f"judge process {number}", actor)
        return _Process(number=number, actor=actor, owner=owner)

    def ready(self, timeout: float) -> None:
        """Waits until every process has its judge.

        Raises EngineError after `timeout` seconds or if a process dies too often, ConfigError if the judge cannot be
        built there.
        """
        deadline = time.monotonic() + timeout
        starting = [(process, process.actor.ready.remote()) for process in self._processes]
        for process, ref in starting:
            try:
                ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError as error:
                raise EngineError(
                    f"the judge processes were not ready after {timeout:.0f} s; see whether the cluster has "
                    "ray.judge_cpus and ray.judge_gpus free for each of judge.workers, or raise ray.startup_timeout_s"
                ) from error
            except RayTaskError as error:
                raise _meant(error) from error
            except RayError as error:
                self._replace(process, error)

    def submit(self, groups: Sequence[Group], round_: int = 0, occasion: str = "") -> Future[list[Judgement]]:
        """One judgement per group, in order; EngineError if processes die too often, BudgetError where `judge.budget`
        is spent, once calls that are under way in all processes are over."""
        asked = _Asked(groups=list(groups), round=round_, occasion=occasion)
        asked.answer.set_running_or_notify_cancel()
        self._ask(asked)
        return asked.answer

    def _ask(self, asked: _Asked) -> None:
        with self._lock:
            process = min(self._processes, key=lambda process: process.load)
            process.load += len(asked.groups)
        call = process.actor.judge.remote(asked.groups, asked.round, asked.occasion)
        call.future().add_done_callback(lambda done: self._heard(process, asked, done))

    def _heard(self, process: _Process, asked: _Asked, done: Future[list[Judgement]]) -> None:
        with self._lock:
            process.load -= len(asked.groups)
        error = done.exception()
        if error is None:
            asked.answer.set_result(done.result())
        elif isinstance(error, RayTaskError) and isinstance(error.cause, BudgetError):
            self._drain(lambda: asked.answer.set_exception(error.cause))
        elif isinstance(error, RayTaskError):
            asked.answer.set_exception(_meant(error))
        elif not isinstance(error, RayError):
            asked.answer.set_exception(error)
        else:
            with self._lock:
                if not self._closed:
                    self._restarting.submit(self._ask_again, process, asked, error)
                    return
            asked.answer.set_exception(EngineError(f"judge process {process.number} was closed"))

    def _ask_again(self, process: _Process, asked: _Asked, error: RayError) -> None:
        """Asks the process that has taken the place of a dead one, or any other that has less to do."""
        try:
            self._replace(process, error)
            self._ask(asked)
        except Exception as failure:  # whatever it is, who waits must hear of it
            asked.answer.set_exception(failure)

    def _replace(self, process: _Process, error: RayError) -> None:
        """Puts a new process, which is ready, in a dead one's place, unless that was done already. Raises EngineError
        where it dies too often. In one thread at a time."""
        name = f"judge process {process.number}"
        began = time.monotonic()
        while self._processes[process.number] is process:
            cause = self._supervisor.why(process.actor, death(error))
            self._supervisor.lost(name, cause)
            self._supervisor.end(process.actor)
            if self._cache is not None:  # or whoever is asked the same would wait for its answers
                disown(self._cache, process.owner)
            new = self._make(process.number)
            with self._lock:  # never around calls of Ray: its thread may wait for the lock
                closed, self._starting = self._closed, new
            if closed:
                self._supervisor.end(new.actor)
                raise EngineError("the run is ending")
            try:
                ray.get(new.actor.ready.remote())  # for as long as the watch lets it
            except RayTaskError as failed:
                self._supervisor.end(new.actor)
                raise _meant(failed) from failed
            except RayError as died:
                process.actor, process.owner, error = new.actor, new.owner, died
                continue
            with self._lock:
                self._processes[process.number], self._starting = new, None
            self._supervisor.back(name, cause, time.monotonic() - began)

    def shown(self, group: Group) -> str | None:
        """See `judges.runtime.shown`."""
        while True:
            process = self._processes[0]
            try:
                return ray.get(process.actor.shown.remote(group))
            except RayTaskError as error:
                raise _meant(error) from error
            except RayError as error:
                self._restarting.submit(self._replace, process, error).result()

    def _drain(self, then: Callable[[], None]) -> None:
        """Calls `then` once no process has a call under way: answers that were paid for are kept."""
        waiting = {process.actor.drain.remote().future() for process in self._processes}

        def landed(done: Future[None]) -> None:
            with self._lock:
                waiting.discard(done)
                last = not waiting
            if last:
                then()

        for future in list(waiting):
            future.add_done_callback(landed)  # a process that died has nothing under way either

    def close(self) -> None:
        """Ends the processes, busy or not."""
        with self._lock:
            self._closed = True
            starting = self._starting
        if starting is not None:
            self._supervisor.end(starting.actor)
        self._restarting.shutdown()
        actors = [process.actor for process in self._processes]
        if self._cache is not None:  # once nobody has it open, one plain file is left
            ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=2)
        for actor in actors:
            self._supervisor.end(actor)
        if self._cache is not None:
            release(self._cache)


class _JudgeWorker:
    """One judge process: an asynchronous actor, so that calls of many groups overlap."""

    def __init__(self, config: JudgeBase, search_path: list[str], cache: Path | None, owner: str) -> None:
        self._config, self._cache, self._owner = config, cache, owner
        self._store: JudgeStore | None = None
        self._starting: asyncio.Task[None] | None = None
        self._progress = Progress()
        sys.path.extend(folder for folder in search_path if folder not in sys.path)

    @ray.method(concurrency_group="pulse")
    async def pulse(self) -> Pulse:
        return self._progress.pulse()

    async def ready(self) -> None:
        """Builds the judge, once, however often it is called."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        with self._progress.at("start"):
            await self._starting

    async def _start(self) -> None:
        # Importing the user's module, or loading a model, may take long; the actor's event loop stays free. Not in the
        # constructor: an error there would reach the driver as text only.
        if self._cache is not None:
            self._store = JudgeStore(self._cache, self._owner)
        if self._config.holds_model:
            await asyncio.to_thread(cpu.use_onednn_products)  # this process does nothing else
        self._asker = Asker(self._config, self._store, workers=self._config.workers)
        self._judge: Any = await asyncio.to_thread(
            build_judge, self._config, self._asker, make_scorer=load_reward_model
        )

    async def judge(self, groups: list[Group], round_: int, occasion: str) -> list[Judgement]:
        async def judged(group: Group) -> Judgement:
            (judgement,) = await judge_groups(self._judge, [group], round_, occasion)
            self._progress.tick()
            return judgement

        with self._progress.at("judge"):
            return list(await asyncio.gather(*map(judged, groups)))

    async def shown(self, group: Group) -> str | None:
        return shown(self._judge, self._config, group)

    async def drain(self) -> None:
        await self._asker.drain()

    async def stop(self) -> None:
        await close_judge(self._judge)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)


def _meant(error: RayTaskError) -> Exception:
    """What a process raised on purpose, or what it means for the run."""
    if isinstance(error.cause, OnlinePOError):
        return error.cause
    return EngineError(f"a judge process failed: {_short(error)}. What was judged before is kept; resume the run")


def _short(error: BaseException) -> str:
    """A Ray error without its pages of advice and remote traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return describe(cause)[:300]
