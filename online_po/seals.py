"""Files that carry their own hash: one changed byte, anywhere in them, is found whenever they are read.

The hash (SHA-256) is of the whole file with zeros in the hash's own place. JSON holds it as its last key, YAML in its
last line, parquet in its footer: all of them stay what other programs read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

KEY = "sha256"
BLANK = "0" * 64
JSON_MARK = b'"sha256": "'
YAML_MARK = b"# sha256: "
PARQUET_MARK = b"\x06sha256\x18\x40"
"""As thrift's compact protocol writes a key of 6 bytes, and that a value of 64 follows."""
CHUNK = 1 << 20


def seal_text(text: str, mark: bytes) -> str:
    """The text with its hash in place of the zeros after the last `mark`."""
    at = _after_mark(text.encode(), mark)
    assert at is not None
    data = text.encode()
    return (data[:at] + _digest(data, at) + data[at + len(BLANK) :]).decode()


def text_holds(data: bytes, mark: bytes) -> bool:
    """Whether a text is as it was sealed."""
    at = _after_mark(data, mark)
    return at is not None and data[at : at + len(BLANK)] == _digest(data, at)


def seal_parquet(path: Path) -> None:
    """Puts the hash into a closed file that was given `KEY` with `BLANK` as metadata."""
    at = _parquet_place(path)
    assert at is not None
    digest = _file_digest(path, at)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(digest)


def parquet_holds(path: Path) -> bool:
    """Whether a parquet file is as it was sealed. Raises OSError where it cannot be read."""
    at = _parquet_place(path)
    if at is None:
        return False
    with path.open("rb") as file:
        file.seek(at)
        return file.read(len(BLANK)) == _file_digest(path, at)


def _after_mark(data: bytes, mark: bytes) -> int | None:
    """Where the hash begins: after the last mark."""
    at = data.rfind(mark)
    return None if at < 0 or at + len(mark) + len(BLANK) > len(data) else at + len(mark)


def _digest(data: bytes, at: int) -> bytes:
    return hashlib.sha256(data[:at] + BLANK.encode() + data[at + len(BLANK) :]).hexdigest().encode()


def _parquet_place(path: Path) -> int | None:
    """The footer's length stands in the 8 bytes at the end."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(8)[:4], "little") + 8
        if length > size:
            return None
        file.seek(size - length)
        at = _after_mark(file.read(), PARQUET_MARK)
        return None if at is None else size - length + at


def _file_digest(path: Path, at: int) -> bytes:
    """`_digest` of a file that may be large."""
    hashed, left = hashlib.sha256(), at
    with path.open("rb") as file:
        while left and (chunk := file.read(min(CHUNK, left))):
            hashed.update(chunk)
            left -= len(chunk)
        file.seek(at + len(BLANK))
        hashed.update(BLANK.encode())
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest().encode()
