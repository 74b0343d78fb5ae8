"""LoRA adapters beside the trained one: computing with another in its place, and weighted means of several.

An adapter adds scale * B A to a weight W: A is (r, in), B is (out, r), and the scale (alpha / r, as it was trained) is
the same for every adapter of a run. So a weighted sum of adapters is an adapter again, of a higher rank and with
nothing rounded away: sum_j c_j B_j A_j = [c_1 B_1, c_2 B_2, ...] [A_1; A_2; ...].
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from online_po.errors import ConfigError, OnlinePOError

ADAPTER_FILE = "adapter_model.safetensors"

ADAPTER = "default"
"""PEFT's name of the trained adapter; it is never the name of another one."""

NEGLIGIBLE = 1e-7
"""An adapter whose weight in a mean has fallen to this share of the newest one's is left out: float32 ends there."""


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Every module that has an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def require_known_layers(model: PeftModel, targets: str | list[str]) -> None:
    """Raises ConfigError unless all adapters are on layers whose adapter can be exchanged: linear ones (quantised or
    not, experts too) and embeddings. `targets`: what the user wrote."""
    for name, layer in lora_layers(model).items():
        linear = isinstance(layer.lora_A[ADAPTER], nn.Linear) if layer.lora_A else bool(layer.lora_embedding_A)
        if not linear or isinstance(layer, MultiheadAttention):
            raise ConfigError(
                f"learner.lora.target_modules is {targets!r}, which puts an adapter on {name!r}, a "
                f"{type(layer.get_base_layer()).__name__}; name linear layers and embeddings only"
            )


def _parts(layer: LoraLayer) -> tuple[str, str]:
    """The attributes that hold a layer's A and B."""
    return ("lora_A", "lora_B") if layer.lora_A else ("lora_embedding_A", "lora_embedding_B")


def _names(name: str, layer: LoraLayer) -> tuple[str, str]:
    """What A and B of the layer called `name` are called in an adapter's file."""
    a, b = (f"{name}.{part}" if "embedding" in part else f"{name}.{part}.weight" for part in _parts(layer))
    return a, b


