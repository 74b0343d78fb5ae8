"""Writing the run's judge cache: answers that are never asked for twice, and a row for each call.

Many processes may write. On one machine the file is in WAL mode; where judge processes run on several nodes, or the
folder is on a network file system, it keeps SQLite's rollback journal, which needs no memory shared between writers
but locks that work there (NFS 4 has them).
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from judges.questions import Answer
from online_po import files
from online_po.errors import BudgetError, LedgerError
from online_po.fail_points import fail_point
from online_po.judge_cache import (
    APPLICATION_ID,
    BUSY_TIMEOUT_S,
    OPEN,
    SCHEMA_VERSION,
    SEAL,
    TABLES,
    connect,
    explain,
    require_ours,
    require_whole,
    seal,
)
from online_po.judge_configs.base import BudgetConfig
from online_po.types import FailureKind

BATCH = 1024
"""So many writes go into one transaction at most."""
HITS_S = 0.5
"""Counts of hits wait for another write at most about so long."""
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "glusterfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "smbfs",
    "virtiofs", "wekafs",
}  # fmt: skip
"""File systems that several machines may mount; so may any `fuse.` one."""


def prepare(path: Path, *, nodes: int = 1) -> None:
    """Makes the judge cache, or checks the one that is there; the one process that starts the writers calls it first.

    Calls that a killed process left open count as lost, at the most they can have cost. `nodes`: machines that judge
    processes may be on. Raises LedgerError.
    """
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    require_whole(path)
    local = nodes == 1 and not _is_on_network(path)
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables == 0:
                for statement in TABLES.split(";\n"):
                    connection.execute(statement)
                connection.execute("INSERT INTO seal VALUES (?)", ((SEAL + OPEN).decode(),))
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            require_ours(connection, path)
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise explain(sqlite3.DatabaseError(verdict), path)
            _lose(connection, "outcome = 'open'")
            # Before anything else is written to the file, and before its journal is another one.
            connection.execute("UPDATE seal SET hash = ?", ((SEAL + OPEN).decode(),))
            connection.execute("COMMIT")
            fail_point("judge_cache.opened")
            connection.execute(f"PRAGMA journal_mode = {'WAL' if local else 'DELETE'}")
            fail_point("judge_cache.prepared")
    except sqlite3.Error as error:
        raise explain(error, path) from error


def disown(path: Path, owner: str) -> None:
    """After a process died while others go on: its open calls count as lost, so that nobody waits for their answers.
    Raises LedgerError."""
    try:
        with closing(connect(path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            _lose(connection, "outcome = 'open' AND owner = ?", owner)
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise explain(error, path) from error


def _lose(connection: sqlite3.Connection, which: str, *values: str) -> None:
    """Open calls become lost ones, at the most they can have cost."""
    lost = connection.execute(f"SELECT round, sum(cost) FROM calls WHERE {which} GROUP BY round", values)
    for round_, cost in lost.fetchall():
        connection.execute("UPDATE spent SET money = money + ? WHERE round = ?", (cost, round_))
    connection.execute(f"UPDATE calls SET outcome = 'lost', key = NULL WHERE {which}", values)


def release(path: Path) -> None:
    """Once all writers are gone: leaves one plain file with its hash in it, which can be copied or read anywhere."""
    # A process that is still ending, or a reader: the file then stays in WAL mode, which harms nobody. One that was
    # not in WAL mode may have a writer still, and gets no hash.
    with suppress(sqlite3.Error, LedgerError, OSError):
        with closing(connect(path)) as connection:
            connection.execute("PRAGMA busy_timeout = 2000")
            (was,) = connection.execute("PRAGMA journal_mode").fetchone()
            (now,) = connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        if (was, now) == ("wal", "delete"):
            seal(path)


def _is_on_network(path: Path) -> bool:
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    folder = path.absolute().resolve().parent
    kind = next((mounts[parent] for parent in [folder, *folder.parents] if parent in mounts), "")
    return kind in NETWORK or kind.startswith("fuse.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One attempt to get an answer, as it is counted."""

    round: int
    judge: str
    """Hash of the judge's identity."""
    attempt: int
    """1 for the first call for a question."""
    outcome: FailureKind | str
    """ok, or how it failed."""
    seconds: float
    prompt_tokens: int = 0
    response_tokens: int = 0
    cost: float = 0.0
    cut: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    writes: bool
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class JudgeStore:
    """One process's access to a judge cache that `prepare` made.

    A thread does all the work: what waits is written in one transaction, so that many answers share one fsync. Every
    method returns when what it wrote is durable. Its methods are for one event loop at a time. Any of them raises
    LedgerError where the file cannot be read or written. `owner`: the process, for `disown`.
    """

    def __init__(self, path: Path, owner: str = "") -> None:
        self.path, self._owner = path, owner
        self._connection = connect(path)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._hits: Counter[tuple[int, str]] = Counter()
        self._hits_since = 0.0
        self._thread = threading.Thread(target=self._serve, name="judge-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes what waits, and closes the file."""
        self._jobs.put(None)
        self._thread.join()

    async def find(self, key: str, round_: int, judge: str) -> Answer | None:
        """The remembered answer to a question; it counts as a hit."""

        def work(connection: sqlite3.Connection) -> Answer | None:
            return self._find(connection, key, round_, judge)

        return await self._do(work, writes=False)

    async def hit(self, round_: int, judge: str) -> None:
        """Counts a question that was answered without a call or a look-up."""
        await self._do(lambda _: self._count_hit(round_, judge), writes=False)

    async def begin(
        self, key: str, round_: int, judge: str, attempt: int, *, bound: float, budget: BudgetConfig
    ) -> int | Answer | None:
        """Before a call that others must know of: its number, once it is on disk that it goes out.

        An Answer where somebody else had the same one meanwhile. None: wait, and try again; somebody else is asking
        the same, or the money left is held for calls under way. `bound`: the most that the call can cost. Raises
        BudgetError where the budget allows no further call.
        """

        def work(connection: sqlite3.Connection) -> int | Answer | None:
            if (known := self._find(connection, key, round_, judge)) is not None:
                return known
            taken = connection.execute("SELECT 1 FROM calls WHERE key = ? AND outcome = 'open'", (_blob(key),))
            if taken.fetchone() is not None or not _affords(connection, budget, round_, bound):
                return None
            _spend(connection, round_, calls=1)
            return connection.execute(
                "INSERT INTO calls (round, judge, attempt, outcome, key, owner, prompt_tokens, response_tokens, cost,"
                " cut) VALUES (?, ?, ?, 'open', ?, ?, 0, 0, ?, 0)",
                (round_, judge, attempt, _blob(key), self._owner, bound),
            ).lastrowid

        return await self._do(work, writes=True)

    async def finish(self, call: Call, key: str, answer: Answer | None, number: int | None = None) -> None:
        """Counts a call that is over, and remembers its answer if it gave one. `number`: what `begin` gave."""

        value = None if answer is None else json.dumps(answer.value, allow_nan=False)

        def work(connection: sqlite3.Connection) -> None:
            counts = (call.prompt_tokens, call.response_tokens, call.cost, call.seconds, call.cut)
            if number is None:
                connection.execute(
                    "INSERT INTO calls (round, judge, attempt, outcome, prompt_tokens, response_tokens, cost, seconds,"
                    " cut) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (call.round, call.judge, call.attempt, call.outcome, *counts),
                )
                money = call.cost
            else:
                (held,) = connection.execute(
                    "SELECT CASE outcome WHEN 'lost' THEN cost ELSE 0 END FROM calls WHERE id = ?", (number,)
                ).fetchone()
                money = call.cost - held  # of one that was given up, the most is spent already
                connection.execute(
                    "UPDATE calls SET outcome = ?, key = NULL, prompt_tokens = ?, response_tokens = ?, cost = ?,"
                    " seconds = ?, cut = ? WHERE id = ?",
                    (call.outcome, *counts, number),
                )
            _spend(connection, call.round, calls=number is None, money=money)
            if answer is not None:
                said = (value, answer.rationale, *_taken(answer))
                row = (_blob(key), call.judge, call.round, *said, _crc(key, said))
                connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

        await self._do(work, writes=True)

    def _find(self, connection: sqlite3.Connection, key: str, round_: int, judge: str) -> Answer | None:
        row = connection.execute(
            "SELECT value, rationale, prompt_tokens, response_tokens, cost, cut, crc FROM answers WHERE key = ?",
            (_blob(key),),
        ).fetchone()
        if row is None:
            return None
        *said, crc = row
        if crc != _crc(key, said):
            raise sqlite3.DatabaseError("an answer is not as it was written")
        self._count_hit(round_, judge)
        value, rationale, prompt_tokens, response_tokens, cost, cut = said
        return Answer(
            value=json.loads(value),
            rationale=rationale,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            cost=cost,
            cut=bool(cut),
        )

    def _count_hit(self, round_: int, judge: str) -> None:
        if not self._hits:
            self._hits_since = time.monotonic()
        self._hits[round_, judge] += 1

    # -- the thread ------------------------------------------------------------------------------

    async def _do(self, work: Callable[[sqlite3.Connection], Any], *, writes: bool) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._jobs.put(_Job(work, writes, loop, future))
        return await future

    def _serve(self) -> None:
        open_ = True
        while open_:
            jobs: list[_Job] = []
            with suppress(queue.Empty):
                item = self._jobs.get(timeout=HITS_S if self._hits else None)
                while item is not None:
                    jobs.append(item)
                    if len(jobs) == BATCH:
                        break
                    item = self._jobs.get_nowait()
                open_ = item is not None
            self._run([job for job in jobs if not job.writes])
            writes = [job for job in jobs if job.writes]
            if writes or (self._hits and (not open_ or time.monotonic() - self._hits_since >= HITS_S)):
                self._write(writes)
            del jobs, writes  # a waiting thread holds no answers
        self._connection.close()

    # Whatever goes wrong is handed to those who wait: a thread that died would let them wait for ever.

    def _run(self, jobs: list[_Job]) -> None:
        try:
            outcomes = self._outcomes(jobs)
        except Exception as error:
            outcomes = self._failed(jobs, error)
        _deliver(outcomes)

    def _write(self, jobs: list[_Job]) -> None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            outcomes = self._outcomes(jobs)
            for (round_, judge), count in self._hits.items():
                self._connection.execute(
                    "INSERT INTO hits VALUES (?, ?, ?)"
                    " ON CONFLICT (round, judge) DO UPDATE SET count = count + excluded.count",
                    (round_, judge, count),
                )
            fail_point("judge_cache.written")
            self._connection.execute("COMMIT")
            fail_point("judge_cache.committed")
            self._hits.clear()
        except Exception as error:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            if len(jobs) > 1 and not isinstance(error, sqlite3.Error):  # one of them, say a number too large
                for job in jobs:
                    self._write([job])
                return
            outcomes = self._failed(jobs, error)
        _deliver(outcomes)

    def _failed(self, jobs: list[_Job], error: Exception) -> list[_Outcome]:
        told = explain(error, self.path) if isinstance(error, sqlite3.Error) else error
        return [(job, None, told) for job in jobs]

    def _outcomes(self, jobs: list[_Job]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        for job in jobs:
            try:
                outcomes.append((job, job.work(self._connection), None))
            except BudgetError as error:  # raised before anything was written
                outcomes.append((job, None, error))
        return outcomes


_Outcome = tuple[_Job, Any, Exception | None]


def _deliver(outcomes: list[_Outcome]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome[0].loop, []).append(outcome)
    for loop, own in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(_set_results, own)


def _set_results(outcomes: list[_Outcome]) -> None:
    for job, value, error in outcomes:
        if job.future.done():  # who asked was cancelled
            continue
        if error is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(error)


def _blob(key: str) -> bytes:
    return bytes.fromhex(key)


def _taken(answer: Answer) -> tuple[int, int, float, int]:
    return answer.prompt_tokens, answer.response_tokens, float(answer.cost), int(answer.cut)


def _crc(key: str, said: Sequence[Any]) -> int:
    """Checksum of an answer's row; what is trained on must not be a bit that flipped, in a killed run either."""
    return zlib.crc32(json.dumps([key, *said]).encode())


def _spend(connection: sqlite3.Connection, round_: int, *, calls: int = 0, money: float = 0.0) -> None:
    connection.execute(
        "INSERT INTO spent VALUES (?, ?, ?)"
        " ON CONFLICT (round) DO UPDATE SET calls = calls + excluded.calls, money = money + excluded.money",
        (round_, int(calls), money),
    )


def _affords(connection: sqlite3.Connection, budget: BudgetConfig, round_: int, bound: float) -> bool:
    """Whether one more call of at most `bound` fits now; False: perhaps once calls under way are over. BudgetError:
    never."""
    for suffix, where in (("_per_round", "WHERE round = ?"), ("", "")):
        calls, money = getattr(budget, f"calls{suffix}"), getattr(budget, f"money{suffix}")
        if calls is None and money is None:
            continue
        values = (round_,) if where else ()
        spent_calls, spent_money = connection.execute(
            f"SELECT coalesce(sum(calls), 0), coalesce(sum(money), 0.0) FROM spent {where}", values
        ).fetchone()
        if calls is not None and spent_calls >= calls:
            raise _spent(connection, f"judge.budget.calls{suffix}", calls, round_, "")
        if money is None:
            continue
        if spent_money + bound > money:
            raise _spent(
                connection, f"judge.budget.money{suffix}", money, round_, f"; the next call may cost up to {bound:.4g}"
            )
        where_open = f"{where} AND" if where else "WHERE"
        (held,) = connection.execute(
            f"SELECT coalesce(sum(cost), 0.0) FROM calls {where_open} outcome = 'open'", values
        ).fetchone()
        if spent_money + held + bound > money:
            return False
    return True


def _spent(connection: sqlite3.Connection, setting: str, limit: float, round_: int, hint: str) -> BudgetError:
    totals = []
    for what, where, values in (("the round", "WHERE round = ?", (round_,)), ("the run", "", ())):
        calls, money = connection.execute(
            f"SELECT coalesce(sum(calls), 0), coalesce(sum(money), 0.0) FROM spent {where}", values
        ).fetchone()
        (under_way,) = connection.execute(
            f"SELECT count(*) FROM calls {where} {'AND' if where else 'WHERE'} outcome = 'open'", values
        ).fetchone()
        waiting = f" ({under_way} under way)" if under_way else ""
        totals.append(f"{calls} calls{waiting}{f' and {money:.4g} in money' if money else ''} in {what}")
    return BudgetError(
        f"{setting} = {limit:.12g} is spent in round {round_}: {', '.join(totals)}{hint}. Everything judged is kept: "
        f"raise it and go on with `online-po run CONFIG {setting}=...`, or for a file with "
        f"`online-po judge CONFIG IN OUT {setting}=...`; only what is not judged yet is asked"
    )
