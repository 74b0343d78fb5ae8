"""The run's judge_cache.sqlite: its tables, how it is opened, and what a round's judging cost.

`judges.store` writes it. It holds hashes of questions and the verdicts on them, never prompts, responses or keys.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from online_po import files
from online_po.errors import DamagedError, LedgerError

CACHE = "judge_cache.sqlite"
"""Its name in a run folder."""
SCHEMA_VERSION = 3
APPLICATION_ID = 0x6F704A43  # "opJC": tells our files from other people's
SEAL, OPEN = b"online-po seal ", b"0" * 64
"""The file holds, once, the hash of itself with zeros (`OPEN`) in the hash's place; while it is in use, or where its
users were killed, the zeros themselves."""
BUSY_TIMEOUT_S = 60.0
"""How long one process waits while another writes."""

TABLES = """
CREATE TABLE answers (
    key BLOB PRIMARY KEY,        -- judges.questions.Question.key
    judge TEXT NOT NULL,         -- hash of the judge's identity
    round INTEGER NOT NULL,      -- what it was first asked for
    value TEXT NOT NULL,         -- JSON
    rationale TEXT,
    prompt_tokens INTEGER NOT NULL,
    response_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,
    cut INTEGER NOT NULL,
    crc INTEGER NOT NULL         -- of all else in the row
);
CREATE TABLE calls (             -- one row an attempt
    id INTEGER PRIMARY KEY,
    round INTEGER NOT NULL,
    judge TEXT NOT NULL,
    attempt INTEGER NOT NULL,    -- 1, then 2, ... for the same question
    outcome TEXT NOT NULL,       -- ok, a FailureKind, open (under way), lost (the process died meanwhile)
    key BLOB,                    -- while it is open
    owner TEXT,                  -- the process that began it, where others may wait for it
    prompt_tokens INTEGER NOT NULL,
    response_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,          -- of open and lost ones: the most it can be
    seconds REAL,                -- NULL for open and lost ones
    cut INTEGER NOT NULL
);
CREATE INDEX calls_of_round ON calls (round);
CREATE INDEX open_calls ON calls (key) WHERE outcome = 'open';
CREATE TABLE spent (             -- sums over calls, so that a budget is checked without reading them all
    round INTEGER PRIMARY KEY,
    calls INTEGER NOT NULL,      -- open ones included
    money REAL NOT NULL          -- without open ones
);
CREATE TABLE hits (
    round INTEGER NOT NULL,
    judge TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (round, judge)
);
CREATE TABLE seal (hash TEXT NOT NULL)
"""


def connect(path: Path) -> sqlite3.Connection:
    """An existing judge cache, in autocommit mode, for use by one thread at a time. Read-only where the file is.

    Raises LedgerError if it is not there, damaged, no judge cache, or of another schema version.
    """
    try:
        # Never `mode=ro`: what a killed process left half-written has to be rolled back before anything can be read.
        uri = f"file:{quote(str(path.absolute()))}?mode=rw"
        found = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            require_ours(found, path)
            # An answer that is handed on must survive a power cut too.
            found.execute("PRAGMA synchronous = FULL")
        except BaseException:
            found.close()
            raise
    except sqlite3.Error as error:
        raise explain(error, path) from error
    return found


def require_ours(connection: sqlite3.Connection, path: Path) -> None:
    """Raises LedgerError unless the file is a judge cache of this schema version."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise LedgerError(f"{str(path)!r} is not a judge cache; move it away, the run then makes a new one")
    if version != SCHEMA_VERSION:
        raise LedgerError(
            f"{str(path)!r} was written with judge cache schema {version}, this version reads {SCHEMA_VERSION}; use "
            "the version of online-po that wrote it, or move the file away: all in it is then asked, and paid, again"
        )


def require_whole(path: Path) -> None:
    """Raises DamagedError for a file that is not as its last user left it. Nothing is said of one that is in use, whose
    users were killed, or that is none of ours."""
    if not path.exists() or any(_is_filled(path.with_name(path.name + end)) for end in ("-wal", "-journal")):
        return
    with files.explained(path):
        data = path.read_bytes()
    ours = data[60:64] == SCHEMA_VERSION.to_bytes(4, "big") and data[68:72] == APPLICATION_ID.to_bytes(4, "big")
    at = _seal_place(data)
    if (at is None and ours) or (at is not None and data[at : at + len(OPEN)] not in (OPEN, _digest(data, at))):
        raise DamagedError(
            path, f"{_NOT_AS_LEFT} (moved away: what was judged in finished parts is in the rounds' folders, all else "
            "is then asked, and paid, again)"
        )  # fmt: skip