def _views(a: Tensor, b: Tensor, layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A as (E, r, in) and B as (out, r, E). E is 1 but for layers of E experts, whose factors PEFT keeps like this."""
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    return a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts)


# -- another adapter in the trained one's place ------------------------------------------------------


@contextmanager
def adapter_replaced(model: PeftModel, tensors: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside the block the model computes with another adapter, of any rank, or with none (None).

    `tensors`: as an adapter's file names them, whole, on the model's device. PEFT's own forward finds them where it
    looks for the trained adapter's. The trained tensors, their shards, gradients and flags are not touched: FSDP goes
    on gathering them, into modules that nobody calls.
    """
    kept: list[tuple[LoraLayer, str, nn.Module]] = []
    try:
        for name, layer in lora_layers(model).items():
            for part, key in zip(_parts(layer), _names(name, layer), strict=True):
                kept.append((layer, part, getattr(layer, part)))
                # PEFT passes over an adapter that it does not find in a layer: then the layer is the base model's.
                setattr(layer, part, _container(part, None if tensors is None else tensors[key]))
        yield
    finally:
        for layer, part, container in kept:
            setattr(layer, part, container)


def _container(part: str, weight: Tensor | None) -> nn.Module:
    """What PEFT keeps a layer's A or B in, by adapter name; empty without a weight."""
    held = {} if weight is None else {ADAPTER: nn.Parameter(weight, requires_grad=False)}
    if "embedding" in part:
        return nn.ParameterDict(held)
    return nn.ModuleDict({name: _linear(parameter) for name, parameter in held.items()})


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


# -- added to the weights ----------------------------------------------------------------------------


def merged(weights: Callable[[], Iterable[tuple[str, Tensor]]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A model's weights, by the names in its files, with the adapter of a folder added: W + scale B A in float32, where
    W may be less (rounded to bfloat16, small updates would be lost). `weights`: read twice, as files are.

    Raises OnlinePOError, before it gives any, where the adapter is on anything but linear layers whose weights come by
    their own names."""
    settings = PeftLoraConfig.from_pretrained(str(folder))
    factors = {name.removeprefix("base_model.model."): t for name, t in load_file(folder / ADAPTER_FILE).items()}
    layers = {name.rsplit(".lora_", 1)[0] for name in factors}
    shapes = {name.removesuffix(".weight"): weight.shape for name, weight in weights()}
    for layer in sorted(layers):
        a, b = (factors.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if a is None or b is None or shapes.get(layer) != (b.shape[0], a.shape[1]):
            raise OnlinePOError(
                f"the adapter in {str(folder)!r} cannot be added to the model's weights: nothing in the model's files "
                f"is what {layer!r} belongs to; set generator.lora: adapter"
            )
    for name, weight in weights():
        if (layer := name.removesuffix(".weight")) in layers:
            a, b = (factors[f"{layer}.lora_{part}.weight"].float() for part in "AB")
            weight = torch.addmm(weight.float(), b, a, alpha=_scale(settings, layer))
        yield name, weight


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def require_mergeable(model: PeftModel, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ConfigError unless `merged` can add the model's adapters. `shapes`: of the tensors in the starting model's
    files, by name."""
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    tied = _base(head).weight is _base(inputs).weight
    for name, layer in lora_layers(model).items():
        own = name.removeprefix("base_model.model.")
        stored = list(shapes.get(f"{own}.weight", ())) == [layer.out_features, layer.in_features]
        # Conv1D keeps its weight transposed, and a tied head in a file is not read.
        if not layer.lora_A or not stored or getattr(layer, "fan_in_fan_out", False) or (layer is head and tied):
            raise ConfigError(
                f"learner.lora.target_modules puts an adapter on {own!r}, which is no linear layer of its own in "
                "the model's files: engines cannot add it to theirs. Leave it out, or set generator.lora: adapter"
            )


def _scale(settings: PeftLoraConfig, layer: str) -> float:
    """alpha / r of a layer."""
    alpha, rank = (
        pattern.get(get_pattern_key(pattern.keys(), layer), value)
        for pattern, value in ((settings.alpha_pattern, settings.lora_alpha), (settings.rank_pattern, settings.r))
    )
    return alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank


# -- means -----------------------------------------------------------------------------------------


def most_terms(alpha: float) -> int:
    """How many adapters a mean holds at most: the weights are alpha * (1 - alpha)^j, newest first, and those below
    NEGLIGIBLE of the newest are left out."""
    return 1 if alpha == 1 else 1 + math.floor(math.log(NEGLIGIBLE) / math.log1p(-alpha))


def blend_adapters(
    model: PeftModel, own: Mapping[str, Tensor], other: Mapping[str, Tensor] | None, alpha: float
) -> dict[str, Tensor]:
    """alpha * own + (1 - alpha) * other, as an adapter. `own`: of the trained rank; `other`: a mean that this function
    gave, or an adapter of the trained rank; None: the starting model, which is no term.

    The rank grows by the trained one with every call, up to `most_terms` of it. In a linear layer where that would be
    more than full rank, the product itself is kept once full rank is passed: one factor the identity, the rank
    min(in, out), and so never more numbers than the layer's own weights and that identity have.
    """
    blended: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        a_name, b_name = _names(name, layer)
        a, b = _views(own[a_name], alpha * own[b_name], layer)
        rank = a.shape[1]
        if other is not None:
            other_a, other_b = _views(other[a_name], other[b_name], layer)
            a, b = torch.cat([a, other_a], 1), torch.cat([b, (1 - alpha) * other_b], 1)
        full, most = min(a.shape[2], b.shape[0]), most_terms(alpha) * rank
        if isinstance(layer, ParamWrapper) or most <= full:
            a, b = a[:, :most], b[:, :most]
        elif a.shape[1] > full:
            a, b = _multiplied(a[0], b[..., 0])
        blended[a_name], blended[b_name] = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
    return blended


def _multiplied(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(r, in), (out, r) -> the same product with the smaller of in and out as its rank, one factor the identity."""
    product = b @ a
    out, in_ = product.shape
    return (torch.eye(in_), product) if in_ <= out else (product, torch.eye(out))


def adapter_config(model: PeftModel, tensors: Mapping[str, Tensor]) -> PeftLoraConfig:
    """The settings that belong to an adapter's tensors: the trained one's, with the tensors' ranks and, for every
    layer, the trained scale alpha / r."""
    settings = copy.deepcopy(model.peft_config[ADAPTER])
    shares: dict[str, Fraction] = {}  # every layer's rank, in units of the rank it was trained with
    for name, layer in (layers := lora_layers(model)).items():
        a_name, b_name = _names(name, layer)
        a, _ = _views(tensors[a_name], tensors[b_name], layer)
        shares[name] = Fraction(a.shape[1], layer.r[ADAPTER])
    most = max(shares.values())
    # Layers that differ are those that hold the product itself. PEFT takes the first pattern that matches.
    odd = {re.escape(name.removeprefix("base_model.model.")): name for name in shares if shares[name] != most}
    settings.rank_pattern = {
        **{pattern: _times(layers[name].r[ADAPTER], shares[name]) for pattern, name in odd.items()},
        **{pattern: _times(rank, most) for pattern, rank in settings.rank_pattern.items()},
    }
    settings.alpha_pattern = {
        **{pattern: _times(layers[name].lora_alpha[ADAPTER], shares[name]) for pattern, name in odd.items()},
        **{pattern: _times(alpha, most) for pattern, alpha in settings.alpha_pattern.items()},
    }
    settings.r, settings.lora_alpha = _times(settings.r, most), _times(settings.lora_alpha, most)
    for targets in ("target_modules", "target_parameters"):
        # Sets in PEFT, in another order every run; the file must be the same every run.
        if isinstance(names := getattr(settings, targets), set | list):
            setattr(settings, targets, sorted(names))
    settings.inference_mode = True
    return settings


def _times(value: float, share: Fraction) -> float:
    """`value` * `share`; a rank (an integer) stays one."""
    product = value * share
    return int(product) if isinstance(value, int) else float(product)
