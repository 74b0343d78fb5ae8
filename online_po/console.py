"""What a person sees in the terminal: live progress, one line per event in a log, tables."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from online_po import files, guard_view
from online_po.run_view import (
    RunView,
    duration,
    example_count,
    interval,
    load_run_view,
    number,
    plural,
    side_of_half,
    verdict,
)

if TYPE_CHECKING:
    from online_po.ledger import Ledger
    from online_po.plan import Plan

LOG_PHASES_FROM_S = 1.0
"""In a log, phases shorter than this get no line of their own."""
LOG_PROGRESS_EVERY_S = 30.0
"""In a log, a long phase says how far it is this often."""
TONES = {"better": "bold green", "worse": "bold red", "unclear": "bold yellow", "open": "bold"}


@dataclass
class _Phase:
    """One phase that shows progress; `first` is its first report, from which its rate is counted."""

    name: str
    round: int
    begin: float
    task: TaskID | None = None
    first: tuple[float, int] | None = None
    done: int = 0
    total: int | None = None
    logged: float = 0.0

    def rate(self, now: float) -> str:
        """Items per second; what a resumed phase found done already is not counted."""
        if self.first is None or now <= self.first[0] or self.done <= self.first[1]:
            return ""
        return f"{(self.done - self.first[1]) / (now - self.first[0]):,.1f}/s"


class ConsoleObserver:
    """Shows a run: bars in a terminal, plain lines in a log. Rounds, evaluations and messages stay on
    the screen; phases have a bar while they last, or in a log one line each when they end."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._rounds: int | None = None
        self._lock = threading.RLock()
        self._phases: dict[str, _Phase] = {}
        self._round, self._note = 0, ""
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            expand=True,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def plan(self, plan: Plan) -> None:
        """Shows the plan of the run that is about to start; goes in as `on_plan`."""
        self._rounds = plan.config.loop.rounds
        print_plan(plan, self.console)

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        with self._lock:
            self._live.start()
            self._round = round_
            phase = self._open(name, round_)
        try:
            yield
        finally:
            with self._lock:
                self._phases.pop(name, None)
                if phase.task is not None:
                    self._live.remove_task(phase.task)
                self._log_end(phase)

    def _open(self, name: str, round_: int) -> _Phase:
        """The phase's bar. Judging reports before its own phase begins: its bar is there already then."""
        phase = self._phases.get(name)
        if phase is None:
            phase = self._phases[name] = _Phase(name, round_, time.monotonic())
            phase.logged = phase.begin
            if not self._live.disable:
                phase.task = self._live.add_task(self._title(phase), total=None, note="")
        return phase

    def _log_end(self, phase: _Phase) -> None:
        seconds = time.monotonic() - phase.begin
        if self._live.disable and seconds >= LOG_PHASES_FROM_S:
            count = f"  {phase.done:,}" if phase.done else ""
            self._print(f"{self._title(phase)}  {duration(seconds)}{count}  {phase.rate(time.monotonic())}".rstrip())

    def progress(self, name: str, done: int, total: int | None, note: str = "") -> None:
        with self._lock:
            now = time.monotonic()
            phase = self._open(name, self._round)
            phase.first = phase.first or (now, done)
            phase.done, phase.total = done, total
            said = "  ".join(filter(None, (phase.rate(now), note)))
            if phase.task is not None:
                self._live.update(phase.task, completed=done, total=total, note=said)
            elif now - phase.logged >= LOG_PROGRESS_EVERY_S:
                phase.logged = now
                of = "" if total is None else f" of {total:,}"
                self._print(f"{self._title(phase)}  {done:,}{of}  {said}".rstrip())

    def step(self, round_: int, metrics: dict[str, float]) -> None:
        with self._lock:
            self._note = _learned(metrics)
            phase = self._open("learn", round_)
            phase.done += 1
            if phase.task is not None:
                self._live.update(phase.task, completed=phase.done, note=self._note)
            elif time.monotonic() - phase.logged >= LOG_PROGRESS_EVERY_S:
                phase.logged = time.monotonic()
                self._print(f"{self._title(phase)}  step {phase.done:,}  {self._note}")

    def round(self, summary: dict[str, Any]) -> None:
        parts = [
            f"score {number(summary['score_mean'])}",
            _learned(summary),
            plural(example_count(summary) or 0, "label" if "labels" in summary else "pair"),
            duration(summary["wall_seconds"]),
        ]
        self._print(f"round {summary['round']}{self._of()}  " + " · ".join(parts), style="bold")
        self._guards(summary)

    def evaluation(self, summary: dict[str, Any]) -> None:
        what = "share won against the start" if summary["against_start"] else "score"
        text = f"policy {summary['policy_version']} on held-out prompts: {what} {interval(summary['score'])}"
        if (comparison := summary["versus_start"]) is not None:
            text += f" · win rate against the start {interval(comparison['win_rate'], percent=True)}"
        self._print(text, style="cyan")
        self._guards(summary)

    def _guards(self, summary: Mapping[str, Any]) -> None:
        for finding in summary.get("guards", []):
            self._print(f"guard {finding['name']}: {finding['message']}", style="bold yellow")

    def restart(self, who: str, why: str, seconds: float) -> None:
        pass  # messages tell of it, also before it is over

    def message(self, text: str) -> None:
        self._print(text, style="dim")

    def close(self) -> None:
        self._live.stop()

    def _title(self, phase: _Phase) -> str:
        if phase.round == 0 or (self._rounds is not None and phase.round > self._rounds):
            return phase.name
        return f"round {phase.round}{self._of()} {phase.name}"

    def _of(self) -> str:
        return f"/{self._rounds}" if self._rounds is not None else ""

    def _print(self, text: str, style: str | None = None) -> None:
        # Soft wrap: a line of a log stays one line.
        self.console.print(Text(text, style=style or ""), soft_wrap=True)


