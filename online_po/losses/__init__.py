"""Preference losses: pure functions, logps in, per-pair loss out. One formula, one place.

A loss is one function from the tensors it needs to (B,) losses, with its options as keyword arguments;
`online_po.loss_configs` has one class of the same name a loss. `pair_losses` and `unpaired_losses` pass each what it
needs.
"""

from online_po.losses.dispatch import (
    FUNCTIONS,
    LossFunction,
    loss_function,
    pair_losses,
    tensor_names,
    unpaired_losses,
)
from online_po.losses.inputs import LossInputs, UnpairedInputs
from online_po.losses.unpaired import kto_kl

__all__ = [
    "FUNCTIONS",
    "LossFunction",
    "LossInputs",
    "UnpairedInputs",
    "kto_kl",
    "loss_function",
    "pair_losses",
    "tensor_names",
    "unpaired_losses",
]
