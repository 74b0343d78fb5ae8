"""Observers that are no screen: several as one, the phase timer, TensorBoard."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from online_po.protocols import Observer


class CompositeObserver:
    """Tells several observers the same; phases are entered in order and left in reverse."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = tuple(observers)

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.phase(name, round_))
            yield

    def progress(self, name: str, done: int, total: int | None, note: str = "") -> None:
        for observer in self.observers:
            observer.progress(name, done, total, note)

    def step(self, round_: int, metrics: dict[str, float]) -> None:
        for observer in self.observers:
            observer.step(round_, metrics)

    def round(self, summary: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.round(summary)

    def evaluation(self, summary: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.evaluation(summary)

    def restart(self, who: str, why: str, seconds: float) -> None:
        for observer in self.observers:
            observer.restart(who, why, seconds)

    def message(self, text: str) -> None:
        for observer in self.observers:
            observer.message(text)

    def close(self) -> None:
        for observer in self.observers:
            observer.close()


class Silent:
    """An observer that does nothing: the base of those that care for a part of what they are told."""

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        yield

    def progress(self, name: str, done: int, total: int | None, note: str = "") -> None:
        pass

    def step(self, round_: int, metrics: dict[str, float]) -> None:
        pass

    def round(self, summary: dict[str, Any]) -> None:
        pass

    def evaluation(self, summary: dict[str, Any]) -> None:
        pass

    def restart(self, who: str, why: str, seconds: float) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class PhaseTimer(Silent):
    """Where the time goes. Phases may begin and end in any thread, and overlap.

    Every finished phase becomes one line of `path`: {"phase", "round", "start" (Unix seconds), "seconds"}; an actor's
    restart one of {"restart": who, "why", "start", "seconds"}; a resumed run appends. `clock` and `now` are there for
    tests.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time
    ) -> None:
        self._clock, self._now = clock, now
        _end_last_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._open: dict[object, tuple[str, int, float]] = {}  # phases going on: name, round, begin
        self._seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )  # finished ones, by round
        self._window: float | None = None  # begin of the time that no `round_seconds` has told of yet
        self._idle = 0.0  # seconds of that window without any phase
        self._idle_since: float | None = None  # since when no phase has been open

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        token, start = object(), self._now()
        with self._lock:
            begin = self._clock()
            self._open[token] = (name, round_, begin)
            # Starting up (round 0) belongs to no round's window.
            if self._window is None and round_ > 0:
                self._window = begin
            if self._idle_since is not None:
                self._idle += begin - self._idle_since
                self._idle_since = None
        try:
            yield
        finally:
            with self._lock:
                end = self._clock()
                del self._open[token]
                self._seconds[round_][name] += end - begin
                if not self._open and self._window is not None:
                    self._idle_since = end
                line = {"phase": name, "round": round_, "start": round(start, 3), "seconds": round(end - begin, 4)}
                self._write(line)

    def round_seconds(self, round_: int) -> dict[str, Any]:
        """The time of a round that is being committed.

        phase_seconds: busy seconds of each of the round's phases so far (one still going on counts up to
        now), wherever they ran: with `loop.max_staleness` above 0 they overlap other rounds' phases.
        wall_seconds: since the previous call, or since the first phase of a round; such windows add up to
        the run. idle_seconds: how much of that no phase of any round covered.
        """
        with self._lock:
            now = self._clock()
            phases = defaultdict(float, self._seconds[round_])
            for name, phase_round, begin in self._open.values():
                if phase_round == round_:
                    phases[name] += now - begin
            if self._idle_since is not None:
                self._idle += now - self._idle_since
                self._idle_since = now
            wall = now - self._window if self._window is not None else 0.0
            idle, self._idle, self._window = self._idle, 0.0, now
            return {"phase_seconds": dict(phases), "wall_seconds": wall, "idle_seconds": idle}

    def restart(self, who: str, why: str, seconds: float) -> None:
        with self._lock:
            start = round(self._now() - seconds, 3)
            self._write({"restart": who, "why": why, "start": start, "seconds": round(seconds, 4)})

    def _write(self, line: dict[str, Any]) -> None:
        # A full disk is for the ledger to tell; telemetry must not hide what it says.
        with suppress(OSError):
            self._file.write(timeline_line(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def timeline_line(event: Mapping[str, Any]) -> str:
    """A phase or a restart as a line of timeline.jsonl, with a checksum as its last key."""
    text = json.dumps(event)
    return f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}'


def timeline_event(line: bytes) -> dict[str, Any] | None:
    """The phase or the restart of a line; None where the line is not as it was written."""
    try:
        event: dict[str, Any] = json.loads(line)
        del event["crc32"]
        return event if timeline_line(event).encode() == line else None
    except (ValueError, KeyError, TypeError):
        return None


def _end_last_line(path: Path) -> None:
    """Cuts off what a crash or a full disk left of a last line: the next one would be lost with it."""
    if path.exists():
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)


class TensorBoardObserver(Silent):
    """Writes metrics as TensorBoard events, with tensorboard's own writer (torch stays out). Where they cannot be
    written (a full disk), it stops: telemetry must not end a run, nor hide what the ledger says of the same disk.

    Tags: learner/* by optimizer step, round/* by round, heldout/* by policy version. `steps_done` is the
    number of optimizer steps of earlier, committed rounds, from which a resumed run counts on.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))
        self._committed = self._steps = steps_done

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        if name == "learn":  # a round that is trained anew has the same steps
            self._steps = self._committed
        yield

    def step(self, round_: int, metrics: dict[str, float]) -> None:
        self._steps += 1
        self._write("learner", metrics, self._steps)

    def round(self, summary: dict[str, Any]) -> None:
        self._committed = self._steps
        self._write("round", summary, summary["round"])
        self._write("seconds", summary["phase_seconds"], summary["round"])
        self._flush()

    def evaluation(self, summary: dict[str, Any]) -> None:
        scalars = {name: summary[name] for name in ("length_mean", "truncated_share")}
        scalars |= _interval("score", summary["score"])
        for other in ("start", "previous"):
            if (comparison := summary[f"versus_{other}"]) is not None:
                scalars |= _interval(f"win_rate_{other}", comparison["win_rate"])
        self._write("heldout", scalars, summary["policy_version"])
        self._flush()

    def _write(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        with suppress(OSError):
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("round", "step"):
                    self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def _flush(self) -> None:
        with suppress(OSError):
            self._writer.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()


def _interval(name: str, interval: Mapping[str, Any] | None) -> dict[str, Any]:
    if interval is None:
        return {}
    return {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
