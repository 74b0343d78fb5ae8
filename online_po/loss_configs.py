"""The losses by name: their options, what each needs, where it comes from and when to use it.

One class a loss; `online_po.losses` holds one function of the same name a loss, with the options as its keyword
arguments. Imports neither torch nor ray.

In the formulas: a = log pi(chosen) - log ref(chosen), b the same for the rejected response, s = sigmoid, |c| and |r|
the lengths of chosen and rejected in tokens, and m = a - b, the log-ratio margin. Logs are natural, and sums over
response tokens unless divided by a length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import BeforeValidator, Field, model_validator

from online_po.sections import Section

BETA = "Higher keeps the policy closer to the reference; lower lets it drift further."
REFERENCE_FREE_BETA = "Scale of the policy's own log-probabilities; there is no reference to stay close to."


def _read_beta(beta: Any) -> float | tuple[float, ...]:
    listed = isinstance(beta, (list, tuple))
    try:
        betas = tuple(float(value) for value in (beta if listed else (beta,)))
    except (TypeError, ValueError):
        betas = ()
    if not betas or not all(0 < value < math.inf for value in betas):
        raise ValueError(f"must be a number greater than 0, or a list of such, one for each round (got {beta!r})")
    return betas if listed else betas[0]


Beta = Annotated[float | tuple[float, ...], BeforeValidator(_read_beta)]
"""One for the whole run, or one for each round."""


class LossBase(Section):
    """What every loss has."""

    kind: ClassVar[Literal["paired", "unpaired"]] = "paired"
    """paired: trains on (chosen, rejected); unpaired: on single responses labelled desirable or not."""
    needs_reference: ClassVar[bool] = True
    """Whether the formula holds the reference's log-probabilities."""
    needs_scores: ClassVar[bool] = False
    """Whether the formula holds the judge's scores."""
    batchwise: ClassVar[bool] = False
    """Whether the loss of an example depends on the others that are handed in with it: those of an optimizer step."""
    formula: ClassVar[str]
    paper: ClassVar[str]
    use_when: ClassVar[str]

    name: str
    weight: float = Field(1.0, gt=0, description="Factor of this loss in a list of losses (a mixture).")

    @property
    def needs_probabilities(self) -> bool:
        """Whether the loss, with these options, needs the judge's probability that chosen beats rejected."""
        return False


class BetaLoss(LossBase):
    """A loss with a beta against the reference."""

    beta: Beta = Field(0.1, description=BETA)


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


class ReferenceFreeLoss(LossBase):
    """A loss without a reference."""

    needs_reference: ClassVar[bool] = False


class Simpo(ReferenceFreeLoss):
    """Simple preference optimization."""

    formula: ClassVar[str] = "-log s(beta (log pi(c)/|c| - log pi(r)/|r|) - gamma)"
    paper: ClassVar[str] = "Meng et al. 2024, SimPO (arXiv 2405.14734), eq. 6"
    use_when: ClassVar[str] = "No reference is to be kept in memory; needs a small learning rate."

    name: Literal["simpo"] = "simpo"
    beta: Beta = Field(2.0, description=REFERENCE_FREE_BETA)
    gamma: float = Field(1.0, ge=0, description="Target margin of the rewards; gamma / beta is nats per token.")


class Orpo(ReferenceFreeLoss):
    """Odds-ratio preference optimization."""

    formula: ClassVar[str] = "-log pi(c)/|c| - odds_weight log s(log odds(c) - log odds(r)), odds of exp(log pi/|y|)"
    paper: ClassVar[str] = "Hong et al. 2024, ORPO (arXiv 2403.07691), eq. 6 and 7"
    use_when: ClassVar[str] = "From a base model, without a stage of fine-tuning before."

    name: Literal["orpo"] = "orpo"
    odds_weight: float = Field(0.1, ge=0, description="The paper's lambda; 0 is sft.")


class Cpo(ReferenceFreeLoss):
    """Contrastive preference optimization."""

    formula: ClassVar[str] = "-log s(beta (log pi(c) - log pi(r))) - nll_weight log pi(c)/|c|"
    paper: ClassVar[str] = "Xu et al. 2024, Contrastive Preference Optimization (arXiv 2401.08417), eq. 3"
    use_when: ClassVar[str] = "Chosen responses are of high quality (translation): it also imitates them."

    name: Literal["cpo"] = "cpo"
    beta: Beta = Field(0.1, description=REFERENCE_FREE_BETA)
    nll_weight: float = Field(1.0, ge=0, description="Weight of the chosen response's negative log-likelihood.")


