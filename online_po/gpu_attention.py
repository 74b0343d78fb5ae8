"""Attention of trees on a GPU: one FlexAttention call for a whole row (Dong et al. 2024, arXiv 2412.05496).

Blocks of queries and keys that see nothing of each other are skipped, and only those on an edge look at the mask.
FlexAttention's kernels are compiled for a device, so they are tried on it before they are used: in the shapes that the
model has, without gradients and with them, on rows of two lengths, after which no other length compiles them anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.flex_attention import flex_attention_forward

from online_po.errors import first_line, is_out_of_memory

BLOCK = 128
"""Queries of a block, and keys. For rows of fewer torch has other kernels, which do not take all grouped heads."""
TRIAL_SIZES = (((300, 260, 40), (7, 3), (129, 1)), ((500, 400), (20, 30, 1)))
"""Trees of the trial's rows: blocks that are seen whole, in part, and not at all."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""By what share of the tokens' mean norm a token's result, or gradient, may be off on the trial. On a CPU right ones
are off by 4e-6 and 0.04, those of a branch that sees one token too many, or too few, by 0.3. TF32 would pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What kernels are compiled for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    scaling: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Shape:
        """`query` (1, H, T, D), `key` (1, K, T, D), `value` (1, K, T, E)."""
        return cls(
            device=query.device,
            dtype=query.dtype,
            heads=query.shape[1],
            key_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scaling=scaling,
        )


_faults: dict[Shape, str | None] = {}
"""What was found of the shapes that this process tried."""


def is_proven(shape: Shape, tokens: int) -> bool:
    """Whether FlexAttention was tried on a shape, is right, and takes rows of so many tokens."""
    return tokens > BLOCK and _faults.get(shape, "not tried") is None


def try_shapes(shapes: Iterable[Shape]) -> str | None:
    """Tries FlexAttention on a model's shapes, and says what is wrong with it, for people: none of them is proven then.
    None where it is right. All ranks must call it, and come to the same.

    Compiles; not to be called inside a forward. Raises what a device raises that has no memory left."""
    shapes = sorted(shapes, key=str)
    faults = [_fault(shape) for shape in shapes]
    if dist.is_initialized():
        of_ranks: list[list[str | None]] = [[]] * dist.get_world_size()
        dist.all_gather_object(of_ranks, faults)
        faults = [fault for of_rank in of_ranks for fault in of_rank]
    found = next((fault for fault in faults if fault is not None), None)
    _faults.update(dict.fromkeys(shapes, found))
    return found


def _fault(shape: Shape) -> str | None:
    try:
        error = max(_trial(shape), key=lambda error: (math.isnan(error), error))
    except Exception as failure:  # compilers raise whatever they like; another kernel does the same
        if is_out_of_memory(failure):
            raise
        return f"{type(failure).__name__}: {first_line(failure)}"
    if error <= TOLERANCE[shape.dtype]:  # False of a NaN
        return None
    return f"what a token sees is off by {error:.2g} of the mean in {shape.dtype}"


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: BlockMask) -> Tensor:
    """(1, T, H, E): `query` (1, H, T, D), `key` (1, K, T, D), `value` (1, K, T, E), under a `tree_mask`. `module` is
    the layer that asks."""
    with torch.autocast(query.device.type, enabled=False):  # one kernel less to compile
        found, _ = flex_attention_forward(module, query, key, value, mask, scaling=scaling)
    return found


def tree_mask(sizes: Sequence[Sequence[int]], device: torch.device) -> BlockMask:
    """What tokens of a row of trees see; `sizes` as in `online_po.tree_attention.Trees`."""
    lengths = np.array([size for tree in sizes for size in tree])
    numbers, roots = np.arange(len(lengths), dtype=np.int32), np.repeat(_prompts(sizes), [len(tree) for tree in sizes])
    own, root = (torch.from_numpy(np.repeat(places, lengths)).to(device) for places in (numbers, roots))

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
    # (pieces, n): how many tokens of a piece lie in a block; as floats, whose products are fast, and exact so far.
    inside = np.diff(np.clip(edges, (ends - lengths)[:, None], ends[:, None]), axis=1).astype(np.float64)
    causal = np.tril(inside.T @ inside, -1) + np.diag((inside * (inside + 1) / 2).sum(axis=0))
    prompts = inside[_prompts(sizes)]
    branches = np.add.reduceat(inside, _prompts(sizes)) - prompts
    return (causal + branches.T @ prompts).astype(np.int64)


def _prompts(sizes: Sequence[Sequence[int]]) -> np.ndarray:
    """(trees,) int32: each one's prompt's number among all pieces."""
    return np.cumsum([0, *(len(tree) for tree in sizes[:-1])], dtype=np.int32)


def _listed(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 1, n) how many blocks of keys a block of queries has, (1, 1, n, n) their numbers and then the others'."""
    numbers = np.argsort(~blocks, axis=1, kind="stable")
    counts, indices = (torch.from_numpy(found.astype(np.int32)) for found in (blocks.sum(axis=1), numbers))
    return counts[None, None].to(device), indices[None, None].to(device)


def _trial(shape: Shape) -> Iterator[float]:
    """By how much results and gradients are off on random input, see `TOLERANCE`."""
    for with_gradients in (False, True):
        for sizes in TRIAL_SIZES:
            yield from _errors(shape, sizes, with_gradients)


def _errors(shape: Shape, sizes: Sequence[Sequence[int]], with_gradients: bool) -> Iterator[float]:
    generator, tokens = torch.Generator().manual_seed(0), sum(map(sum, sizes))

    def random(heads: int, dim: int) -> Tensor:
        made = torch.randn(1, tokens, heads, dim, generator=generator).to(shape.device, shape.dtype)
        return made.transpose(1, 2).requires_grad_(with_gradients)  # as models make them

    inputs = (
        random(shape.heads, shape.key_dim),
        random(shape.key_heads, shape.key_dim),
        random(shape.key_heads, shape.value_dim),
    )
    query, key, value = (tensor.detach().float().requires_grad_(with_gradients) for tensor in inputs)
    mask = tree_mask(sizes, shape.device)
    places = torch.arange(tokens, device=shape.device)
    seen = mask.mask_mod(places, places, places[:, None], places[None])
    with torch.set_grad_enabled(with_gradients), torch.autocast(shape.device.type, enabled=False):
        found = [attend(nn.Module().eval(), *inputs, scaling=shape.scaling, mask=mask)]
        wide = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=shape.scaling, enable_gqa=True)
        expected = [wide.transpose(1, 2)]
        if with_gradients:
            weights = torch.randn(found[0].shape, generator=generator).to(shape.device)
            gradients = torch.autograd.grad((found[0].float() * weights).sum(), inputs)
            others = torch.autograd.grad((expected[0] * weights).sum(), (query, key, value))
            found += [gradient.transpose(1, 2) for gradient in gradients]
            expected += [gradient.transpose(1, 2) for gradient in others]
    for one, other in zip(found, expected, strict=True):  # (1, T, heads, dim)
        off = (one.float() - other).flatten(2).norm(dim=2).max()
        yield (off / other.flatten(2).norm(dim=2).mean()).item()
