"""A loss of one's own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from online_po.loss_configs.base import BetaLoss


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
