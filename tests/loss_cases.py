"""Every loss with its options, and inputs for it: what the tests of the losses share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from online_po.loss_configs import LOSSES, Custom, LossBase, LossName
from online_po.losses import FUNCTIONS, LossInputs, UnpairedInputs, pair_losses, unpaired_losses
from online_po.losses.dispatch import tensor_parameters

NAMED = {loss.model_fields["name"].default: loss for loss in LOSSES if loss is not Custom}
PAIRED = [name for name, loss in NAMED.items() if loss.kind == "paired"]
UNPAIRED = [name for name, loss in NAMED.items() if loss.kind == "unpaired"]
ADAPTER: TypeAdapter[Any] = TypeAdapter(LossName)
B = 6

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cdpo": [{"label_smoothing": 0.3}],
    "rdpo": [{"label_smoothing": 0.3}],
    "ipo": [{"average_logps": False}],
    "exo_pair": [{"label_smoothing": 0.2}],
    "sppo": [{"beta": 0.2}, {"beta": 0.2, "probability": "soft"}],
    "discopop": [{"tau": 1.0, "beta": 0.4}, {"beta": 0.4}],
    "ld_dpo": [{"alpha": 0.0}],
    "r_dpo": [{"alpha": 0.05}],
    "dpop": [{"penalty": 2.0, "beta": 0.1}],
    "odpo": [{"transform": "identity"}, {"alpha": 0.4}],
    "madpo": [{"amplify": 4.0, "dampen": 0.0, "threshold": 0.5, "steepness": 3.0}],
    "beta_dpo": [{"keep": 1.0}, {"keep": 0.4, "beta": 0.5}, {"alpha": 20.0}],
    "f_dpo": [
        {"divergence": "reverse_kl"},
        {"divergence": "forward_kl"},
        {"divergence": "alpha", "alpha": 0.3},
    ],
    "xpo": [{"alpha": 0.1}],
    "simpo": [{"gamma": 0.3}],
    "orpo": [{"odds_weight": 2.0}],
    "cpo": [{"nll_weight": 0.0}],
    "alphapo": [{"alpha": -0.5}, {"alpha": 1.5}],
    "sft": [{"average_logps": False}],
    "kto": [{"desirable_weight": 1.3, "undesirable_weight": 0.4}],
    "apo_zero_unpaired": [{"desirable_weight": 1.3, "undesirable_weight": 0.4}],
    "bco": [{"desirable_weight": 1.3, "undesirable_weight": 0.4}],
}
CASES = [(name, options) for name in NAMED for options in ({}, *VARIANTS.get(name, []))]
"""Every loss with its defaults, and with options that bring out its other branches."""


def config(name: str, **options: Any) -> Any:
    return ADAPTER.validate_python({"name": name, **options})


def paired_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """B pairs of float64 inputs such as occur: log-ratios of a few nats, both signs, mixed lengths."""
    rng = np.random.default_rng(seed)
    x: dict[str, np.ndarray] = {}
    for side in ("chosen", "rejected"):
        x[f"{side}_lengths"] = rng.integers(4, 20, B).astype(float)
        x[f"reference_{side}_logps"] = -rng.uniform(0.5, 2.0, B) * x[f"{side}_lengths"]
        x[f"{side}_logps"] = np.minimum(x[f"reference_{side}_logps"] + rng.normal(0, 2, B), -0.5)
        x[f"{side}_weight_logps"] = rng.uniform(-1.0, 0.3, B)
    shorter = np.minimum(x["chosen_lengths"], x["rejected_lengths"])
    for side in ("chosen", "rejected"):
        for name in (side, f"reference_{side}"):
            whole = shorter == x[f"{side}_lengths"]
            share = np.where(whole, 1.0, shorter / x[f"{side}_lengths"] * rng.uniform(0.8, 1.2, B))
            x[f"{name}_prefix_logps"] = share * x[f"{name}_logps"]
    x["rejected_scores"] = rng.normal(0, 1, B)
    x["chosen_scores"] = x["rejected_scores"] + rng.uniform(0.1, 3, B)
    x["preference_probabilities"] = rng.uniform(0.5, 1, B)
    return x


def unpaired_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = -rng.uniform(5, 30, B)
    return {
        "logps": reference + rng.normal(0, 2, B),
        "reference_logps": reference,
        "desirable": np.array([True, False, True, True, False, False]),
        "kl": np.array(0.7),
    }


def arrays(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    return paired_arrays(seed) if NAMED[name].kind == "paired" else unpaired_arrays(seed)


def tensors(x: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {key: torch.tensor(v) if v.dtype == bool else torch.tensor(v, dtype=dtype) for key, v in x.items()}


def losses(loss: Any, t: dict[str, Tensor], beta: Any = None) -> Tensor:
    """Through the dispatch, as the learner calls it."""
    if (loss if isinstance(loss, LossBase) else loss[0]).name in UNPAIRED:
        return unpaired_losses(loss, UnpairedInputs(**t), beta)
    return pair_losses(loss, LossInputs(**t), beta)


def policy_fields(name: str) -> list[str]:
    return [f for f in ("chosen_logps", "rejected_logps", "chosen_prefix_logps", "rejected_prefix_logps", "logps")
            if f in tensor_parameters(FUNCTIONS[name])]  # fmt: skip


def option_values(loss: LossBase) -> dict[str, Any]:
    return {key: value for key, value in loss.model_dump().items() if key not in ("name", "weight")}
