"""The process beside a judge that runs what models wrote, each piece in a confined child of its own.

It loads what its mode needs once, then answers requests, one JSON line each, many at a time: forks, confines the child
(`judges.sandbox.confine`), and says what the child said and how it ended. Started by `judges.sandbox.client` as
`python -I`, with a bare environment; ends when its standard input does. Standard library alone, but for its verifiers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import resource
import secrets
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from judges.sandbox.confine import confine, end_with_parent

MAX_SAID = 4 << 20
"""Bytes that a child may say; more ends it. Thousands of tests take less."""
FILE_SIZE = 10 << 20
MAX_NOTE = 120
"""Characters of an error's text."""

Say = Callable[[Any], None]
"""Takes JSON, and says it to whoever asked."""
Task = Callable[[dict[str, Any], Say], None]


# -- what children do ------------------------------------------------------------------------------


def run_tests(task: dict[str, Any], say: Say) -> None:
    """Runs `code`, then each of `tests` in the same names; says of each how it went, {"test": i, "error": text | None},
    or {"error": text} where the code did not even run."""
    names: dict[str, Any] = {"__name__": "response"}
    try:
        exec(compile(task["code"], "response.py", "exec"), names)
    except BaseException as error:  # SystemExit too: whatever ends the code ends it badly
        say({"error": note(error)})
        return
    for index, test in enumerate(task["tests"]):
        try:
            exec(compile(test, f"test {index + 1}", "exec"), names)
        except BaseException as error:
            say({"test": index, "error": note(error)})
        else:
            say({"test": index, "error": None})


def load_tests() -> tuple[Task, Callable[[dict[str, Any]], None]]:
    return run_tests, lambda task: None


def load_math() -> tuple[Task, Callable[[dict[str, Any]], None]]:
    """math-verify. Its own time-outs are signals of the main thread; the child's CPU limit stands in for them."""
    from math_verify import parse, verify
    from sympy import Basic, MatrixBase

    read = functools.partial(parse, parsing_timeout=None)

    def read_answer(text: str) -> list[Any]:
        """The answer as LaTeX, with or without the dollar signs around it, else as plain text."""
        marked = any(mark in text for mark in ("$", "\\boxed", "\\[", "\\("))
        for way in (text,) if marked else (f"${text}$", text):
            found = read(way)
            if any(isinstance(item, Basic | MatrixBase) for item in found):
                return list(found)
        return []

    def check(task: dict[str, Any], say: Say) -> None:
        answer = read_answer(task["answer"])
        if "response" not in task:
            say({"readable": bool(answer)})
            return
        found = read(task["response"])
        say({"found": str(found[-1])[:MAX_NOTE] if found else None, "equal": False})
        say({"equal": bool(verify(answer, found, timeout_seconds=None))})

    verify(read("$1$"), read(r"$\frac{2}{2}$"), timeout_seconds=None)  # fills its caches, for the children to inherit
    return check, lambda task: None


def load_reasoning_gym() -> tuple[Task, Callable[[dict[str, Any]], None]]:
    from reasoning_gym.factory import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    verifier = functools.lru_cache(maxsize=None)(get_score_answer_fn)

    def name(task: dict[str, Any]) -> str:
        return str(task["entry"]["metadata"]["source_dataset"])

    def check(task: dict[str, Any], say: Say) -> None:
        response = task["response"]
        answer = extract_answer(response) if task["extract"] else None
        say({"score": float(verifier(name(task))(response if answer is None else answer, task["entry"]))})

    return check, lambda task: void(verifier(name(task)))


def void(_: Any) -> None:
    """For its argument's effect."""


MODES = {"code": load_tests, "math": load_math, "reasoning_gym": load_reasoning_gym}


def note(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:MAX_NOTE]


# -- the server ------------------------------------------------------------------------------------


@dataclass
class Child:
    request: int
    pid: int
    folder: str
    reads: int
    """What it says."""
    watch: int
    """Readable when it ends."""
    nonce: str
    """What it must begin each line with: nobody else knows it unless he looks through its memory."""
    seconds: int
    deadline: float
    said: bytearray = field(default_factory=bytearray)
    late: bool = False
    flooded: bool = False


