"""What beta a round's losses have: as configured, from a list, or held by a controller."""

from __future__ import annotations

from collections.abc import Sequence

from online_po.loss_configs import LossBase
from online_po.reference_configs import BetaControlConfig
from online_po.types import Reference


def round_betas(losses: Sequence[LossBase], round_: int, scale: float) -> list[float | None]:
    """The beta of each loss in a round (from 1); None where a loss has none.

    `scale`: what the controller multiplies with; it acts on betas against a reference only.
    """
    betas: list[float | None] = []
    for loss in losses:
        beta = getattr(loss, "beta", None)
        if isinstance(beta, tuple):
            beta = beta[round_ - 1]
        betas.append(beta * scale if beta is not None and loss.needs_reference else beta)
    return betas


def drifted(held: Reference, sampled: int) -> bool:
    """Whether the KL of policy version `sampled` to the reference `held` tells how far beta let it go.

    Not where that policy is the reference itself, at distance zero, nor where it is older (`loop.max_staleness`): then
    it was trained against another one. A mean of policies lies behind the newest one always.
    """
    return held.blended or sampled > held.round


def next_scale(control: BetaControlConfig, scale: float, kl: float | None) -> float:
    """The controller's scale after a round whose policy was `kl` nats a response from the reference; the same where
    nothing was measured.

    Proportional in the relative error, which is clipped: Ziegler et al. 2019, "Fine-Tuning Language Models from Human
    Preferences", section 2.2, with `gain` for K_beta and a round for a batch. KL above the target raises beta, which
    holds the policy closer.
    """
    if kl is None:
        return scale
    error = min(control.max_error, max(-control.max_error, kl / control.target_kl - 1))
    return min(control.max_scale, max(control.min_scale, scale * (1 + control.gain * error)))
