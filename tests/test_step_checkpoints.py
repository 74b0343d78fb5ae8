"""Step checkpoints as files: whole or not at all, the newest few, damage found and named."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from online_po import files
from online_po.errors import LedgerError
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.step_checkpoints import StepPlan, StepWriter, newest_whole
from tests.fakes import make_config
from tests.test_loop import content, make_parts

METRICS = [{"loss": 0.1 * step, "pairs": 4.0} for step in range(1, 10)]


def write_state(step: int, path: Path) -> dict[str, str]:
    (path / "state").write_bytes(bytes([step] * 99))
    return {}


def write_steps(folder: Path, steps: range, every: int = 1) -> None:
    with StepWriter(StepPlan(folder=folder, every=every)) as writer:
        for step in steps:
            writer.write(step, METRICS[:step], partial(write_state, step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_are_kept_and_the_newest_is_found(tmp_path):
    assert newest_whole(tmp_path / "nothing") == (None, {})
    write_steps(tmp_path, range(2, 9, 2))
    assert names(tmp_path) == ["000006", "000008"]
    found, damaged = newest_whole(tmp_path)
    assert (found.step, found.folder, found.metrics, damaged) == (8, tmp_path / "000008", METRICS[:8], {})
    assert (found.folder / "state").read_bytes() == bytes([8] * 99)


def test_a_checkpoint_is_due_after_every_so_many_steps_but_not_after_the_last():
    plan = StepPlan(folder=Path(), every=3)
    assert [step for step in range(1, 10) if plan.is_due(step, 9)] == [3, 6]
    assert not any(StepPlan(folder=Path(), every=None).is_due(step, 9) for step in range(1, 10))


@pytest.mark.parametrize("name", ["state", "metrics.json", "CHECKPOINT.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_one_is_named_and_the_one_before_it_taken(tmp_path, name, harm):
    ledger, told = Ledger(tmp_path), []
    folder = ledger.round_dir(1) / "steps"
    write_steps(folder, range(1, 5))
    for step, expected in ((4, 3), (3, None)):
        path = folder / f"{step:06d}" / name
        data = path.read_bytes()
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(data[:-2] if harm == "cut" else data[:20] + bytes([data[20] ^ 1]) + data[21:])
        plan = ledger.step_plan(1, 1, told.append)
        assert (plan.after.step if plan.after else None, plan.done) == (expected, expected or 0)
        damage, where = told[-2:]
        assert f"steps/{step:06d}' is damaged, and is left out" in damage
        assert where == "round 1 trains on " + (f"after step {expected}" if expected else "from its first step")
        assert plan.metrics == METRICS[: expected or 0]
    assert names(folder) == [] and ledger.step_plan(1, 1, told.append).after is None
    assert len(told) == 4, "what was left out is not told again"


def test_a_step_is_waited_for_only_by_the_next_one_and_by_the_end(tmp_path):
    held, begun, seen = threading.Event(), threading.Event(), list[str]()

    def slow(path: Path) -> dict[str, str]:
        begun.set()
        assert held.wait(30)
        return {}

    def looks(path: Path) -> dict[str, str]:
        seen.extend(names(tmp_path))
        return {}

    def train() -> None:
        with StepWriter(StepPlan(folder=tmp_path, every=1)) as writer:
            writer.write(1, METRICS[:1], slow)
            assert begun.wait(30) and names(tmp_path) == [files.temporary_of(Path("000001")).name], (
                "a step could be made now"
            )
            second.set()
            writer.write(2, METRICS[:2], looks)

    second = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        assert second.wait(30) and not training.done()
        held.set()
        training.result(30)
    assert seen == ["000001", files.temporary_of(Path("000002")).name]


def test_what_was_hashed_as_it_was_written_is_not_read_again(tmp_path, monkeypatch):
    read: list[Path] = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda paths: read.extend(paths) or sha256(paths))

    def write(path: Path) -> dict[str, str]:
        (path / "state").write_bytes(b"state")
        (path / "other").write_bytes(b"other")
        return {"state": hashlib.sha256(b"state").hexdigest()}

    with StepWriter(StepPlan(folder=tmp_path, every=1)) as writer:
        writer.write(1, METRICS[:1], write)
    assert {path.name for path in read} == {"other", "metrics.json"}
    assert newest_whole(tmp_path)[0].step == 1


@pytest.mark.parametrize("waits", ["next", "end"])
def test_a_full_disk_is_told_and_leaves_the_last_one(tmp_path, waits):
    def full(path: Path) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    write_steps(tmp_path, range(1, 3))
    with (
        pytest.raises(LedgerError, match="no space left for .*000003"),
        StepWriter(StepPlan(folder=tmp_path, every=1)) as w,
    ):
        w.write(3, METRICS[:3], full)
        if waits == "next":
            w.write(4, METRICS[:4], full)
            pytest.fail("not told")
    assert names(tmp_path) == ["000001", "000002"]


def test_an_update_s_own_error_goes_before_a_write_s(tmp_path):
    with pytest.raises(KeyboardInterrupt), StepWriter(StepPlan(folder=tmp_path, every=1)) as writer:
        writer.write(1, METRICS[:1], lambda path: 1 / 0)
        raise KeyboardInterrupt


def stopped_after(config, step: int) -> None:
    """A process that ends while the next step of round 1 is made."""
    parts = make_parts(config)
    parts.learner.steps = 5
    parts.observer.step = lambda round_, metrics: (
        (_ for _ in ()).throw(KeyboardInterrupt) if (len(parts.learner.taken) > step) else None
    )
    with pytest.raises(KeyboardInterrupt):
        run_rounds(parts)
    parts.sampler.shutdown()


def finished(config):
    parts = make_parts(config)
    parts.learner.steps = 5
    run_rounds(parts)
    return parts


def test_a_round_goes_on_after_its_newest_step_and_says_so(tmp_path):
    whole = finished(make_config(tmp_path / "whole", loop__rounds=2))
    config = make_config(tmp_path / "stopped", loop__rounds=2, checkpoint={"every_steps": 1})
    stopped_after(config, 3)
    # The interval is no part of the run's identity, and what is there is used without one too.
    again = finished(make_config(tmp_path / "stopped", loop__rounds=2))
    assert again.learner.taken == [(1, 5), *((2, step) for step in range(1, 6))]
    assert "round 1 trains on after step 4" in again.observer.messages
    assert content(again.ledger.root) == content(whole.ledger.root)


def test_pieces_that_are_made_again_take_the_steps_with_them(tmp_path):
    config = make_config(tmp_path, loop__rounds=1, checkpoint__every_steps=1)
    stopped_after(config, 3)
    folder = Ledger(config.run_dir).round_dir(1)
    assert (folder / "steps").exists()
    path = folder / "judgements" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    again = finished(config)
    assert again.learner.taken == [(1, step) for step in range(1, 6)]


def test_a_committed_round_has_no_steps_in_its_listing_nor_in_its_folder(tmp_path):
    config = make_config(tmp_path, loop__rounds=1, checkpoint__every_steps=1)
    parts = finished(config)
    folder = parts.ledger.round_dir(1)
    assert not [name for name in parts.ledger.committed(1).files if name.startswith("steps")]
    assert not (folder / "steps").exists()
    write_steps(folder / "steps", range(1, 3))  # as a kill right after the commit leaves it
    make_parts(config)
    assert not (folder / "steps").exists()


def test_a_round_that_is_rolled_back_takes_no_steps_along(tmp_path):
    parts = finished(make_config(tmp_path, loop__rounds=1, checkpoint__every_steps=1))
    write_steps(parts.ledger.round_dir(2) / "steps", range(1, 3))
    parts.ledger.roll_back(since=2, to=1, guard="nonfinite", message="")
    assert (parts.ledger.root / "rolled_back" / "001" / "000002").exists()
    assert not list(parts.ledger.root.glob("rolled_back/*/*/*")), files.TMP
