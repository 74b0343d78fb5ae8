"""Two writers: on one machine, on two that share a folder, and what dead ones leave."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from online_po import files, run_lock
from online_po.errors import DiskError, LedgerError
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.run_lock import OWNER, STALE_S, Process, RunLock
from online_po.step_checkpoints import Trained
from online_po.types import Probe, Reference
from tests.fakes import make_config
from tests.test_loop import make_parts

ELSEWHERE = dataclasses.replace(Process.this(), host="other", boot="another machine's", pid=4711)


@pytest.fixture
def blind(monkeypatch) -> None:
    """The operating system's lock keeps nobody out: as where it holds for one machine, and the other is another."""

    class Nothing:
        def __init__(self, path: Path, **how: bool) -> None: ...

        def acquire(self) -> None: ...

        def release(self) -> None: ...

    monkeypatch.setattr(run_lock, "FileLock", Nothing)


def unheard(root: Path, seconds: float) -> None:
    """The owner was last heard of so long ago, by the file system's clock."""
    heard = time.time() - seconds
    os.utime(root / OWNER, (heard, heard))


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_of_another_machine_the_one_that_is_heard_of_is_not_disturbed(tmp_path, blind):
    first, second = RunLock(tmp_path, me=ELSEWHERE), RunLock(tmp_path)
    first.acquire()
    unheard(tmp_path, STALE_S - 20)
    with pytest.raises(
        LedgerError, match=r"in use by process 4711 on other; .*heard of 10\d s ago; .*taken over 120 s"
    ):
        second.acquire()
    assert second.holder() == "process 4711 on other"
    first.require_held()
    first.release()
    second.acquire()
    assert first.holder() == str(Process.this())
    second.release()
    assert names(tmp_path) == set() and second.holder() is None


def test_of_another_machine_a_dead_one_is_taken_over_and_may_not_commit_when_it_comes_back(tmp_path, blind):
    first, second = RunLock(tmp_path, me=ELSEWHERE), RunLock(tmp_path)
    first.acquire()
    unheard(tmp_path, STALE_S + 20)
    assert second.holder() is None
    second.acquire()
    with pytest.raises(LedgerError, match=rf"was taken over by process {os.getpid()} on .*; this one ends"):
        first.require_held()
    first.release()  # it has nothing to give back
    second.require_held()
    assert second.holder() == str(Process.this())
    second.release()
    assert names(tmp_path) == set()


def test_a_commit_asks_whether_the_folder_is_still_held(tmp_path, blind):
    ledger = Ledger(tmp_path)
    with ledger.lock():
        unheard(tmp_path, STALE_S + 20)
        RunLock(tmp_path, me=ELSEWHERE).acquire()
        with pytest.raises(LedgerError, match="was taken over by process 4711 on other"):
            ledger.commit(
                0, is_adapter=False, reference=Reference(round=0), probe=Probe(token_ids=(1,), token_logps=())
            )
    assert not ledger.is_committed(0) and ledger.holder() is not None


def test_an_owner_is_heard_of_again_and_again(tmp_path, blind):
    lock = RunLock(tmp_path, me=ELSEWHERE, beat_s=0.01)
    lock.acquire()
    unheard(tmp_path, STALE_S + 20)
    deadline = time.monotonic() + 20
    while RunLock(tmp_path).holder() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert RunLock(tmp_path).holder() is not None
    lock.release()


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"started": 1.0}])
def test_of_this_machine_a_dead_process_is_taken_over_at_once(tmp_path, blind, change):
    """Also where its number belongs to another process now."""
    dead = dataclasses.replace(Process.this(), **change)
    RunLock(tmp_path, me=dead).acquire()
    lock = RunLock(tmp_path)
    assert lock.holder() is None
    lock.acquire()
    assert lock.holder() == str(Process.this())
    lock.release()


def test_of_this_machine_a_living_process_is_never_taken_over(tmp_path, blind):
    """However long nothing was heard of it; its lock's file may be what stands still."""
    first = RunLock(tmp_path)
    first.acquire()
    unheard(tmp_path, 10 * STALE_S)
    with pytest.raises(LedgerError, match=rf"in use by process {os.getpid()} on .*; wait for it or stop it$"):
        RunLock(tmp_path).acquire()
    first.release()


