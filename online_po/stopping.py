"""Ending a run in order: asked by a signal (or a caller), it finishes the piece that it is at, and stops.

Pieces are parts of responses with their judgements, pairs, reference log-probabilities, a round's update with its
commit, an evaluation: what is finished of them is durable, so it is not thrown away where `run.grace_s` is enough.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager, suppress
from types import FrameType, TracebackType

from online_po.errors import Interrupted

EXIT_CODE = Interrupted.exit_code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers send before they kill; Slurm's `--signal=USR1@120`."""
ECHO_S = 0.5
"""A signal so soon after the first is the same one, sent to the process and to its group."""


class Stop:
    """The wish that a run ends. Any thread may `ask`; the run looks between two pieces."""

    def __init__(self) -> None:
        self.asked = False
        self.working = False
        """Whether there is a piece to be finished; false while a run starts."""
        self.grace_s = 0.0
        """What the run's config gives for finishing it."""

    def ask(self) -> None:
        self.asked = True

    def check(self) -> None:
        """Between two pieces. Raises Interrupted where the run is to end."""
        if self.asked:
            raise Interrupted("the run was asked to stop")


class StopSignals(AbstractContextManager[Stop]):
    """Inside the block, the first signal asks the run to stop and, `Stop.grace_s` later, raises KeyboardInterrupt in
    the main thread; it does so at once where there is no piece to finish. A second one ends the process at once, which
    tears no file: they appear whole or not at all."""

    def __init__(self) -> None:
        self.stop = Stop()
        self._first = 0.0

    def __enter__(self) -> Stop:
        # SIGINT too: a shell starts background jobs with it ignored, and Python then leaves it so.
        self._before = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
        return self.stop

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._first:
            if now - self._first >= ECHO_S:
                _say(f"{name} again: stopped at once")
                os._exit(EXIT_CODE)
            return
        self._first = now
        self.stop.ask()
        if not self.stop.working or self.stop.grace_s <= 0:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, self.stop.grace_s)
        _say(f"{name}: finishing what is being made, for at most {self.stop.grace_s:g} s; once more stops at once")

    def _late(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


def _say(text: str) -> None:
    """Written past Python's streams, which a signal may have interrupted."""
    with suppress(OSError):  # a pipe whose reader is gone, say: the same Ctrl-C ended it
        os.write(2, f"\n{text}\n".encode())
