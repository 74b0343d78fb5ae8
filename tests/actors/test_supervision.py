"""Who hangs, who may start again, and what is said of it: without Ray."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from actors.supervision import POLL_S, Progress, Pulse, Supervisor, Watch, end, limits_by_call
from online_po.errors import EngineError, is_out_of_memory
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
        self.watch._thread = SimpleNamespace(is_alive=lambda: True)  # type: ignore[assignment]  # the test looks itself

    def answer(self, actor: str) -> Pulse | None:
        found = self.pulses.get(actor)
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self, actor: str, pulse: Pulse | None) -> None:
        self.killed.append(actor)

    def look(self, now: float, **calls: tuple[str | None, float] | Exception | None) -> list[str]:
        """Looks until a time; a pulse is what it is at and since when, None where it does not come."""
        for actor, said in calls.items():
            self.pulses[actor] = (
                Pulse(call=said[0], seconds=said[1], pid=1, started=0.0, node="n") if isinstance(said, tuple) else said
            )
        while self.now < now:
            self.now = min(now, self.now + POLL_S)
            self.watch.look()
        return self.killed

    def sleep(self, until: float) -> None:
        """Nobody looks; then somebody does."""
        self.now = until
        self.watch.look()


def test_work_may_take_as_long_as_it_likes_while_something_comes_of_it():
    bench = Bench()
    bench.watch.add("generator replica 0", "a")
    for now in range(0, 10_000, 50):
        assert bench.look(now, a=("generate", 59.0)) == []
    assert bench.look(20_000, a=(None, 10_000.0)) == [], "an idle actor may be idle"
    assert bench.watch.why("a") is None


def test_who_hangs_is_named_with_the_limit_and_ended_once():
    bench = Bench()
    for actor in "ab":
        bench.watch.add(f"learner rank {actor}", actor)
    assert bench.look(10, a=("update", 99.0), b=("update", 99.0)) == []
    assert bench.look(12, a=("update", 101.0), b=("update", 0.1)) == ["a"]
    assert bench.watch.why("a").text == "it hung: nothing came of `update` for 101 s (limits.step_s is 100)"
    assert bench.look(13, b=("save", 50.0)) == ["a"]
    bench.watch.remove("a")
    assert bench.watch.why("a") is None


def test_a_process_that_gives_no_pulse_is_found_by_it():
    bench = Bench()
    bench.watch.add("a", "a")
    bench.look(100, a=("generate", 1.0))
    assert bench.look(135, a=None) == []
    assert bench.look(140, a=None) == ["a"]
    assert "no sign of life for 35 s (limits.pulse_s is 30)" in bench.watch.why("a").text


def test_an_actor_that_never_starts_has_the_time_of_a_start():
    bench = Bench()
    bench.watch.add("a", "a")
    assert bench.look(505, a=None) == []
    assert bench.look(510, a=None) == ["a"]
    assert "`start` for 505 s (ray.startup_timeout_s is 500)" in bench.watch.why("a").text


def test_a_dead_actor_is_left_to_those_who_wait_for_it():
    bench = Bench()
    bench.watch.add("a", "a")
    assert bench.look(1000, a=ActorDiedError()) == []
    assert bench.look(9000, a=None) == []


@pytest.mark.parametrize(
    "error", [ActorUnavailableError("away", None), RayTaskError("pulse", "", KeyError("x")), KeyError("x")]
)
def test_one_that_is_out_of_reach_is_watched_on(error):
    bench = Bench()
    for actor in "ab":
        bench.watch.add(actor, actor)
    bench.look(10, a=("generate", 1.0), b=("generate", 1.0))
    bench.look(30, a=error)
    assert bench.look(35, a=("generate", 1.0)) == [], "it is back"
    bench.look(60, a=error, b=("update", 101.0))
    assert bench.killed == ["b"], "the others too"
    assert bench.look(80) == ["b", "a"], "it counts as silence"


def test_one_that_cannot_be_killed_is_killed_at_the_next_look():
    bench = Bench()
    kill, failures = bench.watch._kill, [PermissionError()]

    def fails_once(actor, pulse):
        if failures:
            raise failures.pop()
        kill(actor, pulse)

    bench.watch._kill = fails_once
    bench.watch.add("a", "a")
    assert bench.look(5, a=("update", 101.0)) == []
    assert bench.look(10) == ["a"]


@pytest.fixture
def here(monkeypatch) -> list[str]:
    """Whom Ray was told to kill, of actors on this machine."""
    killed: list[str] = []
    monkeypatch.setattr("actors.supervision.ray.kill", killed.append)
    monkeypatch.setattr("actors.supervision.ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n"))
    monkeypatch.setattr("actors.supervision.HEARS_S", 0.1)
    return killed


def test_a_process_that_hears_nothing_is_killed_and_another_one_of_its_number_is_not(here):
    process = subprocess.Popen(["sleep", "60"])
    started = psutil.Process(process.pid).create_time()
    end("a", Pulse(call=None, seconds=0.0, pid=process.pid, started=started - 5.0, node="n"))
    end("b", Pulse(call=None, seconds=0.0, pid=process.pid, started=started, node="another"))
    assert process.poll() is None
    end("c", Pulse(call=None, seconds=0.0, pid=process.pid, started=started, node="n"))
    assert process.wait(30) == -signal.SIGKILL
    end("d", Pulse(call=None, seconds=0.0, pid=process.pid, started=started, node="n"))
    assert here == list("abcd")


def test_a_process_that_hears_ends_by_itself(here, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr("actors.supervision.HEARS_S", 30.0)
    monkeypatch.setattr("actors.supervision.ray.kill", lambda actor: process.stdin.close())
    monkeypatch.setattr(psutil.Process, "kill", lambda self: pytest.fail("killed"))
    started = psutil.Process(process.pid).create_time()
    end("a", Pulse(call=None, seconds=0.0, pid=process.pid, started=started, node="n"))
    assert not psutil.pid_exists(process.pid)


def test_an_error_of_the_watch_is_told_once():
    bench = Bench()
    told: list[str] = []
    bench.watch._tell = told.append
    bench.watch.add("engine 0", "a")
    bench.watch.add("engine 1", "b")
    assert bench.look(30, a=("shown", 1.0), b=("update", 200.0)) == ["b"]
    assert told == ["engine 0 cannot be watched, or ended ('shown'); it is tried again"]


def test_everything_that_an_actor_is_at_has_a_limit():
    folder = Path(__file__).parents[2] / "actors"
    texts = [path.read_text() for path in folder.glob("*.py")]
    named = {name for text in texts for name in re.findall(r"progress\.at\(\"(\w+)\"\)", text)}
    named |= {name for text in texts for name in re.findall(r"self\._(?:call|stream)\(\"(\w+)\"", text)}
    assert named >= {"start", "judge", "generate", "sync", "answer", "update", "save_policy", "save_trainer"}
    assert named <= limits_by_call(LimitsConfig(), 1.0).keys()


def test_a_pause_of_the_driver_is_nobodys_hang():
    """Whether its actors paused with it or not, and whether an answer came meanwhile or not."""
    bench = Bench()
    for actor in "abc":
        bench.watch.add(actor, actor)
    bench.look(10, a=("generate", 1.0), b=("generate", 1.0), c=("generate", 1.0))
    bench.pulses |= {"b": None, "c": Pulse(call="generate", seconds=4990.0, pid=1, started=0.0, node="n")}
    bench.sleep(5000)
    assert bench.look(5025) == []
    assert bench.look(5045, a=("generate", 45.0)) == ["b"], "from then on silence counts again"
    assert bench.look(5065, a=("generate", 1.0)) == ["b", "c"]


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


def test_a_watch_whose_thread_is_gone_starts_another():
    watch = Watch({"start": ("x", 1e6)}, QUIET, ask=lambda actor: actor, answer=lambda ref: None)
    watch._thread = dead = threading.Thread(target=int)
    watch.add("a", "a")
    assert watch._thread is not dead and watch._thread.is_alive()
    watch.remove("a")


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


SHORT = {"startup_timeout_s": 5.0}
LIMITS_S = {name: 5.0 for name in LimitsConfig.model_fields}


def test_one_that_hangs_every_time_ends_the_run_with_the_limits_as_they_are(tmp_path):
    now = [0.0]
    supervisor = Supervisor(make_config(tmp_path), clock=lambda: now[0])
    hang = LimitsConfig().step_s + 300  # type: ignore[call-arg]
    for _ in range(3):
        now[0] += hang
        supervisor.lost("a", "it hung")
    now[0] += hang
    with pytest.raises(EngineError, match=r"^a was started again 3 times within 9600 s .* and died: it hung"):
        supervisor.lost("a", "it hung")


def test_restarts_are_counted_for_each_actor_within_the_window(tmp_path):
    now, observer = [0.0], FakeObserver()
    supervisor = Supervisor(
        make_config(tmp_path, ray={"max_restarts": 2, "restart_window_s": 100.0, **SHORT}, limits=LIMITS_S),
        observer,
        lambda: now[0],
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
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (KeyError("x"), False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected
    behind = RuntimeError("the engine died")
    behind.__cause__ = error
    assert is_out_of_memory(behind) is expected