class Server:
    def __init__(self, mode: str, own_path: list[str]) -> None:
        self.task, self.prepare = MODES[mode]()
        self.readable = [] if mode == "code" else [path for path in sys.path if os.path.isdir(path)]
        if mode == "code":
            sys.path[:] = own_path
        self.base = tempfile.mkdtemp(prefix="online-po-sandbox-")
        self.children: dict[int, Child] = {}
        """By `watch`."""
        self.selector = selectors.DefaultSelector()
        self.incoming = bytearray()
        self.requests, self.replies = os.dup(0), os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        os.set_blocking(self.requests, False)
        self.selector.register(self.requests, selectors.EVENT_READ)

    def serve(self) -> None:
        self.reply({"ready": self.base})
        try:
            while True:
                for key, _ in self.selector.select(self.patience()):
                    child: Child | None = key.data
                    if child is None:
                        if not self.take():
                            return
                    elif self.children.get(child.watch) is not child:
                        continue  # it ended in this very turn
                    elif key.fd == child.watch:
                        self.finish(child)
                    else:
                        self.listen(child)
                now = time.monotonic()
                for child in self.children.values():
                    if child.deadline <= now and not child.late:
                        child.late = True
                        os.kill(child.pid, signal.SIGKILL)
        finally:
            for child in self.children.values():
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
            shutil.rmtree(self.base, ignore_errors=True)

    def patience(self) -> float | None:
        """Seconds until the next child is late."""
        waiting = [child.deadline for child in self.children.values() if not child.late]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def take(self) -> bool:
        """Reads requests and starts a child for each; False at the end of them."""
        chunk = os.read(self.requests, 1 << 20)
        self.incoming += chunk
        *lines, rest = self.incoming.split(b"\n")
        self.incoming = bytearray(rest)
        for line in lines:
            self.start(json.loads(line))
        return bool(chunk)

    def start(self, request: dict[str, Any]) -> None:
        try:
            self.prepare(request["task"])
        except Exception as error:  # what it names is not there: the one who asked is told
            self.reply({"id": request["id"], "end": "refused", "said": [], "why": note(error)})
            return
        folder, nonce = tempfile.mkdtemp(dir=self.base), secrets.token_hex(16)
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.be_child(request, folder, nonce, writes)
        os.close(writes)
        os.set_blocking(reads, False)
        child = Child(
            request=request["id"], pid=pid, folder=folder, reads=reads, watch=os.pidfd_open(pid), nonce=nonce,
            seconds=request["seconds"], deadline=time.monotonic() + request["wall"],
        )  # fmt: skip
        self.children[child.watch] = child
        self.selector.register(child.watch, selectors.EVENT_READ, child)
        self.selector.register(reads, selectors.EVENT_READ, child)

    def be_child(self, request: dict[str, Any], folder: str, nonce: str, writes: int) -> None:
        """Never returns."""
        try:
            end_with_parent()
            os.dup2(writes, 3)
            os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            os.chdir(folder)
            os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = folder

            def say(what: Any) -> None:
                os.write(3, f"{nonce} {json.dumps(what)}\n".encode())

            try:
                confine(
                    folder, seconds=request["seconds"], memory=request["memory"], file_size=FILE_SIZE,
                    readable=self.readable,
                )  # fmt: skip
            except OSError as error:
                say({"unconfined": note(error)})
                os._exit(1)
            self.task(request["task"], say)
        except MemoryError:
            os._exit(1)
        except Exception as error:
            with contextlib.suppress(Exception):
                say({"raised": note(error)})
        finally:
            os._exit(0)

    def listen(self, child: Child) -> None:
        """Takes in what a child says."""
        while True:
            try:
                chunk = os.read(child.reads, 1 << 16)
            except BlockingIOError:
                return
            if not chunk:
                self.selector.unregister(child.reads)
                return
            child.said += chunk
            if len(child.said) > MAX_SAID:
                child.flooded = True
                os.kill(child.pid, signal.SIGKILL)
                self.selector.unregister(child.reads)
                return

    def finish(self, child: Child) -> None:
        """Replies for a child that has ended."""
        del self.children[child.watch]
        self.selector.unregister(child.watch)
        if child.reads in self.selector.get_map():
            self.listen(child)
        if child.reads in self.selector.get_map():
            self.selector.unregister(child.reads)
        _, status, usage = os.wait4(child.pid, 0)
        os.close(child.reads)
        os.close(child.watch)
        shutil.rmtree(child.folder, ignore_errors=True)
        spent = usage.ru_utime + usage.ru_stime
        end = "done"
        if child.late:
            end = "late"
        elif os.WIFSIGNALED(status) and spent >= child.seconds - 0.5:
            end = "cpu"
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not child.flooded:
            end = "killed"  # not by itself, which it cannot
        elif status:
            end = "died"
        head = f"{child.nonce} ".encode()
        said = [line[len(head) :] for line in bytes(child.said).splitlines() if line.startswith(head)]
        self.reply({"id": child.request, "end": end, "said": [_json(line) for line in said], "why": _why(status)})

    def reply(self, what: Any) -> None:
        data = json.dumps(what).encode() + b"\n"
        while data:
            data = data[os.write(self.replies, data) :]


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _why(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"ended by signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"


def main(own_path: list[str]) -> None:
    """Called by the client's `-c` code. `own_path`: the interpreter's search path, without the judge's."""
    logging.disable(logging.CRITICAL)
    try:
        server = Server(sys.argv[2], own_path)
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    server.serve()
