"""Judge processes: Ray actors that score groups while the driver goes on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors import cluster
from actors.engines import variables
from actors.vllm_reward import load_reward_model
from judges.asking import Asker
from judges.calls import describe
from judges.runtime import build_judge, judge_groups
from online_po.config import Config
from online_po.errors import EngineError, OnlinePOError
from online_po.judge_configs import JudgeBase
from online_po.types import Group, Judgement


class JudgeGroup:
    """A `protocols.JudgePool` over `judge.workers` processes; work goes to the one with the fewest groups.

    The actors start when this is made; `ready` waits for them. A judge's error is a JudgeFailure of its
    group; a judge process that dies makes its futures raise EngineError.
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
        self._workers = [
            worker.options(**options, **place.options("judge", number)).remote(config.judge, search_path)
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

    def submit(self, groups: Sequence[Group], round_: int = 0) -> Future[list[Judgement]]:
        """One judgement per group, in order; EngineError if the process dies before it answers."""
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
            elif isinstance(error, RayError):
                answer.set_exception(
                    EngineError(
                        f"judge process {index} failed with {len(groups)} groups unanswered: {_short(error)}. "
                        "Everything judged before is kept; resume the run"
                    )
                )
            else:
                answer.set_exception(error)

        self._workers[index].judge.remote(list(groups)).future().add_done_callback(finish)
        return answer

    def close(self) -> None:
        """Ends the processes, busy or not."""
        for worker in self._workers:
            ray.kill(worker)


class _JudgeWorker:
    """One judge process: an asynchronous actor, so that calls of many groups overlap."""

    def __init__(self, config: JudgeBase, search_path: list[str]) -> None:
        self._config = config
        sys.path.extend(folder for folder in search_path if folder not in sys.path)

    async def ready(self) -> None:
        # Importing the user's module, or loading a model, may take long; the actor's event loop stays free. Not in the
        # constructor: an error there would reach the driver as text only.
        self._judge: Any = await asyncio.to_thread(build_judge, self._config, Asker(self._config), load_reward_model)

    async def judge(self, groups: list[Group]) -> list[Judgement]:
        return await judge_groups(self._judge, groups)


def _short(error: BaseException) -> str:
    """A Ray error without its pages of advice and remote traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return describe(cause)[:300]
