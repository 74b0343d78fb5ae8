"""The fixed log-probabilities that a round's examples are trained against: under the reference, and the start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from online_po.batching import PAIR_SIDES
from online_po.parts import Parts
from online_po.pieces import LogpKind
from online_po.seeds import stable_seed
from online_po.types import Policy, Reference

MISMATCH_EXAMPLES = 32
"""On so many examples of a round the sampler's log-probabilities are compared with the learner's."""

SideLogps = dict[str, np.ndarray]
"""{side: (N,) float32}: logps of the examples' responses, summed over tokens, in nats, see `Learner.logps`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """Response logps of a round's examples under the policies that it is held against; None: not needed."""

    reference: SideLogps | None
    start: SideLogps | None
    sampler_mismatch: float | None = None
    """How far sampler and learner were apart, in nats a token; None: not asked."""

    def sampling_kl(self, examples: pa.Table) -> dict[str, float]:
        """KL of the policy that sampled the round to the reference and to the start, in nats a response.

        The k1 estimator (Schulman 2020, "Approximating KL divergence"): the mean of log(pi / other) over
        responses drawn from pi, here all responses of the examples that the round itself sampled. Unlike the metrics
        of a step, which see the same responses after pi has moved on, these are on-policy. Two biases remain: responses
        were picked by score, and they were drawn at `generator.temperature` (and top_p and so on), while pi is
        temperature 1. Empty where no example holds a response of the round's own.
        """
        found = {}
        for key, logps in (("kl_reference", self.reference), ("kl_start", self.start)):
            if logps is None:
                continue
            ratios = [values - logps[side] for side, values in sampler_logps(examples).items()]
            known = [ratio[~np.isnan(ratio)].mean() for ratio in ratios if not np.isnan(ratio).all()]
            if known:
                found[key] = float(np.mean(known))
        return found


def sampler_logps(examples: pa.Table) -> SideLogps:
    """{side: (N,) float64} logps that the sampling policy gave the responses; NaN where the round sampled none."""
    found = {}
    for side in (*PAIR_SIDES, "response"):
        name = f"{side}_sampler_logp"
        if name in examples.column_names:
            found[side] = examples[name].to_numpy().copy()
            if "source" in examples.column_names:
                found[side][np.isin(examples["source"].to_numpy(), ("replay", "seed"))] = np.nan
    return found


def make_anchors(parts: Parts, round_: int, examples: pa.Table, held: Reference) -> Anchors:
    """The anchors that the config asks for, from the ledger or computed. `held`: this round's reference."""
    config = parts.config
    reference = start = None
    if config.reference.kind != "none":
        policy = parts.ledger.reference(held, parts.start)
        make = anchor_logps if config.reference.logps == "learner" else logps_of_the_sampler
        reference = make(parts, round_, examples, "reference", policy)
    if reference is not None and held == Reference(round=0):
        start = reference
    elif config.measures_kl_to_start:
        start = anchor_logps(parts, round_, examples, "start", parts.ledger.policy(0, parts.start))
    return Anchors(
        reference=reference, start=start, sampler_mismatch=parts.ledger.logp_notes(round_, "reference").get("mismatch")
    )


def anchor_logps(parts: Parts, round_: int, examples: pa.Table, kind: LogpKind, policy: Policy) -> SideLogps:
    """Response logps of all examples under a policy on disk; what the ledger holds already is kept."""
    stored = _stored(parts, round_, examples, kind)
    if stored is None:
        stored = ask_learner(parts, examples, policy)
        parts.ledger.write_logps(round_, kind, stored)
    return stored


def logps_of_the_sampler(parts: Parts, round_: int, examples: pa.Table, kind: LogpKind, policy: Policy) -> SideLogps:
    """The logps that the sampler gave its own responses, where the reference is the sampling policy.

    On `MISMATCH_EXAMPLES` examples the learner is asked too: past `reference.max_mismatch` it computes them all. The
    mismatch is a response's difference, per token: what the loss sees, token by token errors of either sign cancelled.
    """
    stored = _stored(parts, round_, examples, kind)
    if stored is not None:
        return stored
    config = parts.config
    assert set(examples["policy_version"].to_pylist()) == {policy.version}, "the reference is not the sampling policy"
    rng = np.random.default_rng(stable_seed(config.run.seed, "mismatch", round_))
    rows = np.sort(rng.permutation(examples.num_rows)[:MISMATCH_EXAMPLES])
    own = {side: logps.astype(np.float32) for side, logps in sampler_logps(examples).items()}
    found = ask_learner(parts, examples.take(rows), policy)
    lengths = {side: pc.list_value_length(examples[f"{side}_token_ids"]).to_numpy()[rows] for side in own}
    tokens = sum(int(length.sum()) for length in lengths.values())
    mismatch = float(sum(np.abs(found[side] - own[side][rows]).sum() for side in own) / tokens)
    bound = config.reference.max_mismatch
    trusted = mismatch <= bound
    text = f"round {round_}: the sampler's log-probabilities differ from the learner's by {mismatch:.1e} nats a token"
    end = "the reference's are taken from it" if trusted else "the learner computes the reference's"
    sign = "within" if trusted else "above"
    parts.observer.message(f"{text} ({sign} reference.max_mismatch = {bound:g}): {end}")
    logps = own if trusted else ask_learner(parts, examples, policy)
    parts.ledger.write_logps(round_, kind, logps, {"mismatch": mismatch})
    return logps


def ask_learner(parts: Parts, examples: pa.Table, policy: Policy) -> SideLogps:
    """What the learner says of all examples."""
    logps: SideLogps = {}
    seen = np.zeros(examples.num_rows, dtype=np.int64)
    for batch in parts.learner.logps(examples, policy):
        rows = batch.pop("row")
        for name, values in batch.items():
            logps.setdefault(name, np.full(examples.num_rows, np.nan, dtype=np.float32))[rows] = values
        seen[rows] += 1
        parts.observer.progress("reference", int(seen.sum()), examples.num_rows)
    assert (seen == 1).all(), "the learner left examples out, or gave some twice"
    return logps


def _stored(parts: Parts, round_: int, examples: pa.Table, kind: LogpKind) -> SideLogps | None:
    stored = parts.ledger.logps(round_, kind)
    if stored is None or any(len(values) != examples.num_rows for values in stored.values()):
        return None
    return stored