@pytest.mark.parametrize("change", [{"boot": "before"}, {"namespace": "pid:[1]"}])
def test_a_number_that_means_nothing_here_is_not_looked_up(tmp_path, blind, change):
    """Of a container with numbers of its own, or of before the machine was started: by what was heard of it."""
    RunLock(tmp_path, me=dataclasses.replace(Process.this(), pid=2**22 + 1, **change)).acquire()
    with pytest.raises(LedgerError, match="heard of 0 s ago"):
        RunLock(tmp_path).acquire()
    unheard(tmp_path, STALE_S + 20)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_of_two_that_find_a_dead_owner_one_takes_over(tmp_path, blind, monkeypatch):
    RunLock(tmp_path, me=ELSEWHERE).acquire()
    unheard(tmp_path, STALE_S + 20)
    first = RunLock(tmp_path, me=dataclasses.replace(ELSEWHERE, host="first"))
    second = RunLock(tmp_path, me=dataclasses.replace(ELSEWHERE, host="second"))
    real = second._create

    def late(path: Path, token: str) -> bool:
        """Between what it read of the owner and its own claim, the other one was faster."""
        if path.name != OWNER and first.token is None:
            first.acquire()
        return real(path, token)

    monkeypatch.setattr(second, "_create", late)
    with pytest.raises(LedgerError, match="in use by process 4711 on first"):
        second.acquire()
    first.require_held()
    first.release()
    assert names(tmp_path) == set()


def test_who_died_while_it_took_over_is_in_nobodys_way_for_long(tmp_path, blind):
    RunLock(tmp_path, me=ELSEWHERE).acquire()
    unheard(tmp_path, STALE_S + 20)
    token = RunLock(tmp_path)._read()[0]
    right = tmp_path / f"lock.takeover.{token}"
    right.write_text("")
    with pytest.raises(LedgerError, match="in use"):
        RunLock(tmp_path).acquire()
    os.utime(right, (1, 1))
    with pytest.raises(LedgerError, match="by a process that died; try again"):
        RunLock(tmp_path).acquire()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_an_owner_that_cannot_be_read_is_waited_for_then_taken_over(tmp_path, blind):
    """Written just now, or torn by a crash."""
    (tmp_path / OWNER).write_text("{")
    with pytest.raises(LedgerError, match="in use by another process"):
        RunLock(tmp_path).acquire()
    unheard(tmp_path, STALE_S + 20)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.require_held()
    lock.release()


def test_who_may_only_read_is_told_what_the_owner_wrote(tmp_path, blind, monkeypatch):
    RunLock(tmp_path, me=ELSEWHERE).acquire()

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)
    assert RunLock(tmp_path).holder() == "process 4711 on other"


def test_two_in_one_process_are_two(tmp_path):
    with Ledger(tmp_path).lock(), pytest.raises(LedgerError, match=f"in use by process {os.getpid()}"):
        Ledger(tmp_path).run_lock.acquire()
    with Ledger(tmp_path).lock():
        assert Ledger(tmp_path).holder() == str(Process.this())


@pytest.mark.parametrize(
    "write", ["responses", "judged", "metrics", "trained", "evaluation", "acts", "weights", "blended", "steps", "prune"]
)
def test_who_was_taken_over_writes_nothing_any_more(tmp_path, blind, write):
    ledger, folder = Ledger(tmp_path), tmp_path / "rounds/000001"
    with ledger.lock():
        unheard(tmp_path, STALE_S + 20)
        RunLock(tmp_path, me=ELSEWHERE).acquire()
        (folder / "steps/000001").mkdir(parents=True)  # not whole
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(LedgerError, match="was taken over by process 4711 on other"):
            match write:
                case "responses":
                    ledger.write_responses(1, 0, [])
                case "judged":
                    ledger.write_judged(1, 0)
                case "metrics":
                    ledger.write_metrics(1, [{}])
                case "trained":
                    ledger._hashed |= {(1, "policy"): {}, (1, "trainer"): {}}
                    ledger.write_trained(1, Trained(steps=[], token_logps=[]))
                case "evaluation":
                    ledger.write_evaluation(1, pa.table({}), {})
                case "acts":
                    ledger.roll_back(since=1, to=0, guard=None, message="")
                case "prune":
                    ledger.prune(3, 1, {}, None)
                case "weights":
                    with ledger.weights(1, "policy"):
                        pass
                case "blended":
                    with ledger.blended_weights(1):
                        pass
                case "steps":
                    ledger.step_plan(1, 1, print)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("part", ["policy", "trainer"])
