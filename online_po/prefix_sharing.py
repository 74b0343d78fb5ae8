"""Whether a model computes the same where responses share their prompt (`online_po.tree_attention`), and how far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from online_po.batching import PAIR_SIDES, Examples
from online_po.errors import first_line
from online_po.gpu_attention import Shape, try_shapes
from online_po.logps import LogpModel
from online_po.packing import collate
from online_po.policy_model import decoder_layers
from online_po.scoring import score
from online_po.tree_attention import ATTENTION

DUST, SHARE = 3e-6, 1e-4
"""On its trial a token may differ by `DUST` nats, and by so much of what it would differ if branches saw each other."""
TRIAL_TOKENS = [([5, 3], [4, 7], [9, 2]), ([1, 1], [1, 6], [3, 1])]
"""Of the trial's two passes: tokens of the prompts, the chosen and the rejected responses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """Which sequences may share their prompt."""

    longest: float = 0
    """Those of at most so many tokens, prompt and response: 0 none, infinity all."""
    why_not: str | None = None
    """Why not all."""
    shapes: frozenset[Shape] = field(default=frozenset(), compare=False)
    """Of the model's attention, on the CPU where it was tried."""
    slow: str | None = None
    """Why a GPU computes their attention piece by piece."""

    @property
    def told(self) -> list[str]:
        """What there is to say of it."""
        found = []
        if self.why_not is not None:
            which = "no responses" if self.longest == 0 else f"responses beyond {self.longest} tokens do not"
            found.append(f"learner.prefix_sharing: {which} share their prompt's pass through the model: {self.why_not}")
        if self.slow is not None:
            found.append(
                "learner.prefix_sharing: the attention of shared prompts is computed by one call for each prompt and "
                f"each response, and not by FlexAttention, which failed on a trial: {self.slow}"
            )
        return found


def share_prompts(model: PreTrainedModel) -> Sharing:
    """Makes a model know shared prompts, where it computes the same with them.

    Tried, not trusted: random tokens go through both ways, in float32. A model that differs is left as it was. It is
    meant for a model that is still on the CPU.
    """
    own = model.config._attn_implementation
    if own != "sdpa":
        return Sharing(why_not=f"model.attention is {own}, and shared prompts need sdpa")
    longest, bound = window_of(model.config.get_text_config())
    if longest < 16:  # less than the trial's
        return Sharing(why_not=bound)
    try:
        model.set_attn_implementation(ATTENTION)
        with _layers_in_float32(model):
            error, effect, shapes = _trial(model)
    except Exception as failure:  # whatever a model raises that takes no such attention, it can go on with plain rows
        reason = f"{type(model).__name__} does not take them ({type(failure).__name__}: {first_line(failure)})"
    else:
        if error <= DUST + SHARE * effect:  # False where either is NaN
            return Sharing(longest=longest, why_not=bound, shapes=frozenset(shapes))
        reason = f"{type(model).__name__} computes something else with them (log-probabilities differ by {error:.2g})"
    model.set_attn_implementation(own)
    return Sharing(why_not=reason)


def with_kernels(sharing: Sharing, device: torch.device, dtype: torch.dtype) -> Sharing:
    """Tries the kernels that a GPU would use for it, see `online_po.gpu_attention`. `dtype`: what is computed in. All
    ranks must call it."""
    if device.type == "cpu" or sharing.longest == 0:
        return sharing
    return replace(sharing, slow=try_shapes(replace(shape, device=device, dtype=dtype) for shape in sharing.shapes))


def window_of(config: PretrainedConfig) -> tuple[float, str | None]:
    """Tokens of a sequence up to which each sees all before it, at angles that depend on its place alone; and why no
    more."""
    bounds: list[tuple[float, str]] = []
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if slides and (window := getattr(config, "sliding_window", None)):
        bounds.append((window, f"its attention slides over windows of {window} tokens"))
    if chunk := getattr(config, "attention_chunk_size", None):
        bounds.append((chunk, f"its attention is cut into chunks of {chunk} tokens"))
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if (kind := settings.get("rope_type")) in ("dynamic", "longrope"):
            # One longer sequence changes the angles of a whole row.
            own = settings.get("original_max_position_embeddings")
            end = own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            bounds.append((end, f"its position embeddings ({kind}) change beyond {end} tokens"))
    return min(bounds, default=(math.inf, None))


@contextmanager
def _layers_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block each decoder layer computes in float32, one at a time: rounding would hide what differs."""

    def widen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer.float()
        return tree_map_only(Tensor, _widened, (args, kwargs))

    def narrow(layer: nn.Module, _inputs: Any, _output: Any) -> None:
        layer.to(dtype)

    dtype, handles = model.dtype, list[RemovableHandle]()
    for layer in decoder_layers(model) if dtype != torch.float32 else ():
        handles.append(layer.register_forward_pre_hook(widen, with_kwargs=True))
        handles.append(layer.register_forward_hook(narrow))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def _trial(model: PreTrainedModel) -> tuple[float, float, set[Shape]]:
    """By how many nats a token's log-probability differs at most between shared prompts and plain rows; and where all
    trees are one sequence, whose tokens see everything before them; and the shapes of its attention."""
    vocabulary = model.config.get_text_config().vocab_size
    rng, scorer, errors, effects = np.random.default_rng(0), LogpModel(model), list[float](), list[float]()
    shapes = set[Shape]()
    for lengths in TRIAL_TOKENS:
        names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        columns = {
            name: pa.array([rng.integers(0, vocabulary, n).tolist() for n in sizes], pa.list_(pa.int32()))
            for name, sizes in zip(names, lengths, strict=True)
        }
        # Each prompt with two pairs, so that a tree has several branches.
        examples = Examples(pa.concat_tables([pa.table(columns), pa.table(columns | {names[1]: columns[names[2]]})]))
        trees, rows = (collate(examples, np.arange(4), PAIR_SIDES, shared=shared) for shared in (True, False))
        chained = replace(trees, trees=None)
        found, expected, leaking = (
            torch.cat(score(scorer, batch, model.device, shapes=shapes).logps) for batch in (trees, rows, chained)
        )
        errors.append((found - expected).abs().max().item())
        effects.append((leaking - expected).abs().max().item())
    return float(np.max(errors)), float(np.max(effects)), shapes
