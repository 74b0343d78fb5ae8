"""The fixed log-probabilities that a round's examples are trained against: under the reference, and the start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from online_po.ledger import LogpKind
from online_po.parts import Parts
from online_po.types import Policy, Reference

SideLogps = dict[str, np.ndarray]
"""{"chosen": (N,), "rejected": (N,)} float32: logps of the pairs' responses, summed over their tokens, in nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """Response logps of a round's pairs under the policies that it is held against; None: not needed."""

    reference: SideLogps | None
    start: SideLogps | None

    def sampling_kl(self, pairs: pa.Table) -> dict[str, float]:
        """KL of the policy that sampled the round to the reference and to the start, in nats a response.

        The k1 estimator (Schulman 2020, "Approximating KL divergence"): the mean of log(pi / other) over
        responses drawn from pi, here both responses of every pair. Unlike the metrics of a step, which see
        the same responses after pi has moved on, these are on-policy. Two biases remain: responses were picked
        by score, and they were drawn at `generator.temperature` (and top_p and so on), while pi is temperature 1.
        """
        sampler = {name: pairs[f"{name}_sampler_logp"].to_numpy() for name in ("chosen", "rejected")}
        return {
            key: float(np.mean([(sampler[name] - logps[name]).mean() for name in sampler]))
            for key, logps in (("kl_reference", self.reference), ("kl_start", self.start))
            if logps is not None
        }


def make_anchors(parts: Parts, round_: int, pairs: pa.Table, held: Reference) -> Anchors:
    """The anchors that the config asks for, from the ledger or computed by the learner. `held`: this round's
    reference."""
    config = parts.config
    reference = start = None
    if config.reference.kind != "none":
        reference = anchor_logps(parts, round_, pairs, "reference", parts.ledger.reference(held, parts.start))
    if reference is not None and held == Reference(round=0):
        start = reference
    elif config.measures_kl_to_start:
        start = anchor_logps(parts, round_, pairs, "start", parts.ledger.policy(0, parts.start))
    return Anchors(reference=reference, start=start)


def anchor_logps(parts: Parts, round_: int, pairs: pa.Table, kind: LogpKind, policy: Policy) -> SideLogps:
    """Response logps of all pairs under a policy on disk; what the ledger holds already is kept."""
    stored = parts.ledger.logps(round_, kind)
    if stored is not None and len(stored["chosen"]) == pairs.num_rows:
        return stored
    logps = {name: np.full(pairs.num_rows, np.nan, dtype=np.float32) for name in ("chosen", "rejected")}
    done = 0
    for batch in parts.learner.logps(pairs, policy):
        for name, values in logps.items():
            values[batch["row"]] = batch[name]
        done += len(batch["row"])
        parts.observer.progress("reference", done, pairs.num_rows)
    assert not any(np.isnan(values).any() for values in logps.values()), "the learner left pairs out"
    parts.ledger.write_logps(round_, kind, logps)
    return logps
