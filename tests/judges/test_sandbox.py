"""What code in the sandbox cannot do, what it can, and that whoever asks is told the truth of how it ended."""

import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from judges.sandbox import confine
from judges.sandbox.client import Sandbox, SandboxError


@pytest.fixture(scope="module")
def box():
    made = Sandbox("code")
    yield made
    made.close()


def run(box, code, *tests, seconds=1, wall=30.0):
    return box.ask({"code": textwrap.dedent(code), "tests": list(tests)}, seconds=seconds, wall=wall)


def error_of(reply):
    assert reply.end == "done", reply
    return reply.said[0].get("error")


# -- what is stopped -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        # processes
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "PermissionError"),
        ("import multiprocessing as m; m.get_context('spawn').Process(target=print).start()", "PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import os; os.kill(-1, 9)", "PermissionError"),
        ("import os; os.kill(os.getpid(), 9)", "PermissionError"),
        ("import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", "PermissionError"),
        ("import fcntl, os; fcntl.ioctl(os.pipe()[0], 0x8901, os.getppid().to_bytes(4, 'little'))", "PermissionError"),
        ("import os; os.sched_setaffinity(os.getppid(), {0})", "PermissionError"),
        # network
        ("import socket; socket.socket()", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "PermissionError"),
        ("import socket; socket.socket(socket.AF_UNIX)", "PermissionError"),
        # such a pair could send to any socket of this machine
        ("import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "PermissionError"),
        # memory
        ("x = bytearray(10 ** 10)", "MemoryError"),
        ("x = []\nwhile True: x.append('a' * 10 ** 7)", "MemoryError"),
        ("import mmap; mmap.mmap(-1, 10 ** 10)", "OSError"),
        # files
        ("open('OUTSIDE', 'w')", "PermissionError"),
        ("import os; os.remove('OUTSIDE')", "PermissionError"),
        ("import os; os.rename('OUTSIDE', 'here')", "PermissionError"),
        ("import os; os.truncate('OUTSIDE', 0)", "PermissionError"),
        ("import os; os.chmod('OUTSIDE', 0)", "PermissionError"),
        ("import os; os.utime('OUTSIDE')", "PermissionError"),
        ("import os; os.mkdir('OUTSIDE.d')", "PermissionError"),
        ("import os; os.symlink('OUTSIDE', 'link'); open('link', 'w')", "PermissionError"),
        ("import os; os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)", "PermissionError"),
        ("open('OUTSIDE').read()", "PermissionError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("import os; os.listdir('/')", "PermissionError"),
        ("open('big', 'wb').write(bytes(11 << 20))", "OSError"),
        ("x = [open(f'{i}', 'w') for i in range(100)]", "OSError"),
        # the way out
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "ValueError"),
        ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (-1, -1))", "ValueError"),
        ("import os; os.setuid(12345)", "PermissionError"),
        ("import os; os.chroot('.')", "PermissionError"),
        ("import os; open(f'/proc/{os.getppid()}/environ')", "PermissionError"),
        ("import os; open(f'/proc/{os.getppid()}/mem')", "PermissionError"),
        ("import os; os.pidfd_open(os.getppid())", "PermissionError"),
        ("import ctypes; x = ctypes.CDLL(None, use_errno=True)\nif x.unshare(0x10000000): raise OSError", "OSError"),
        ("import ctypes; x = ctypes.CDLL(None)\nif x.ptrace(16, 1, 0, 0): raise OSError", "OSError"),
        ("import ctypes; x = ctypes.CDLL(None)\nif x.syscall(425, 8, 0) == -1: raise OSError", "OSError"),
    ],
)
def test_refused(box, tmp_path, attack, error):
    outside = tmp_path / "outside.txt"
    outside.write_text("as it was")
    before = outside.stat()
    assert (error_of(run(box, attack.replace("OUTSIDE", str(outside)), seconds=10)) or "no error").split(":")[
        0
    ] == error
    assert outside.read_text() == "as it was" and os.listdir(tmp_path) == ["outside.txt"]
    assert outside.stat().st_mode == before.st_mode and outside.stat().st_mtime_ns == before.st_mtime_ns


def test_a_loop_ends_with_its_cpu_time(box):
    assert run(box, "while True: pass").end == "cpu"
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(box, ignoring).end == "cpu"


def test_waiting_ends_by_the_clock(box):
    assert run(box, "import time; time.sleep(60)", wall=0.5).end == "late"


def test_output_goes_nowhere_and_what_is_said_is_bounded(box):
    assert error_of(run(box, "for _ in range(100): print('x' * 10 ** 6)", "pass")) is None
    flood = run(box, "import os\nfor _ in range(10 ** 4): os.write(3, b'x' * 1000)", "pass")
    assert (flood.end, flood.said) == ("died", [])


def test_threads_are_bounded(box):
    code = """
    import threading, time
    for count in range(10 ** 6):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """
    assert error_of(run(box, code)) == "RuntimeError: can't start new thread"


def test_crashes_are_told(box):
    assert run(box, "import ctypes; ctypes.string_at(0)").why == "ended by signal SIGSEGV"
    assert run(box, "import os; os.abort()").why == "ended by signal SIGABRT"
    assert run(box, "import os; os._exit(3)").why == "ended with status 3"


def test_lines_without_the_secret_are_not_heard(box):
    lie = 'import os; os.write(3, b\'{"test": 0, "error": null}\\nx {"test": 0, "error": null}\\n\'); os._exit(0)'
    assert run(box, lie, "assert False").said == []


