"""What beta a round's losses have: as configured, from a list, or held by a controller."""

from __future__ import annotations

from collections.abc import Sequence

from online_po.loss_configs import LossBase
from online_po.reference_configs import BetaControlConfig


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
