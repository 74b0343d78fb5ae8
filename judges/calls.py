"""Calls to code that is not ours: sync or async, each error caught and named."""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any

from judges.protocol import JudgeError


class Calls:
    """Runs sync and async functions for judges. How many at a time and how long, `judges.asking.Asker` sees to.

    An async function is awaited on the event loop (it must not block it: nothing else runs meanwhile, not
    even its time-out). A sync function runs in a thread. A thread cannot be killed: one whose call is cancelled
    (it overran its time-out) is left to itself, and another thread takes its place.
    One object serves one event loop.
    """

    def __init__(self) -> None:
        self._idle: list[_Worker] = []

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function(*args)` returns or resolves to.

        Raises JudgeError("error") for whatever the function raises.
        """
        try:
            return await self._run(function, args)
        # The point of this place: an error of the user's code ends one group's judging, not the run.
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if isinstance(error, JudgeError):
                raise
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # we are being stopped; otherwise the function cancelled itself
            raise JudgeError("error", describe(error)) from error

    async def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        worker = self._idle.pop() if self._idle else _Worker()
        try:
            error, value = await worker.run(function, args)
        except asyncio.CancelledError:
            worker.leave()
            raise
        self._idle.append(worker)
        if error is not None:
            raise JudgeError("error", describe(error)) from error
        # A decorated async function, or an object with an async __call__, looks sync until it is called.
        return await value if inspect.isawaitable(value) else value


def describe(error: BaseException) -> str:
    """Type and text of an exception, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Worker:
    """A daemon thread for one call at a time: unlike an executor's, a stuck one holds up neither other calls
    nor the process's end."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="judge-call", daemon=True).start()

    async def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[BaseException | None, Any]:
        """(error, None) or (None, value): not raised here, for a future cannot carry every exception."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[BaseException | None, Any]] = loop.create_future()
        self._work.put((function, args, loop, answer))
        return await answer

    def leave(self) -> None:
        """Ends the thread once its present call, if any, returns."""
        self._work.put(None)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            function, args, loop, answer = item
            outcome: tuple[BaseException | None, Any]
            try:
                outcome = (None, function(*args))
            except BaseException as error:  # handed to the caller, who names it
                outcome = (error, None)
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, answer, outcome)
            del item, function, args, outcome  # a waiting thread holds no responses


def _deliver(answer: asyncio.Future[Any], outcome: Any) -> None:
    if not answer.done():
        answer.set_result(outcome)
