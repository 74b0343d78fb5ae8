"""Whether a model computes the same where responses share their prompt (`online_po.tree_attention`), and how far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from transformers import PretrainedConfig, PreTrainedModel

from online_po.batching import PAIR_SIDES, Examples
from online_po.logps import LogpModel
from online_po.packing import collate
from online_po.scoring import score
from online_po.tree_attention import ATTENTION

TRIAL_TOKENS = [([5, 3], [4, 7], [9, 2]), ([1, 1], [1, 6], [3, 1])]
"""Of the trial's two passes: tokens of the prompts, the chosen and the rejected responses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """Which sequences may share their prompt."""

    longest: float = 0
    """Those of at most so many tokens, prompt and response: 0 none, infinity all."""
    why_not: str | None = None
    """Why not all."""

    def __str__(self) -> str:
        """What to tell of it."""
        which = "no responses share" if self.longest == 0 else f"responses beyond {self.longest} tokens do not share"
        return f"learner.prefix_sharing: {which} their prompt's pass through the model: {self.why_not}"


def share_prompts(model: PreTrainedModel) -> Sharing:
    """Makes a model know shared prompts, where it computes the same with them.

    Tried, not trusted: random tokens go through both ways. A model that differs is left as it was. It is meant for a
    model that is still on the CPU.
    """
    own = model.config._attn_implementation
    if own != "sdpa":
        return Sharing(why_not=f"model.attention is {own}, and shared prompts need sdpa")
    longest, bound = window_of(model.config.get_text_config())
    if longest < 16:  # less than the trial's
        return Sharing(why_not=bound)
    try:
        model.set_attn_implementation(ATTENTION)
        error = _trial(model)
    except (TypeError, ValueError, RuntimeError) as failure:  # a model that takes no such attention, or none of these
        error, reason = math.nan, f"{type(model).__name__} does not take them ({failure})"
    else:
        reason = f"{type(model).__name__} computes something else with them (log-probabilities differ by {error:.2g})"
    if error <= (1e-4 if model.dtype == torch.float32 else 0.2):
        return Sharing(longest=longest, why_not=bound)
    model.set_attn_implementation(own)
    return Sharing(why_not=reason)


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


@torch.no_grad()
def _trial(model: PreTrainedModel) -> float:
    """By how many nats a token's log-probability differs at most between shared prompts and plain rows."""
    vocabulary = model.config.get_text_config().vocab_size
    rng, scorer, errors = np.random.default_rng(0), LogpModel(model), list[float]()
    for lengths in TRIAL_TOKENS:
        names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        columns = {
            name: pa.array([rng.integers(0, vocabulary, n).tolist() for n in sizes], pa.list_(pa.int32()))
            for name, sizes in zip(names, lengths, strict=True)
        }
        # Each prompt with two pairs, so that a tree has several branches.
        examples = Examples(pa.concat_tables([pa.table(columns), pa.table(columns | {names[1]: columns[names[2]]})]))
        found, expected = (
            torch.cat(score(scorer, collate(examples, np.arange(4), PAIR_SIDES, shared=shared), model.device).logps)
            for shared in (True, False)
        )
        errors.append((found - expected).abs().max().item())
    return float(np.max(errors))
