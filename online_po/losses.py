"""Preference losses: pure functions, logps in, per-pair loss out. One formula, one place.

A loss is one function from the tensors it needs to `(B,)` losses; `pair_losses` passes it what it needs.
Log-probabilities are in nats and, unless a loss says otherwise, summed over response tokens. The
implicit reward of a response is r = beta * (logp - reference_logp).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from online_po.sections import LossConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What a loss may take, for B pairs: each tensor is (B,) float32. Gradients flow through the policy's."""

    chosen_logps: Tensor
    """Policy's log-probability of the chosen response."""
    rejected_logps: Tensor
    """Policy's log-probability of the rejected response."""
    reference_chosen_logps: Tensor
    """Reference's log-probability of the chosen response."""
    reference_rejected_logps: Tensor
    """Reference's log-probability of the rejected response."""


def pair_losses(config: LossConfig, inputs: LossInputs) -> Tensor:
    """(B,) losses of B pairs under the configured loss."""
    match config.name:
        case "sigmoid":
            return sigmoid(
                inputs.chosen_logps,
                inputs.rejected_logps,
                inputs.reference_chosen_logps,
                inputs.reference_rejected_logps,
                beta=config.beta,
                label_smoothing=config.label_smoothing,
            )


def sigmoid(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO, and conservative DPO where labels may be wrong. All tensors (B,); returns (B,).

    m = beta * [(logp_c - ref_c) - (logp_r - ref_r)],   loss = -(1 - e) * log sigmoid(m) - e * log sigmoid(-m)

    e = 0: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7. e > 0 is the assumed share of
    wrong labels: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3; its minimum is at
    sigmoid(m) = 1 - e instead of at infinity.
    Needs summed logps of policy and reference. Fails by driving both logps down as long as the rejected
    one falls faster: watch `chosen_logps`; a higher beta or e > 0 holds it back.
    """
    margin = beta * ((chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