def test_who_is_taken_over_while_it_saves_leaves_what_the_new_owner_saves(tmp_path, blind, monkeypatch, part):
    ledger, new = Ledger(tmp_path), Ledger(tmp_path)
    monkeypatch.setattr(files, "WRITER", "old")
    with ledger.lock():
        with pytest.raises(LedgerError, match="was taken over by process 4711 on other"):
            with ledger.weights(1, part) as (folder, _):
                (folder / "w").write_text("old")
                unheard(tmp_path, STALE_S + 20)
                new.run_lock = RunLock(tmp_path, me=ELSEWHERE)
                new.run_lock.acquire()
                monkeypatch.setattr(files, "WRITER", "new")
                saving = new.weights(1, part)
                folder, _ = saving.__enter__()
                (folder / "w").write_text("new")
                monkeypatch.setattr(files, "WRITER", "old")
        saving.__exit__(None, None, None)
    assert (ledger.round_dir(1) / part / "w").read_text() == "new"


def test_who_is_taken_over_while_it_trains_trains_no_further(tmp_path, blind):
    """Its step checkpoints are written by the learner, which cannot ask whose the folder is."""
    parts = make_parts(make_config(tmp_path, checkpoint__every_steps=1))
    update = parts.learner.update

    def overtaken(*given):
        for step, metrics in enumerate(update(*given), 1):
            if step == 2:
                unheard(parts.ledger.root, STALE_S + 20)
                RunLock(parts.ledger.root, me=ELSEWHERE).acquire()
            yield metrics

    parts.learner.steps, parts.learner.update = 5, overtaken
    with parts.ledger.lock(), pytest.raises(LedgerError, match="was taken over by process 4711 on other"):
        run_rounds(parts)
    assert parts.learner.taken == [(1, 1), (1, 2)]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_fault_of_the_file_system_is_told_as_one(tmp_path, monkeypatch, number):
    def fails(path: Path, *how: object, **named: object) -> str:
        raise OSError(number, os.strerror(number))

    ledger = Ledger(tmp_path)
    with ledger.lock(), monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fails)
        with pytest.raises(DiskError, match=r"lock.owner.json' cannot be written or read .* mend that and resume"):
            ledger.write_judged(1, 0)


def test_a_killed_process_that_nobody_has_asked_for_its_end_is_dead(tmp_path, blind):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    killed = dataclasses.replace(Process.this(), pid=child.pid, started=psutil.Process(child.pid).create_time())
    assert killed.lives()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its exit code is still there to be had: a zombie
    assert not killed.lives()
    child.wait()


def test_an_owner_that_a_full_disk_kept_from_being_written_is_in_nobodys_way(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ledger = Ledger(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_lock.os, "fsync", full)
        with pytest.raises(DiskError, match="no space left"), ledger.lock():
            pass
    assert not (tmp_path / OWNER).exists()
    with ledger.lock():
        assert ledger.holder() is not None


@pytest.mark.parametrize("number", sorted(run_lock.NO_LOCKS))
def test_where_the_file_system_has_no_locks_the_owners_file_has_to_do(tmp_path, monkeypatch, blind, number):
    def none(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    with pytest.raises(LedgerError, match="in use"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    RunLock(tmp_path, me=ELSEWHERE).acquire()
    unheard(tmp_path, STALE_S + 20)
    second.acquire()
    assert second.holder() == str(Process.this())
    second.release()
