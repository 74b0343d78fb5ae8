"""Attention of trees on a CPU: a few large matrix products for each block of queries, no probabilities kept.

torch's own kernel cuts queries into blocks of some 32 and spends its time between them (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SCORES = 1 << 19
"""A block has about so many scores, over all heads: what a core's cache holds."""
BLOCK_ROWS = 64
"""Or so many queries, if that is more."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that follow one another, and what they see: a prompt, and before the last of them their own sequence."""

    rows: slice
    prompt: slice
    """Empty for a prompt's own queries."""
    own: slice
    """Ends with the queries themselves, which see each other causally."""

    def gather(self, tokens: Tensor) -> Tensor:
        """(K, S, D) of what is seen, of (K, T, D): prompt first. A view where both are neighbours."""
        if self.prompt.stop == self.own.start:
            return tokens[:, self.prompt.start : self.own.stop]
        return torch.cat([tokens[:, self.prompt], tokens[:, self.own]], dim=1)

    def scatter(self, gradient: Tensor, seen: Tensor) -> None:
        """Adds what `gather` gave its gradient to (K, T, D)."""
        prompt = self.prompt.stop - self.prompt.start
        gradient[:, self.prompt] += seen[:, :prompt]
        gradient[:, self.own] += seen[:, prompt:]


def blocks(sizes: Sequence[Sequence[int]], heads: int) -> Iterator[Block]:
    """The blocks of trees, which follow one another; `sizes` as in `online_po.tree_attention.Trees`."""
    end = 0
    for tree in sizes:
        root = slice(end, end + tree[0])
        for number, tokens in enumerate(tree):
            start, end = end, end + tokens
            prompt = root if number else slice(start, start)
            seen = prompt.stop - prompt.start + tokens
            step = max(BLOCK_ROWS, BLOCK_SCORES // (heads * seen))
            for first in range(start, end, step):
                last = min(first + step, end)
                yield Block(rows=slice(first, last), prompt=prompt, own=slice(start, last))


class TreeAttention(torch.autograd.Function):
    """`apply(query, key, value, scale, sizes)`: softmax(scale * query keys') values, of what each query sees.

    `query` (1, H, T, D), `key` (1, K, T, D), `value` (1, K, T, E), H a multiple of K: query head h reads key head
    h // (H / K). Returns (1, T, H, E). Half-precision input is computed in float32, autocast or not. Probabilities are
    computed again in backward, as FlashAttention does (Dao et al. 2022, arXiv 2205.14135, appendix B): what is kept
    grows with T only.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, sizes: Sequence[Sequence[int]]
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            queries, keys, values = _widened(query) * scale, _widened(key), _widened(value)
            heads, tokens, _ = queries.shape
            out = query.new_empty(tokens, heads, values.shape[2])
            for block in blocks(sizes, heads):
                _, _, shares = _attend(block, queries, keys)
                found = torch.bmm(shares, block.gather(values))
                out[block.rows] = found.view(heads, -1, values.shape[2]).transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.sizes = scale, sizes
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            queries, keys, values = _widened(query) * ctx.scale, _widened(key), _widened(value)
            heads, tokens, dim = queries.shape
            incoming = _widened(gradient).transpose(0, 1)
            to_queries = queries.new_empty(tokens, heads, dim)
            to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in blocks(ctx.sizes, heads):
                own, seen, shares = _attend(block, queries, keys)
                arrived = incoming[:, block.rows].reshape(len(keys), -1, values.shape[2])
                block.scatter(to_values, torch.bmm(shares.transpose(1, 2), arrived))
                to_scores = torch.bmm(arrived, block.gather(values).transpose(1, 2))
                to_scores.sub_((to_scores * shares).sum(dim=-1, keepdim=True)).mul_(shares)
                to_queries[block.rows] = torch.bmm(to_scores, seen).view(heads, -1, dim).transpose(0, 1)
                block.scatter(to_keys, torch.bmm(to_scores.transpose(1, 2), own))
            to_query = to_queries.mul_(ctx.scale).transpose(0, 1)
        kept = (to_query.to(query.dtype), to_keys.to(key.dtype), to_values.to(value.dtype))
        return *(found[None] for found in kept), None, None


def _widened(tensor: Tensor) -> Tensor:
    """Of one row, and in no less than float32."""
    return tensor[0].to(torch.promote_types(tensor.dtype, torch.float32))


def _attend(block: Block, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block's queries (K, H / K * t, D), the keys they see (K, S, D) and their probabilities (K, H / K * t, S)."""
    tokens = block.rows.stop - block.rows.start
    own = queries[:, block.rows].reshape(len(keys), -1, queries.shape[2])
    seen = block.gather(keys)
    scores = torch.bmm(own, seen.transpose(1, 2))
    each_other = scores.view(len(keys), -1, tokens, seen.shape[1])[..., -tokens:]
    each_other += _future(tokens, scores.dtype)
    return own, seen, torch.softmax(scores, dim=-1)


def _future(tokens: int, dtype: torch.dtype) -> Tensor:
    """(t, t): minus infinity where a query would see a later one, else 0."""
    return _triangle(1 << (tokens - 1).bit_length(), dtype)[:tokens, :tokens]


@cache
def _triangle(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu(1)