def _learned(metrics: Mapping[str, float]) -> str:
    if "loss" not in metrics:  # left out, since it was not finite
        return "loss not finite"
    return f"loss {metrics['loss']:.3f} · accuracy {100 * metrics['accuracy']:.0f}%"


def final_table(view: RunView) -> Table:
    """One row per policy (of many: some, evenly spaced): held-out results with 95% intervals, and its training."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("policy", justify="right", no_wrap=True)
    table.add_column("held-out score", no_wrap=True)
    table.add_column("vs start", no_wrap=True)
    table.add_column("vs previous", no_wrap=True)
    for name in ("toks", "cut", f"{view.example}s", "KL k1"):
        table.add_column(name, justify="right", no_wrap=True)
    for round_ in view.table_rounds:
        evaluation = round_.evaluation or {}
        share = evaluation.get("truncated_share")
        length = evaluation.get("length_mean")
        count, kl = example_count(round_.summary), view.kl_to_start(round_.number)
        table.add_row(
            "start" if round_.number == 0 else str(round_.number),
            interval(evaluation.get("score")),
            _win_rate(evaluation.get("versus_start")),
            _win_rate(evaluation.get("versus_previous")),
            "–" if length is None else f"{length:.0f}",
            "–" if share is None else f"{100 * share:.0f}%",
            "–" if count is None else f"{count:,}",
            "–" if kl is None else f"{kl:.2f}",
        )
    return table


def _win_rate(comparison: Mapping[str, Any] | None) -> Text:
    if comparison is None:
        return Text("–", style="dim")
    styles = {"better": "green", "worse": "red", "": ""}
    return Text(interval(comparison["win_rate"], percent=True), style=styles[side_of_half(comparison["win_rate"])])


def print_result(view: RunView, console: Console | None = None) -> None:
    """The verdict, the final table and the best policy of a run, and what guards saw."""
    found = verdict(view)
    parts: list[RenderableType] = [Text(found.sentence, style=TONES[found.tone]), final_table(view)]
    if (best := guard_view.best(view)) is not None:
        parts.append(Text(best))
    if lines := guard_view.latest(view):
        parts.append(Text("\n".join(lines), style="yellow"))
    (console or Console()).print(Padding(_group(*parts), (1, 0)))


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """What `check` found out: figures, prompts left out by reason, warnings."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in plan.figures.items():
        table.add_row(label, escape(text))
    warnings = [Text(f"warning: {text}", style="yellow") for text in plan.warnings]
    (console or Console()).print(Padding(_group(table, *warnings), (1, 0)))


def print_status(ledger: Ledger, console: Console | None = None) -> None:
    """Where a run stands: verdict, table, the round being made, who is working on it."""
    view = load_run_view(ledger.root)
    console = console or Console()
    owner = ledger.holder()
    if owner:
        state = Text(f"running in {owner}", style="green")
    elif view.finished:
        state = Text("finished", style="green")
    else:
        state = Text("stopped; `online-po resume` continues it", style="yellow")
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", no_wrap=True)
    head.add_column(overflow="fold")
    head.add_row("run", f"{escape(view.name)} in {escape(str(view.folder))}")
    head.add_row("state", state)
    head.add_row("rounds", f"{view.trained} of {view.planned} committed")
    for round_ in view.rounds:
        if not round_.committed and round_.number:
            head.add_row(f"round {round_.number}", _made(ledger, round_.number))
    if view.phases:
        last = view.phases[-1]
        ago = time.time() - last["start"] - last["seconds"]
        head.add_row("last phase", f"{last['phase']} of round {last['round']}, ended {duration(max(0.0, ago))} ago")
    console.print(Padding(head, (1, 0, 0, 0)))
    print_result(view, console)


def _made(ledger: Ledger, round_: int) -> str:
    """What an uncommitted round holds so far."""
    folder = ledger.round_dir(round_)
    counts = []
    if (path := folder / "prompts.parquet").exists():
        files.require_whole(path)
        counts.append(f"{plural(pq.read_metadata(path).num_rows, 'prompt')} drawn")
    for name in ("responses", "judgements"):
        parts = len(list((folder / name).glob("part-*.parquet")))
        counts.append(f"{plural(parts, 'part')} of {name}")
    if ledger.has_examples(round_, "pairs"):
        counts.append("paired")
    if ledger.has_examples(round_, "labels"):
        counts.append("labelled")
    return ", ".join(counts)


def _group(*renderables: RenderableType) -> Group:
    """Renderables with an empty line between them."""
    spaced: list[RenderableType] = []
    for renderable in renderables:
        spaced += [renderable, ""]
    return Group(*spaced[:-1])
