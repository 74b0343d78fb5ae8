"""One process at a time writes to a run folder, also where several machines see it.

Two things say who does. `lock` is locked by the operating system for as long as the process lives; on a network file
system that may hold for one machine only. `lock.owner.json` names the owner, and its owner touches it every few
seconds. What a dead process left is taken over: of this machine as soon as its process is gone, of another one when
nothing was heard of it for `STALE_S`. Ages are differences of times that the file system itself wrote, so that the
machines' clocks need not agree.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from online_po.errors import LedgerError
from online_po.files import TMP, explained

BEAT_S = 10.0
"""How often an owner is heard of."""
STALE_S = 120.0
"""An owner on another machine that was not heard of for so long is dead. File attributes may be a minute old there."""
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
LOCK, OWNER, TAKEOVER = "lock", "lock.owner.json", "lock.takeover."


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process, as other processes can find out whether it lives."""

    host: str
    boot: str
    """Of the machine, since it was started."""
    namespace: str
    """In which the number counts: a container may have its own."""
    pid: int
    started: float
    """Unix seconds; tells the process from a later one of its number."""

    @classmethod
    def this(cls) -> Process:
        return cls(
            host=socket.gethostname(),
            boot=_first_line(Path("/proc/sys/kernel/random/boot_id")) or f"{psutil.boot_time():.0f}",
            namespace=_link(Path("/proc/self/ns/pid")),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
        )

    def sees(self, other: Process) -> bool:
        """Whether the other's number means something here."""
        return (self.boot, self.namespace) == (other.boot, other.namespace)

    def lives(self) -> bool:
        """Of a process that is seen from here."""
        try:
            process = psutil.Process(self.pid)
            dead = process.status() == psutil.STATUS_ZOMBIE  # its parent has not asked for its exit code
            return not dead and abs(process.create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _first_line(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _link(path: Path) -> str:
    return os.readlink(path) if path.exists() else ""


class RunLock:
    """The lock of one run folder. `me`, `beat_s` and `stale_s` are there for tests."""

    def __init__(
        self, root: Path, *, me: Process | None = None, beat_s: float = BEAT_S, stale_s: float = STALE_S
    ) -> None:
        self.root, self.owner = root, root / OWNER
        self.me, self.beat_s, self.stale_s = me or Process.this(), beat_s, stale_s
        self.token: str | None = None
        self._file: FileLock | None = None
        self._end = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Raises LedgerError, naming the owner, where somebody else has it; OSError where the folder cannot be
        written."""
        lock = FileLock(self.root / LOCK, blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise self._taken() from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            # A file system without locks: the owner's file has to do.
        try:
            self.token = self._claim()
        except BaseException:
            lock.release()
            raise
        self._file = lock
        self._end.clear()
        self._heart = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Gives the folder back, unless another process has taken it over."""
        if self._file is None or self._heart is None:
            return
        self._end.set()
        self._heart.join()
        if self._holds():
            self.owner.unlink(missing_ok=True)
        self.token = None
        self._file.release()
        self._file = None

    def require_held(self) -> None:
        """Raises LedgerError where another process took the folder over meanwhile: this one was not heard of (it, or
        the file system, stood still), and must not commit any more."""
        with explained(self.owner):
            held, by = self.token is None or self._holds(), self._read()
        if not held:
            who = by[1] if by else "another process"
            raise LedgerError(
                f"run folder {str(self.root)!r} was taken over by {who} while this process was not heard of for "
                f"{self.stale_s:.0f} s; this one ends, the other one goes on"
            )

    def holder(self) -> str | None:
        """Who holds the folder now, for people; None if nobody does."""
        found = self._read()
        try:
            return str(found[1]) if found is not None and self._alive(found[1]) else None
        except OSError:  # a folder that we may only read: then what its owner wrote has to do
            return str(found[1]) if found is not None else None

    # -- who owns it -----------------------------------------------------------------------------

    def _claim(self) -> str:
        """Writes this process down as the owner; its token."""
        token = uuid.uuid4().hex
        if self._create(self.owner, token):
            return token
        found = self._read()
        if found is not None and self._alive(found[1]):
            raise self._taken()
        if found is None and self._age() < self.stale_s:  # not yet written, or torn by a crash just now
            raise self._taken()
        # Whoever may take over from this very owner is the one that first writes a file by the owner's name.
        right = self.root / f"{TAKEOVER}{found[0] if found else 'torn'}"
        if not self._create(right, token):
            if self._age(right) < self.stale_s:
                raise self._taken()
            right.unlink(missing_ok=True)  # it died on the way
            raise LedgerError(f"run folder {str(self.root)!r} was being taken over by a process that died; try again")
        try:
            now = self._read()
            if (now and now[0]) != (found and found[0]):  # somebody else was first
                raise self._taken()
            os.replace(right, self.owner)
        finally:
            right.unlink(missing_ok=True)
        return token

    def _create(self, path: Path, token: str) -> bool:
        """Writes token and process to a file that is not there yet; False where it is."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"token": token, **vars(self.me)}, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # a full disk: an empty one would look like somebody's
            path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> tuple[str, Process] | None:
        """Token and process of the owner; None where there is none, or none that can be read."""
        try:
            record: dict[str, Any] = json.loads(self.owner.read_text())
            return record.pop("token"), Process(**record)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _holds(self) -> bool:
        found = self._read()
        return found is not None and found[0] == self.token

    def _alive(self, owner: Process) -> bool:
        return owner.lives() if self.me.sees(owner) else self._age() < self.stale_s

    def _age(self, path: Path | None = None) -> float:
        """Seconds since the owner was heard of, by the file system's own clock."""
        probe = self.root / f"{LOCK}.{uuid.uuid4().hex}{TMP}"
        try:
            with (path or self.owner).open("rb") as file:  # opened: a network file system then asks its server
                heard = os.fstat(file.fileno()).st_mtime
            probe.touch()
            return probe.stat().st_mtime - heard
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _taken(self) -> LedgerError:
        found = self._read()
        who = str(found[1]) if found else "another process"
        text = f"run folder {str(self.root)!r} is in use by {who}; wait for it or stop it"
        if found and not self.me.sees(found[1]):
            text += (
                f" (it was heard of {self._age():.0f} s ago; if it is dead, its lock is taken over {self.stale_s:.0f} "
                "s after it was last heard of)"
            )
        return LedgerError(text)

    def _beat(self) -> None:
        while not self._end.wait(self.beat_s):
            try:
                if not self._holds():
                    return
                os.utime(self.owner)
            except OSError:  # a file system that stands still, or is full: the next beat may come through
                continue
