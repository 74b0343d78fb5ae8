"""Judge processes: Ray actors that score groups while the driver goes on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors import cluster
from actors.engines import variables
from actors.vllm_reward import load_reward_model
from judges.asking import Asker
from judges.calls import describe
from judges.runtime import build_judge, close_judge, judge_groups, remembers, shown
from judges.store import JudgeStore, prepare, release
from online_po.config import Config
from online_po.errors import BudgetError, EngineError, OnlinePOError
from online_po.judge_configs import JudgeBase
from online_po.ledger import Ledger
from online_po.types import Group, Judgement


class JudgeGroup:
    """A `protocols.JudgePool` over `judge.workers` processes; work goes to the one with the fewest groups.

    The actors start when this is made; `ready` waits for them. A judge's error is a JudgeFailure of its
    group; a judge process that dies makes its futures raise EngineError. Judges that remember share the run's judge
    cache, which is made here: LedgerError if it cannot be.
    """

    def __init__(self, config: Config) -> None:
        count = config.judge.workers
        place = cluster.placement(config)
        worker = ray.remote(num_cpus=config.ray.judge_cpus, max_restarts=0)(_JudgeWorker)
        options: dict[str, Any] = {}
        if config.judge.holds_model:
            passed = variables(int(config.ray.judge_cpus) or cluster.cores() // count)
            passed |= {} if place.judge else {"CUDA_VISIBLE_DEVICES": ""}
            options["runtime_env"] = {"env_vars": passed}
        # Where the driver finds the user's module, a judge process must find it too.
        search_path = [os.path.abspath(folder) for folder in [os.getcwd(), *sys.path]]
        self._cache: Path | None = None
        if remembers(config.judge):
            self._cache = Ledger(config.run_dir.absolute()).judge_cache
            prepare(self._cache, nodes=sum(node["Alive"] for node in ray.nodes()))
        self._workers = [
            worker.options(**options, **place.options("judge", number)).remote(config.judge, search_path, self._cache)
            for number in range(count)
        ]
        self._load = [0] * count
        self._lock = threading.Lock()

    def ready(self, timeout: float) -> None:
        """Waits until every process has its judge.

        Raises EngineError after `timeout` seconds or if a process dies, ConfigError if the judge cannot be
        built there.
        """
        try:
            ray.get([worker.ready.remote() for worker in self._workers], timeout=timeout)
        except GetTimeoutError as error:
            raise EngineError(
                f"the judge processes were not ready after {timeout:.0f} s; see whether the cluster has "
                "ray.judge_cpus and ray.judge_gpus free for each of judge.workers, or raise ray.startup_timeout_s"
            ) from error
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, OnlinePOError):
                raise error.cause from error
            raise EngineError(f"a judge process could not start: {_short(error)}") from error

    def submit(self, groups: Sequence[Group], round_: int = 0, occasion: str = "") -> Future[list[Judgement]]:
        """One judgement per group, in order; EngineError if the process dies before it answers, BudgetError where
        `judge.budget` is spent, once calls that are under way in all processes are over."""
        with self._lock:
            index = self._load.index(min(self._load))
            self._load[index] += len(groups)
        answer: Future[list[Judgement]] = Future()
        answer.set_running_or_notify_cancel()

        def finish(done: Future[list[Judgement]]) -> None:
            with self._lock:
                self._load[index] -= len(groups)
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            elif isinstance(error, RayTaskError) and isinstance(error.cause, BudgetError):
                self._drain(lambda: answer.set_exception(error.cause))
            elif isinstance(error, RayTaskError) and isinstance(error.cause, OnlinePOError):
                answer.set_exception(error.cause)
            elif isinstance(error, RayError):
                answer.set_exception(
                    EngineError(
                        f"judge process {index} failed with {len(groups)} groups unanswered: {_short(error)}. "
                        "Everything judged before is kept; resume the run"
                    )
                )
            else:
                answer.set_exception(error)

        self._workers[index].judge.remote(list(groups), round_, occasion).future().add_done_callback(finish)
        return answer

    def shown(self, group: Group) -> str | None:
        """See `judges.runtime.shown`."""
        return ray.get(self._workers[0].shown.remote(group))

    def _drain(self, then: Callable[[], None]) -> None:
        """Calls `then` once no process has a call under way: answers that were paid for are kept."""
        waiting = {worker.drain.remote().future() for worker in self._workers}

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
        if self._cache is not None:  # once nobody has it open, one plain file is left
            ray.wait([worker.stop.remote() for worker in self._workers], num_returns=len(self._workers), timeout=2)
        for worker in self._workers:
            ray.kill(worker)
        if self._cache is not None:
            release(self._cache)


class _JudgeWorker:
    """One judge process: an asynchronous actor, so that calls of many groups overlap."""

    def __init__(self, config: JudgeBase, search_path: list[str], cache: Path | None) -> None:
        self._config, self._cache = config, cache
        self._store: JudgeStore | None = None
        sys.path.extend(folder for folder in search_path if folder not in sys.path)

    async def ready(self) -> None:
        # Importing the user's module, or loading a model, may take long; the actor's event loop stays free. Not in the
        # constructor: an error there would reach the driver as text only.
        if self._cache is not None:
            self._store = JudgeStore(self._cache)
        self._asker = Asker(self._config, self._store, workers=self._config.workers)
        self._judge: Any = await asyncio.to_thread(
            build_judge, self._config, self._asker, make_scorer=load_reward_model
        )

    async def judge(self, groups: list[Group], round_: int, occasion: str) -> list[Judgement]:
        return await judge_groups(self._judge, groups, round_, occasion)

    async def shown(self, group: Group) -> str | None:
        return shown(self._judge, self._config, group)

    async def drain(self) -> None:
        await self._asker.drain()

    async def stop(self) -> None:
        await close_judge(self._judge)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)


def _short(error: BaseException) -> str:
    """A Ray error without its pages of advice and remote traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return describe(cause)[:300]