class Alphapo(ReferenceFreeLoss):
    """SimPO with another shape of reward."""

    formula: ClassVar[str] = "-log s(beta (R(c) - R(r)) - gamma), R(y) = (1 - exp(-alpha log pi(y)/|y|))/alpha"
    paper: ClassVar[str] = "Gupta et al. 2025, AlphaPO: Reward Shape Matters for LLM Alignment (arXiv 2501.03884)"
    use_when: ClassVar[str] = "SimPO lets the chosen response's likelihood fall too far."

    name: Literal["alphapo"] = "alphapo"
    beta: Beta = Field(2.5, description=REFERENCE_FREE_BETA)
    gamma: float = Field(0.1, ge=0, description="Target margin of the rewards.")
    alpha: float = Field(0.25, description="Shape of the reward; 0 is SimPO, above 0 weighs unlikely responses more.")


class Sft(ReferenceFreeLoss):
    """Negative log-likelihood of the chosen response."""

    formula: ClassVar[str] = "-log pi(c)/|c|, or -log pi(c) with average_logps: false"
    paper: ClassVar[str] = "in mixtures: Pang et al. 2024, Iterative RPO (arXiv 2404.19733); MPO (arXiv 2411.10442)"
    use_when: ClassVar[str] = "In a mixture, so that the chosen response's likelihood does not fall."

    name: Literal["sft"] = "sft"
    average_logps: bool = Field(True, description="Per token; false: summed over the response.")


class UnpairedLoss(BetaLoss):
    """A loss of single responses labelled desirable or undesirable."""

    kind: ClassVar[Literal["paired", "unpaired"]] = "unpaired"

    desirable_weight: float = Field(1.0, ge=0, description="Weight of desirable responses.")
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of undesirable responses.")


class Kto(UnpairedLoss):
    """Kahneman-Tversky optimization."""

    formula: ClassVar[str] = "desirable: 1 - s(beta (a - KL)); undesirable: 1 - s(beta (KL - a)); each times its weight"
    paper: ClassVar[str] = "Ethayarajh et al. 2024, KTO (arXiv 2402.01306), eq. 8"
    use_when: ClassVar[str] = "Labels are thumbs up or down, or too few pairs have a clear winner."

    name: Literal["kto"] = "kto"


class ApoZeroUnpaired(UnpairedLoss):
    """Anchored preference optimization, zero, of single responses."""

    formula: ClassVar[str] = "desirable: 1 - s(beta a); undesirable: s(beta a); each times its weight"
    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, Anchored Preference Optimization (arXiv 2408.06266), eq. 7"
    use_when: ClassVar[str] = "As kto, without an estimate of the KL."

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"


class Bco(UnpairedLoss):
    """Binary classifier optimization."""

    batchwise: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "desirable: -log s(beta (a - d)); undesirable: -log s(-beta (a - d)); each times its weight, d the running "
        "mean of a"
    )
    paper: ClassVar[str] = "Jung et al. 2024, Binary Classifier Optimization (arXiv 2404.04656)"
    use_when: ClassVar[str] = "As kto, where a convex loss is wanted."

    name: Literal["bco"] = "bco"


class Custom(BetaLoss):
    """Your own function of pairs."""

    formula: ClassVar[str] = "your own"
    paper: ClassVar[str] = "-"
    use_when: ClassVar[str] = "A loss is not here: name a function of the tensors it needs, options keyword-only."

    name: Literal["custom"] = "custom"
    function: str = Field(
        pattern=r"^[\w.]+:[\w.]+$",
        description="module:function. Its positional parameters are named as the fields of LossInputs, its "
        "keyword-only ones beta and the options; it returns one loss a pair.",
    )
    options: dict[str, bool | int | float | str] = Field({}, description="Values of its keyword-only parameters.")


LossName = Annotated[
    Union[  # noqa: UP007 - one a line
        Sigmoid,
        Cdpo,
        Rdpo,
        Ipo,
        Hinge,
        ExoPair,
        NcaPair,
        BcoPair,
        Sppo,
        Aot,
        AotUnpaired,
        ApoZero,
        ApoDown,
        Discopop,
        LnDpo,
        LdDpo,
        RDpo,
        Dpop,
        Odpo,
        Madpo,
        BetaDpo,
        Wpo,
        FDpo,
        Xpo,
        Simpo,
        Orpo,
        Cpo,
        Alphapo,
        Sft,
        Kto,
        ApoZeroUnpaired,
        Bco,
        Custom,
    ],
    Field(discriminator="name"),
]
"""Any loss, told apart by its name."""

LOSSES: tuple[type[LossBase], ...] = get_args(get_args(LossName)[0])
"""Every loss, in the order of the documentation."""

LOSS_BY_NAME: dict[str, type[LossBase]] = {loss.model_fields["name"].default: loss for loss in LOSSES}


def reward_beta(losses: Sequence[LossBase], betas: Sequence[float | None]) -> float:
    """The beta that implicit rewards are reported with: the first one of a loss with a reference, else of any; 1
    where no loss has one. `betas`: the round's, one a loss; None: as configured."""
    ranked = sorted(zip(losses, betas, strict=True), key=lambda item: not item[0].needs_reference)
    used = (getattr(loss, "beta", None) if beta is None else beta for loss, beta in ranked)
    return next((beta for beta in used if beta is not None), 1.0)
