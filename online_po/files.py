"""Files that appear whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from online_po.errors import LedgerError
from online_po.fail_points import fail_point

TMP = ".tmp"
"""Suffix of everything not yet whole; such leftovers are deleted when a run is opened."""
PARALLEL_BYTES = 1 << 23
"""Hashing less than this takes no longer than starting threads for it."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on a clean exit it becomes `path`, durably."""
    temporary = path.with_name(path.name + TMP)
    with _explained(path):
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
    temporary = path.with_name(path.name + TMP)
    shutil.rmtree(temporary, ignore_errors=True)
    with _explained(path):
        try:
            _make_folder(temporary)
            yield temporary
            fail_point("folder.written", path)
            for file in sorted(temporary.rglob("*")):
                _fsync(file)
            _fsync(temporary)
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


def remove_folder(path: Path) -> None:
    """Removes a folder so that a kill in the middle leaves nothing that looks like it."""
    if path.exists():
        doomed = path.with_name(path.name + ".removed" + TMP)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        fail_point("remove.renamed", path)
        shutil.rmtree(doomed, ignore_errors=True)
        fail_point("remove.done", path)


def move_folder(path: Path, to: Path) -> None:
    """Renames a folder, durably; the one it goes into is made."""
    with _explained(to):
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
def _explained(path: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into a LedgerError; other errors pass."""
    try:
        yield
    except Exception as error:
        # Writers in other processes and in Rust lose the number of the error, but not its text.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise LedgerError(
                f"no space left for {str(path)!r}; what was finished is kept: free some space, or lower "
                "checkpoint.keep, and run the config again"
            ) from error
        if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise LedgerError(f"{str(path)!r} cannot be written ({error}); mend that and resume") from error
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises LedgerError, naming the file, if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LedgerError(f"{str(path)!r} is damaged: {error}") from error


def write_parquet(path: Path, table: pa.Table) -> None:
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table)


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer whose file appears at `path` when the block ends; pages carry checksums."""
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        yield writer


def read_parquet(path: Path) -> pa.Table:
    """Reads with every page's checksum verified; raises OSError or pa.ArrowInvalid on damage."""
    # One thread: most of a run's files are small, and a pool costs more than it saves on them.
    return pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False).read(use_threads=False)


def is_whole(path: Path) -> bool:
    """Whether a parquet file reads back, every page's checksum included."""
    try:
        read_parquet(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def sha256(paths: list[Path]) -> list[str]:
    """Hex digests; of much data, hashed in parallel (hashing releases the GIL)."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if sum(path.stat().st_size for path in paths) < PARALLEL_BYTES:
        return [digest(path) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, paths))
