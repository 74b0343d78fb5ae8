"""The one way a judge asks for anything: remembered, counted, limited, tried again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from judges.limits import PATIENCE_S, POLL_S, CircuitBreaker, RateLimit
from judges.protocol import JudgeError, to_text
from judges.questions import Answer, Question
from judges.store import Call, JudgeStore
from online_po.errors import BudgetError
from online_po.judge_configs import Endpoint, JudgeBase
from online_po.judge_configs.base import BudgetConfig

__all__ = ["OCCASION", "ROUND", "Answer", "Asker", "Question"]

ROUND: ContextVar[int] = ContextVar("round", default=0)
"""The round that calls count for; `judges.runtime.judge_groups` sets it."""

OCCASION: ContextVar[str] = ContextVar("occasion", default="")
"""What was said on another occasion is not remembered on this one: a judge is tried anew while the run goes on."""

ATTEMPTS: int = Endpoint.model_fields["attempts"].default
"""Tries of one call, for judges without a setting for it; only errors that say so are tried again."""
AWAY = ("transport", "timeout")
"""Errors by which an endpoint seems to be away, or to want less at a time."""
TEMPLATE_BYTES = 8000
"""More than any prompt of ours has besides what is judged, rubric and constitution."""

_backoff = wait_exponential_jitter(initial=1.0, max=60.0, jitter=1.0)


class Asker:
    """Asks for one judge, in one process and one event loop.

    store: the run's judge cache; None: nothing is remembered or counted. workers: processes that ask with the same
    config and store: rate limits are divided by it. budget: the run's; the config's own by default.
    """

    def __init__(
        self,
        config: JudgeBase,
        store: JudgeStore | None = None,
        *,
        workers: int = 1,
        budget: BudgetConfig | None = None,
        flights: _Flights | None = None,
    ) -> None:
        self.config = config
        self._memory, self._workers = store, workers
        self._store = store if config.cached else None
        self._budget = budget or config.budget
        # Others must know of a call before it goes out: for the budget's sake, or because they may ask the same.
        self._announced = workers > 1 or self._budget != BudgetConfig()  # type: ignore[call-arg]
        self._flights = flights or _Flights()
        self.identify()
        self._slots = nullcontext() if config.batches else asyncio.Semaphore(config.concurrency)
        self._breaker = CircuitBreaker()
        self._rate = RateLimit(None, None, workers)
        self._attempts = ATTEMPTS
        if isinstance(config, Endpoint):
            self._rate = RateLimit(config.requests_per_minute, config.tokens_per_minute, workers)
            self._attempts = config.attempts
        self._asking = self._flights.asking

    def identify(self, **parts: str) -> None:
        """What answers depend on besides the config, and only the built judge knows: its source, its weights. Before
        anything is asked."""
        identity = self.config.identity() | parts
        self._judge = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def member(self, config: JudgeBase) -> Asker:
        """For a judge of an ensemble: another identity and other limits, the same memory and budget."""
        return Asker(config, self._memory, workers=self._workers, budget=self._budget, flights=self._flights)

    async def drain(self) -> None:
        """Lets no further call out, where calls are announced; returns once all that are out are over and kept."""
        await self._flights.stop(BudgetError("the run is pausing"))

    async def ask(self, question: Question, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """The remembered answer, or what `call` gives.

        Raises JudgeError for a call that failed for good, BudgetError when `judge.budget` is spent.
        """
        key, round_ = question.key(self._judge + OCCASION.get(), by_ids=self.config.by_ids), ROUND.get()
        task = self._asking.get(key)
        if task is None:
            # A task of its own: who asked first may be cancelled, others want to know.
            task = asyncio.get_running_loop().create_task(self._answer(key, round_, question, call))
            self._asking[key] = task
            task.add_done_callback(lambda done: self._over(key, done))
            return await asyncio.shield(task)
        answer = await asyncio.shield(task)
        if self._store is not None:
            await self._store.hit(round_, self._judge)
        return answer

    def _over(self, key: str, task: asyncio.Task[Answer]) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # seen, whether or not anybody still waits for it

    async def _answer(self, key: str, round_: int, question: Question, call: Callable[[], Awaitable[Answer]]) -> Answer:
        if self._store is not None and (known := await self._store.find(key, round_, self._judge)) is not None:
            return known
        attempt = _Attempt(self, key, round_, question, call)
        retrying = AsyncRetrying(
            sleep=self._flights.sleep,
            retry=retry_if_exception(_may_ask_again),
            stop=lambda _: attempt.counted >= self._attempts,
            wait=lambda state: 0.0 if attempt.probe else _wait(state),  # after a probe the breaker says how long
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except JudgeError as error:
            if attempt.number == 1:
                raise
            raise JudgeError(error.kind, f"{error} (asked {attempt.number} times)") from error


class _Attempt:
    """One try after the other to get one answer."""

    def __init__(
        self, asker: Asker, key: str, round_: int, question: Question, call: Callable[[], Awaitable[Answer]]
    ) -> None:
        self.asker, self.key, self.round, self.question, self.call = asker, key, round_, question, call
        self.number = 0
        self.counted = 0
        """Tries that were not probes: an endpoint that is away for some time is not the question's fault."""
        self.probe = False

    async def __call__(self) -> Answer:
        asker = self.asker
        with ExitStack() as flight:
            async with asker._slots:
                go_on = asker._flights.require_open
                go_on()
                self.probe = await asker._breaker.admit(go_on)
                if self.probe:
                    flight.callback(asker._breaker.probe_over)
                estimate = await asker._rate.admit(self.question, go_on)
                bound = _most(asker.config, self.question) if asker._budget.counts_money else 0.0
                begun = await self._begin(bound)
                if isinstance(begun, Answer):
                    return begun
                self.number += 1
                self.counted += not self.probe
                flight.enter_context(asker._flights)
                outcome, seconds = await self._run()
            self._note(outcome, estimate)
            await self._keep(outcome, seconds, begun, bound)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    async def _begin(self, bound: float) -> int | Answer | None:
        asker = self.asker
        if asker._store is None or not asker._announced:
            return None
        try:
            while True:
                asker._flights.require_open()
                with asker._flights:  # once `begin` has written it down, it goes out
                    begun = await asker._store.begin(
                        self.key, self.round, asker._judge, self.number + 1, bound=bound, budget=asker._budget
                    )
                if begun is not None:
                    return begun
                await asyncio.sleep(POLL_S)
        except BudgetError as error:
            # What is under way was paid for: it is waited for before the run pauses.
            await asker._flights.stop(error)
            raise

    async def _run(self) -> tuple[Answer | Exception, float]:
        began = time.perf_counter()  # finer than the event loop's clock
        limit = None if self.asker.config.batches else self.asker.config.timeout_s
        outcome: Answer | Exception
        try:
            async with asyncio.timeout(limit) as timeout:
                answer = await self.call()
            # As it will be read back: what is trained on must not depend on whether it was asked or remembered.
            outcome = replace(
                answer,
                value=json.loads(json.dumps(answer.value, allow_nan=False)),
                rationale=None if answer.rationale is None else to_text(answer.rationale),
            )
        except Exception as error:  # counted, then raised again
            outcome = error
            if isinstance(error, TimeoutError) and timeout.expired():
                again = isinstance(self.asker.config, Endpoint)
                outcome = JudgeError("timeout", f"no answer within judge.timeout_s = {limit:g} s", retry=again)
        return outcome, time.perf_counter() - began

    def _note(self, outcome: Answer | Exception, estimate: float) -> None:
        """Tells the limits."""
        asker = self.asker
        if not isinstance(outcome, Answer | JudgeError):
            return
        if tokens := outcome.prompt_tokens + outcome.response_tokens:
            asker._rate.used(self.question, estimate, tokens)
        if isinstance(outcome, JudgeError) and outcome.retry and outcome.kind in AWAY:
            asker._breaker.failed(outcome, self.probe)
        else:
            asker._breaker.answered()

    async def _keep(self, outcome: Answer | Exception, seconds: float, number: int | None, bound: float) -> None:
        asker = self.asker
        if asker._store is None:
            return
        answer = outcome if isinstance(outcome, Answer) else None
        call = Call(
            round=self.round,
            judge=asker._judge,
            attempt=self.number,
            outcome="ok" if answer else "error",
            seconds=seconds,
        )
        if isinstance(outcome, JudgeError):
            # An answer that came too late for us may be paid for all the same.
            late = bound if outcome.kind == "timeout" else 0.0
            call = replace(
                call,
                outcome=outcome.kind,
                prompt_tokens=outcome.prompt_tokens,
                response_tokens=outcome.response_tokens,
                cost=max(outcome.cost, late),
            )
        elif answer is not None:
            call = replace(
                call,
                prompt_tokens=answer.prompt_tokens,
                response_tokens=answer.response_tokens,
                cost=answer.cost,
                cut=answer.cut,
            )
        await asker._store.finish(call, self.key, answer, number)


