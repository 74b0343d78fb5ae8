"""Functions that stay finite, with finite gradients, for every float32 log-probability a loss may meet."""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENT_CAP = 20.0
"""Exponentials go on as straight lines beyond exp(20), about 5e8: no overflow, and the gradient never dies."""
LARGEST_MEAN_LOGP = -1e-6
"""Mean log-probabilities are held at or below this where odds are taken: p = 1 has none."""


def expm1_capped(x: Tensor) -> Tensor:
    """exp(x) - 1, its tangent beyond EXPONENT_CAP. Any shape."""
    capped = x.clamp(max=EXPONENT_CAP)
    return torch.expm1(capped) + torch.exp(capped) * (x - capped)


def shaped_log_ratio(log_ratio: Tensor, alpha: float) -> Tensor:
    """(1 - u^-alpha) / alpha for u = exp(log_ratio); log_ratio itself at alpha 0, its limit. Any shape.

    Straight beyond u^-alpha = exp(EXPONENT_CAP).
    """
    return log_ratio if alpha == 0 else -expm1_capped(-alpha * log_ratio) / alpha


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean_logps), which is held at or below LARGEST_MEAN_LOGP. Any shape."""
    held = mean_logps.clamp(max=LARGEST_MEAN_LOGP)
    return held - torch.log(-torch.expm1(held))
