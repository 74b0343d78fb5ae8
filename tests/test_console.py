"""What the terminal and the log show, the phase timer, TensorBoard."""

from __future__ import annotations

import io
import json
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from online_po.console import ConsoleObserver, final_table, print_plan, print_result, print_status
from online_po.ledger import Ledger
from online_po.observers import CompositeObserver, PhaseTimer, Silent, TensorBoardObserver
from online_po.run_view import load_run_view, read_timeline
from tests.run_folder import make_run_folder


def play(observer, view) -> None:
    """What a round tells its observer."""
    with observer.phase("start", 0):
        pass
    with observer.phase("generate", 1):
        observer.progress("generate", 3, 10)
        observer.progress("judge", 1, 10)
        observer.message("a message with [bold]brackets[/bold]")
    with observer.phase("judge", 1):
        observer.progress("judge", 10, 10)
    with observer.phase("learn", 1):
        for step in view.rounds[1].steps:
            observer.step(1, step)
    observer.round(view.rounds[1].summary)
    observer.evaluation(view.rounds[1].evaluation)
    observer.close()


@pytest.fixture
def view(tmp_path):
    return load_run_view(make_run_folder(tmp_path, rounds=1))


def test_a_log_has_plain_lines(view, monkeypatch):
    monkeypatch.setattr("online_po.console.LOG_PHASES_FROM_S", 0.0)
    monkeypatch.setattr("online_po.console.LOG_PROGRESS_EVERY_S", 0.0)
    out = io.StringIO()
    play(ConsoleObserver(Console(file=out, width=40)), view)
    text = out.getvalue()
    assert not any(ord(char) < 32 and char != "\n" for char in text), "no control characters"
    lines = text.splitlines()
    assert "a message with [bold]brackets[/bold]" in lines
    assert any(line.startswith("round 1 generate  3 of 10") for line in lines)
    assert any(line.startswith("round 1  score 0.") and "pairs" in line and "loss" in line for line in lines)
    assert any(line.startswith("policy 1 on held-out prompts: score 0.") and "win rate" in line for line in lines)


def test_short_phases_are_no_news_in_a_log(view):
    out = io.StringIO()
    play(ConsoleObserver(Console(file=out)), view)
    assert len(out.getvalue().splitlines()) == 3, "the message, the round, the evaluation"


def test_a_terminal_gets_bars_and_is_left_clean(view):
    out = io.StringIO()
    observer = ConsoleObserver(Console(file=out, force_terminal=True, width=100))
    play(observer, view)
    assert "generate" in out.getvalue() and "\x1b[" in out.getvalue()
    assert not observer._live.tasks and not observer._live.live.is_started


def test_final_table_fits_a_terminal_of_80_columns(tmp_path):
    view = load_run_view(make_run_folder(tmp_path))
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.print(final_table(view))
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and "…" not in out.getvalue()
    assert "[" in lines[1] and "%" in lines[2]
    print_result(view, console)
    assert "Held-out score rose" in out.getvalue()


def test_status_of_a_run_that_was_stopped(tmp_path):
    folder = make_run_folder(tmp_path, committed=1)
    (folder / "rounds" / "000002").mkdir()
    out = io.StringIO()
    print_status(Ledger(folder), Console(file=out, width=200))
    text = out.getvalue()
    assert "1 of 3 committed" in text and "stopped" in text
    assert "0 parts of responses" in text
    assert "Unfinished" in text


def test_the_plan_shows_figures_and_warnings_as_they_are():
    plan = SimpleNamespace(figures={"disk": "up to 1.0 GiB in [runs]/demo"}, warnings=["run.dir: little is free"])
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=80))  # type: ignore[arg-type]
    assert "up to 1.0 GiB in [runs]/demo" in out.getvalue()
    assert "warning: run.dir: little is free" in out.getvalue()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phase_seconds_idle_and_wall(tmp_path):
    clock = Clock()
    timer = PhaseTimer(tmp_path / "timeline.jsonl", clock=clock, now=clock)
    with timer.phase("start", 0):
        clock.now = 100.0
    clock.now = 103.0  # before the first round: nobody's
    with timer.phase("generate", 1):
        clock.now = 113.0
    clock.now = 114.0  # idle
    with timer.phase("commit", 1):
        clock.now = 116.0
        found = timer.round_seconds(1)
        clock.now = 117.0
    assert found == {"phase_seconds": {"generate": 10.0, "commit": 2.0}, "wall_seconds": 13.0, "idle_seconds": 1.0}
    clock.now = 120.0  # idle: 3
    with timer.phase("generate", 2):
        clock.now = 121.0
    clock.now = 125.0  # idle: 4, up to the question
    assert timer.round_seconds(2) == {"phase_seconds": {"generate": 1.0}, "wall_seconds": 9.0, "idle_seconds": 7.0}
    timer.close()
    lines = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["start", "generate", "commit", "generate"]
    phase = read_timeline(tmp_path / "timeline.jsonl")[2]
    assert phase == {"phase": "commit", "round": 1, "start": 114.0, "seconds": 3.0}


