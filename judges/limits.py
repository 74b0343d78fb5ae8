"""How often a judge may be asked: its own limits, and whether it is there at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from aiolimiter import AsyncLimiter

from judges.protocol import JudgeError
from judges.questions import Question

FIRST_OVERHEAD = 800
"""Tokens that a call has besides prompt and responses, until some were seen."""
BREAK_AFTER = 10
"""Failures in a row that mean: it is not there."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between two probes; doubled after each."""
PATIENCE_S = 600.0
"""So long an endpoint that has answered before may be away."""
FIRST_PATIENCE_S = 30.0
"""So long one that never said anything: a wrong address should be told soon."""
POLL_S = 0.25


class RateLimit:
    """Requests and tokens a minute, kept in any minute. Each of `workers` processes keeps its share."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None, workers: int) -> None:
        self._requests = None if requests_per_minute is None else _bucket(requests_per_minute / workers)
        self._tokens = None if tokens_per_minute is None else _bucket(tokens_per_minute / workers)
        self._turn = asyncio.Lock()  # first come, first served
        self._overhead, self._seen = float(FIRST_OVERHEAD), 0
        self._owed = 0.0  # tokens that earlier calls took beyond their estimates

    async def admit(self, question: Question, go_on: Callable[[], None]) -> float:
        """Waits until a call is allowed; returns the tokens it was taken to need. `go_on` raises what ends the wait."""
        if self._requests is None and self._tokens is None:
            return 0.0
        async with self._turn:
            go_on()
            if self._requests is not None:
                await self._requests.acquire()
            if self._tokens is None:
                return 0.0
            estimate = question.tokens() + self._overhead
            wanted, self._owed = estimate + self._owed, 0.0
            while wanted > 0:  # a call may need more than the bucket holds
                part = min(wanted, self._tokens.max_rate)
                await self._tokens.acquire(part)
                wanted -= part
            return estimate

    def used(self, question: Question, estimate: float, tokens: int) -> None:
        """What the call took in truth: later ones wait for what it took more. What it took less is lost: made up
        for later, it would be too much for that minute."""
        if self._tokens is not None:
            self._owed += max(0.0, tokens - estimate)
            self._seen += 1
            self._overhead += max(0.1, 1 / self._seen) * (max(0, tokens - question.tokens()) - self._overhead)


def _bucket(per_minute: float) -> AsyncLimiter:
    # A bucket lets through what it holds at once, and then what leaks: together no more than the limit in a minute.
    burst = max(1.0, per_minute / 600)
    leak = per_minute - burst if burst > 1 else per_minute
    return AsyncLimiter(burst, 60 * burst / leak)


class CircuitBreaker:
    """Tells an endpoint that is away from calls that fail: then all wait, and one at a time tries."""

    def __init__(self) -> None:
        self._failures = 0
        self._answered = False
        self._since: float | None = None  # when it was found away; None: it is there
        self._not_before = 0.0
        self._pause = FIRST_PAUSE_S
        self._probing = False
        self._last = ""

    async def admit(self, go_on: Callable[[], None]) -> bool:
        """Waits while the endpoint is away; True: this call is the one that tries, and `probe_over` follows.

        Raises JudgeError("transport") where it has been away for too long. `go_on` raises what else ends the wait.
        """
        loop = asyncio.get_running_loop()
        while self._since is not None:
            go_on()
            if loop.time() >= self._not_before and not self._probing:
                self._probing = True
                return True
            away = loop.time() - self._since
            if not self._probing and away > (PATIENCE_S if self._answered else FIRST_PATIENCE_S):
                raise JudgeError("transport", f"the judge has not answered for {away:.0f} s; last: {self._last}")
            await asyncio.sleep(POLL_S)
        return False

    def probe_over(self) -> None:
        self._probing = False

    def answered(self) -> None:
        """A call got an answer, good or bad."""
        self._answered = True
        self._failures, self._since, self._pause = 0, None, FIRST_PAUSE_S

    def failed(self, error: JudgeError, probe: bool) -> None:
        """A call could not reach it."""
        self._failures += 1
        self._last = str(error)
        self._answered |= error.retry_after is not None  # who says when to come back is there
        if probe or (self._since is None and self._failures >= BREAK_AFTER):
            now = asyncio.get_running_loop().time()
            self._since = now if self._since is None else self._since
            jitter = random.uniform(0.75, 1.25)  # processes must not come back as one
            self._not_before = now + max(jitter * self._pause, min(error.retry_after or 0.0, PATIENCE_S))
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
