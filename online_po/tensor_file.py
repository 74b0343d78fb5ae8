"""Tensor files that are written once and seldom read: safetensors, past the page cache and hashed on the way.

An optimizer's state is twice the size of the policy, and nothing reads it, or a step checkpoint, until a resume; nor
does anything, mostly, read a policy that engines took from memory. Through the page cache files take processor time
while engines sample, push out what is read next, and have to be read again to be hashed. Where the file system knows
no direct I/O, or refuses a write of that kind, the file is written the ordinary way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, cycle
from mmap import mmap
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes: TypeAlias = npt.NDArray[np.uint8]

CHUNK = 1 << 24
"""Bytes a write. Two such buffers are held: one is filled and hashed while the disk takes the other."""
BLOCK = 1 << 12
"""Addresses, offsets and lengths of direct I/O are multiples of this."""
DIRECT: int = getattr(os, "O_DIRECT", 0)
"""Zero where the operating system has none."""
REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}
"""What file systems say that know no direct I/O."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    tick: Callable[[], None] = lambda: None,
    metadata: Mapping[str, str] | None = None,
    direct: bool = True,
) -> str:
    """Writes tensors that are on the CPU to a safetensors file, durably. Returns its SHA-256, in hex. `tick` is
    called after each chunk. `metadata`: what the format has beside tensors. `direct`: past the page cache.

    Raises OSError where the disk is full or cannot be written.
    """
    # The widest first, as the format has it: each then begins at a multiple of its width.
    whole = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _header(whole, metadata)
    total = len(header) + sum(tensor.nbytes for tensor in whole.values())
    digest, at = hashlib.sha256(), 0
    writing: Future[None] | None = None
    descriptor = _open(path, DIRECT if direct else 0)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="disk") as disk:
            for chunk in _chunks(header, whole, total):
                digest.update(chunk[: total - at].data)
                if writing is not None:
                    writing.result()
                writing = disk.submit(_write, descriptor, chunk, at)
                at += len(chunk)
                tick()
        if writing is not None:
            writing.result()
        os.ftruncate(descriptor, total)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """What a safetensors file begins with: 8 bytes that hold the length of the JSON that follows."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at + tensor.nbytes]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(header: bytes, tensors: Mapping[str, Tensor], total: int) -> Iterator[Bytes]:
    """The file, `CHUNK` at a time, in two buffers by turns: each is left alone until the next but one is asked for. The
    last is filled up to a whole number of blocks with anything."""
    size = min(CHUNK, _in_blocks(total))
    buffers = cycle([np.frombuffer(mmap(-1, size), np.uint8) for _ in range(2)])  # maps begin where a block may
    buffer, filled = next(buffers), 0
    for piece in chain([np.frombuffer(header, np.uint8)], map(_bytes, tensors.values())):
        taken = 0
        while taken < len(piece):
            count = min(size - filled, len(piece) - taken)
            buffer[filled : filled + count] = piece[taken : taken + count]
            filled, taken = filled + count, taken + count
            if filled == size:
                yield buffer
                buffer, filled = next(buffers), 0
    if filled:
        yield buffer[: _in_blocks(filled)]


def _in_blocks(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _bytes(tensor: Tensor) -> Bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _open(path: Path, direct: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | direct, 0o666)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return os.open(path, flags, 0o666)


def _write(descriptor: int, chunk: Bytes, at: int) -> None:
    while len(chunk) > 0:
        try:
            count = os.pwrite(descriptor, chunk.data, at)
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            if error.errno not in REFUSED or not flags & DIRECT:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        else:
            chunk, at = chunk[count:], at + count
