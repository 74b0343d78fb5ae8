"""The reference of the next round: which weights it is, decided and written before the commit that names it."""

from __future__ import annotations

from online_po.fail_points import fail_point
from online_po.parts import Parts
from online_po.reference_configs import ReferenceConfig
from online_po.types import Reference


def next_reference(config: ReferenceConfig, round_: int, held: Reference, kl: float | None) -> Reference:
    """What the reference is after a round whose reference was `held`.

    `kl`: estimate of the KL of the policy that sampled the round to `held`, in nats a response; None where nothing
    was measured (no reference). For `reference.kind: kl` it is looked at when the round is over: the policy that
    takes the reference's place has made one more round of steps than the one that was measured (and
    `loop.max_staleness` more).
    """
    match config.kind:
        case "refresh" if round_ % config.every == 0:
            return Reference(round=round_)
        case "ema" if round_ % config.every == 0:
            return Reference(round=round_, blended=True)
        case "kl" if kl is not None and config.above is not None and kl > config.above:
            return Reference(round=round_)
    return held


def renew_reference(parts: Parts, round_: int, held: Reference, kl: float | None) -> Reference:
    """The reference of the round after this one; where that is a new mean of policies, the learner writes it.

    `kind: ema` is the soft update of TR-DPO (Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good
    Alignment", arXiv 2404.09656): reference <- alpha * policy + (1 - alpha) * reference, in weight space.
    """
    config = parts.config.reference
    fail_point("refresh.begin")
    reference = next_reference(config, round_, held, kl)
    if reference.blended and reference != held:
        assert config.alpha is not None
        with parts.ledger.blended_weights(round_) as folder:
            parts.learner.blend(parts.ledger.reference(held, parts.start), config.alpha, folder)
    return reference
