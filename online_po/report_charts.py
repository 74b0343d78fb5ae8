"""What the report's charts show, as plain data; `report.js` draws it with plotly.js in the reader's colours.

A chart: {"series": [...], "x": axis, "y": axis}, optional "line" (a level worth marking), "breaks" (x values
where a round ends), "bars" (grouped bars over named x values), "stack" ("v" or "h": stacked bars).
A series: {"name", "x", "y", "color" (index into the palette of report.css)}, optional "low" and "high"
(interval), "fill" (outline of a histogram), "faint".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from online_po.metrics import HISTOGRAM_VALUES, bin_width, to_bins
from online_po.run_view import RunView, evenly, phase_seconds

MAX_POINTS = 600
"""A training curve with more steps is drawn as that many means of neighbours."""
MAX_HISTOGRAMS = 5
"""Rounds that a distribution chart shows: the first, the last, and some evenly in between."""
MAX_BREAKS = 12
"""With more rounds their ends are not marked on the training curves."""
MAX_BARS = 60
"""Bars of the time chart; with more rounds each stands for several."""
HORIZONTAL_BARS = 12
"""Up to this many bars lie, so that their labels are easy to read."""

Chart = dict[str, Any]

TRAINING = (
    ("loss", "Loss", (("loss", "loss"),), None),
    ("accuracy", "Preference accuracy", (("accuracy", "accuracy"),), ".0%"),
    ("margin", "Reward margin", (("margin", "margin"),), None),
    ("rewards", "Implicit rewards", (("chosen_reward", "chosen"), ("rejected_reward", "rejected")), None),
    ("logps", "Log-probability of a response", (("chosen_logps", "chosen"), ("rejected_logps", "rejected")), None),
    ("kl", "KL estimate (k1)", (("kl_reference", "to reference"), ("kl_start", "to start")), None),
    ("entropy", "Entropy", (("entropy", "entropy"),), None),
    ("grad_norm", "Gradient norm", (("grad_norm", "gradient norm"),), None),
    ("learning_rate", "Learning rate", (("learning_rate", "learning rate"),), ".1e"),
    ("importance_weight", "Importance weight", (("importance_weight", "mean weight"),), None),
)
"""(chart, title, (metric, label) of each line, number format)."""

LABEL_NAMES = {"chosen": "desirable", "rejected": "undesirable"}
"""What the lines of `TRAINING` are called where the run trains on labelled responses."""

BY_ROUND = (
    ("beta", "Beta", (("beta", "beta"),)),
    ("sampling_kl", "KL of the sampling policy", (("kl_reference", "to reference"), ("kl_start", "to start"))),
    ("reference", "Reference", (("reference_round", "policy"),)),
    ("mismatch", "Sampler mismatch", (("sampler_mismatch", "mismatch"),)),
)
"""(chart, title, (figure of the round's row, label) of each line)."""

AGREEMENT = (
    ("order_consistency", "both orders alike", 1),
    ("judge_agreement", "agreement of judges (alpha)", 2),
)
"""(figure of the round's row, label, colour)."""

PHASE_GROUPS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("generate", ("generate",), 0),
    ("judge", ("judge",), 2),
    ("reference logps", ("reference",), 4),
    ("learn", ("learn",), 1),
    ("evaluate", ("evaluate",), 3),
    ("sync weights", ("sync",), 5),
    ("pair, save, commit", ("pair", "save", "commit"), 6),
    ("start-up", ("start",), 7),
    ("idle", ("idle",), 8),
)
"""(label, phases, colour)."""


def charts(view: RunView) -> dict[str, Chart]:
    """Every chart the run has data for, by name."""
    found = heldout_charts(view) | training_charts(view) | round_charts(view)
    found |= sampling_charts(view) | distribution_charts(view) | judge_charts(view)
    if view.phases or view.trained_rounds:
        found["time"] = time_chart(view)
    return found


# -- held-out --------------------------------------------------------------------------------------


def heldout_charts(view: RunView) -> dict[str, Chart]:
    """Score, win rates and length by policy version."""
    evaluations = [e for e in view.evaluations if e["score"] is not None]
    if not evaluations:
        return {}
    x = _axis("policy after round", whole=True)
    score = _interval_series("held-out score", 0, [(e["policy_version"], e["score"]) for e in evaluations])
    found: dict[str, Chart] = {"score": {"series": [score], "x": x, "y": _axis("")}}
    wins = []
    for key, name, color in (("versus_start", "against the start", 0), ("versus_previous", "against the previous", 1)):
        points = [(e["policy_version"], e[key]["win_rate"]) for e in evaluations if e[key] and e[key]["win_rate"]]
        if points:
            wins.append(_interval_series(name, color, points))
    if wins:
        found["win_rate"] = {"series": wins, "x": x, "y": _axis("", ".0%"), "line": 0.5}
    length = [(e["policy_version"], e["length_mean"]) for e in evaluations]
    found["length"] = {"series": [_line("mean length", 4, length)], "x": x, "y": _axis("tokens", zero=True)}
    return found


def _interval_series(name: str, color: int, points: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    series = _line(name, color, [(x, value["mean"]) for x, value in points])
    # A point without an interval (one prompt) keeps the mean as its own bounds: nothing is drawn.
    for bound in ("low", "high"):
        series[bound] = [value["mean"] if value[bound] is None else value[bound] for _, value in points]
    return series


# -- training --------------------------------------------------------------------------------------


def training_charts(view: RunView) -> dict[str, Chart]:
    """One chart for each entry of `TRAINING` that the learner reports, by optimizer step of the run."""
    steps = [step for round_ in view.rounds for step in round_.steps]
    ends, total = [], 0
    for round_ in view.rounds:
        total += len(round_.steps)
        if round_.steps:
            ends.append(total)
    found = {}
    for name, _, lines, fmt in TRAINING:
        series = []
        for color, (metric, label) in enumerate(lines):
            points = [(i, step[metric]) for i, step in enumerate(steps, 1) if metric in step]
            if points:
                name_ = LABEL_NAMES.get(label, label) if view.example == "label" else label
                series.append(_line(name_, color, thin(points)))
        if series:
            found[name] = {
                "series": series,
                "x": _axis("optimizer step"),
                "y": _axis("", fmt, zero=name == "learning_rate"),
                "breaks": ends[:-1] if len(ends) <= MAX_BREAKS else [],
            }
    return found


def round_charts(view: RunView) -> dict[str, Chart]:
    """Charts of `BY_ROUND` that the run has data for; beta and reference only where they change."""
    found: dict[str, Chart] = {}
    for name, _, lines in BY_ROUND:
        series = [_by_round(view, key, label, color) for color, (key, label) in enumerate(lines)]
        series = [line for line in series if line["x"]]
        constant = len({y for line in series for y in line["y"]}) == 1
        if series and not (constant and name in ("beta", "reference")):
            zero = name in ("beta", "reference", "mismatch")
            found[name] = {"series": series, "x": _axis("round", whole=True), "y": _axis("", zero=zero)}
    if "mismatch" in found:
        found["mismatch"]["line"] = view.config["reference"]["max_mismatch"]
    return found


def _by_round(view: RunView, key: str, label: str, color: int) -> dict[str, Any]:
    """A figure of the rounds' rows, where it was measured."""
    points = [(r.number, r.summary[key]) for r in view.trained_rounds if r.summary.get(key) is not None]
    return _line(label, color, thin(points))


def source_chart(view: RunView, names: Mapping[str, str]) -> dict[str, Chart]:
    """Where each round's examples came from, if not all from the same; `names`: of the sources."""
    counts = [(r.number, r.summary.get("sources", {})) for r in view.trained_rounds]
    sources = [source for source in names if any(source in of for _, of in counts)]
    if len(sources) < 2:
        return {}
    series = [
        _line(names[source], color, thin([(number, of.get(source, 0)) for number, of in counts]))
        for color, source in enumerate(sources)
    ]
    return {"sources": {"series": series, "x": _axis("round", whole=True), "y": _axis(f"{view.example}s", zero=True)}}


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, each the mean of equally many neighbours (the last of what is left)."""
    size = math.ceil(len(points) / MAX_POINTS)
    chunks = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    if not chunks:
        return list(points)
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


# -- sampling --------------------------------------------------------------------------------------


def sampling_charts(view: RunView) -> dict[str, Chart]:
    """What each round's responses were like, by round."""
    panels: dict[str, tuple[tuple[str, str, int], ...]] = {
        "scores": (
            ("score_best", "best of its group", 2),
            ("score_mean", "mean", 0),
            ("score_worst", "worst of its group", 1),
        ),
        "lengths": (
            ("length_p90", "90th percentile", 6),
            ("length_mean", "mean", 0),
            ("length_p10", "10th percentile", 6),
        ),
        "diversity": (("distinct_1", "distinct-1", 0), ("distinct_2", "distinct-2", 2), ("self_bleu", "self-BLEU", 1)),
        "correlation": (("length_score_correlation", "length and score", 3),),
    }
    titles = {"scores": "score", "lengths": "tokens", "diversity": "", "correlation": "correlation"}
    # Their whole scale: noise around a value shall not look like a trend.
    ranges = {"diversity": (0.0, 1.05), "correlation": (-1.0, 1.0)}
    found: dict[str, Chart] = {}
    for name, lines in panels.items():
        series = [_by_round(view, key, label, color) for key, label, color in lines]
        series = [line for line in series if line["x"]]
        if series:
            y = _axis(titles[name], zero=name == "lengths", range_=ranges.get(name))
            found[name] = {"series": series, "x": _axis("round", whole=True), "y": y}
    if "correlation" in found:
        found["correlation"]["line"] = 0
    return found


def judge_charts(view: RunView) -> dict[str, Chart]:
    """How far the judge can be trusted, by round, and how long it takes."""
    trials = [(r.number, r.judge_trial["accuracy"]) for r in view.rounds if r.judge_trial is not None]
    agreement = [_by_round(view, key, label, color) for key, label, color in AGREEMENT]
    agreement = [line for line in agreement if line["x"]]
    if trials:
        agreement.insert(0, _line("known pairs right", 0, trials))
    found: dict[str, Chart] = {}
    if agreement:
        y = _axis("", range_=(min([0.0, *(v for line in agreement for v in line["y"])]), 1.05))
        found["judge_trust"] = {"series": agreement, "x": _axis("round", whole=True), "y": y}
    latency = [
        _by_round(view, f"judge_latency_p{p}", f"{p}th percentile", color) for color, p in enumerate((50, 90, 99))
    ]
    if latency := [line for line in latency if line["x"]]:
        found["judge_latency"] = {
            "series": latency, "x": _axis("round", whole=True), "y": _axis("seconds", zero=True),
        }  # fmt: skip
    return found


def distribution_charts(view: RunView) -> dict[str, Chart]:
    """Histograms of the sampled responses' scores and lengths, of a few rounds on the same bins."""
    rounds = evenly(view.trained_rounds, MAX_HISTOGRAMS)
    found = {}
    for name, key, title in (("score_bins", "score_histogram", "score"), ("length_bins", "length_histogram", "tokens")):
        filled = {r.number: r.summary[key] for r in rounds if r.summary[key]["counts"]}
        if filled:
            found[name] = _distribution(filled, title)
    return found


def _distribution(histograms: dict[int, dict[str, Any]], title: str) -> Chart:
    """Grouped bars where every round has the same few values, else outlines over common bins."""
    values = sorted({value for h in histograms.values() for value in h.get("values", ())})
    exact = all("values" in h for h in histograms.values()) and len(values) <= HISTOGRAM_VALUES
    widths = [h["width"] for h in histograms.values() if "width" in h]
    width = max(widths) if widths else bin_width(values[0], values[-1]) if not exact else 1.0
    # Few responses: coarser bins, so that their heights are more than noise.
    fewest = min(sum(h["counts"]) for h in histograms.values())
    while not exact and max(len(to_bins(h, width)["counts"]) for h in histograms.values()) > max(8, fewest / 10):
        width *= 2
    series = []
    for place, (number, histogram) in enumerate(histograms.items()):
        total = sum(histogram["counts"])
        line: dict[str, Any] = {"name": f"round {number}"}
        if exact:
            counts = dict(zip(histogram["values"], histogram["counts"], strict=True))
            line |= {"x": [f"{value:.4g}" for value in values], "y": [counts.get(v, 0) / total for v in values]}
        else:
            bins = to_bins(histogram, width)
            edges = [(bins["first"] + i) * width for i in range(len(bins["counts"]) + 1)]
            # A zero on each side closes the outline.
            line |= {"x": [edges[0], *edges], "y": [0, *(count / total for count in bins["counts"]), 0]}
        outer = place in (0, len(histograms) - 1)
        # From grey at the start to the accent colour at the end.
        line |= {"color": 6 if place == 0 and len(histograms) > 1 else 0, "fill": not exact, "faint": not outer}
        series.append(line)
    chart = {"series": series, "x": _axis(title), "y": _axis("share of responses", ".0%", zero=True)}
    return chart | {"bars": True} if exact else chart


# -- time ------------------------------------------------------------------------------------------


def time_chart(view: RunView) -> Chart:
    """Busy seconds of every phase, stacked for each round, and the time no phase covered."""
    seconds = phase_seconds(view)
    for round_ in view.trained_rounds:
        seconds.setdefault(round_.number, {})["idle"] = round_.summary["idle_seconds"]
    rounds = sorted(seconds)
    size = math.ceil(len(rounds) / MAX_BARS)
    bars = [rounds[i : i + size] for i in range(0, len(rounds), size)]
    labels = [_bar_label(view, bar) for bar in bars]
    series = []
    for name, phases, color in PHASE_GROUPS:
        values = [sum(seconds[round_].get(phase, 0.0) for round_ in bar for phase in phases) for bar in bars]
        if any(values):
            series.append({"name": name, "x": labels, "y": values, "color": color})
    stack = "h" if len(bars) <= HORIZONTAL_BARS else "v"
    return {"series": series, "x": _axis(""), "y": _axis("seconds"), "stack": stack}


def _bar_label(view: RunView, rounds: Sequence[int]) -> str:
    if len(rounds) > 1:
        return f"rounds {rounds[0]}–{rounds[-1]}"
    if rounds[0] == 0:
        return "start-up"
    return "end" if rounds[0] > view.planned else f"round {rounds[0]}"


# -- parts -----------------------------------------------------------------------------------------


def _line(name: str, color: int, points: Iterable[tuple[float, float]]) -> dict[str, Any]:
    points = list(points)
    return {"name": name, "color": color, "x": [x for x, _ in points], "y": [y for _, y in points]}


def _axis(
    title: str,
    format_: str | None = None,
    *,
    whole: bool = False,
    zero: bool = False,
    range_: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """`whole`: ticks at whole numbers only; `zero`: the axis begins at 0; `range_`: its fixed ends."""
    return {"title": title, "format": format_, "whole": whole, "zero": zero, "range": range_}