class _Flights:
    """What is under way, for all members of an ensemble."""

    def __init__(self) -> None:
        self.asking: dict[str, asyncio.Task[Answer]] = {}
        """Questions by their keys: members may be the same judge."""
        self._out = 0
        self._stopped = asyncio.Event()
        self._why = ""
        self._landed = asyncio.Event()
        self._landed.set()

    def __enter__(self) -> None:
        self._out += 1
        self._landed.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._out -= 1
        if not self._out:
            self._landed.set()

    def require_open(self) -> None:
        if self._stopped.is_set():
            raise BudgetError(self._why)  # one for each: an exception that many raise collects all their tracebacks

    async def sleep(self, seconds: float) -> None:
        """Waits so long, or until no further call goes out."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    async def stop(self, error: BudgetError) -> None:
        """No further call goes out; returns once none is."""
        self._why = self._why or str(error)
        self._stopped.set()
        while self._out:
            await self._landed.wait()


def _may_ask_again(error: BaseException) -> bool:
    return isinstance(error, JudgeError) and error.retry and (error.retry_after or 0.0) <= PATIENCE_S


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: longer and longer, and no less than was asked for; none where it did answer, and
    only said nothing of use."""
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, JudgeError)
    return max(_backoff(state) if error.kind in AWAY else 0.0, error.retry_after or 0.0)


def _most(config: JudgeBase, question: Question) -> float:
    """What a call costs at most: its bytes, rubric and constitution for tokens, and all tokens of an answer."""
    if not isinstance(config, Endpoint) or config.prompt_price is None or config.response_price is None:
        return 0.0
    files = [Path(path).stat().st_size for path in (config.rubric, config.constitution) if path is not None]
    prompt = question.size() + sum(files) + TEMPLATE_BYTES
    return (prompt * config.prompt_price + config.max_tokens * config.response_price) / 1e6