_NOT_AS_LEFT = "its hash is not the one it was written with"


def seal(path: Path) -> None:
    """Puts the hash into a file that nobody has open any more."""
    data = path.read_bytes()
    at = _seal_place(data)
    if at is not None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(_digest(data, at))
            file.flush()
            os.fsync(file.fileno())


def _is_filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _seal_place(data: bytes) -> int | None:
    """Where the hash begins; a judge's answer may have the mark in it too, but no hash after it."""
    places = [found.end() - len(OPEN) for found in re.finditer(re.escape(SEAL) + rb"[0-9a-f]{%d}" % len(OPEN), data)]
    return places[0] if len(places) == 1 else None


def _digest(data: bytes, at: int) -> bytes:
    return hashlib.sha256(data[:at] + OPEN + data[at + len(OPEN) :]).hexdigest().encode()


def explain(error: sqlite3.Error, path: Path) -> LedgerError:
    """What SQLite says, with what to do about it."""
    text = str(error)
    if isinstance(error, sqlite3.OperationalError) and "unable to open" in text:
        return LedgerError(
            f"the judge cache {str(path)!r} cannot be opened ({text}): run.dir must be a folder that every judge "
            "process can write to, on every node of the cluster"
        )
    if isinstance(error, sqlite3.OperationalError) and "locked" in text:
        return LedgerError(
            f"the judge cache {str(path)!r} was locked by another process for {BUSY_TIMEOUT_S:.0f} s; see that no "
            "other program has it open, and that locks work on the file system of run.dir, then resume"
        )
    if isinstance(error, sqlite3.OperationalError):  # disk full, read-only, an I/O error
        return LedgerError(
            f"the judge cache {str(path)!r} cannot be used: {text}; mend that and resume, everything judged before is "
            "kept"
        )
    return LedgerError(
        f"the judge cache {str(path)!r} is damaged ({text}); restore it from a copy, or move it away: judgements of "
        "finished parts are in the rounds' folders, all else is then asked, and paid, again"
    )


def judge_statistics(path: Path, round_: int | None) -> dict[str, Any]:
    """What judging cost in one round, its evaluation included, or in all (None); {} where there is no judge cache.

    Round 0 is what came before the first one; what came after the last one is the round's after it.

    calls: attempts, failed ones and those a killed process left included; retries: those of them that asked again;
    hits: questions answered by the cache; prompt_tokens, response_tokens, cost; cut: answers on texts that were longer
    than the judge's context; failed_calls: {kind: attempts that failed so}; latency_p50/p90/p99: seconds of attempts
    that succeeded, None without any. Raises LedgerError for a damaged file.
    """
    if not path.exists():
        return {}
    where, values = ("TRUE", ()) if round_ is None else ("round = ?", (round_,))
    try:
        with closing(connect(path)) as connection:
            calls, retries, prompt, response, cost, cut = connection.execute(
                "SELECT count(*), coalesce(sum(attempt > 1), 0), coalesce(sum(prompt_tokens), 0),"
                " coalesce(sum(response_tokens), 0), coalesce(sum(cost), 0.0), coalesce(sum(cut), 0)"
                f" FROM calls WHERE {where}",
                values,
            ).fetchone()
            failures = connection.execute(
                f"SELECT outcome, count(*) FROM calls WHERE {where} AND outcome NOT IN ('ok', 'open')"
                " GROUP BY outcome ORDER BY outcome",
                values,
            ).fetchall()
            seconds = np.fromiter(
                (row[0] for row in connection.execute(
                    f"SELECT seconds FROM calls WHERE {where} AND outcome = 'ok'", values
                )),
                dtype=np.float64,
            )  # fmt: skip
            (hits,) = connection.execute(f"SELECT coalesce(sum(count), 0) FROM hits WHERE {where}", values).fetchone()
    except sqlite3.Error as error:
        raise explain(error, path) from error
    percentiles = {f"latency_p{p}": float(np.percentile(seconds, p)) if len(seconds) else None for p in (50, 90, 99)}
    return {
        "calls": calls,
        "hits": hits,
        "retries": retries,
        "prompt_tokens": prompt,
        "response_tokens": response,
        "cost": cost,
        "cut": cut,
        "failed_calls": dict(failures),
        **percentiles,
    }
