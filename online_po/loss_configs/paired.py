"""Losses of pairs that take the log-probabilities of policy and reference, and nothing else."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from online_po.loss_configs.base import BETA, Beta, BetaLoss


class Sigmoid(BetaLoss):
    """DPO."""

    formula: ClassVar[str] = "-log s(beta m)"
    paper: ClassVar[str] = "Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290), eq. 7"
    use_when: ClassVar[str] = "The default: labels are mostly right."

    name: Literal["sigmoid"] = "sigmoid"


class Cdpo(BetaLoss):
    """Conservative DPO."""

    formula: ClassVar[str] = "-(1 - e) log s(beta m) - e log s(-beta m)"
    paper: ClassVar[str] = "Mitchell 2023, A note on DPO with noisy preferences & relationship to IPO, eq. 3"
    use_when: ClassVar[str] = "A known share of labels is wrong, and margins must not grow without end."

    name: Literal["cdpo"] = "cdpo"
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="e, the assumed share of wrong labels; 0 is DPO.")


class Rdpo(BetaLoss):
    """Robust DPO."""

    formula: ClassVar[str] = "(-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2e)"
    paper: ClassVar[str] = "Chowdhury et al. 2024, Provably Robust DPO (arXiv 2403.00409), section 3.1"
    use_when: ClassVar[str] = "Labels are flipped at random at a known rate: its mean is the clean DPO loss."

    name: Literal["rdpo"] = "rdpo"
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="e, the rate at which labels are flipped; 0 is DPO.")


class Ipo(BetaLoss):
    """Identity preference optimization."""

    formula: ClassVar[str] = "(a/|c| - b/|r| - 1/(2 beta))^2, or (m - 1/(2 beta))^2 with average_logps: false"
    paper: ClassVar[str] = (
        "Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences "
        "(arXiv 2310.12036), eq. 17; beta is the paper's tau"
    )
    use_when: ClassVar[str] = "Labels are near certain, where DPO's margin would grow without end."

    name: Literal["ipo"] = "ipo"
    average_logps: bool = Field(
        True,
        description="Log-ratios per token, as the paper's authors take them; false: summed over the response, as "
        "eq. 17 is written.",
    )


class Hinge(BetaLoss):
    """SLiC's hinge on the log-ratio margin."""

    formula: ClassVar[str] = "max(0, 1 - beta m)"
    paper: ClassVar[str] = (
        "Zhao et al. 2023, SLiC-HF (arXiv 2305.10425); with the reference: Liu et al. 2023, RSO (arXiv 2309.06657)"
    )
    use_when: ClassVar[str] = "Pairs that are apart by 1/beta should be left alone."

    name: Literal["hinge"] = "hinge"


class ExoPair(BetaLoss):
    """Efficient exact optimization on pairs: the reverse KL to the smoothed label."""

    formula: ClassVar[str] = "s(beta m) (log s(beta m) - log(1 - e)) + s(-beta m) (log s(-beta m) - log e)"
    paper: ClassVar[str] = "Ji et al. 2024, Towards Efficient Exact Optimization (arXiv 2402.00856), eq. 16"
    use_when: ClassVar[str] = "Mode-seeking alignment, as RLHF's, is wanted from pairs."

    name: Literal["exo_pair"] = "exo_pair"
    label_smoothing: float = Field(0.001, gt=0, lt=0.5, description="e, the smoothed label's mass on the rejected one.")


class NcaPair(BetaLoss):
    """Noise contrastive alignment on pairs."""

    formula: ClassVar[str] = "-log s(beta a) - log s(-beta a) / 2 - log s(-beta b) / 2"
    paper: ClassVar[str] = "Chen et al. 2024, Noise Contrastive Alignment (arXiv 2402.05369), section 4.1"
    use_when: ClassVar[str] = "The chosen response's likelihood must not fall, as it may under DPO."

    name: Literal["nca_pair"] = "nca_pair"


class BcoPair(BetaLoss):
    """Binary classifier optimization on pairs."""

    batchwise: ClassVar[bool] = True
    formula: ClassVar[str] = "-log s(beta (a - d)) - log s(-beta (b - d)), d the running mean of a and b"
    paper: ClassVar[str] = "Jung et al. 2024, Binary Classifier Optimization (arXiv 2404.04656)"
    use_when: ClassVar[str] = "The quality term of a mixture (MPO: sigmoid 0.8, bco_pair 0.2, sft 1)."

    name: Literal["bco_pair"] = "bco_pair"


class Sppo(BetaLoss):
    """Self-play preference optimization."""

    formula: ClassVar[str] = "(a - (p - 1/2)/beta)^2 + (b + (p - 1/2)/beta)^2, p = 1 if hard"
    paper: ClassVar[str] = "Wu et al. 2024, Self-Play Preference Optimization (arXiv 2405.00675), eq. 4.7; beta = 1/eta"
    use_when: ClassVar[str] = "The reference is the policy that sampled (refreshed every round)."

    name: Literal["sppo"] = "sppo"
    beta: Beta = Field(0.001, description=BETA)
    probability: Literal["hard", "soft"] = Field(
        "hard", description="p: 1 (hard), or the judge's probability that chosen beats rejected (soft)."
    )

    @property
    def needs_probabilities(self) -> bool:
        return self.probability == "soft"


class ApoZero(BetaLoss):
    """Anchored preference optimization, zero."""

    formula: ClassVar[str] = "1 - s(beta a) + s(beta b)"
    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, Anchored Preference Optimization (arXiv 2408.06266), eq. 7"
    use_when: ClassVar[str] = "Chosen responses are better than what the policy says by itself."

    name: Literal["apo_zero"] = "apo_zero"


class ApoDown(BetaLoss):
    """Anchored preference optimization, down."""

    formula: ClassVar[str] = "s(beta a) + 1 - s(beta m)"
    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, Anchored Preference Optimization (arXiv 2408.06266), eq. 8"
    use_when: ClassVar[str] = "The policy is better than the chosen responses (an old pair set)."

    name: Literal["apo_down"] = "apo_down"


class Discopop(BetaLoss):
    """The loss that language models found: log-ratio modulated."""

    formula: ClassVar[str] = "-(1 - g) log s(beta m) + g exp(-beta m), g = s(beta m / tau)"
    paper: ClassVar[str] = (
        "Lu et al. 2024, Discovering Preference Optimization Algorithms (arXiv 2406.08414), eq. 5 and appendix E"
    )
    use_when: ClassVar[str] = "Doubtful pairs are to be left alone: it has a local minimum just below margin 0."

    name: Literal["discopop"] = "discopop"
    beta: Beta = Field(0.05, description=BETA)
    tau: float = Field(0.05, gt=0, le=1, description="Temperature of the blend of logistic and exponential loss.")
