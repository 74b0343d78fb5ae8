"""What guards saw and did in a run, and which policy is best, as sentences for terminal and report."""

from __future__ import annotations

from online_po.run_view import RunView, interval

SHOWN = 6
"""Findings that a terminal shows, the latest; the report has all."""


def findings(view: RunView) -> list[str]:
    """One sentence for each thing that a guard saw in the rounds there are, oldest first."""
    stops = {(stop["policy"], stop["attempt"], stop["guard"]) for stop in view.guard_stops}
    found = []
    for round_ in view.rounds:
        for kind, record in (("round", round_.summary), ("policy", round_.evaluation or {})):
            for finding in record.get("guards", []):
                stopped = (finding["policy"], record["attempt"], finding["name"]) in stops
                who = f"guard {finding['name']}" + (" (the run stopped)" if stopped else "")
                found.append(f"{kind} {round_.number}, {who}: {finding['message']}")
    return found


def roll_backs(view: RunView) -> list[str]:
    """One sentence for each time the run went back, oldest first."""
    return [
        f"went back from round {record['from']} to round {record['to']}, "
        f"{'by hand' if record['guard'] is None else 'guard ' + record['guard']}: {record['message']}"
        for record in view.roll_backs
    ]


def latest(view: RunView) -> list[str]:
    """What a terminal shows: roll-backs and the latest findings."""
    found = findings(view)
    hidden = len(found) - SHOWN
    before = [f"{hidden} earlier findings of guards are in the report"] if hidden > 0 else []
    return [*roll_backs(view), *before, *found[-SHOWN:]]


def best(view: RunView) -> str | None:
    """The policy with the highest held-out score, and whether the run ended early; None with fewer than two."""
    if len(view.heldout_scores) < 2 or view.best is None:
        return None
    score = next(e["score"] for e in view.evaluations if e["policy_version"] == view.best)
    name = f"policy {view.best}" if view.best else "the starting policy"
    said = f"Best on held-out prompts: {name}, {interval(score)}."
    if view.early_stopped is not None:
        rule = view.config["eval"]["early_stop"]
        said += f" Ended early: no gain in {rule['patience']} evaluations on end, up to policy {view.early_stopped}."
    return said