# -- what is not stopped, and what is allowed ----------------------------------------------------------


def test_code_that_lies_to_its_tests_can(box):
    """Same process, same names: the docstring of the `code` constraint says so."""
    code = "class Yes:\n    def __eq__(self, other): return True\ndef double(x): return Yes()"
    assert run(box, code, "assert double(2) == 4").said == [{"test": 0, "error": None}]


def test_code_may_read_libraries_and_write_in_its_own_folder(box):
    code = """
    import asyncio, json, math, numpy, pathlib, tempfile, threading
    asyncio.run(asyncio.sleep(0))
    pathlib.Path("sub").mkdir()
    pathlib.Path("sub/file").write_text("x")
    pathlib.Path("sub/file").rename("file")
    with tempfile.NamedTemporaryFile("w") as file: file.write("y")
    thread = threading.Thread(target=print); thread.start(); thread.join()
    assert (numpy.ones((200, 200)) @ numpy.ones((200, 200)))[0, 0] == 200
    """
    assert error_of(run(box, code, "assert pathlib.Path('file').read_text() == 'x'", seconds=5)) is None


def test_one_run_leaves_nothing_for_the_next(box):
    spoil = "import builtins, json, os\nopen('left', 'w')\nbuiltins.len = json.dumps = None\nos.environ['LEFT'] = '1'"
    assert run(box, spoil, "pass").said == []  # what it needs to speak with is gone
    look = "import os, json\nassert os.listdir('.') == [] and 'LEFT' not in os.environ"
    assert error_of(run(box, look, "assert len(json.dumps([])) == 2")) is None


def test_no_environment_comes_in(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    fresh = Sandbox("code")
    try:
        assert error_of(run(fresh, "import os\nassert 'OPENAI_API_KEY' not in os.environ", "pass")) is None
    finally:
        fresh.close()


# -- the process beside us -----------------------------------------------------------------------------


def test_many_at_a_time_each_gets_its_own_answer(box):
    with ThreadPoolExecutor(8) as threads:
        tests = [f"raise ValueError({i})" for i in range(60)]
        replies = list(threads.map(lambda test: run(box, "", test, seconds=5), tests))
    assert [reply.said[0]["error"] for reply in replies] == [f"ValueError: {i}" for i in range(60)]


def test_large_tasks_and_long_replies_of_many_at_a_time(box):
    tests = ["raise ValueError('y' * 200)"] * 2000
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: run(box, "#" + "x" * 600_000, *tests, seconds=10), range(16)))
    assert [(reply.end, len(reply.said)) for reply in replies] == [("done", len(tests))] * 16


def test_nothing_is_left_behind():
    fresh = Sandbox("code")
    run(fresh, "open('file', 'w')")
    process, made = psutil.Process(fresh._process.pid), Path(fresh._folder)
    assert os.listdir(made) == [] and process.children() == []
    fresh.close()
    assert not made.exists() and not process.is_running()


def test_a_child_that_somebody_kills_is_no_failed_test():
    """The kernel does, where the machine is out of memory: nothing is known of the response."""
    fresh = Sandbox("code")
    try:
        run(fresh, "")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(run, fresh, "import time; time.sleep(60)", wall=60)
            children = psutil.Process(fresh._process.pid).children
            while not children():
                pass
            children()[0].kill()
            with pytest.raises(SandboxError, match="killed from outside"):
                waiting.result(30)
    finally:
        fresh.close()


def test_it_starts_again_when_it_died():
    fresh = Sandbox("code")
    try:
        run(fresh, "")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(run, fresh, "import time; time.sleep(60)", wall=60)
            children = psutil.Process(fresh._process.pid).children
            while not children():
                pass
            (child,) = children()
            folder = Path(fresh._folder)
            psutil.Process(fresh._process.pid).kill()
            with pytest.raises(SandboxError, match="ended"):
                waiting.result(30)
        assert not folder.exists()
        assert error_of(run(fresh, "", "raise ValueError")) == "ValueError"
        child.wait(30)  # nothing goes on without the one that watches over it
    finally:
        fresh.close()


def test_what_is_lacking_is_said(monkeypatch):
    assert confine.missing() is None
    monkeypatch.setattr(confine, "_landlock_version", lambda: -1)
    assert "Landlock" in confine.missing()
    monkeypatch.setattr(confine.platform, "machine", lambda: "riscv64")
    assert "riscv64" in confine.missing()
    with pytest.raises(SandboxError, match="code cannot be confined here: it needs Linux on x86_64"):
        Sandbox("code").ask({"code": "", "tests": []}, seconds=1, wall=5)


def test_the_program_for_the_other_machine_has_its_numbers(monkeypatch):
    """Only its shape: it cannot be run here."""
    for machine, fork in (("x86_64", 57), ("aarch64", None)):
        monkeypatch.setattr(confine.platform, "machine", lambda machine=machine: machine)
        program = confine._program()
        assert program[1] == (confine._JUMP_EQUAL, 1, 0, confine._ARCHITECTURES[machine])
        compared = {operand for code, _, _, operand in program if code == confine._JUMP_EQUAL}
        assert confine._number((None, 198) if machine == "aarch64" else (41, None)) in compared
        assert (fork in compared) == (fork is not None)
        for place, (code, met, unmet, _) in enumerate(program):
            if code in (confine._JUMP_EQUAL, confine._JUMP_SET, confine._JUMP_AT_LEAST):
                assert place + 1 + max(met, unmet) < len(program)
    assert sys.platform == "linux"
