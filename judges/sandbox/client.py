"""The judge's side of the sandbox: starts its process, asks, waits. See `judges.sandbox.server`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Literal

from judges.sandbox.confine import missing

Mode = Literal["code", "math", "reasoning_gym"]
MEMORY = 512 << 20
"""Bytes that a confined process may have on top of what is loaded."""
_START = (
    "import json, sys; own = list(sys.path); sys.path += json.loads(sys.argv[1]); "
    "from judges.sandbox.server import main; main(own)"
)
_PATIENCE = 60.0
"""Seconds beyond a request's own limit after which the process beside us is taken for dead."""


class SandboxError(Exception):
    """The sandbox itself did not work: nothing is known of what was to run in it."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How a confined process ended, and what it said before."""

    end: Literal["done", "cpu", "late", "died"]
    """done: by itself; cpu: its CPU time was spent; late: its wall-clock time was; died: by anything else."""
    said: list[Any]
    why: str


class Sandbox:
    """One process that forks confined ones; starts when first asked, again if it died. Any thread may ask."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """Of its own: who writes may wait for the process, which may wait for its replies to be taken."""
        self._process: subprocess.Popen[bytes] | None = None
        """None: not started, or it ended."""
        self._folder = ""
        """What its confined processes have their own folders in."""
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._asked = 0

    def ask(self, task: dict[str, Any], *, seconds: int, wall: float) -> Reply:
        """Runs a task of `judges.sandbox.server` in a confined process of its own.

        seconds: of CPU time; wall: seconds by the clock. Raises SandboxError.
        """
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            process = self._process or self._start()
            self._asked += 1
            request = {"id": self._asked, "task": task, "seconds": seconds, "memory": MEMORY, "wall": wall}
            self._pending[self._asked] = answer
        assert process.stdin is not None
        # If it just died, `_read` says so to all who wait.
        with self._writing, contextlib.suppress(OSError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        try:
            reply = answer.result(wall + _PATIENCE)
        except FutureTimeout as error:
            process.kill()
            raise SandboxError("the sandbox process does not answer") from error
        said = [item for item in reply["said"] if isinstance(item, dict)]
        for item in said:
            if "unconfined" in item:
                raise SandboxError(f"the kernel refused the sandbox: {item['unconfined']}")
        if reply["end"] == "refused":
            raise SandboxError(reply["why"])
        if reply["end"] == "killed":
            raise SandboxError("a confined process was killed from outside; the machine may be out of memory")
        return Reply(end=reply["end"], said=said, why=reply["why"])

    def close(self) -> None:
        """Ends the process and what runs in it."""
        process = self._process
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        """Raises SandboxError where it cannot be."""
        if (lacks := missing()) is not None:
            raise SandboxError(f"code cannot be confined here: {lacks}")
        path = list(dict.fromkeys(os.path.abspath(folder) for folder in sys.path))
        # Nothing of the judge's environment: no keys.
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, json.dumps(path), self._mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        assert process.stdout is not None
        first = json.loads(process.stdout.readline() or '{"error": "it ended at once"}')
        if "error" in first:
            process.kill()
            process.wait()
            raise SandboxError(f"the sandbox process did not start: {first['error']}")
        self._process, self._folder = process, first["ready"]
        threading.Thread(target=self._read, args=(process, self._folder), name="sandbox", daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[bytes], folder: str) -> None:
        """Hands out replies until the process ends; then all who still wait are told, and its folder goes."""
        assert process.stdout is not None
        for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # it died over it
            reply = json.loads(line)
            with self._lock:
                answer = self._pending.pop(reply["id"])
            answer.set_result(reply)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)  # a killed process leaves it
        with self._lock:
            self._process, waiting, self._pending = None, self._pending, {}
        for answer in waiting.values():
            answer.set_exception(SandboxError("the sandbox process ended"))


@functools.cache
def sandbox(mode: Mode) -> Sandbox:
    """This process's sandbox of a mode; it ends with this process."""
    return Sandbox(mode)
