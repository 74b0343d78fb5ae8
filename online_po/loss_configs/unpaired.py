"""Losses of single responses, each labelled desirable or not."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from online_po.loss_configs.base import BetaLoss


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
