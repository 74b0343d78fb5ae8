"""Losses of pairs without a reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from online_po.loss_configs.base import REFERENCE_FREE_BETA, Beta, LossBase


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
