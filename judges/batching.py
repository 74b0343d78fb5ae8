"""Questions to a model in this process: those that wait at the same time go through it together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from judges.asking import Question
from judges.calls import describe
from judges.protocol import JudgeError
from online_po.types import Group, Response

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Gathers what waits, runs it in one thread, answers each. One object serves one event loop.

    `run` is called with a batch, longest item first, and gives one result per item, in order. `length` is an item's
    tokens; a batch holds at most `tokens` of them, padded to its longest item, and a longer item goes alone. None: all
    that waits is one batch.
    """

    def __init__(
        self, run: Callable[[list[Item]], Sequence[Result]], length: Callable[[Item], int], tokens: int | None
    ) -> None:
        self._run, self._length, self._tokens = run, length, tokens
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._serving: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge-model")

    async def ask(self, item: Item) -> Result:
        """The item's result. Raises JudgeError("error") where its batch failed."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for batch in self._batches(waiting):
                await self._answer(batch)

    def _batches(
        self, waiting: list[tuple[Item, asyncio.Future[Result]]]
    ) -> Iterator[list[tuple[Item, asyncio.Future[Result]]]]:
        """All that waits, longest first: what does not fit into memory shows at once."""
        ordered = sorted(waiting, key=lambda entry: -self._length(entry[0]))
        begin = 0
        while begin < len(ordered):
            size = len(ordered)
            if self._tokens is not None:
                size = max(1, self._tokens // max(1, self._length(ordered[begin][0])))
            yield ordered[begin : begin + size]
            begin += size

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        asked = [(item, future) for item, future in batch if not future.done()]  # a call that timed out is left out
        if not asked:
            return
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._run, [item for item, _ in asked])
        except Exception as error:  # whatever the model's libraries raise, it is these questions' failure
            for _, future in asked:
                if not future.done():
                    future.set_exception(JudgeError("error", describe(error)))
            return
        for (_, future), result in zip(asked, results, strict=True):
            if not future.done():
                future.set_result(result)

    def close(self) -> None:
        """Lets the thread end after its present batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)


async def ask_all(
    ask: Callable[[Question], Awaitable[float]], group: Group, shown: Sequence[tuple[Response, ...]]
) -> list[float]:
    """What `ask` says of each, asked at once. Raises the first failure in order, once all are there: what was answered
    is remembered."""
    questions = [Question(prompt=group.prompt, responses=responses) for responses in shown]
    outcomes = await asyncio.gather(*map(ask, questions), return_exceptions=True)
    answers: list[float] = []
    for responses, outcome in zip(shown, outcomes, strict=True):
        if isinstance(outcome, JudgeError):
            which = " and ".join(str(response.index) for response in responses)
            raise JudgeError(outcome.kind, f"response {which}: {outcome}") from outcome
        if isinstance(outcome, BaseException):
            raise outcome
        answers.append(outcome)
    return answers
