"""A disk that is full, or cannot be written or read: the run ends in order, nothing is torn, and it goes on later."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from judges import store
from online_po import files, launch, report, room
from online_po.errors import DiskError, LearnerLostError, LedgerError
from online_po.integrity import find_damage
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.observers import TensorBoardObserver
from online_po.room import RoundBytes, require_room, round_bytes
from tests.fake_run import faked
from tests.fakes import FakeLearner, make_config
from tests.test_loop import content, make_parts

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder without fsyncs to wait for."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class Disk:
    """Lets the calls that reach the disk fail from the `fails_at`-th one on, as long as `number` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.fails_at, self.number = 0, 0, 0
        for owner, name in (
            (files, "_fsync"),
            (files.os, "replace"),
            (files.pq, "ParquetWriter"),
            (Path, "write_text"),
        ):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.number and self.calls >= self.fails_at:
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **kwargs)

        return call


def nothing_torn(root: Path) -> None:
    ledger = Ledger(root)
    assert not list(root.rglob(f"*{files.TMP}"))
    assert find_damage(ledger, True) == []
    for path in root.rglob("*.parquet"):
        assert files.is_whole(path)


def test_writes_that_fail_anywhere_end_the_run_in_order_and_it_goes_on(memory, monkeypatch):
    disk = Disk(monkeypatch)
    whole = make_parts(make_config(memory / "whole"))
    disk.calls = 0
    run_rounds(whole)
    expected, points = content(whole.ledger.root), disk.calls
    assert points > 150
    for place, point in enumerate(range(1, points, 6)):
        config = make_config(memory / str(point))
        parts = make_parts(config)
        disk.calls, disk.fails_at, disk.number = 0, point, NUMBERS[place % len(NUMBERS)]
        with pytest.raises(DiskError, match=r"what was finished is kept: (free some space|mend that)"):
            run_rounds(parts)
        parts.sampler.shutdown()
        disk.number = 0
        nothing_torn(parts.ledger.root)
        again = make_parts(config)
        run_rounds(again)
        assert content(again.ledger.root) == expected, f"failed at {point} of {points}"


FULL = """
import subprocess, sys
from pathlib import Path
from online_po.errors import DiskError
from online_po.loop import run_rounds
from tests.fakes import make_config
from tests.test_disk import nothing_torn
from tests.test_loop import content, make_parts

place = Path(sys.argv[1])
whole = make_parts(make_config(place / "whole"))
run_rounds(whole)
expected = content(whole.ledger.root)
full = place / "full"
full.mkdir()
config, ended = make_config(full), []
for kib in range(40, 1000, 16):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", full], check=True)
    try:
        parts = None
        try:
            parts = make_parts(config)
            run_rounds(parts)
        except DiskError as error:
            ended.append(str(error))
        else:
            break
        finally:
            if parts is not None:
                parts.sampler.shutdown()
        if parts is not None:
            nothing_torn(parts.ledger.root)
        subprocess.run(["mount", "-o", "remount,size=64m", full], check=True)
        parts = make_parts(config)
        run_rounds(parts)
        assert content(parts.ledger.root) == expected, kib
    finally:
        subprocess.run(["umount", "--lazy", full], check=True)  # the timeline is still open
print(len(ended), sum("no space left" in text for text in ended), sum("needs about" in text for text in ended))
"""


