"""The real command line, lock, ledger and loop with fake parts, in processes of their own that start at once.

As a program it is a server: it has imported everything, and forks a process for each line of JSON it is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from online_po import cli, launch, report
from online_po.config import Config
from online_po.ledger import Ledger
from online_po.observers import PhaseTimer, Silent
from online_po.parts import Parts
from online_po.protocols import Observer
from online_po.room import RoundBytes
from online_po.stopping import Stop
from tests.fakes import FakeGenerator, FakeJudge, SickLearner, make_prompts

VERSIONS = {"python": "3.11"}


@contextmanager
def faked(**parts: Any) -> Iterator[None]:
    """Inside the block `online_po.launch` runs fakes (or these `parts`) on 20 prompts, and plans nothing."""
    prompts = make_prompts(24)

    def plan(config: Config, told: Observer) -> SimpleNamespace:
        return SimpleNamespace(
            config=config, heldout=prompts[20:], figures={}, warnings=[], need=SimpleNamespace(round=RoundBytes())
        )

    def run(plan: Any, ledger: Ledger, observer: Observer, timer: PhaseTimer, stop: Stop) -> None:
        made = {"generator": FakeGenerator(), "judges": FakeJudge(), "learner": SickLearner(plan.config, 99)} | parts
        launch.run_rounds(
            Parts(
                config=plan.config,
                ledger=ledger,
                observer=observer,
                timer=timer,
                train=prompts[:20],
                heldout=plan.heldout,
                start=Path(plan.config.model.path),
                stop=stop,
                **made,
            )
        )

    changed = {"checked_plan": plan, "_run_with_actors": run, "_run_info": lambda _: {"versions": VERSIONS}}
    before = {name: getattr(launch, name) for name in changed}
    for name, value in changed.items():
        setattr(launch, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(launch, name, value)


class Holding(Silent):
    """Makes one phase take a while: `place`/held appears when it begins."""

    def __init__(self, place: Path, phase: str, round_: int, seconds: float) -> None:
        self.place, self.held, self.seconds = place, (phase, round_), seconds

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        if (name, round_) == self.held and not (self.place / "held").exists():
            (self.place / "held").touch()
            end = time.monotonic() + self.seconds
            while time.monotonic() < end:  # a sleep that a signal's handler interrupts would go on all the same
                time.sleep(0.02)
        yield


@dataclass
class FakeRun:
    """A process of the server's."""

    server: subprocess.Popen[str]
    pid: int
    log: Path

    def wait(self) -> int:
        """Its exit code."""
        assert self.server.stdout is not None
        return int(json.loads(self.server.stdout.readline())["code"])


def start(
    server: subprocess.Popen[str], place: Path, *args: str, hold: tuple[str, int] = ("", 0), seconds: float = 0.0
) -> FakeRun:
    """`online-po` with these arguments; `hold`: see `Holding`. One at a time."""
    assert server.stdin is not None and server.stdout is not None
    order = {"args": args, "place": str(place), "hold": [*hold, seconds]}
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return FakeRun(server, json.loads(server.stdout.readline())["pid"], place / "log")


@contextmanager
def serving() -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.fake_run"]
    server = subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield server
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(30)


def _serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(order["args"], Path(order["place"]), order["hold"]))
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


def _child(args: list[str], place: Path, hold: list[Any]) -> int:
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["online-po", *args]
    report.render = lambda view: ""  # takes a second
    real = launch.CompositeObserver
    launch.CompositeObserver = lambda observers: real([*observers, Holding(place, *hold)])  # type: ignore[misc,assignment]
    try:
        with faked():
            cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve()
