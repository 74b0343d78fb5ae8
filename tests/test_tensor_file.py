"""Files of optimizer states: what the library would write, hashed on the way, on disks of every temper."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from online_po import tensor_file
from online_po.tensor_file import BLOCK, write_tensors

RANDOM = torch.Generator().manual_seed(0)


def state(*sizes: int) -> dict[str, torch.Tensor]:
    """Moments of these sizes, and others."""
    tensors = {f"layers.{i}/exp_avg": torch.randn(size, generator=RANDOM) for i, size in enumerate(sizes)}
    return tensors | {"norm/step": torch.tensor(7.0), "größe/exp_avg": torch.randn(2, 3, generator=RANDOM)}


def require_whole(path: Path, digest: str, tensors: dict[str, torch.Tensor]) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Less than a block; about one and two chunks of two blocks; tensors over several chunks.
@pytest.mark.parametrize("sizes", [(), (0, 1), (500,), (1790, 5), (3900,), (3000, 3000, 9000), (1024,) * 9])
def test_it_is_what_the_library_writes(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(tensor_file, "CHUNK", 2 * BLOCK)
    tensors, heard = state(*sizes), []
    digest = write_tensors(tmp_path / "t", tensors, lambda: heard.append(1))
    require_whole(tmp_path / "t", digest, tensors)
    assert (tmp_path / "t").read_bytes() == safetensors.torch.save(tensors)
    assert len(heard) == -(-(tmp_path / "t").stat().st_size // (2 * BLOCK))


def test_nothing_but_a_header(tmp_path):
    """An optimizer without state: every step of the round was left out."""
    require_whole(tmp_path / "t", write_tensors(tmp_path / "t", {}), {})
    assert (tmp_path / "t").read_bytes() == safetensors.torch.save({})


def test_any_length_ends_where_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK", 2 * BLOCK)
    for size in range(3900, 4140, 7):  # around the end of a chunk
        tensors = {"a": torch.arange(size, dtype=torch.float16)}
        require_whole(tmp_path / "t", write_tensors(tmp_path / "t", tensors), tensors)


def test_every_type_and_layout(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7, dtype=torch.float64),
        "c": torch.randn(4, 6).T,
        "d": torch.nn.Parameter(torch.randn(2, 2)),
        "e": torch.randn(9).half(),
        "f": torch.arange(5),
        "g": torch.tensor([True, False, True]),
    }
    digest = write_tensors(tmp_path / "t", tensors)
    require_whole(tmp_path / "t", digest, {name: tensor.detach() for name, tensor in tensors.items()})
    with safe_open(tmp_path / "t", "pt") as file:
        assert set(file.keys()) == set("abcdefg")


def test_what_was_there_before_is_gone(tmp_path):
    (tmp_path / "t").write_bytes(b"x" * 100_000)
    tensors = state(10)
    require_whole(tmp_path / "t", write_tensors(tmp_path / "t", tensors), tensors)


class Disk:
    """Writes as the real one does, but for what a test has against it; remembers the way each write went."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[bool] = []
        self.direct: list[bool] = []
        self.lengths: list[int] = []
        self._open, self._pwrite = os.open, os.pwrite
        monkeypatch.setattr(tensor_file, "CHUNK", 2 * BLOCK)
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def refuses_open(self, direct: bool) -> int:
        return 0

    def takes(self, direct: bool, length: int) -> int:
        return length

    def open(self, path, flags, *mode):
        direct = bool(flags & tensor_file.DIRECT)
        if Path(path).name == "t":
            self.opened.append(direct)
            if number := self.refuses_open(direct):
                raise OSError(number, os.strerror(number))
        return self._open(path, flags, *mode)

    def pwrite(self, descriptor, chunk, at):
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & tensor_file.DIRECT)
        self.direct.append(direct)
        self.lengths.append(len(chunk))
        return self._pwrite(descriptor, chunk[: self.takes(direct, len(chunk))], at)


@pytest.mark.skipif(not tensor_file.DIRECT, reason="this operating system has no direct I/O")
def test_it_goes_past_the_page_cache(tmp_path, monkeypatch):
    disk, tensors = Disk(monkeypatch), state(9000)
    require_whole(tmp_path / "t", write_tensors(tmp_path / "t", tensors), tensors)
    if disk.opened == [True, False]:
        pytest.skip("this file system knows no direct I/O")
    assert disk.opened == [True] and all(disk.direct) and all(length % BLOCK == 0 for length in disk.lengths)


def test_through_the_page_cache_where_it_is_read_soon(tmp_path, monkeypatch):
    disk, tensors = Disk(monkeypatch), state(9000)
    require_whole(tmp_path / "t", write_tensors(tmp_path / "t", tensors, direct=False), tensors)
    assert disk.opened == [False] and not any(disk.direct)


@pytest.mark.parametrize("number", sorted(tensor_file.REFUSED))
def test_a_file_system_that_knows_no_direct_io(tmp_path, monkeypatch, number):
    disk, tensors = Disk(monkeypatch), state(9000)
    disk.refuses_open = lambda direct: number if direct else 0
    require_whole(tmp_path / "t", write_tensors(tmp_path / "t", tensors), tensors)
    assert disk.opened == [True, False] and not any(disk.direct)


def test_a_file_system_that_says_so_at_the_first_write(tmp_path, monkeypatch):
    disk, tensors = Disk(monkeypatch), state(9000)

    def takes(direct: bool, length: int) -> int:
        if direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return length

    disk.takes = takes
    require_whole(tmp_path / "t", write_tensors(tmp_path / "t", tensors), tensors)
    assert sum(disk.direct) <= 1 and len(disk.direct) > 3


def test_a_disk_that_takes_less_than_it_is_given(tmp_path, monkeypatch):
    """Of what is left, a direct write may be refused: it begins inside a block."""
    disk, tensors = Disk(monkeypatch), state(9000)
    disk.takes = lambda direct, length: min(length, 5000 if not direct else BLOCK)
    require_whole(tmp_path / "t", write_tensors(tmp_path / "t", tensors), tensors)
    assert len(disk.lengths) > 8


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINVAL])
def test_a_write_that_fails_is_heard(tmp_path, monkeypatch, number):
    disk, made = Disk(monkeypatch), []

    def takes(direct: bool, length: int) -> int:
        made.append(1)
        if len(made) >= 3:
            raise OSError(number, os.strerror(number))
        return length

    disk.takes = takes
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(OSError, match=os.strerror(number)):
        write_tensors(tmp_path / "t", state(9000))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_last_write_of_all_that_fails_is_heard(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)

    def takes(direct: bool, length: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk.takes = takes
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "t", state(1))
