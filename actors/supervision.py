"""Who of a run's actors is alive: the pulse that each gives, the watch that ends those that hang, and restarts.

Ray restarts nothing by itself here: an actor that starts again must get its weights and prove them before it gets
work, so who owns it makes a new one in the same place. Here is what they share: how often, why, and what is told.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
)

from online_po.config import Config
from online_po.errors import EngineError, first_line, is_out_of_memory
from online_po.observers import Silent
from online_po.protocols import Observer
from online_po.sections import LimitsConfig

PULSE_GROUP = {"pulse": 1}
"""Ray's concurrency groups of every actor: its pulse is felt while it works."""
POLL_S = 5.0
"""How often the watch looks, at most."""
HEARS_S = 2.0
"""So long a process has to end after Ray told it to."""
LATE_S = 10.0
"""A look that comes so much too late was kept from it (a stopped driver, say): time before it counts for nobody."""


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """What an actor is at."""

    call: str | None
    """None: nothing."""
    seconds: float
    """Since anything came of it."""
    pid: int
    started: float
    """Unix seconds of its process: another one may have its number later."""
    node: str
    """Ray's id of the machine."""


class Progress:
    """An actor's own record of what it is at. Written by its working thread, read by the one that answers `pulse`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[object, str] = {}
        self._since = time.monotonic()

    @contextmanager
    def at(self, call: str) -> Iterator[None]:
        """Around a call; several may be under way."""
        token = object()
        with self._lock:
            if not self._calls:
                self._since = time.monotonic()
            self._calls[token] = call
        try:
            yield
        finally:
            with self._lock:
                del self._calls[token]
                self._since = time.monotonic()

    def tick(self) -> None:
        """Something came of it."""
        self._since = time.monotonic()

    def pulse(self) -> Pulse:
        with self._lock:
            call = next(iter(self._calls.values()), None)
            seconds = time.monotonic() - self._since
        node = ray.get_runtime_context().get_node_id()
        return Pulse(call=call, seconds=seconds, pid=os.getpid(), started=psutil.Process().create_time(), node=node)


class ActorLostError(Exception):
    """An actor died, or its engine is of no use any more: what it was asked is to be asked again.

    memory: for want of memory. counts: as a death; what a living engine says of its memory does not."""

    def __init__(self, cause: str, *, memory: bool = False, counts: bool = True) -> None:
        super().__init__(cause)
        self.memory, self.counts = memory, counts


@dataclass
class _Watched:
    who: str
    actor: Any
    pulse: Pulse | None = None
    """Its last."""
    asked: Any = None
    """Its answer to come."""
    since: float | None = None
    """When the first question was asked that has no answer yet."""
    told: bool = False
    """That it cannot be watched."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Why the watch ended an actor."""

    text: str
    call: str | None
    """What it was at."""


class Watch:
    """Asks actors for their pulse, and ends those from which nothing came for longer than `limits` allow.

    An actor that hangs is dead from then on for everybody who waits for it. `limits`: seconds by what a pulse calls
    the work; `quiet_s`: seconds that a pulse itself may take. `ask`, `answer`, `kill` and `clock` are there for tests.
    """

    def __init__(
        self,
        limits: Mapping[str, tuple[str, float]],
        quiet: tuple[str, float],
        *,
        ask: Callable[[Any], Any] = lambda actor: actor.pulse.remote(),
        answer: Callable[[Any], Pulse | None] = lambda ref: _answer(ref),
        kill: Callable[[Any, Pulse | None], None] = lambda actor, pulse: end(actor, pulse),
        tell: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._quiet = limits, quiet
        self._ask, self._answer, self._kill, self._tell, self._clock = ask, answer, kill, tell, clock
        self._lock = threading.Lock()
        self._watched: dict[Any, _Watched] = {}
        self._hung: dict[Any, Hang] = {}
        self._thread: threading.Thread | None = None
        self._looked, self._awake = clock(), -math.inf
        """Of the last look; of the last that came too late."""
        self._poll = min([POLL_S, quiet[1] / 4, *(seconds / 4 for _, seconds in limits.values())])

    def add(self, who: str, actor: Any) -> None:
        """Watches an actor from now on, until it is dead."""
        with self._lock:
            self._watched[actor] = _Watched(who=who, actor=actor)
            if self._thread is None or not self._thread.is_alive():
                self._looked = self._clock()
                self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
                self._thread.start()

    def why(self, actor: Any) -> Hang | None:
        """Why the watch ended an actor; None where it did not."""
        with self._lock:
            return self._hung.get(actor)

    def remove(self, actor: Any) -> Pulse | None:
        """Watches an actor no more; its last pulse."""
        with self._lock:
            self._hung.pop(actor, None)
            watched = self._watched.pop(actor, None)
        return watched.pulse if watched is not None else None

    def _look(self) -> None:
        while True:
            time.sleep(self._poll)
            with self._lock:
                if not self._watched:
                    self._thread = None
                    return
            self.look()

    def look(self) -> None:
        """One look at everybody."""
        with self._lock:
            watched = list(self._watched.values())
            now = self._clock()
            if now - self._looked > self._poll + LATE_S:
                self._awake = now
            self._looked = now
        for one in watched:
            try:
                self._look_at(one)
            except Exception as error:  # tried again at the next look, and the others are watched on
                if not one.told:
                    one.told = True
                    self._tell(f"{one.who} cannot be watched, or ended ({first_line(error)}); it is tried again")

    def _look_at(self, one: _Watched) -> None:
        try:
            if one.asked is None:
                one.since = self._clock() if one.since is None else one.since
                one.asked = self._ask(one.actor)
            found = self._answer(one.asked)
        except Exception as error:
            if means_death(error):  # who waits for it hears of it
                self._forget(one)
                return
            one.asked, found = None, None  # it could not be reached, or has no answer: it is silent, and asked again
        if found is not None:
            one.pulse, one.since, one.asked = found, None, None
        if (hang := self._overdue(one)) is None:
            return
        with self._lock:
            if one.actor not in self._watched:
                return
            self._hung[one.actor] = hang  # before it is dead: who waits for it asks why
        self._kill(one.actor, one.pulse)
        self._forget(one)

    def _forget(self, one: _Watched) -> None:
        with self._lock:
            self._watched.pop(one.actor, None)

    def _overdue(self, one: _Watched) -> Hang | None:
        now = self._clock()
        awake = now - self._awake
        silent = min(awake, now - one.since) if one.since is not None else 0.0
        call, since = (one.pulse.call, one.pulse.seconds) if one.pulse is not None else ("start", 0.0)
        if call is not None:
            field, limit = self._limits[call]
            if (still := min(awake, since + silent)) > limit:
                text = f"it hung: nothing came of `{call}` for {still:.0f} s ({field} is {limit:g})"
                return Hang(text=text, call=call)
        field, limit = self._quiet
        # While it starts it may load libraries for long without letting anybody else have a turn.
        if call != "start" and silent > limit:
            text = f"it hung: the process has given no sign of life for {silent:.0f} s ({field} is {limit:g})"
            return Hang(text=text, call=call)
        return None


def means_death(error: Exception) -> bool:
    """Whether an actor is dead for good, rather than out of reach or unable to say how it is."""
    if isinstance(error, RayActorError):
        return not isinstance(error, ActorUnavailableError)
    return isinstance(error, ActorPlacementGroupRemoved | ActorUnschedulableError)


def _answer(ref: Any) -> Pulse | None:
    """A pulse, if it is there. Raises RayError where it will not come."""
    ready, _ = ray.wait([ref], timeout=0)
    return ray.get(ready[0]) if ready else None


def death(error: RayError) -> str:
    """How an actor died, without Ray's page of advice."""
    text = " ".join(str(error).split())
    if "node has died" in text or "node failed" in text.lower():
        return "its machine is gone"
    if is_out_of_memory(error):
        return "its machine was running out of memory"
    if "process has died" in text or "died unexpectedly" in text:
        return "its process was killed, or crashed"
    return text[:200] or type(error).__name__


def end(actor: Any, pulse: Pulse | None) -> None:
    """Kills an actor; `pulse`: a recent one of it, by which its process is known."""
    ray.kill(actor)
    # A process that was stopped or sits in the kernel does not hear Ray. On other machines its own raylet has to do.
    if pulse is None or pulse.node != ray.get_runtime_context().get_node_id():
        return
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pulse.pid)
        if process.create_time() != pulse.started:
            return
        try:
            process.wait(HEARS_S)  # one that ends by a signal is told of as a crash, by Ray
        except psutil.TimeoutExpired:
            process.kill()


