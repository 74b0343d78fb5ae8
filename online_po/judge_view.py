"""What a run's judging took and how far it can be trusted, for the report."""

from __future__ import annotations

from typing import Any

from online_po.judge_cache import CACHE, judge_statistics, require_whole
from online_po.run_view import RunView, number

COLUMNS = (
    ("calls", "calls"),
    ("hits", "from the cache"),
    ("retries", "asked again"),
    ("prompt_tokens", "tokens read"),
    ("response_tokens", "tokens written"),
    ("cut", "texts cut"),
)
"""(figure of `judge_statistics`, column) of whole numbers."""


def table(view: RunView) -> dict[str, Any]:
    """{"head": column names, "rows": a row a round, as text} of judges that are asked through the cache."""
    rounds = [r for r in view.table_rounds if "judge_calls" in r.summary]
    priced = any(r.summary["judge_cost"] for r in rounds)
    head = [
        "round",
        *(title for _, title in COLUMNS),
        *(["cost"] if priced else []),
        "latency p50 / p90 / p99",
        "failed",
    ]
    rows = []
    for round_ in rounds:
        row = round_.summary
        latency = [row[f"judge_latency_p{p}"] for p in (50, 90, 99)]
        rows.append(
            [
                str(round_.number),
                *(f"{row[f'judge_{key}']:,}" for key, _ in COLUMNS),
                *([f"{row['judge_cost']:,.4g}"] if priced else []),
                "–" if None in latency else " / ".join(f"{seconds:.2g}" for seconds in latency) + " s",
                ", ".join(f"{count} x {kind}" for kind, count in row["judge_failed_calls"].items()) or "–",
            ]
        )
    return {"head": head, "rows": rows}


def notes(view: RunView) -> list[str]:
    """Sentences: the preflight, what all calls took, alarms, what was taken out of the scores."""
    judge, found = view.config["judge"], []
    trials = {r.number: r.judge_trial for r in view.rounds if r.judge_trial is not None}
    if first := trials.get(0):
        which = "pairs of judge.gold" if judge.get("gold") else "known pairs that come with the package"
        said = f"Before the run it got {first['accuracy']:.0%} of {first['pairs']} {which} right"
        if first["consistency"] is not None:
            said += f", and said the same in both orders of {first['consistency']:.0%}"
        if first["longer"] is not None:
            said += f"; it took the longer response in {first['longer']:.0%} of its decisions"
        if first["failures"]:
            said += f"; {sum(first['failures'].values())} it could not judge"
        found.append(said + ".")
    require_whole(view.folder / CACHE)
    if took := judge_statistics(view.folder / CACHE, None):
        cost = f" for {took['cost']:,.4g}" if took["cost"] else ""
        found.append(
            f"In all, {took['calls']:,} calls went out{cost}: those of the rounds below, and those that tried the "
            "judge or evaluated the last policy."
        )
    for round_, trial in trials.items():
        if trial.get("alarm"):
            found.append(f"ALARM after round {round_}: {trial['accuracy']:.0%} of the known pairs right.")
    length = judge.get("length", {})
    if length.get("penalty_per_token"):
        found.append(
            f"judge.length: {length['penalty_per_token']:g} was taken off a score for each token of its response."
        )
    if length.get("regress"):
        slopes = [(r.number, r.summary["length_slope"]) for r in view.table_rounds if "length_slope" in r.summary]
        trend = ", ".join(f"{number(slope)} (round {r})" for r, slope in slopes)
        found.append(
            f"judge.length.regress: the trend over length was taken out of the scores; by token: {trend or '–'}."
        )
    return found
