"""The losses by name: their options, what each needs, where it comes from and when to use it.

One class a loss, in modules named as those of `online_po.losses`, which holds one function of the same name a loss,
with the options as its keyword arguments. Imports neither torch nor ray.

In the formulas: a = log pi(chosen) - log ref(chosen), b the same for the rejected response, s = sigmoid, |c| and |r|
the lengths of chosen and rejected in tokens, and m = a - b, the log-ratio margin. Logs are natural, and sums over
response tokens unless divided by a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Union, get_args

from pydantic import Field

from online_po.loss_configs.base import LossBase
from online_po.loss_configs.custom import Custom
from online_po.loss_configs.paired import (
    ApoDown,
    ApoZero,
    BcoPair,
    Cdpo,
    Discopop,
    ExoPair,
    Hinge,
    Ipo,
    NcaPair,
    Rdpo,
    Sigmoid,
    Sppo,
)
from online_po.loss_configs.reference_free import Alphapo, Cpo, Orpo, Sft, Simpo
from online_po.loss_configs.shaped import (
    Aot,
    AotUnpaired,
    BetaDpo,
    Dpop,
    FDpo,
    LdDpo,
    LnDpo,
    Madpo,
    Odpo,
    RDpo,
    Wpo,
    Xpo,
)
from online_po.loss_configs.unpaired import ApoZeroUnpaired, Bco, Kto

__all__ = ["LOSSES", "LOSS_BY_NAME", "Custom", "LossBase", "LossName", "Sigmoid", "Simpo", "Sppo", "reward_beta"]

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