def test_phases_that_overlap_are_busy_once(tmp_path):
    clock = Clock()
    timer = PhaseTimer(tmp_path / "timeline.jsonl", clock=clock, now=clock)
    learn, generate = timer.phase("learn", 1), timer.phase("generate", 2)
    learn.__enter__()
    clock.now = 4.0
    generate.__enter__()
    clock.now = 10.0
    learn.__exit__(None, None, None)
    clock.now = 12.0
    assert timer.round_seconds(1) == {"phase_seconds": {"learn": 10.0}, "wall_seconds": 12.0, "idle_seconds": 0.0}
    clock.now = 20.0
    generate.__exit__(None, None, None)
    assert timer.round_seconds(2) == {"phase_seconds": {"generate": 16.0}, "wall_seconds": 8.0, "idle_seconds": 0.0}
    timer.close()


def test_a_phase_that_raises_is_counted_and_threads_may_share_the_timer(tmp_path):
    timer = PhaseTimer(tmp_path / "timeline.jsonl")
    with pytest.raises(KeyError), timer.phase("learn", 1):
        raise KeyError

    def work(round_: int) -> None:
        for _ in range(200):
            with timer.phase("judge", round_):
                pass

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    timer.close()
    lines = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert len(lines) == 601 and lines[0]["phase"] == "learn"


def test_composite_leaves_phases_in_reverse():
    log: list[str] = []

    class Logging(Silent):
        def __init__(self, name: str) -> None:
            self.name = name

        def phase(self, name, round_):
            log.append(f"{self.name} {name} {round_}")
            return super().phase(name, round_)

        def message(self, text):
            log.append(f"{self.name} {text}")

    composite = CompositeObserver([Logging("a"), Logging("b")])
    with composite.phase("learn", 2):
        composite.message("hello")
    assert log == ["a learn 2", "b learn 2", "a hello", "b hello"]


def test_tensorboard_events(tmp_path, view):
    observer = TensorBoardObserver(tmp_path / "tb", steps_done=100)
    play(observer, view)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {"learner/loss", "round/score_mean", "seconds/generate", "heldout/score", "heldout/win_rate_start"} <= set(
        tags
    )
    assert [event.step for event in events.Tensors("learner/loss")][:2] == [101, 102]
    assert events.Tensors("heldout/score")[0].step == 1


def test_tensorboard_counts_a_round_that_is_trained_anew_once(tmp_path):
    observer = TensorBoardObserver(tmp_path, steps_done=10)
    for steps in (1, 2):  # the learner is lost after the first step
        with observer.phase("learn", 1):
            for _ in range(steps):
                observer.step(1, {"loss": 1.0})
    observer.round({"round": 1, "phase_seconds": {"learn": 1.0}})
    with observer.phase("learn", 2):
        observer.step(2, {"loss": 1.0})
    assert observer._steps == 13
    observer.close()


def test_tensorboard_that_cannot_be_written_ends_no_run(tmp_path, view, monkeypatch):
    observer = TensorBoardObserver(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("add_scalar", "flush", "close"):
        monkeypatch.setattr(observer._writer, name, full)
    observer.step(1, {"loss": 1.0})
    observer.round({"round": 1, "phase_seconds": {"learn": 1.0}})
    observer.close()


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"phase": "learn", "round": 1}\n{"phase": "sa')
    timer = PhaseTimer(path)
    with timer.phase("generate", 2):
        pass
    timer.close()
    assert [json.loads(line)["phase"] for line in path.open()] == ["learn", "generate"]
