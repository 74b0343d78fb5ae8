"""Log-probabilities of response tokens. Logits of a whole batch never exist at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from online_po.errors import ConfigError
from online_po.tree_attention import Trees

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Float32 logits that may exist at once: 64 MiB on a CPU, where larger ones cost page faults; 512 MiB on a GPU."""


@dataclass(slots=True)
class TokenStatistics:
    """What else is to be said of the distributions that tokens were drawn from, chunk by chunk, without a gradient."""

    entropies: list[Tensor] | None = None
    """Chunks of float32 entropies in nats; None: not wanted."""
    log_collisions: list[Tensor] | None = None
    """Chunks of float32 log sum_v p_v^2, the log-probability that two draws agree; None: not wanted."""

    @torch.no_grad()
    def add(self, logits: Tensor, probabilities: Tensor, normalizers: Tensor) -> None:
        """Both (C, V), and (C,) the logits' log sum exp."""
        if self.entropies is not None:
            logps = logits - normalizers[:, None]
            self.entropies.append(-torch.linalg.vecdot(probabilities, logps))
        if self.log_collisions is not None:
            self.log_collisions.append(torch.linalg.vecdot(probabilities, probabilities).log())


class ChosenLogps(torch.autograd.Function):
    """(C, V) float32 logits, (C,) tokens -> (C,) log-probabilities of the tokens, (C, V) probabilities, and (C,) log
    sum exp of the logits; the latter two carry no gradient.

    Backward writes the logits' gradient over the probabilities: a tensor as wide as the vocabulary is made once in each
    direction, where log_softmax and gather make two and four. It goes backward once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = torch.softmax(logits, dim=-1)
        most, places = logits.max(dim=-1)
        log_sum = -probabilities.gather(1, places[:, None]).squeeze(1).log()  # of exp(logits - most)
        chosen = logits.gather(1, targets[:, None]).squeeze(1) - most - log_sum
        ctx.save_for_backward(probabilities, targets)
        ctx.mark_non_differentiable(probabilities, normalizers := most + log_sum)
        return chosen, probabilities, normalizers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probabilities, targets = ctx.saved_tensors
        slopes = gradients[0][:, None]
        return probabilities.mul_(-slopes).scatter_add_(1, targets[:, None], slopes), None


class LogpModel(nn.Module):
    """A causal LM that answers with the logps of chosen tokens instead of logits.

    The head runs in chunks of tokens and again in backward, so memory grows with the hidden size, not with
    the vocabulary. Backbone and head are called inside one forward: FSDP's root hooks see both.

    The head computes in float32 whatever the backbone does (on a GPU under bfloat16 in TF32, see `online_po.gpu`):
    logits rounded to bfloat16 are off by up to a hundredth of a nat and more. For that, a forward under bfloat16
    weights holds a float32 copy of the head's weights until its backward is over, in which the chunks' gradients add
    up.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        with_entropy: bool = False,
        with_collision: bool = False,
        *,
        position_ids: Tensor | None = None,
        trees: Trees | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`input_ids` (B, T), padded on the right; `positions` (S,) places in the flattened (B * T,) sequences;
        `targets` (S,) the tokens that follow those places. With `trees` B is 1, nothing is padded, and `position_ids`
        (1, T) are the tokens' places in sequences of their own; the model must know trees
        (`online_po.prefix_sharing`).

        Returns (S,) float32 logps of the targets, and of the distributions they were drawn from (S,) float32
        entropies and log sum_v p_v^2, all in nats; the latter two carry no gradient, and are empty (0,) unless asked
        for.
        """
        # No attention mask: attention is causal and padding is on the right, so no real token sees padding,
        # and without a mask sdpa takes its fast causal path. Position ids default to 0..T-1.
        kwargs: dict[str, object] = {}
        if trees is not None:
            # Of four dimensions: transformers hands it on as it is, and makes no mask of its own. Nothing reads it.
            unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
            kwargs = {"trees": trees, "position_ids": position_ids, "attention_mask": unread}
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state  # (B, T, D)
        hidden = hidden.flatten(0, 1).index_select(0, positions)  # (S, D)
        chunk = max(1, CHUNK_LOGITS[hidden.device.type] // self.model.config.get_text_config().vocab_size)
        weights = float32_weights(self.model.get_output_embeddings())
        statistics = TokenStatistics([] if with_entropy else None, [] if with_collision else None)
        logps = [
            checkpoint(self._chunk_logps, h, t, weights, statistics, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        none = targets.new_empty(0, dtype=torch.float32)
        entropies, collisions = (
            torch.cat(chunks) if chunks else none for chunks in (statistics.entropies, statistics.log_collisions)
        )
        return torch.cat(logps), entropies, collisions

    def _chunk_logps(
        self, hidden: Tensor, targets: Tensor, weights: Mapping[str, Tensor], statistics: TokenStatistics
    ) -> Tensor:
        """(C, D), (C,) -> (C,) logps; adds to the statistics."""
        logits = logits_of(self.model, hidden, weights)  # (C, V) float32
        chosen, probabilities, normalizers = ChosenLogps.apply(logits, targets)
        # Backward's recomputation stops at the last tensor it needs, which lies before this: statistics are
        # computed once.
        statistics.add(logits, probabilities, normalizers)
        return chosen


def float32_weights(head: nn.Module) -> dict[str, Tensor]:
    """The head's parameters by name in float32: themselves where they are that, else copies autograd sees through."""
    return {name: parameter.float() for name, parameter in head.named_parameters()}