def test_a_disk_of_any_size_that_is_too_small(tmp_path):
    """Real ones: file systems in memory, of which the run finds the end at many different points."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of his own")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL, str(tmp_path)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ended, full, asked = map(int, done.stdout.split())
    assert ended >= 10 and full >= 3 and asked >= 3 and ended == full + asked


def usage(monkeypatch, free: int) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Usage(10**12, 0, free))


def test_room_is_asked_for_before_a_round_and_before_its_weights(tmp_path, monkeypatch):
    parts = make_parts(make_config(tmp_path))
    parts.expected = RoundBytes(weights=3 << 20, data=1 << 20)
    usage(monkeypatch, 4 << 20)
    with pytest.raises(DiskError, match=r"round 1 needs about 4.4 MiB in .*fake' \(weights .* 3.3 MiB\), but 4.0 MiB"):
        run_rounds(parts)
    assert not parts.ledger.has_prompts(1), "before anything was sampled"
    again = make_parts(parts.config)
    again.expected = parts.expected
    usage(monkeypatch, 5 << 20)
    save = FakeLearner.save_policy
    monkeypatch.setattr(FakeLearner, "save_policy", lambda *args: pytest.fail("nothing is to be saved"))
    update = again.learner.update
    again.learner.update = lambda *args: (usage(monkeypatch, 3 << 20), update(*args))[1]
    with pytest.raises(DiskError, match=r"round 1 needs about 3.3 MiB .*resume"):
        run_rounds(again)
    assert again.ledger.is_judged(1) and not list(again.ledger.root.rglob("policy*"))
    monkeypatch.setattr(FakeLearner, "save_policy", save)
    usage(monkeypatch, 1 << 30)
    run_rounds(make_parts(parts.config))


def test_what_rounds_took_tells_what_the_next_one_takes(tmp_path, monkeypatch):
    parts = make_parts(make_config(tmp_path))
    run_rounds(parts)
    ledger, nothing = parts.ledger, RoundBytes(weights=1, data=2)
    assert round_bytes(ledger, 1, nothing) == nothing, "nothing is known yet"
    taken = round_bytes(ledger, 4, nothing)
    sizes = {r: sum(f["bytes"] for f in ledger.committed(r).files.values()) for r in (1, 2, 3)}
    assert max(sizes.values()) <= taken.weights + taken.data < 1.2 * max(sizes.values())
    usage(monkeypatch, 1)
    with pytest.raises(DiskError):
        require_room(ledger, 4, nothing)
    usage(monkeypatch, int(1.1 * (taken.weights + taken.data)) + 2)
    require_room(ledger, 4, nothing)
    made = ledger.round_dir(4) / "prompts.parquet"
    made.parent.mkdir()
    made.write_bytes(b"x" * taken.data)
    usage(monkeypatch, int(1.1 * taken.weights + 0.1 * taken.data) + 2)
    require_room(ledger, 4, nothing)  # the data are there already
    with pytest.raises(DiskError):
        require_room(ledger, 4, RoundBytes(steps=1 << 20))


@pytest.mark.parametrize("number", NUMBERS)
def test_the_words_of_other_libraries_are_understood(tmp_path, number):
    """Rust and other processes give no number."""
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    with pytest.raises(DiskError, match="x"), files.atomic(tmp_path / "x"):
        raise RuntimeError(text)
    lost = LearnerLostError(text)
    with pytest.raises(LearnerLostError), files.atomic(tmp_path / "x"):
        raise lost
    with pytest.raises(ValueError, match="else"), files.atomic(tmp_path / "x"):
        raise ValueError("something else")
    with pytest.raises(FileNotFoundError), files.atomic(tmp_path / "x"):
        (tmp_path / "none").read_text()
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_read_only_is_told(tmp_path):
    root = Path(__file__).parents[1]
    code = (
        "import sys; from pathlib import Path; from tests.fake_run import faked; from online_po import launch, report\n"
        "report.render = lambda view: ''\n"
        "from tests.fakes import make_config\n"
        "with faked():\n"
        "    try: launch.run(make_config(Path(sys.argv[1])))\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    with faked(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "render", lambda view: "")
        launch.run(make_config(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of his own")
    mount = f'mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", code, str(tmp_path)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.startswith("DiskError "), done.stdout + done.stderr
    assert "cannot be written or read ([Errno 30] Read-only file system" in done.stdout
    assert "what was finished is kept: mend that and resume" in done.stdout
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", {})
    files.write_parquet(tmp_path / "b.parquet", pa.table({"a": [1]}))

    def broken(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", broken)
    monkeypatch.setattr(Path, "open", broken)
    for read, name in ((files.read_json, "a.json"), (files.read_parquet, "b.parquet")):
        with pytest.raises(DiskError, match=rf"{name}' cannot be written or read \(\[Errno 5\]"):
            read(tmp_path / name)


def test_a_judge_cache_on_a_full_disk_is_told(tmp_path, monkeypatch):
    """By a limit that SQLite itself keeps: as many pages as are there."""
    path = tmp_path / "judge_cache.sqlite"
    store.prepare(path)
    opened = store.JudgeStore(path)
    opened._connection.execute(f"PRAGMA max_page_count = {path.stat().st_size // 4096 + 1}")

    async def fill() -> None:
        for number in range(200):
            call = store.Call(round=1, judge="j", attempt=1, outcome="ok", seconds=0.1)
            answer = store.Answer(value=1, rationale="long " * 500)
            await opened.finish(call, f"{number:064x}", answer)

    with pytest.raises(LedgerError, match=r"judge_cache.sqlite' cannot be used: database or disk is full; mend that"):
        asyncio.run(fill())
    opened.close()
    store.release(path)
    store.prepare(path)  # nothing is torn


def test_telemetry_on_a_full_disk_is_told_at_the_start(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorBoardObserver, "__init__", full)
    config = make_config(tmp_path, run={"name": "fake", "dir": str(tmp_path)})
    with faked(), pytest.raises(DiskError, match="no space left"):
        launch.run(config)
