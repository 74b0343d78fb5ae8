"""Losses of single responses, each labelled desirable or not.

Every function: tensors (B,), returns (B,) losses. a is the log-ratio log pi - log ref, s the sigmoid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kto_kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """() KL(policy || reference) as KTO estimates it: max(0, mean log-ratio) of prompts with others' responses.

    logps, reference_logps: (M,), response i + 1 of the batch after prompt i. Without a gradient. Ethayarajh et al.
    2024, "KTO", section 4.1. Across ranks, average the log-ratios before the maximum is taken.
    """
    return (logps - reference_logps).detach().mean().clamp(min=0)


def _either(desirable: Tensor, if_desirable: float, if_not: float, like: Tensor) -> Tensor:
    return torch.where(desirable, like.new_tensor(if_desirable), like.new_tensor(if_not))


def kto(
    logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO: desirable w_d (1 - s(beta (a - kl))), undesirable w_u (1 - s(beta (kl - a))); kl without a gradient.

    Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 8. The paper advises
    w_d n_d / (w_u n_u) between 1 and 3/2 for n_d and n_u labels of each kind (eq. 9; 4/3 in its first version). Fails
    with kl estimated over few responses, and where one kind of label is rare and not weighted up.
    """
    signs = _either(desirable, 1.0, -1.0, logps)
    shifted = logps - reference_logps - kl.detach()
    return _either(desirable, desirable_weight, undesirable_weight, logps) * torch.sigmoid(-beta * signs * shifted)


def apo_zero_unpaired(
    logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """APO-zero of single responses: desirable w_d (1 - s(beta a)), undesirable w_u s(beta a).

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization", eq. 7, its two terms apart. Fails as apo_zero does:
    desirable responses that are worse than the policy's own are pushed up all the same.
    """
    signs = _either(desirable, 1.0, -1.0, logps)
    weights = _either(desirable, desirable_weight, undesirable_weight, logps)
    return weights * torch.sigmoid(-beta * signs * (logps - reference_logps))


def bco(
    logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    log_ratio_mean: Tensor | None = None,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """BCO: desirable -w_d log s(beta (a - d)), undesirable -w_u log s(-beta (a - d)), d without a gradient.

    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", without its density-ratio
    weights (they are for labels that come from different prompts). d = log_ratio_mean, a running mean over all
    responses; where it is not given, the mean over these. Fails where d lags behind a policy that moves fast.
    """
    signs = _either(desirable, 1.0, -1.0, logps)
    log_ratios = logps - reference_logps
    shift = log_ratios.mean().detach() if log_ratio_mean is None else log_ratio_mean.detach()
    weights = _either(desirable, desirable_weight, undesirable_weight, logps)
    return -weights * F.logsigmoid(beta * signs * (log_ratios - shift))