def float32_head(head: nn.Module, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """(C, D) -> (C, V) float32: the head called as a module (it may hold a bias, or LoRA) with `float32_weights`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return functional_call(head, dict(weights), (hidden.float(),))


def logits_of(model: PreTrainedModel, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """(C, D) final hidden states -> (C, V) float32 logits, scaled and capped as the model's config says.

    `weights`: the head's `float32_weights`.
    """
    return scaled_logits(float32_head(model.get_output_embeddings(), hidden, weights), model.config.get_text_config())


def scaled_logits(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """What the head gave, scaled and capped as the config says."""
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


@torch.no_grad()
def require_known_head(model: PreTrainedModel, name: str) -> None:
    """Raises ConfigError unless `LogpModel` says what the model's own forward says, on a few tokens.

    Heads differ between model families in ways no config tells; this finds out instead of trusting. It is meant for
    a model that is still on the CPU, where it needs no GPU memory, and computes there whatever the attention.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.linspace(0, vocabulary - 1, 9, device=model.device).long()[None]  # (1, 9)
    with _attention_of_any_device(model):
        with _own_forward_in_float32(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found, _, _ = LogpModel(model)(ids, torch.arange(8, device=model.device), ids[0, 1:])
    expected = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    error = (found - expected).abs().max().item()
    if not error <= tolerance:  # also where it is NaN
        raise ConfigError(
            f"model.path is {name!r}: {type(model).__name__} turns hidden states into logits in a way the learner "
            f"does not know (log-probabilities differ by {error:.3g}); use a model with a plain, scaled or "
            "soft-capped LM head"
        )


@contextmanager
def _attention_of_any_device(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block a model that would use flash attention, which only GPUs have, uses eager attention."""
    wanted = model.config._attn_implementation
    if "flash" not in wanted:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(wanted)


@contextmanager
def _own_forward_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the head gives float32 logits to the model's own forward too: in bfloat16 their rounding
    would hide what differs, or pass for it."""

    def unrounded(head: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor | None:
        if logits.dtype == torch.float32:  # a float32 head, or the call below
            return None
        return float32_head(head, inputs[0], float32_weights(head))

    handle = model.get_output_embeddings().register_forward_hook(unrounded)
    try:
        yield
    finally:
        handle.remove()
