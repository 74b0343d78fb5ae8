"""The probe: a fixed token sequence of which the learner says the same wherever it holds the same weights."""

from __future__ import annotations

from collections.abc import Sequence

from online_po.errors import SyncError
from online_po.parts import Parts
from online_po.protocols import Learner
from online_po.types import Probe

PROBE_TOLERANCE = 0.02
"""How far a probe token's log-probability may be off, in nats, on another machine but with the same weights."""


def require_probe(parts: Parts, probe: Probe, what: str) -> None:
    """Raises SyncError unless the learner says of the probe what it said before. `what`: what it did, for people."""
    if (gap := probe_gap(parts, probe)) is not None:
        raise SyncError(
            f"{what}, but its log-probabilities of the probe are off by up to {gap:.3g} nats; the weights did not "
            "arrive whole"
        )


def probe_gap(parts: Parts, probe: Probe) -> float | None:
    """By how much, in nats, the learner is off from what it said of the probe before; None where that may be another
    machine's rounding."""
    now = parts.learner.token_logps(probe.token_ids)
    gap = max(abs(a - b) for a, b in zip(now, probe.token_logps, strict=True))
    tolerance = PROBE_TOLERANCE if parts.config.learner.compute_dtype == "float32" else 16 * PROBE_TOLERANCE
    return None if gap <= tolerance else gap  # a NaN is a gap


def probe_of(learner: Learner, token_ids: Sequence[int]) -> Probe:
    """The learner's current word on the probe tokens."""
    return Probe(token_ids=tuple(token_ids), token_logps=tuple(learner.token_logps(token_ids)))