class Supervisor:
    """What the groups of actors share: the watch, how often whom may be started again, and telling of it."""

    def __init__(self, config: Config, observer: Observer | None = None, clock: Callable[[], float] = time.monotonic):
        self._ray, self._observer, self._clock = config.ray, observer or Silent(), clock
        self.watch = Watch(
            limits_by_call(config.limits, config.ray.startup_timeout_s),
            ("limits.pulse_s", config.limits.pulse_s),
            tell=self.tell,
        )
        # A hang is found after its limit: a shorter window would never hold more than one.
        hang_s = max(config.limits.model_dump().values()) + config.ray.startup_timeout_s
        self._window = max(config.ray.restart_window_s, (config.ray.max_restarts + 1) * hang_s)
        self._lock = threading.Lock()
        self._restarts: defaultdict[str, deque[float]] = defaultdict(deque)

    def lost(self, who: str, cause: str) -> None:
        """Notes that an actor died. Raises EngineError where it did so more often than it may be started again."""
        allowed, window = self._ray.max_restarts, self._window
        with self._lock:
            now, times = self._clock(), self._restarts[who]
            while times and now - times[0] > window:
                times.popleft()
            if len(times) >= allowed:
                again = f"was started again {len(times)} times within {window:g} s (ray.max_restarts) and " * (
                    allowed > 0
                )
                raise EngineError(
                    f"{who} {again}died: {cause}. What was finished is kept; see to the cause, and resume the run"
                )
            times.append(now)
        self.tell(f"{who} died ({cause}); it is started again")

    def back(self, who: str, why: str, seconds: float, what: str = "") -> None:
        """Tells of an actor that was started again: why, how long that took, and what it holds."""
        self.tell(f"{who} is back after {seconds:.1f} s{what}")
        self._observer.restart(who, why, seconds)

    def tell(self, text: str) -> None:
        self._observer.message(text)

    def why(self, actor: Any, otherwise: str) -> str:
        """Why an actor died, as far as is known."""
        hang = self.watch.why(actor)
        return otherwise if hang is None else hang.text

    def end(self, actor: Any) -> None:
        """Kills an actor that is of no use any more."""
        end(actor, self.watch.remove(actor))


def limits_by_call(limits: LimitsConfig, startup_s: float) -> dict[str, tuple[str, float]]:
    """What a pulse calls the work -> (setting, seconds without any progress)."""
    fields = {
        "generate_s": ("generate", "answer"),
        "weights_s": ("sync", "share_policy", "save_policy", "save_trainer", "load", "blend"),
        "judge_s": ("judge",),
        "step_s": ("update", "logps", "token_logps"),
    }
    found = {call: (f"limits.{field}", getattr(limits, field)) for field, calls in fields.items() for call in calls}
    return found | {"start": ("ray.startup_timeout_s", startup_s)}
