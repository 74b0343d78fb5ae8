"""A run as its folder tells it, for status, tables and the report: finished, stopped or going on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from online_po import files
from online_po.evaluation import best_version, early_stop
from online_po.observers import timeline_event

USEFUL_PHASES = ("generate", "judge", "reference", "learn", "evaluate")
"""Phases that are the work itself; everything else of a run's time is overhead."""
FEW_PROMPTS = 20
"""Below this many prompts a percentile bootstrap interval is known to be too narrow."""

MAX_TABLE_ROWS = 12
"""Policies a table shows; with more, as many spaced evenly."""

T = TypeVar("T")
Tone = Literal["better", "worse", "unclear", "open"]


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """One round's folder."""

    number: int
    folder: Path
    committed: bool
    steps: list[dict[str, Any]]
    """The learner's metrics, one dict an optimizer step."""
    summary: dict[str, Any]
    """The round's row of metrics.jsonl; empty before it is written."""
    evaluation: dict[str, Any] | None
    """`online_po.evaluation.EvalSummary` of the policy that the round made."""
    judge_trial: dict[str, Any] | None = None
    """`online_po.judge_trials.Trial` of the judge after the round; of round 0 before the run."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run folder."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    info: dict[str, Any]
    """run.json: versions, creation time, prompt counts."""
    rounds: list[RoundView]
    """In order; round 0 holds the starting policy's evaluation."""
    phases: list[dict[str, Any]]
    """timeline.jsonl: {"phase", "round", "start" (Unix seconds), "seconds"} in the order they ended."""
    restarts: list[dict[str, Any]]
    """timeline.jsonl: {"restart": who, "why", "start", "seconds"} of actors that were started again."""
    roll_backs: list[dict[str, Any]]
    """See `online_po.ledger.Ledger.roll_backs`."""
    guard_stops: list[dict[str, Any]]
    """See `online_po.ledger.Ledger.guard_stops`."""

    @property
    def name(self) -> str:
        return self.config["run"]["name"]

    @property
    def planned(self) -> int:
        """Rounds the config asks for."""
        return self.config["loop"]["rounds"]

    @property
    def trained(self) -> int:
        """Rounds committed so far."""
        return max((r.number for r in self.rounds if r.committed), default=0)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Evaluation summaries, oldest policy first."""
        return [r.evaluation for r in self.rounds if r.evaluation is not None]

    @cached_property
    def heldout_scores(self) -> dict[int, float]:
        """Policy version -> mean held-out score, oldest first."""
        return {e["policy_version"]: e["score"]["mean"] for e in self.evaluations if e["score"] is not None}

    @property
    def best(self) -> int | None:
        """The policy version with the highest held-out score."""
        return best_version(self.heldout_scores)

    @property
    def early_stopped(self) -> int | None:
        """The policy version whose evaluation ended the run early."""
        rule = self.config["eval"].get("early_stop")
        return early_stop(self.heldout_scores, rule["patience"], rule["min_gain"]) if rule else None

    @property
    def finished(self) -> bool:
        if self.early_stopped is not None:
            return self.trained >= min(self.planned, self.early_stopped + self.config["loop"]["max_staleness"])
        if self.trained < self.planned:
            return False
        return not self.config["eval"]["every"] or any(e["policy_version"] == self.planned for e in self.evaluations)

    @property
    def table_rounds(self) -> list[RoundView]:
        """The committed rounds that a table shows."""
        return evenly([r for r in self.rounds if r.committed], MAX_TABLE_ROWS)

    @property
    def example(self) -> str:
        """What the run trains on, in one word: pair, or label."""
        return "label" if any("labels" in r.summary for r in self.rounds) else "pair"

    def kl_to_start(self, version: int) -> float | None:
        """KL of a policy to the start (k1, nats a response), from the first round that it sampled; None if it sampled
        none yet, as the last one never does."""
        sampled = (r.summary for r in self.trained_rounds if r.summary["policy_version_sampled"] == version)
        return next(sampled, {}).get("kl_start")

    @property
    def trained_rounds(self) -> list[RoundView]:
        """The rounds that have their metrics."""
        return [r for r in self.rounds if r.summary]


def example_count(summary: Mapping[str, Any]) -> int | None:
    """Pairs or labelled responses that a round trained on; None of a round without metrics."""
    return summary.get("labels", summary.get("pairs"))


def load_run_view(folder: Path) -> RunView:
    """Reads a run folder. What is not there yet is left out; a last line cut short by a crash is skipped. Raises
    DamagedError for a file that is not as it was written."""
    config_text = files.read_yaml(folder / "config.yaml")
    timeline = [event for event in read_timeline(folder / "timeline.jsonl") if event is not None]
    return RunView(
        folder=folder,
        config_text=config_text,
        config=yaml.safe_load(config_text),
        info=files.read_json(folder / "run.json"),
        rounds=[_load_round(path) for path in sorted((folder / "rounds").glob("[0-9]*")) if path.name.isdigit()],
        phases=[line for line in timeline if "phase" in line],
        restarts=[line for line in timeline if "restart" in line],
        roll_backs=_acts(folder / "roll_backs.json"),
        guard_stops=_acts(folder / "guard_stops.json"),
    )


def _acts(path: Path) -> list[dict[str, Any]]:
    return files.read_json(path)["acts"] if path.exists() else []


def _load_round(folder: Path) -> RoundView:
    metrics = folder / "metrics.jsonl"
    rows = files.read_json_lines(metrics) if metrics.exists() else []
    evaluation, trial = folder / "eval.json", folder / "judge_trial.json"
    return RoundView(
        number=int(folder.name),
        folder=folder,
        committed=(folder / "COMMIT.json").exists(),
        steps=[row for row in rows if row["kind"] == "step"],
        summary=next((row for row in rows if row["kind"] == "round"), {}),
        evaluation=files.read_json(evaluation) if evaluation.exists() else None,
        judge_trial=files.read_json(trial) if trial.exists() else None,
    )


def read_timeline(path: Path) -> list[dict[str, Any] | None]:
    """The phases and restarts in timeline.jsonl, each line with a checksum; None for a line that is not as it was
    written. A last line that a crash cut is skipped."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [timeline_event(line) for line in lines]


