"""What all losses have, and how a beta is read."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

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
