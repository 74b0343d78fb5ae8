"""Attention of trees on a CPU, against torch's own with all of what is seen written down as a mask."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from online_po import cpu_attention
from online_po.cpu_attention import TreeAttention, blocks

SIZES = [(5, 3, 70, 1), (1, 2), (130, 4), (9,), (3, 3, 3)]
TOKENS = sum(map(sum, SIZES))


def seen(sizes: Sequence[Sequence[int]] = SIZES) -> Tensor:
    """(T, T): what each token sees."""
    tokens, start = sum(map(sum, sizes)), 0
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for prompt, *branches in sizes:
        end = start + prompt
        mask[start:end, start:end] = torch.ones(prompt, prompt).tril()
        for tokens in branches:
            mask[end : end + tokens, start : start + prompt] = True
            mask[end : end + tokens, end : end + tokens] = torch.ones(tokens, tokens).tril()
            end += tokens
        start = end
    return mask


def tensors(heads: int, groups: int, dtype: torch.dtype, value_dim: int = 8) -> list[Tensor]:
    """Query, key, value, as models make them: views of (1, T, H, D)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, 8), (groups, 8), (groups, value_dim))
    made = (torch.randn(1, TOKENS, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in made]


def expected(query: Tensor, key: Tensor, value: Tensor, sizes: Sequence[Sequence[int]] = SIZES) -> Tensor:
    found = scaled_dot_product_attention(query, key, value, attn_mask=seen(sizes), scale=0.3, enable_gqa=True)
    return found.transpose(1, 2)


def with_gradients(found: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), inputs)]


@pytest.mark.parametrize("scores", [1, 4000, 1 << 19])
@pytest.mark.parametrize(("heads", "groups", "value_dim"), [(4, 4, 8), (6, 2, 8), (3, 1, 5)])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, scores: int, heads: int, groups: int, value_dim: int
) -> None:
    """Whatever the blocks: in float64, to which nothing hides."""
    monkeypatch.setattr(cpu_attention, "BLOCK_SCORES", scores)
    monkeypatch.setattr(cpu_attention, "BLOCK_ROWS", 7)
    inputs = tensors(heads, groups, torch.float64, value_dim)
    assert (len(list(blocks(SIZES, heads))) > sum(map(len, SIZES))) == (scores < 1 << 19)
    found = with_gradients(TreeAttention.apply(*inputs, 0.3, SIZES), inputs)
    for one, other in zip(found, with_gradients(expected(*inputs), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_float32_under_autocast_too() -> None:
    inputs = tensors(4, 2, torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = TreeAttention.apply(*inputs, 0.3, SIZES)
        found = with_gradients(out, inputs)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 4
    for one, other in zip(found, with_gradients(TreeAttention.apply(*wide, 0.3, SIZES), wide), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=0.02)
    torch.testing.assert_close(found[0], TreeAttention.apply(*wide, 0.3, SIZES).bfloat16(), rtol=0, atol=0)


def test_memory_grows_with_tokens_only() -> None:
    """What is kept for backward is input and output."""
    kept = list[Tensor]()
    inputs = tensors(4, 2, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        TreeAttention.apply(*inputs, 0.3, SIZES)
    assert max(tensor.numel() for tensor in kept) == 4 * TOKENS * 8
