"""Attention of trees on a GPU: one FlexAttention call for a whole row (Dong et al. 2024, arXiv 2412.05496).

Blocks of queries and keys that see nothing of each other are skipped, and only those on an edge look at the mask.
FlexAttention's kernels are compiled for a device, so they are tried on it before they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.flex_attention import flex_attention_forward

from online_po.errors import first_line

BLOCK = 128
"""Queries of a block, and keys."""
TRIAL_SIZES = ((300, 260, 40), (7, 3), (129,))
"""Trees of the trial: blocks that are seen whole, in part, and not at all."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""By what share of its norm a result or a gradient may be off on the trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What kernels are compiled for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Shape:
        """`query` (1, H, T, D), `key` (1, K, T, D), `value` (1, K, T, E)."""
        return cls(
            device=query.device,
            dtype=query.dtype,
            heads=query.shape[1],
            key_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
        )


_faults: dict[Shape, str | None] = {}
"""What was found of the shapes that this process tried."""


def is_proven(shape: Shape) -> bool:
    """Whether FlexAttention was tried on a shape, and is right."""
    return _faults.get(shape, "not tried") is None


def fault_of(shape: Shape) -> str | None:
    """Tries FlexAttention on a shape: what is wrong with it there, for people; None: it is right, forward and backward.

    Compiles; not to be called inside a forward."""
    if shape not in _faults:
        try:
            error = _trial(shape)
        except Exception as failure:  # compilers raise whatever they like; another kernel does the same
            _faults[shape] = f"{type(failure).__name__}: {first_line(failure)}"
        else:
            is_right = error <= TOLERANCE.get(shape.dtype, 0.0)  # False of a NaN
            _faults[shape] = None if is_right else f"results are off by {error:.2g} of their norm"
    return _faults[shape]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, mask: BlockMask
) -> Tensor:
    """(1, T, H, E): `query` (1, H, T, D), `key` (1, K, T, D), `value` (1, K, T, E), under a `tree_mask`. `module` is
    the layer that asks."""
    found, _ = flex_attention_forward(module, query, key, value, mask, scaling=scaling)
    return found


def tree_mask(sizes: Sequence[Sequence[int]], device: torch.device) -> BlockMask:
    """What tokens of a row of trees see; `sizes` as in `online_po.tree_attention.Trees`."""
    pieces = [(size, root) for root, tree in _roots(sizes) for size in tree]
    lengths = np.array([size for size, _ in pieces])
    own = torch.from_numpy(np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)).to(device)
    root = torch.from_numpy(np.repeat(np.array([root for _, root in pieces], dtype=np.int32), lengths)).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # A prompt lies before its branches.
        return (query >= key) & ((own[query] == own[key]) | (root[query] == own[key]))

    counts = seen_pairs(sizes)
    whole = counts == BLOCK**2
    (partial, partial_indices), (full, full_indices) = (
        _listed(blocks, device) for blocks in ((counts > 0) & ~whole, whole)
    )
    tokens = int(lengths.sum())
    return BlockMask.from_kv_blocks(
        partial, partial_indices, full, full_indices, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def seen_pairs(sizes: Sequence[Sequence[int]]) -> np.ndarray:
    """(n, n) int64 for the n blocks of a row: how many of a block's queries see how many of another one's keys."""
    lengths = [size for tree in sizes for size in tree]
    ends = np.cumsum(lengths)
    edges = np.arange(-(-ends[-1] // BLOCK) + 1) * BLOCK
    # (pieces, n): how many tokens of a piece lie in a block.
    inside = np.diff(np.clip(edges, (ends - lengths)[:, None], ends[:, None]), axis=1)
    causal = np.tril(inside.T @ inside, -1) + np.diag((inside * (inside + 1) // 2).sum(axis=0))
    starts = np.cumsum([0, *map(len, sizes)])
    prompts = inside[starts[:-1]]
    branches = np.stack([inside[first + 1 : last].sum(axis=0) for first, last in pairwise(starts)])
    return causal + branches.T @ prompts


def _roots(sizes: Sequence[Sequence[int]]) -> list[tuple[int, Sequence[int]]]:
    """(the number of its prompt among all pieces, the tree)."""
    starts = np.cumsum([0, *map(len, sizes)])
    return list(zip(starts.tolist(), sizes, strict=False))


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 1, n) how many blocks of keys a block of queries has, (1, 1, n, n) their numbers and then the others'."""
    numbers = np.argsort(~blocks, axis=1, kind="stable")
    counts, indices = (torch.from_numpy(found.astype(np.int32)) for found in (blocks.sum(axis=1), numbers))
    return counts[None, None].to(device), indices[None, None].to(device)


def _trial(shape: Shape) -> float:
    """By what share of its norm the result, or a gradient, is off on random input, at most."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, TRIAL_SIZES))
    sizes = ((shape.heads, shape.key_dim), (shape.key_heads, shape.key_dim), (shape.key_heads, shape.value_dim))
    inputs = [
        torch.randn(1, heads, tokens, dim, generator=generator).to(shape.device, shape.dtype).requires_grad_()
        for heads, dim in sizes
    ]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    weights = torch.randn(1, tokens, shape.heads, shape.value_dim, generator=generator).to(shape.device)
    mask = tree_mask(TRIAL_SIZES, shape.device)
    places = torch.arange(tokens, device=shape.device)
    seen = mask.mask_mod(places, places, places[:, None], places[None])
    errors = list[float]()
    with torch.enable_grad(), torch.autocast(shape.device.type, enabled=False):
        query, key, value = wide
        expected = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)
        query, key, value = inputs
        found = attend(nn.Module(), query, key, value, None, mask)
        others = torch.autograd.grad((expected * weights).sum(), wide)
        gradients = torch.autograd.grad((found.float() * weights).sum(), inputs)
    for one, other in zip((found, *gradients), (expected, *others), strict=True):
        errors.append(((one.float() - other).norm() / other.norm()).item())
    return float(np.max(errors))  # a NaN, if there is one
