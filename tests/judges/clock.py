"""An event loop whose time passes as soon as nobody has anything to do: minutes of waiting take no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.SelectSelector):
    now = 1000.0

    def select(self, timeout=None):
        if found := super().select(0):
            return found
        if timeout is None:  # waiting for a thread, and for nothing else
            return super().select(None)
        self.now += max(timeout, 1e-6)  # even work takes time
        return []


class FastLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def run_fast(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run` in such a loop."""
    with asyncio.Runner(loop_factory=FastLoop) as runner:
        return runner.run(coroutine)
