"""Losses of pairs with a reference that also look at lengths, scores, the batch or single tokens, or at another
divergence."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from online_po.loss_configs.base import BETA, Beta, BetaLoss


class Aot(BetaLoss):
    """Alignment via optimal transport, paired."""

    batchwise: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "-log s(beta (u[k] - v[k])): u, v the batch's margins under policy and reference, each sorted"
    )
    paper: ClassVar[str] = "Melnyk et al. 2024, Distributional Preference Alignment (arXiv 2406.05882), section 3"
    use_when: ClassVar[str] = "The distribution of margins matters more than each pair; needs large batches."

    name: Literal["aot"] = "aot"


class AotUnpaired(BetaLoss):
    """Alignment via optimal transport, the pairing undone."""

    batchwise: ClassVar[bool] = True
    formula: ClassVar[str] = "-log s(beta (a[k] - b[k])): a and b of the batch, each sorted"
    paper: ClassVar[str] = "Melnyk et al. 2024, Distributional Preference Alignment (arXiv 2406.05882), section 3"
    use_when: ClassVar[str] = "As aot, where which rejected belongs to which chosen says little."

    name: Literal["aot_unpaired"] = "aot_unpaired"


class LnDpo(BetaLoss):
    """Length-normalised DPO."""

    formula: ClassVar[str] = "-log s(beta (a/|c| - b/|r|))"
    paper: ClassVar[str] = (
        "Ahrabian et al. 2024, The Hitchhiker's Guide to Human Alignment with *PO (arXiv 2407.15229); with beta 5: "
        "Lambert et al. 2024, Tulu 3 (arXiv 2411.15124)"
    )
    use_when: ClassVar[str] = "Responses grow longer round by round; beta counts per token, so take about 5."

    name: Literal["ln_dpo"] = "ln_dpo"
    beta: Beta = Field(5.0, description=BETA)


class LdDpo(BetaLoss):
    """Length-desensitised DPO."""

    formula: ClassVar[str] = (
        "-log s(beta m'), every logp replaced by prefix + alpha (whole - prefix), prefix: first min(|c|, |r|) tokens"
    )
    paper: ClassVar[str] = "Liu et al. 2024, Length Desensitization in DPO (arXiv 2409.06411)"
    use_when: ClassVar[str] = "Length is to count less, but not to vanish as in ln_dpo."

    name: Literal["ld_dpo"] = "ld_dpo"
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of tokens past the shorter length; 1 is DPO.")


class RDpo(BetaLoss):
    """Length-regularised DPO."""

    formula: ClassVar[str] = "-log s(beta m + alpha (|c| - |r|))"
    paper: ClassVar[str] = "Park et al. 2024, Disentangling Length from Quality in DPO (arXiv 2403.19159)"
    use_when: ClassVar[str] = "The judge likes length: pairs whose chosen one is longer teach less."

    name: Literal["r_dpo"] = "r_dpo"
    alpha: float = Field(0.01, ge=0, description="Reward taken off for each token; 0 is DPO.")


class Dpop(BetaLoss):
    """DPO-positive (Smaug)."""

    formula: ClassVar[str] = "-log s(beta (m - penalty max(0, -a)))"
    paper: ClassVar[str] = "Pal et al. 2024, Smaug: Fixing Failure Modes with DPO-Positive (arXiv 2402.13228), eq. 3"
    use_when: ClassVar[str] = "Chosen and rejected differ little, and DPO would push both down."

    name: Literal["dpop"] = "dpop"
    beta: Beta = Field(0.3, description=BETA)
    penalty: float = Field(50.0, ge=0, description="Price of a chosen log-probability below the reference's; 0 is DPO.")


class Odpo(BetaLoss):
    """DPO with an offset from the score gap."""

    needs_scores: ClassVar[bool] = True
    formula: ClassVar[str] = "-log s(beta m - alpha f(gap)), gap = score(chosen) - score(rejected), f = log or identity"
    paper: ClassVar[str] = "Amini et al. 2024, Direct Preference Optimization with an Offset (arXiv 2402.10571)"
    use_when: ClassVar[str] = "Scores say by how much chosen is better, not only that it is."

    name: Literal["odpo"] = "odpo"
    alpha: float = Field(1.0, ge=0, description="Factor of the offset; 0 is DPO.")
    transform: Literal["log", "identity"] = Field(
        "log", description="f of the score gap. log, the paper's, is negative for gaps below 1."
    )


class Madpo(BetaLoss):
    """Margin-adaptive DPO."""

    needs_scores: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "-w log s(beta m), w = s(c h)/s(h), h = score(chosen) - score(rejected), c = dampen + (amplify - dampen)/(1 + "
        "k exp(steepness (|h| - threshold))), k = (amplify - 1)/(1 - dampen)"
    )
    paper: ClassVar[str] = "Rho 2025, Margin Adaptive DPO (arXiv 2510.05342); weights as in the author's code"
    use_when: ClassVar[str] = "Scores come from a reward model (log-odds): close pairs teach more than clear ones."

    name: Literal["madpo"] = "madpo"
    amplify: float = Field(2.0, gt=1, description="Factor of margins far below the threshold; the author's c_max.")
    dampen: float = Field(0.5, ge=0, lt=1, description="Factor of margins far above the threshold; his c_min.")
    threshold: float = Field(
        2.0, ge=0, description="Score gap whose margin is left as it is; his tau (2 in his code, 6.9 in its runs)."
    )
    steepness: float = Field(1.0, gt=0, description="How fast the factor falls around the threshold; his lambda.")


class BetaDpo(BetaLoss):
    """DPO with a beta set by the batch."""

    batchwise: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "-log s(beta (1 + alpha (mean m - m0)) m) over the share `keep` of the batch nearest to m0, the running "
        "mean of m"
    )
    paper: ClassVar[str] = "Wu et al. 2024, beta-DPO (arXiv 2407.08639)"
    use_when: ClassVar[str] = "Pair quality varies from batch to batch, with outliers."

    name: Literal["beta_dpo"] = "beta_dpo"
    alpha: float = Field(
        0.6, ge=0, description="Relative change of beta for each nat that the batch's mean margin is above m0."
    )
    keep: float = Field(0.8, gt=0, le=1, description="Share of the batch that is trained on; 1 with alpha 0 is DPO.")


class Wpo(BetaLoss):
    """Weighted preference optimization."""

    formula: ClassVar[str] = "-w log s(beta m), w = min(1, exp(wc + wr)), wc, wr: mean log(p / sum_v p_v^2) of tokens"
    paper: ClassVar[str] = "Zhou et al. 2024, WPO (arXiv 2406.11827), eq. 2, sampled alignment"
    use_when: ClassVar[str] = "Pairs are old (replay, a data set): those the policy would not say weigh less."

    name: Literal["wpo"] = "wpo"


class FDpo(BetaLoss):
    """DPO under another f-divergence."""

    formula: ClassVar[str] = (
        "-log s(beta (f'(u_c) - f'(u_r))), u = pi/ref; f' = log u (reverse_kl), -1/u (forward_kl), "
        "log(2u/(1+u)) (js), (1 - u^-alpha)/alpha (alpha)"
    )
    paper: ClassVar[str] = "Wang et al. 2023, Beyond Reverse KL (arXiv 2309.16240)"
    use_when: ClassVar[str] = "Diversity is to be kept: forward_kl covers most, js and alpha lie between."

    name: Literal["f_dpo"] = "f_dpo"
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "js", description="The divergence that beta weighs; reverse_kl is DPO."
    )
    alpha: float | None = Field(
        None, gt=0, lt=1, description="Order of divergence: alpha; towards 0 it is reverse_kl, towards 1 forward_kl."
    )

    @model_validator(mode="after")
    def _check(self) -> FDpo:
        if (self.alpha is None) == (self.divergence == "alpha"):
            raise ValueError(
                f"loss.alpha is {self.alpha} with loss.divergence: {self.divergence}; give alpha (0.5, say) with "
                "divergence: alpha and with no other"
            )
        return self


class Xpo(BetaLoss):
    """Exploratory preference optimization."""

    formula: ClassVar[str] = "-log s(beta m) + alpha (log pi(chosen) + log pi(rejected)) / 2"
    paper: ClassVar[str] = "Xie et al. 2024, Exploratory Preference Optimization (arXiv 2405.21046), algorithm 1"
    use_when: ClassVar[str] = "Rounds explore too little; the reference is the policy that sampled."

    name: Literal["xpo"] = "xpo"
    alpha: float = Field(1e-5, ge=0, description="Weight of the exploration bonus; 0 is DPO.")
