"""Losses of pairs that take the log-probabilities of policy and reference, and nothing else.

Every function: tensors (B,), returns (B,) losses. a and b are the log-ratios log pi - log ref of chosen and rejected,
m = a - b their margin, s the sigmoid.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """DPO: -log s(beta m).

    Rafailov et al. 2023, "Direct Preference Optimization", eq. 7. Fails by driving both logps down as long as the
    rejected one falls faster: watch `chosen_logps`; a higher beta, or `sft` beside it, holds it back.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(beta * margins)


def cdpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Conservative DPO: -(1 - e) log s(beta m) - e log s(-beta m), e = label_smoothing.

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3. Its minimum is at
    s(beta m) = 1 - e instead of at infinity. Fails where e is larger than the share of wrong labels: clear pairs are
    then pulled back together.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    return -(1 - label_smoothing) * F.logsigmoid(beta * margins) - label_smoothing * F.logsigmoid(-beta * margins)


def rdpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Robust DPO: (-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2e), e = label_smoothing.

    Chowdhury et al. 2024, "Provably Robust DPO", section 3.1: where labels are flipped at rate e its expectation is the
    DPO loss of the true labels. Fails without an early stop: it has no lower bound, and margins grow without end.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    right, flipped = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    return (-(1 - label_smoothing) * right + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    average_logps: bool,
) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2, h = a/|c| - b/|r| (average_logps) or a - b.

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17, beta being
    the paper's tau. The paper writes sums; its authors average over tokens, which keeps the target margin 1/(2 beta)
    apart from length; with sums, take a beta lower by about the length. Fails as a regression does: pairs past the
    target are pulled back, and one far outlier outweighs a batch.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    margins = a / chosen_lengths - b / rejected_lengths if average_logps else a - b
    return (margins - 1 / (2 * beta)) ** 2


def hinge(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """SLiC's hinge on the log-ratio margin: max(0, 1 - beta m).

    Zhao et al. 2023, "SLiC-HF"; with the reference as here: Liu et al. 2023, "Statistical Rejection Sampling Improves
    Preference Optimization" (RSO). Fails by standing still once every pair is 1/beta apart.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    return torch.relu(1 - beta * margins)


def exo_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """EXO on pairs: KL((s(beta m), s(-beta m)) || (1 - e, e)), e = label_smoothing.

    Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", eq. 16. Zero where
    s(beta m) = 1 - e. Fails on pairs far on the wrong side: the gradient vanishes there.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    log_right, log_wrong = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    right = log_right.exp() * (log_right - math.log1p(-label_smoothing))
    return right + log_wrong.exp() * (log_wrong - math.log(label_smoothing))


def nca_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """NCA on pairs: -log s(beta a) - (log s(-beta a) + log s(-beta b)) / 2.

    Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards", section 4.1. Works on
    absolute likelihoods: the chosen one's minimum is at s(beta a) = 2/3. Fails by separating less than DPO does.
    """
    chosen = beta * (chosen_logps - reference_chosen_logps)
    rejected = beta * (rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    log_ratio_mean: Tensor | None = None,
    *,
    beta: float,
) -> Tensor:
    """BCO on pairs: -log s(beta (a - d)) - log s(-beta (b - d)), d = log_ratio_mean, without a gradient.

    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment". d is a running mean over all
    responses; where it is not given, the mean over these pairs, which makes the loss depend on the batch. Fails where
    d lags behind a policy that moves fast.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    shift = torch.cat([a, b]).mean().detach() if log_ratio_mean is None else log_ratio_mean.detach()
    return -F.logsigmoid(beta * (a - shift)) - F.logsigmoid(-beta * (b - shift))


def sppo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    preference_probabilities: Tensor | None = None,
    *,
    beta: float,
    probability: Literal["hard", "soft"],
) -> Tensor:
    """SPPO: (a - (p - 1/2) / beta)^2 + (b + (p - 1/2) / beta)^2.

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", eq. 4.7, summed over the two
    responses; beta is 1/eta, the reference is the sampling policy. p is the probability of winning: 1 (hard), or the
    judge's that chosen beats rejected (soft), where the paper takes the one of beating the policy's average response.
    Raises ValueError for soft without preference_probabilities. Fails with a beta of DPO's size: at 0.1 the targets
    are 5 nats, and nothing moves.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    if probability == "soft":
        if preference_probabilities is None:
            raise ValueError("sppo with probability: soft needs preference_probabilities, which were not given")
        target = (preference_probabilities - 0.5) / beta
    else:
        target = torch.full_like(a, 0.5 / beta)
    return (a - target) ** 2 + (b + target) ** 2


def apo_zero(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """APO-zero: 1 - s(beta a) + s(beta b): the chosen response up, the rejected one down.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization", eq. 7, plus 1 so that it is not negative. Fails where
    the policy is better than the chosen responses: they are pushed up all the same.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    return torch.sigmoid(-beta * a) + torch.sigmoid(beta * b)


def apo_down(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """APO-down: s(beta a) + 1 - s(beta m): both responses down, the rejected one further.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization", eq. 8, plus 1 so that it is not negative. Fails where
    the chosen responses are better than the policy: they are pushed down all the same.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    return torch.sigmoid(beta * a) + torch.sigmoid(-beta * (a - b))


def discopop(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    tau: float,
) -> Tensor:
    """DiscoPOP: -(1 - g) log s(beta m) + g exp(-beta m), g = s(beta m / tau), tau at most 1.

    Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models", eq. 5 and
    appendix E. The product g exp(-beta m) is taken as one exponential, whose exponent is at most 0 on the wrong side.
    Fails, as it is not convex, by leaving pairs just below margin 0 as they are: a local minimum is there.
    """
    scaled = beta * ((chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps))
    modulation = scaled / tau
    return -torch.sigmoid(-modulation) * F.logsigmoid(scaled) + torch.exp(F.logsigmoid(modulation) - scaled)
