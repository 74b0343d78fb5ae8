"""Signals: the current piece is finished, within a bound; what is whole is kept; a second one ends the run at once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from online_po import files
from online_po.errors import Interrupted
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.parts import Parts
from online_po.step_checkpoints import StepPlan
from online_po.stopping import EXIT_CODE, StopSignals
from tests.fake_run import FakeRun, serving, start
from tests.fakes import SickLearner, make_config
from tests.test_loop import content, make_parts

PHASES = ["generate", "judge", "pair", "reference", "learn", "save", "commit", "sync", "evaluate"]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, object]:
    """What the run holds that is never stopped."""
    parts = make_parts(make_config(tmp_path_factory.mktemp("whole")))
    parts.learner = SickLearner(parts.config, 99)  # as in `tests.fake_run`
    run_rounds(parts)
    return content(parts.ledger.root)


def write_config(place: Path, grace_s: float) -> Path:
    path = place / "run.yaml"
    path.write_text(make_config(place, run__grace_s=grace_s).to_yaml())
    return path


def wait_until_held(place: Path, run: FakeRun) -> None:
    deadline = time.monotonic() + 60
    while not (place / "held").exists():
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.01)


def stopped(server, place: Path, phase: str, number: int, grace_s: float, seconds: float, round_: int = 2) -> FakeRun:
    """A run that got a signal while a phase was held."""
    run = start(server, place, "run", str(write_config(place, grace_s)), hold=(phase, round_), seconds=seconds)
    wait_until_held(place, run)
    os.kill(run.pid, number)
    return run


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("grace_s", [60.0, 0.0])
def test_a_run_that_is_told_to_end_in_any_phase_goes_on_as_if_it_never_was(server, whole, tmp_path, phase, grace_s):
    run = stopped(server, tmp_path, phase, signal.SIGTERM, grace_s, seconds=0.3)
    assert run.wait() == EXIT_CODE == 130
    said = run.log.read_text()
    assert f"online-po resume {tmp_path / 'fake'}" in said and "Traceback" not in said
    assert ("finishing what is being made, for at most 60 s" in said) == (grace_s > 0)
    ledger = Ledger(tmp_path / "fake")
    assert not [path for path in ledger.root.rglob(f"*{files.TMP}*") if grace_s > 0]
    if grace_s > 0 and phase in ("learn", "save", "commit"):
        assert ledger.last_committed() == 2, "the round that was being trained was finished"
    if grace_s > 0 and phase == "generate":
        assert ledger.has_judgements(2, 0) or not ledger.has_responses(2, 0), "what was sampled was judged"
    assert start(server, tmp_path, "resume", str(ledger.root)).wait() == 0, run.log.read_text()
    assert content(ledger.root) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_ctrl_c_and_slurms_warning_do_the_same(server, whole, tmp_path, number):
    run = stopped(server, tmp_path, "learn", number, 60.0, seconds=0.3)
    assert run.wait() == 130
    assert f"{number.name}: finishing" in run.log.read_text()
    assert Ledger(tmp_path / "fake").last_committed() == 2


def test_what_takes_longer_than_the_bound_is_not_waited_for(server, whole, tmp_path):
    run = stopped(server, tmp_path, "learn", signal.SIGTERM, 0.3, seconds=600.0)
    assert run.wait() == 130
    assert Ledger(tmp_path / "fake").last_committed() == 1
    assert start(server, tmp_path, "resume", str(tmp_path / "fake")).wait() == 0
    assert content(tmp_path / "fake") == whole


def test_a_second_signal_ends_the_run_at_once_and_safely(server, whole, tmp_path):
    run = stopped(server, tmp_path, "learn", signal.SIGTERM, 500.0, seconds=600.0)
    while "finishing" not in run.log.read_text():
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGTERM)  # the same one, sent twice: nothing more
    time.sleep(0.6)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == 130
    assert "SIGINT again: stopped at once" in run.log.read_text()
    assert start(server, tmp_path, "resume", str(tmp_path / "fake")).wait() == 0, "its lock was taken over"
    assert content(tmp_path / "fake") == whole


@pytest.mark.parametrize("every", [2, 5])
def test_an_update_ends_at_its_next_step_checkpoint(tmp_path, every):
    def make() -> Parts:
        parts = make_parts(make_config(tmp_path, loop__rounds=1, checkpoint__every_steps=every))
        parts.learner.steps = 6
        return parts

    parts = make()
    update = parts.learner.update

    def waiting(*args):
        """Steps that take longer than a write."""
        for step, metrics in enumerate(update(*args), 1):
            while step % every == 0 and step < 6 and not args[-1].is_written(step):
                time.sleep(0.001)
            yield metrics

    parts.learner.update = waiting
    parts.observer.step = lambda round_, metrics: parts.stop.ask()  # at the first
    with pytest.raises(Interrupted):
        run_rounds(parts)
    assert parts.ledger.last_committed() == 0 and parts.learner.taken[-1] == (1, every)
    again = make()
    run_rounds(again)
    assert again.learner.taken[0] == (1, every + 1)


@pytest.mark.parametrize("staleness", [0, 1])
def test_asked_between_two_pieces_the_loop_ends_there(tmp_path, whole, staleness):
    """By a caller, without a signal: after each chunk that is handed out."""
    uninterrupted = make_parts(make_config(tmp_path / "whole", loop__max_staleness=staleness))
    run_rounds(uninterrupted)
    config = make_config(tmp_path / "asked", loop__max_staleness=staleness)
    for _ in range(100):
        parts, generate = make_parts(config), None
        generate = parts.generator.generate

        def asking(chunks, sampling, parts=parts, generate=generate):
            for number, item in enumerate(generate(chunks, sampling)):
                yield item
                if number == 3:
                    parts.stop.ask()

        parts.generator.generate = asking
        try:
            run_rounds(parts)
            break
        except Interrupted:
            parts.sampler.shutdown()
    else:
        pytest.fail("the run never ended")
    assert content(parts.ledger.root) == content(uninterrupted.ledger.root)


def test_what_is_sampled_ahead_is_finished_too(tmp_path):
    parts = make_parts(make_config(tmp_path, loop__max_staleness=1))
    update, generate, judged = parts.learner.update, parts.generator.generate, threading.Event()

    def asking(*args):
        parts.stop.ask()
        assert judged.wait(30)
        yield from update(*args)

    def slow(chunks, sampling):
        for number, item in enumerate(generate(chunks, sampling)):
            if parts.ledger.is_judged(1):  # of round 2: under way while round 1 is trained
                judged.set()
                time.sleep(0.2)
            yield item
            del number

    parts.learner.update, parts.generator.generate = asking, slow
    with pytest.raises(Interrupted):
        run_rounds(parts)
    assert parts.ledger.last_committed() == 1
    assert parts.ledger.has_responses(2, 0) and parts.ledger.has_judgements(2, 0)


def test_a_terminal_that_is_gone_keeps_no_run_from_finishing(monkeypatch):
    """`online-po run ... | tee log`, and Ctrl-C, which ends tee too."""

    def gone(descriptor: int, data: bytes) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with StopSignals() as stop:
        stop.working, stop.grace_s = True, 60.0
        monkeypatch.setattr("online_po.stopping.os.write", gone)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60.0
        monkeypatch.undo()


def test_a_later_checkpoint_is_as_good_as_the_one_that_was_waited_for(tmp_path):
    plan = StepPlan(folder=tmp_path, every=1)
    (tmp_path / "000005").mkdir()
    assert plan.is_written(4) and plan.is_written(5) and not plan.is_written(6)
