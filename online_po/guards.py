"""What guards see in a round's numbers: pure functions of rows of metrics.jsonl. `online_po.roll_back` acts on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from online_po.evaluation import Comparison
from online_po.guard_configs import (
    Action,
    DisplacementGuard,
    DiversityGuard,
    EntropyGuard,
    FlatGuard,
    Guard,
    GuardsConfig,
    KlGuard,
    LengthGuard,
    LengthScoreGuard,
    NonFiniteGuard,
)

Row = Mapping[str, Any]
"""A round's row of metrics.jsonl."""


class Finding(TypedDict):
    """What one guard saw."""

    name: str  # the guard, as in section `guards`
    action: Action
    policy: int  # the policy version that shows it; going back means going to an older one
    message: str  # one sentence: what was seen, and what to try


def rows_needed(guards: GuardsConfig, round_: int) -> list[int]:
    """The earlier rounds whose rows `round_findings` looks at, oldest first: the first, and the latest few."""
    return sorted({1, *range(round_ - guards.flat.rounds + 1, round_)} & set(range(1, round_)))


def round_findings(guards: GuardsConfig, row: Row, earlier: Sequence[Row]) -> list[Finding]:
    """What the guards see in a round's row; `earlier`: the rows of `rows_needed`.

    A guard says nothing of a round without its metric (no KL where none is measured, say).
    """
    found: list[Finding] = []
    for name, guard in guards.each().items():
        if name not in CHECKS or guard.action == "off":
            continue
        check, of_sampler = CHECKS[name]
        saw = check(guard, row, earlier)
        if saw is not None:
            policy = row["policy_version_sampled"] if of_sampler else row["round"]
            found.append(finding(name, guard, policy, saw))
    return found


def evaluation_findings(
    guards: GuardsConfig, version: int, accuracy: float, best: int, versus_best: Comparison
) -> list[Finding]:
    """What is seen when a policy is evaluated. `accuracy`: of the round that made it; `best`: the earlier policy with
    the highest held-out score, and `versus_best` this one against it, prompt by prompt."""
    guard, difference = guards.over_optimisation, versus_best["difference"]
    if guard.action == "off" or accuracy < guard.min_accuracy or not versus_best["worse"] or difference is None:
        return []
    saw = (
        f"preference accuracy was {accuracy:.0%} in round {version}, but the held-out score is "
        f"{-difference['mean']:.3g} below that of policy {best} (95% interval {difference['low']:.3g} to "
        f"{difference['high']:.3g}): over-optimisation"
    )
    return [finding("over_optimisation", guard, version, saw)]


def finding(name: str, guard: Guard, policy: int, saw: str) -> Finding:
    """`saw` as a finding, with what to try."""
    return Finding(name=name, action=guard.action, policy=policy, message=f"{saw}; {guard.remedy}.")


# -- one check a guard: what it saw, or None -------------------------------------------------------


def _kl(guard: KlGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    for key, other in (("kl_reference", "the reference"), ("kl_start", "the start")):
        if row.get(key, 0.0) > guard.max_nats:
            return (
                f"policy {row['policy_version_sampled']} has a KL of {row[key]:.3g} nats a response to {other}, above "
                f"guards.kl.max_nats = {guard.max_nats:g}"
            )
    return None


def _displacement(guard: DisplacementGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    if "chosen_shift" not in row:
        return None
    chosen, rejected = (row[f"{side}_shift"] / max(1.0, row[f"{side}_length"]) for side in ("chosen", "rejected"))
    if chosen >= -guard.max_fall or rejected >= -guard.max_fall:
        return None
    return (
        f"training made chosen responses less likely as well as rejected ones, by {-chosen:.2g} and {-rejected:.2g} "
        f"nats a token since they were sampled (guards.displacement.max_fall = {guard.max_fall:g})"
    )


def _entropy(guard: EntropyGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    share = _share_of_first("entropy", row, earlier)
    if share is None or share >= guard.min_share:
        return None
    return (
        f"entropy is {row['entropy']:.3g} nats a token, {share:.0%} of round 1's, below guards.entropy.min_share = "
        f"{guard.min_share:g}"
    )


def _diversity(guard: DiversityGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    share = _share_of_first("distinct_2", row, earlier)
    if share is None or share >= guard.min_share:
        return None
    return (
        f"responses to one prompt repeat each other: distinct_2 is {row['distinct_2']:.3g}, {share:.0%} of round 1's, "
        f"below guards.diversity.min_share = {guard.min_share:g}"
    )


def _length(guard: LengthGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    ratio = _share_of_first("length_mean", row, earlier)
    if ratio is None or ratio <= guard.max_ratio:
        return None
    return (
        f"responses have {row['length_mean']:.0f} tokens on average, {ratio:.3g} times round 1's, above "
        f"guards.length.max_ratio = {guard.max_ratio:g}"
    )


def _length_score(guard: LengthScoreGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    correlation = row.get("length_score_correlation")
    if correlation is None or correlation <= guard.max_correlation:
        return None
    return (
        f"longer responses to a prompt score higher: correlation {correlation:.2f}, above "
        f"guards.length_score.max_correlation = {guard.max_correlation:g}"
    )


def _flat(guard: FlatGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    rows = [*earlier, row][-guard.rounds :]
    if [r["round"] for r in rows] != list(range(row["round"] - guard.rounds + 1, row["round"] + 1)):
        return None  # too few rounds so far
    if not all(_is_flat(guard, r) for r in rows):
        return None
    return (
        f"the policy does not tell chosen from rejected: accuracy {row['accuracy']:.0%}, margin {row['margin']:.2g}, "
        f"loss {row['loss']:.3g}, and no better in {guard.rounds} rounds on end"
    )


def _is_flat(guard: FlatGuard, row: Row) -> bool:
    # One step from a reference that is the policy itself has no margin by construction.
    from_itself = row.get("reference_round") == row["round"] - 1 and not row["reference_blended"]
    if (from_itself and row["steps"] == 1) or "margin" not in row or "loss" not in row:
        return False
    # Two standard errors of a coin's share of heads: what chance alone gives for so few.
    chance = 1 / math.sqrt(row.get("pairs") or row.get("labels") or 1)
    margin = row["margin"] / row["beta"]  # betas differ between losses by orders of magnitude
    return abs(row["accuracy"] - 0.5) <= max(guard.max_edge, chance) and abs(margin) <= guard.max_margin


def _nonfinite(guard: NonFiniteGuard, row: Row, earlier: Sequence[Row]) -> str | None:
    if not row.get("skipped"):
        return None
    return (
        f"{row['skipped']:.0f} of {row['steps']} steps of round {row['round']} had a loss or gradient that was not "
        "finite and were left out"
    )


def _share_of_first(key: str, row: Row, earlier: Sequence[Row]) -> float | None:
    """A metric as a share of round 1's; None in round 1 itself, and where either is missing or 0."""
    first = earlier[0].get(key) if earlier else None
    return row[key] / first if first and row.get(key) is not None else None


CHECKS: dict[str, tuple[Callable[[Any, Row, Sequence[Row]], str | None], bool]] = {
    "kl": (_kl, True),
    "displacement": (_displacement, False),
    "entropy": (_entropy, False),
    "diversity": (_diversity, True),
    "length": (_length, True),
    "length_score": (_length_score, True),
    "flat": (_flat, False),
    "nonfinite": (_nonfinite, False),
}
"""Guards on a round's row -> (check, whether it is the policy that sampled the round which shows it, else the one
that the round made)."""
