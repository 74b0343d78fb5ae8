"""Attention in which the responses to a prompt share it.

A tree is a prompt and, behind it, its responses as branches: each branch sees the prompt and itself, none of the
others, and its tokens have the positions they would have in a row of their own. Many trees lie one after the other in
one row (`online_po.packing`), so there is no padding, and what a prompt costs is paid once. Everything else in a model
works token by token and needs to know nothing of it; where that is not so, `online_po.prefix_sharing` finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from online_po import gpu_attention
from online_po.cpu_attention import TreeAttention
from online_po.gpu_attention import Shape

ATTENTION = "online_po_trees"
"""The name that `tree_attention` has in transformers."""


class Trees:
    """The trees of one row. One object serves all layers, in backward again.

    `sizes`: for each tree its prompt's tokens, then each branch's (if it has any); they follow each other in the row.
    `shapes` gets those that layers ask in.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], device: torch.device, shapes: set[Shape] | None = None) -> None:
        self.sizes = sizes
        self.on_cpu = device.type == "cpu"
        self.pieces = [size for tree in sizes for size in tree]
        self.device = device
        self.shapes = shapes
        self._biases: dict[tuple[int, int], Tensor] = {}

    @cached_property
    def mask(self) -> BlockMask:
        """What the row's tokens see, for FlexAttention."""
        return gpu_attention.tree_mask(self.sizes, self.device)

    def bias(self, prompt: int, tokens: int) -> Tensor:
        """(tokens, prompt + tokens): what a branch's queries see of prompt and branch, as kernels know it without a
        mask in memory."""
        key = prompt, tokens
        if key not in self._biases:
            self._biases[key] = causal_lower_right(tokens, prompt + tokens)
        return self._biases[key]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    trees: Trees | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls them: `query` (B, H, T, D), `key` and `value` (B, K, T, D), H a
    multiple of K; returns (B, T, H, D).

    With `trees` B is 1, and `attention_mask` is not looked at; without, it is transformers' sdpa.
    """
    if trees is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if trees.shapes is not None:
        trees.shapes.add(Shape.of(query, key, value, scaling))
    if trees.on_cpu:
        return TreeAttention.apply(query, key, value, scaling, trees.sizes), None
    kind = query.device.type  # nothing casts for these kernels
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if gpu_attention.is_proven(Shape.of(query, key, value, scaling), query.shape[2]):
        return gpu_attention.attend(module, query, key, value, scaling, trees.mask), None
    return _piece_by_piece(query, key, value, scaling, trees), None


def _piece_by_piece(query: Tensor, key: Tensor, value: Tensor, scaling: float, trees: Trees) -> Tensor:
    """The same by torch's kernels, one call for each prompt and each branch."""
    repeats = query.shape[1] // key.shape[1]  # where a bias is given, not all of them take grouped heads
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    pieces = zip(*(tensor.split(trees.pieces, dim=2) for tensor in (query, key, value)), strict=True)
    found = []
    for prompt, *branches in trees.sizes:
        own, prompt_key, prompt_value = next(pieces)
        found.append(scaled_dot_product_attention(own, prompt_key, prompt_value, is_causal=True, scale=scaling))
        for tokens in branches:
            own, own_key, own_value = next(pieces)
            keys, values = torch.cat([prompt_key, own_key], dim=2), torch.cat([prompt_value, own_value], dim=2)
            bias = trees.bias(prompt, tokens)
            found.append(scaled_dot_product_attention(own, keys, values, attn_mask=bias, scale=scaling))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # of rows; trees come with theirs
