"""Who hangs, who may start again, and what is said of it: without Ray."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.supervision import Progress, Pulse, Supervisor, Watch, limits_by_call, out_of_memory
from online_po.errors import EngineError
from online_po.sections import LimitsConfig
from tests.fakes import FakeObserver, make_config

LIMITS = limits_by_call(LimitsConfig(generate_s=60, step_s=100), startup_s=500)
QUIET = ("limits.pulse_s", 30.0)


class Bench:
    """A watch over actors that are names, whose pulses the test says."""

    def __init__(self) -> None:
        self.now, self.killed = 0.0, list[str]()
        self.pulses: dict[str, Pulse | Exception | None] = {}
        self.watch = Watch(
            LIMITS, QUIET, ask=lambda actor: actor, answer=self.answer, kill=self.kill, clock=lambda: self.now
        )
        self.watch._thread = object()  # type: ignore[assignment]  # the test looks itself

    def answer(self, actor: str) -> Pulse | None:
        found = self.pulses.get(actor)
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self, actor: str, pulse: Pulse | None) -> None:
        self.killed.append(actor)

    def look(self, now: float, **calls: tuple[str | None, float] | Exception | None) -> list[str]:
        """Looks at a time; a pulse is what it is at and since when, None where it does not come."""
        self.now = now
        for actor, said in calls.items():
            self.pulses[actor] = (
                Pulse(call=said[0], seconds=said[1], pid=1, node="n") if isinstance(said, tuple) else said
            )
        self.watch.look()
        return self.killed


def test_work_may_take_as_long_as_it_likes_while_something_comes_of_it():
    bench = Bench()
    bench.watch.add("generator replica 0", "a")
    for now in range(0, 100_000, 50):
        assert bench.look(now, a=("generate", 59.0)) == []
    assert bench.look(100_000, a=(None, 10_000.0)) == [], "an idle actor may be idle"
    assert bench.watch.why("a") is None


def test_who_hangs_is_named_with_the_limit_and_ended_once():
    bench = Bench()
    for actor in "ab":
        bench.watch.add(f"learner rank {actor}", actor)
    assert bench.look(10, a=("update", 99.0), b=("update", 99.0)) == []
    assert bench.look(12, a=("update", 101.0), b=("update", 0.1)) == ["a"]
    assert bench.watch.why("a") == "it hung: nothing came of `update` for 101 s (limits.step_s is 100)"
    assert bench.look(13, b=("save", 50.0)) == ["a"]
    bench.watch.remove("a")
    assert bench.watch.why("a") is None


def test_a_process_that_gives_no_pulse_is_found_by_it():
    bench = Bench()
    bench.watch.add("a", "a")
    bench.look(100, a=("generate", 1.0))
    assert bench.look(129, a=None) == []
    assert bench.look(131, a=None) == ["a"]
    assert "no sign of life for 31 s (limits.pulse_s is 30)" in bench.watch.why("a")


def test_an_actor_that_never_starts_has_the_time_of_a_start():
    bench = Bench()
    bench.watch.add("a", "a")
    assert bench.look(499, a=None) == []
    assert bench.look(501, a=None) == ["a"]
    assert "`start` for 501 s (ray.startup_timeout_s is 500)" in bench.watch.why("a")


def test_a_dead_actor_is_left_to_those_who_wait_for_it():
    bench = Bench()
    bench.watch.add("a", "a")
    assert bench.look(1000, a=ActorDiedError()) == []
    assert bench.look(9000, a=None) == []


def test_the_watch_looks_by_itself():
    killed: list[Any] = []
    watch = Watch(
        {"start": ("x", 0.01)},
        QUIET,
        ask=lambda actor: actor,
        answer=lambda ref: None,
        kill=lambda actor, pulse: killed.append(actor),
    )
    for actor in "ab":
        watch.add(actor, actor)
        deadline = time.monotonic() + 30
        while actor not in killed and time.monotonic() < deadline:
            time.sleep(0.01)
    assert killed == ["a", "b"], "also after it had nobody to watch"


def test_progress_is_what_the_pulse_tells(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("actors.supervision.time.monotonic", lambda: now[0])
    monkeypatch.setattr("actors.supervision.ray.get_runtime_context", lambda: type("C", (), {"get_node_id": str})())
    progress, seen = Progress(), []

    def at(time: float) -> None:
        now[0] = time
        pulse = progress.pulse()
        seen.append((pulse.call, pulse.seconds))

    at(5)
    with progress.at("judge"):
        at(6)
        with progress.at("judge"):
            at(8)
            progress.tick()
            at(9)
        at(11)
    at(12)
    assert seen == [(None, 5), ("judge", 1), ("judge", 3), ("judge", 1), ("judge", 2), (None, 1)]


def test_restarts_are_counted_for_each_actor_within_the_window(tmp_path):
    now, observer = [0.0], FakeObserver()
    supervisor = Supervisor(
        make_config(tmp_path, ray={"max_restarts": 2, "restart_window_s": 100.0}), observer, lambda: now[0]
    )
    for time_, who in ((0, "a"), (50, "a"), (60, "b"), (101, "a")):
        now[0] = time_
        supervisor.lost(who, "killed")
    now[0] = 149
    with pytest.raises(
        EngineError, match=r"^a was started again 2 times within 100 s \(ray\.max_restarts\) and died: no memory\."
    ):
        supervisor.lost("a", "no memory")
    supervisor.lost("b", "killed")
    assert observer.messages[0] == "a died (killed); it is started again" and len(observer.messages) == 5


def test_no_restart_where_none_is_wanted(tmp_path):
    supervisor = Supervisor(make_config(tmp_path, ray={"max_restarts": 0}))
    with pytest.raises(EngineError, match=r"^a died: killed\. What was finished is kept"):
        supervisor.lost("a", "killed")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (ValueError("The request needs more KV cache blocks than there are"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})(), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (KeyError("x"), False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(error, expected):
    assert out_of_memory(error) is expected
    behind = RuntimeError("the engine died")
    behind.__cause__ = error
    assert out_of_memory(behind) is expected
