"""Files that appear whole or not at all: temporary name, fsync, rename, fsync of the folder.

What a run writes carries its own hash (`online_po.seals`), which is checked whenever it is read. A disk that is full,
or that cannot be written or read, is a DiskError, with nothing torn.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from online_po import seals
from online_po.errors import DamagedError, DiskError, OnlinePOError, first_line
from online_po.fail_points import fail_point

TMP = ".tmp"
"""Suffix of everything not yet whole; such leftovers are deleted when a run is opened."""
WRITER = uuid.uuid4().hex[:8]
"""Before it: a process that was taken for dead, and comes back, has nothing to do with what its successor writes."""
PARALLEL_BYTES = 1 << 23
"""Hashing less than this takes no longer than starting threads for it."""
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the disk quota is used up"}
BROKEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN}
"""Errors of a disk or file system; others are bugs of ours."""


def temporary_of(path: Path) -> Path:
    """Where what becomes `path` is written, by this process."""
    return path.with_name(f"{path.name}.{WRITER}{TMP}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on a clean exit it becomes `path`, durably."""
    temporary = temporary_of(path)
    with explained(path):
        _make_folder(path.parent)
        try:
            yield temporary
            fail_point("file.written", path)
            _fsync(temporary)
            fail_point("file.synced", path)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fail_point("file.renamed", path)
        _fsync(path.parent)
        fail_point("file.durable", path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a whole folder."""
    temporary = temporary_of(path)
    shutil.rmtree(temporary, ignore_errors=True)
    with explained(path):
        try:
            _make_folder(temporary)
            yield temporary
            fail_point("folder.written", path)
            sync_folder(temporary)
            fail_point("folder.synced", path)
            remove_folder(path)
            fail_point("folder.cleared", path)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fail_point("folder.renamed", path)
        _fsync(path.parent)
        fail_point("folder.durable", path)


def sync_folder(path: Path) -> None:
    """Makes all that is in a folder durable."""
    with explained(path):
        for file in sorted(path.rglob("*")):
            _fsync(file)
        _fsync(path)


def remove_folder(path: Path) -> None:
    """Removes a folder so that a kill in the middle leaves nothing that looks like it."""
    with explained(path):
        if path.exists():
            doomed = temporary_of(path.with_name(path.name + ".removed"))
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
            fail_point("remove.renamed", path)
            shutil.rmtree(doomed, ignore_errors=True)
            fail_point("remove.done", path)


def move_folder(path: Path, to: Path) -> None:
    """Renames a folder, durably; the one it goes into is made."""
    with explained(to):
        _make_folder(to.parent)
        os.replace(path, to)
        fail_point("move.renamed", path)
        _fsync(to.parent)
        _fsync(path.parent)
        fail_point("move.durable", path)


def _make_folder(path: Path) -> None:
    """mkdir -p whose result survives a loss of power."""
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        _fsync(folder.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a full disk, or one that cannot be written or read, into a DiskError; other errors pass, those of ours
    too: what a lost learner says is no matter of the disk."""
    try:
        yield
    except OnlinePOError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number in FULL:
            raise DiskError(
                f"{FULL[number]} for {str(path)!r}; what was finished is kept: free some space, or lower "
                "checkpoint.keep, and run the config again"
            ) from error
        if number in BROKEN:
            raise DiskError(
                f"{str(path)!r} cannot be written or read ({first_line(error)}); what was finished is kept: mend that "
                "and resume"
            ) from error
        raise


def _error_number(error: Exception) -> int | None:
    """The number of an operating system's error. Writers in other processes and in Rust lose it, but not its text."""
    if (number := getattr(error, "errno", None)) is not None:
        return number if isinstance(number, int) else None
    return next((number for number in (*FULL, *BROKEN) if os.strerror(number) in str(error)), None)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """With its hash as the last key."""
    text = json.dumps(value | {seals.KEY: seals.BLANK}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, seals.seal_text(text, seals.JSON_MARK))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises DamagedError, naming the file, if it is not as it was written."""
    value = json.loads(_sealed(path, seals.JSON_MARK))
    del value[seals.KEY]
    return value


def parse_json(path: Path) -> Any:
    """The content of a JSON file whose hash does not hold, for what can be said of it; None where it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One row a line; the last one has the file's hash as its last key."""
    rows = [*rows[:-1], rows[-1] | {seals.KEY: seals.BLANK}]
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, seals.seal_text(text, seals.JSON_MARK))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_json_lines` wrote. Raises DamagedError."""
    rows = [json.loads(line) for line in _sealed(path, seals.JSON_MARK).split("\n")[:-1]]
    del rows[-1][seals.KEY]
    return rows


def write_yaml(path: Path, text: str) -> None:
    """A YAML text, with its hash as a comment in the last line."""
    mark = seals.YAML_MARK.decode()
    write_text(path, seals.seal_text(f"{text}{mark}{seals.BLANK}\n", seals.YAML_MARK))


def read_yaml(path: Path) -> str:
    """The text that `write_yaml` was given. Raises DamagedError."""
    text = _sealed(path, seals.YAML_MARK)
    return text[: text.rindex(seals.YAML_MARK.decode())]


def _sealed(path: Path, mark: bytes) -> str:
    with explained(path):
        data = path.read_bytes()
    if not seals.text_holds(data, mark):
        raise DamagedError(path)
    return data.decode()


def write_parquet(path: Path, table: pa.Table) -> None:
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table)


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer whose file appears at `path` when the block ends, with its hash in its metadata."""
    with atomic(path) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            yield writer
            writer.add_key_value_metadata({seals.KEY: seals.BLANK})
        seals.seal_parquet(temporary)


def read_parquet(path: Path) -> pa.Table:
    """What `parquet_writer` wrote. Raises DamagedError, or FileNotFoundError."""
    require_whole(path)
    # One thread: most of a run's files are small, and a pool costs more than it saves on them.
    return pq.ParquetFile(path, pre_buffer=False).read(use_threads=False)


def is_whole(path: Path) -> bool:
    """Whether a parquet, JSON, JSON Lines or YAML file of a run is as it was written."""
    with explained(path):
        if path.suffix == ".parquet":
            return seals.parquet_holds(path)
        return seals.text_holds(path.read_bytes(), seals.YAML_MARK if path.suffix == ".yaml" else seals.JSON_MARK)


def require_whole(path: Path) -> None:
    """Raises DamagedError unless the file is as it was written; FileNotFoundError where there is none."""
    if not is_whole(path):
        raise DamagedError(path)


def sha256(paths: list[Path]) -> list[str]:
    """Hex digests; of much data, hashed in parallel (hashing releases the GIL)."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if sum(path.stat().st_size for path in paths) < PARALLEL_BYTES:
        return [digest(path) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, paths))


def hashes(found: Mapping[str, Path], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> SHA-256 of the file, for every file in `found`. Those in `known` are not read."""
    known = known or {}
    unread = [name for name in found if name not in known]
    read = dict(zip(unread, sha256([found[name] for name in unread]), strict=True))
    return {name: read[name] if name in read else known[name] for name in found}