# -- the verdict -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the run shows, in words that claim no more than the intervals do."""

    tone: Tone
    sentence: str


def verdict(view: RunView) -> Verdict:
    """The run's result in one or two sentences."""
    state = "" if view.finished else f"Unfinished: {view.trained} of {plural(view.planned, 'round')} committed. "
    evaluations = view.evaluations
    if not evaluations:
        reason = "was not evaluated: eval.every is 0" if not view.config["eval"]["every"] else "has no evaluation yet"
        return Verdict(tone="open", sentence=f"{state}This run {reason}, so nothing here says whether it got better.")
    start, last = evaluations[0], evaluations[-1]
    comparison = last["versus_start"]
    if start["policy_version"] or comparison is None or start["score"] is None or last["score"] is None:
        score = last["score"]
        said = f"scores {interval(score)}" if score else "could not be scored"
        who = f"policy {last['policy_version']}" if last["policy_version"] else "the starting policy"
        text = f"On {plural(last['prompts'], 'held-out prompt')} {who} {said}; there is no comparison yet."
        return Verdict(tone="open", sentence=state + text)
    return _compared(state, start, last, comparison)


def _compared(state: str, start: dict[str, Any], last: dict[str, Any], comparison: dict[str, Any]) -> Verdict:
    rounds = plural(last["policy_version"], "round")
    before, after = interval(start["score"]), interval(last["score"])
    if not comparison["prompts"]:
        text = "No held-out prompt was judged for both the starting and the latest policy: there is nothing to compare."
        return Verdict(tone="open", sentence=state + text)
    if comparison["better"] or comparison["worse"]:
        tone: Tone = "better" if comparison["better"] else "worse"
        verb = "rose" if comparison["better"] else "fell"
        text = f"Held-out score {verb} from {before} to {after} in {rounds}"
        basis = "whose 95% interval excludes zero"
    else:
        tone = "unclear"
        text = f"No clear change: held-out score {before} at the start, {after} after {rounds}"
        basis = "whose 95% interval includes zero"
        if comparison["difference"]["low"] is None:
            basis = "without an interval, since one prompt gives none"
    few = comparison["prompts"] < FEW_PROMPTS
    text += (
        f"; difference {interval(comparison['difference'], signed=True)}, {basis}. "
        f"Win rate against the starting policy {interval(comparison['win_rate'], percent=True)} "
        f"on {plural(comparison['prompts'], 'prompt')}" + (", too few for the intervals to be trusted." if few else ".")
    )
    return Verdict(tone=tone, sentence=state + text)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` (2 or more) of the items: the first, the last, and some evenly in between."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def number(value: float | None, signed: bool = False) -> str:
    """A score for people: three decimals below 10, fewer above; an en dash for None."""
    if value is None:
        return "–"
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"


def interval(value: dict[str, Any] | None, percent: bool = False, signed: bool = False) -> str:
    """ "0.612 [0.571, 0.650]" or "74% [68, 80]"; the bounds only where they are known."""
    if value is None:
        return "–"
    if percent:
        bounds = "" if value["low"] is None else f" [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"
        return f"{100 * value['mean']:.0f}%{bounds}"
    bounds = "" if value["low"] is None else f" [{number(value['low'], signed)}, {number(value['high'], signed)}]"
    return number(value["mean"], signed) + bounds


def side_of_half(win_rate: dict[str, Any] | None) -> str:
    """ "better" or "worse" where a win rate's interval lies above or below one half, else ""."""
    if win_rate is None or win_rate["low"] is None:
        return ""
    return "better" if win_rate["low"] > 0.5 else "worse" if win_rate["high"] < 0.5 else ""


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """ "0.4 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# -- time ------------------------------------------------------------------------------------------


def time_use(view: RunView) -> dict[str, float] | None:
    """{"startup", "wall" (after start-up), "useful": union of `USEFUL_PHASES`} in seconds, over all sessions.

    A session begins with its `start` phase and ends with its last phase. None without a timeline.
    """
    sessions: list[list[dict[str, Any]]] = []
    for phase in sorted(view.phases, key=lambda p: p["start"]):
        if phase["phase"] == "start" or not sessions:
            sessions.append([])
        sessions[-1].append(phase)
    if not sessions:
        return None
    startup = sum(p["seconds"] for p in view.phases if p["phase"] == "start")
    wall = useful = 0.0
    for session in sessions:
        work = [p for p in session if p["phase"] != "start"]
        if work:
            first = session[0]
            begin = first["start"] + (first["seconds"] if first["phase"] == "start" else 0.0)
            wall += max(p["start"] + p["seconds"] for p in work) - begin
            useful += _union((p["start"], p["start"] + p["seconds"]) for p in work if p["phase"] in USEFUL_PHASES)
    return {"startup": startup, "wall": wall, "useful": min(useful, wall)}


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Length covered by at least one of the spans, given in order of their begin."""
    covered, reached = 0.0, float("-inf")
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def phase_seconds(view: RunView) -> dict[int, dict[str, float]]:
    """Round -> phase -> busy seconds; from the timeline, which also holds what came after a round's commit."""
    if not view.phases:
        return {r.number: dict(r.summary["phase_seconds"]) for r in view.trained_rounds}
    seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for phase in view.phases:
        seconds[phase["round"]][phase["phase"]] += phase["seconds"]
    return {round_: dict(seconds[round_]) for round_ in sorted(seconds)}


# -- examples --------------------------------------------------------------------------------------

PAIR_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "chosen_score",
    "rejected_score",
    "margin",
    "chosen_rationale",
    "rejected_rationale",
    "chosen_finish_reason",
    "rejected_finish_reason",
    "source",
    "flipped",
)
LABEL_COLUMNS = (
    "prompt",
    "completion",
    "label",
    "response_score",
    "response_rationale",
    "response_finish_reason",
    "source",
    "flipped",
)


def sample_pairs(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` pairs of a round, a uniform draw by seed; reads only the row groups they lie in."""
    return _sample(folder / "pairs.parquet", PAIR_COLUMNS, count, seed)


def sample_labels(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """The same of labelled responses."""
    return _sample(folder / "labels.parquet", LABEL_COLUMNS, count, seed)


def _sample(path: Path, columns: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    files.require_whole(path)
    file = pq.ParquetFile(path)
    total = file.metadata.num_rows
    wanted = sorted(random.Random(seed).sample(range(total), min(count, total)))
    found, begin = [], 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        rows = [row - begin for row in wanted if begin <= row < end]
        if rows:
            found += file.read_row_group(group, columns=list(columns)).take(pa.array(rows)).to_pylist()
        begin = end
    return found


def sample_comparisons(start: Path, last: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` held-out prompts with the first response of both policies, a uniform draw by seed.

    Prompts judged on both sides only. Each: {"prompt": messages, "before": row, "after": row} with rows of
    `online_po.tables.EVAL_SCHEMA`. The draw looks at no score, so losses come up as often as they happen.
    """
    before, after = _first_responses(start / "eval.parquet"), _first_responses(last / "eval.parquet")
    shared = sorted(before.keys() & after.keys())
    drawn = random.Random(seed).sample(shared, min(count, len(shared)))
    return [{"prompt": before[i]["prompt"], "before": before[i], "after": after[i]} for i in drawn]


def _first_responses(path: Path) -> dict[str, dict[str, Any]]:
    files.require_whole(path)
    rows: Sequence[dict[str, Any]] = pq.read_table(path, filters=[("index", "=", 0)]).to_pylist()
    return {row["prompt_id"]: row for row in rows if row["score"] is not None}
