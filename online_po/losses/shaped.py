"""Losses of pairs with a reference that also look at lengths, scores, the batch or single tokens, or at another
divergence.

Every function: tensors (B,), returns (B,) losses. a and b are the log-ratios log pi - log ref of chosen and rejected,
m = a - b their margin, s the sigmoid, |c| and |r| the lengths.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from online_po.losses.numerics import shaped_log_ratio

SMALLEST_GAP = 1e-6
"""Score gaps are held at or above this before their logarithm is taken (flipped labels have negative ones)."""
SMALLEST_BETA = 1e-3
"""beta_dpo's beta is held at or above this, as its authors do: a batch far below the mean would make it negative."""


def ln_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Length-normalised DPO: -log s(beta (a/|c| - b/|r|)).

    Ahrabian et al. 2024, "The Hitchhiker's Guide to Human Alignment with *PO" (LN-DPO), and Lambert et al. 2024,
    "Tulu 3", which trains with beta 5. Fails with a beta of DPO's size: log-ratios per token are small.
    """
    a = (chosen_logps - reference_chosen_logps) / chosen_lengths
    b = (rejected_logps - reference_rejected_logps) / rejected_lengths
    return -F.logsigmoid(beta * (a - b))


def ld_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_prefix_logps: Tensor,
    rejected_prefix_logps: Tensor,
    reference_chosen_prefix_logps: Tensor,
    reference_rejected_prefix_logps: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """Length-desensitised DPO: DPO on prefix + alpha (whole - prefix) in place of every log-probability.

    Liu et al. 2024, "Length Desensitization in Direct Preference Optimization". The prefix is a response's first
    min(|c|, |r|) tokens, so the shorter one counts whole; for policy and reference alike. alpha 1 is DPO, alpha 0
    cuts the longer response off. Fails with a low alpha where what matters comes late (an answer at the end).
    """
    a, a_prefix = chosen_logps - reference_chosen_logps, chosen_prefix_logps - reference_chosen_prefix_logps
    b, b_prefix = rejected_logps - reference_rejected_logps, rejected_prefix_logps - reference_rejected_prefix_logps
    margins = (a_prefix + alpha * (a - a_prefix)) - (b_prefix + alpha * (b - b_prefix))
    return -F.logsigmoid(beta * margins)


def r_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """Length-regularised DPO: -log s(beta m + alpha (|c| - |r|)).

    Park et al. 2024, "Disentangling Length from Quality in Direct Preference Optimization": the policy that maximises
    r - alpha |y| has r = beta log(pi/ref) + alpha |y| + const, hence the plus: a chosen response that is longer has
    part of its margin already. Fails with alpha near the margin per token: length is then all that is learned.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(beta * margins + alpha * (chosen_lengths - rejected_lengths))


def dpop(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    penalty: float,
) -> Tensor:
    """DPO-positive: -log s(beta (m - penalty max(0, -a))).

    Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", eq. 3 with the brackets
    of its version of July 2024 (before, the penalty stood outside of beta). While the chosen response is less likely
    than under the reference, its gradient is 1 + penalty times as strong; the authors saw little change for penalties
    of 5 to 500. Fails by becoming supervised fine-tuning where the penalty is large.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * (a - b - penalty * torch.relu(-a)))


def odpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    alpha: float,
    transform: Literal["log", "identity"],
) -> Tensor:
    """DPO with an offset: -log s(beta m - alpha f(gap)), gap = chosen_scores - rejected_scores, f = log or identity.

    Amini et al. 2024, "Direct Preference Optimization with an Offset". With f = log the gap is held at or above
    SMALLEST_GAP. Fails where the judge's scale is arbitrary: the offset is in units of reward, so scale it by alpha.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    gap = chosen_scores - rejected_scores
    offset = gap.clamp(min=SMALLEST_GAP).log() if transform == "log" else gap
    return -F.logsigmoid(beta * margins - alpha * offset)


def madpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    amplify: float,
    dampen: float,
    threshold: float,
    steepness: float,
) -> Tensor:
    """Margin-adaptive DPO: -w log s(beta m), w = s(c h) / s(h), h = chosen_scores - rejected_scores.

    Rho 2025, "Margin Adaptive DPO", as the author's code has it: c = dampen + (amplify - dampen) / (1 + k e^(steepness
    (|h| - threshold))), k = (amplify - 1) / (1 - dampen), so that c goes from near amplify at h = 0 through 1 at the
    threshold to dampen. Weighted so, labels drawn from a reward model of margin h teach the margin c h. w is 1 where
    h <= -threshold (a label against clear scores). Fails where scores are not log-odds, as a reward model's are: h is
    taken as log P / (1 - P) of the label.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    gap = chosen_scores - rejected_scores
    shift = math.log((amplify - 1) / (1 - dampen))
    factor = dampen + (amplify - dampen) * torch.sigmoid(-steepness * (gap.abs() - threshold) - shift)
    weights = (F.logsigmoid(factor * gap) - F.logsigmoid(gap)).exp()
    weights = torch.where(gap > -threshold, weights, torch.ones_like(weights))
    return -weights * F.logsigmoid(beta * margins)


def beta_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    margin_mean: Tensor | None = None,
    *,
    beta: float,
    alpha: float,
    keep: float,
) -> Tensor:
    """DPO with the batch's own beta: -log s(beta' m), beta' = beta (1 + alpha (mean m - m0)), m0 = margin_mean.

    Wu et al. 2024, "beta-DPO: Direct Preference Optimization with Dynamic beta"; as in the authors' code, margins are
    in nats without beta, and beta' has no gradient and is held at or above SMALLEST_BETA. Only the share `keep` of the
    pairs counts, those nearest to m0: the authors draw them with normal weights around m0, this takes the likeliest
    draw, so that it is repeatable. The others' losses are 0 and these weigh more, which makes the mean over B that over
    the kept. m0 is the running mean of m: 0.9 times the last one plus 0.1 times this batch's, as the authors', but from
    the first batch's on where theirs is from 0 on. Where it is not given, the batch's own, and then beta' moves by the
    filter alone. Fails in small batches, whose mean is noise.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    with torch.no_grad():
        centre = margins.mean() if margin_mean is None else margin_mean
        kept = max(1, round(keep * len(margins)))
        nearest = (margins - centre).abs().argsort(stable=True)[:kept]
        batch_beta = (beta * (1 + alpha * (margins[nearest].mean() - centre))).clamp(min=SMALLEST_BETA)
        weights = torch.zeros_like(margins).index_fill(0, nearest, len(margins) / kept)
    return -weights * F.logsigmoid(batch_beta * margins)


def wpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_weight_logps: Tensor,
    rejected_weight_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Weighted DPO: -w log s(beta m), w = min(1, exp(chosen_weight_logps + rejected_weight_logps)), without a gradient.

    Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", sampled alignment: a response's
    weight is the geometric mean over its tokens of p / sum_v p_v^2 (eq. 2), about 1 for what the policy itself would
    sample; a pair's is the product of its two. The bound at 1 is the authors' code's. Fails on pairs that are all
    off-policy: weights near 0, no learning.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    weights = (chosen_weight_logps + rejected_weight_logps).detach().clamp(max=0).exp()
    return -weights * F.logsigmoid(beta * margins)


def aot(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """AOT, paired: -log s(beta (u - v)), u and v the policy's and reference's margins of the same rank in the batch.

    Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", section 3: the distribution
    of log pi(chosen) - log pi(rejected) is to dominate the reference's. A pair's loss is that of its policy margin.
    One pair alone is DPO. Fails in small batches, where ranks mean little.
    """
    margins = chosen_logps - rejected_logps
    order = margins.argsort(stable=True)
    reference = (reference_chosen_logps - reference_rejected_logps).sort().values
    losses = -F.logsigmoid(beta * (margins[order] - reference))
    return losses[order.argsort()]


def aot_unpaired(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """AOT, unpaired: -log s(beta (a - b)), a and b of the same rank among the batch's chosen and rejected log-ratios.

    Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", section 3: the distribution
    of a is to dominate that of b, whichever pair they come from. A pair's loss is that of its chosen response. One pair
    alone is DPO. Fails in small batches, where ranks mean little.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    order = a.argsort(stable=True)
    losses = -F.logsigmoid(beta * (a[order] - b.sort().values))
    return losses[order.argsort()]


def f_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"],
    alpha: float | None,
) -> Tensor:
    """f-DPO: -log s(beta (f'(u_c) - f'(u_r))), u = pi / ref, so log u_c = a and log u_r = b.

    Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints": f' up to a constant is log u (reverse_kl: DPO), (1 - u^-alpha) / alpha (alpha), its case alpha = 1
    (forward_kl), log(2u / (1 + u)) (js). u^-alpha goes on as a straight line past exp(20), see numerics. Fails for
    forward_kl and alpha on long responses: u^-alpha of a sum of log-ratios explodes, so take a low beta.
    """
    a, b = chosen_logps - reference_chosen_logps, rejected_logps - reference_rejected_logps
    match divergence:
        case "reverse_kl":
            margins = a - b
        case "js":
            margins = F.logsigmoid(a) - F.logsigmoid(b)
        case "forward_kl" | "alpha":
            order = 1.0 if alpha is None else alpha
            margins = shaped_log_ratio(a, order) - shaped_log_ratio(b, order)
    return -F.logsigmoid(beta * margins)


def xpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """XPO: -log s(beta m) + alpha (chosen_logps + rejected_logps) / 2.

    Xie et al. 2024, "Exploratory Preference Optimization", algorithm 1: DPO plus alpha log pi of a response drawn from
    the reference. Here both responses come from the sampling policy, which is the reference where that is refreshed
    every round; their mean is then the estimate of that term. Fails with alpha above about 1e-4: likelihoods of all
    that was sampled fall, and text breaks down.
    """
    margins = (chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(beta * margins) + alpha * (chosen_logps + rejected_logps) / 2
