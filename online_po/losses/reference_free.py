"""Losses of pairs without a reference.

Every function: tensors (B,), returns (B,) losses. s is the sigmoid, |c| and |r| the lengths of chosen and rejected.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from online_po.losses.numerics import log_odds, shaped_log_ratio


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO: -log s(beta (log pi(c)/|c| - log pi(r)/|r|) - gamma).

    Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6. Fails with too high a
    learning rate: nothing holds the policy, and text breaks down.
    """
    return -F.logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma)


def orpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    odds_weight: float,
) -> Tensor:
    """ORPO: -log pi(c)/|c| - odds_weight log s(log odds(c) - log odds(r)), odds(y) = p / (1 - p), p = exp(log pi/|y|).

    Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 6 and 7; odds_weight is
    the paper's lambda. Mean log-probabilities are held at or below -1e-6 for the odds, see numerics. Fails with chosen
    responses of the policy's own: the likelihood term then sharpens what is there already.
    """
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    return -chosen - odds_weight * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def cpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float,
    nll_weight: float,
) -> Tensor:
    """CPO: -log s(beta (log pi(c) - log pi(r))) - nll_weight log pi(c)/|c|.

    Xu et al. 2024, "Contrastive Preference Optimization", eq. 3 and the likelihood of the chosen response, here per
    token and then per response (the authors' code takes the mean over a batch's tokens). Fails on pairs of unlike
    lengths: sums without a reference favour the shorter response.
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) - nll_weight * chosen_logps / chosen_lengths


def alphapo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
    alpha: float,
) -> Tensor:
    """AlphaPO: -log s(beta (R(c) - R(r)) - gamma), R(y) = (1 - exp(-alpha log pi(y)/|y|)) / alpha.

    Gupta et al. 2025, "AlphaPO: Reward Shape Matters for LLM Alignment". alpha 0 is SimPO. The exponential goes on as a
    straight line past exp(20), see numerics. Fails with a large alpha: unlikely responses have all the gradient.
    """
    chosen = shaped_log_ratio(chosen_logps / chosen_lengths, alpha)
    rejected = shaped_log_ratio(rejected_logps / rejected_lengths, alpha)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def sft(chosen_logps: Tensor, chosen_lengths: Tensor, *, average_logps: bool) -> Tensor:
    """Negative log-likelihood of the chosen response: -log pi(c)/|c| (average_logps) or -log pi(c).

    In mixtures: Pang et al. 2024, "Iterative Reasoning Preference Optimization" (per token, there of prompt and
    response); Wang et al. 2024, "Mixed Preference Optimization". Fails alone: it learns nothing from what was rejected.
    """
    return -chosen_logps / chosen_lengths if average_logps else -chosen_logps
