"""FlexAttention of trees, on a CPU: uncompiled it goes forward and backward there, compiled forward only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig
from transformers.integrations import flex_attention as transformers_flex

from online_po import gpu_attention, scoring
from online_po.gpu_attention import BLOCK, Shape, attend, fault_of, is_proven, seen_pairs, tree_mask
from online_po.prefix_sharing import Sharing, share_prompts, with_kernels
from online_po.tree_attention import Trees
from tests.test_cpu_attention import SIZES, expected, seen, tensors, with_gradients
from tests.test_prefix_sharing import CONFIGS, assert_the_same, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LARGE = [(300, 260, 40), (7, 3), (129,), (128, 128, 128), (1, 1)]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as torch computes it without a compiler, which has gradients on a CPU; it only refuses to."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        transformers_flex,
        "compile_friendly_flex_attention",
        lambda *args, training=False, **kwargs: torch_flex.flex_attention(*args, **kwargs),
    )
    monkeypatch.setattr(gpu_attention, "_faults", {})


def random_sizes(seed: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(1, 300, rng.integers(1, 6)).tolist()) for _ in range(rng.integers(1, 6))]


@pytest.mark.parametrize("sizes", [SIZES, LARGE, [(1,)], [(128,)], *(random_sizes(seed) for seed in range(8))])
def test_the_mask_is_the_one_that_torch_makes_of_every_pair(sizes: list[tuple[int, ...]]) -> None:
    mask = tree_mask(sizes, CPU)
    tokens = sum(map(sum, sizes))
    places = torch.arange(tokens)
    dense = mask.mask_mod(places, places, places[:, None], places[None])
    assert torch.equal(dense, seen(sizes))
    padded = torch.zeros(len(seen_pairs(sizes)) * BLOCK, len(seen_pairs(sizes)) * BLOCK, dtype=torch.int64)
    padded[:tokens, :tokens] = dense
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum(dim=(1, 3))
    np.testing.assert_array_equal(seen_pairs(sizes), blocks.numpy())
    other = create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    assert mask.shape == other.shape and torch.equal(mask.to_dense(), other.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(other, name)), name


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (6, 2), (3, 1)])
def test_values_and_gradients(uncompiled: None, heads: int, groups: int) -> None:
    inputs = tensors(heads, groups, torch.float64)
    found = with_gradients(attend(nn.Module(), *inputs, 0.3, tree_mask(SIZES, CPU)), inputs)
    for one, other in zip(found, with_gradients(expected(*inputs), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.fixture
def through_it(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trees go through it, as on a GPU; the tokens of each call."""
    calls = list[int]()

    def counted(module: nn.Module, query: Tensor, *args: Any) -> Tensor:
        calls.append(query.shape[2])
        return attend(module, query, *args)

    class OnGpu(Trees):
        def __init__(self, sizes: list[list[int]], device: torch.device) -> None:
            super().__init__(sizes, device)
            self.on_cpu = False

    monkeypatch.setattr(gpu_attention, "attend", counted)
    monkeypatch.setattr(scoring, "Trees", OnGpu)
    return calls


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_models_say_what_they_say_of_plain_rows(
    through_it: list[int], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Log-probabilities, entropies and gradients; a layer of a shape that was not tried goes piece by piece."""
    model = make_model(CONFIGS[kind]())
    assert share_prompts(model).longest > 0
    assert_the_same(model)
    assert through_it == []
    groups = model.config.num_key_value_heads
    shape = Shape(device=CPU, dtype=torch.float32, heads=4, key_heads=groups, key_dim=16, value_dim=16)
    assert fault_of(shape) is None and is_proven(shape)
    through_it.clear()
    assert_the_same(model)
    assert len(through_it) == model.config.num_hidden_layers and len(set(through_it)) == 1


# -- the trial -------------------------------------------------------------------------------------

SHAPE = Shape(device=CPU, dtype=torch.float32, heads=4, key_heads=2, key_dim=16, value_dim=16)


def test_what_does_not_compile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself has no backward of it for a CPU."""
    monkeypatch.setattr(gpu_attention, "_faults", {})
    fault = fault_of(SHAPE)
    assert fault is not None and fault.startswith("NotImplementedError: FlexAttention does not support backward on CPU")
    assert not is_proven(SHAPE)


def uniform(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return (
        value.mean(dim=2, keepdim=True).repeat(1, 2, query.shape[2], 1).transpose(1, 2) + 0 * (query + key.mean()).sum()
    )


def undefined(*args: Any) -> Tensor:
    return attend(*args) * torch.nan


def forward_only(module: nn.Module, *args: Any) -> Tensor:
    return attend(module, *args).detach() + 0 * sum(tensor.sum() for tensor in args[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [uniform, undefined, forward_only])
def test_what_computes_something_else_is_not_used(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    shape = Shape(device=CPU, dtype=dtype, heads=4, key_heads=2, key_dim=16, value_dim=16)
    monkeypatch.setattr(gpu_attention, "attend", broken)
    fault = fault_of(shape)
    assert fault is not None and "of their norm" in fault and not is_proven(shape)


def test_half_precision_passes(uncompiled: None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert fault_of(Shape(device=CPU, dtype=dtype, heads=4, key_heads=2, key_dim=16, value_dim=16)) is None


def test_what_is_tried_and_told_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Shape]()
    monkeypatch.setattr("online_po.prefix_sharing.fault_of", lambda shape: asked.append(shape) or "it broke")
    config, gpu = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2), torch.device("cuda", 0)
    everything, nothing = Sharing(longest=99, why_not="its windows"), Sharing()
    assert with_kernels(everything, config, CPU, torch.bfloat16) is everything
    assert with_kernels(nothing, config, gpu, torch.bfloat16) is nothing
    found = with_kernels(everything, config, gpu, torch.bfloat16)
    assert asked == [Shape(device=gpu, dtype=torch.bfloat16, heads=6, key_heads=2, key_dim=16, value_dim=16)]
    assert len(found.told) == 2 and found.told[1].endswith("failed on a trial: it broke")
    monkeypatch.setattr("online_po.prefix_sharing.fault_of", lambda shape: None)
    assert with_kernels(Sharing(longest=99), config, gpu, torch.bfloat16).told == []


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_rows_of_other_lengths_compile_nothing_anew() -> None:
    """A row's length and trees are input: one compilation for the first, one for all others."""
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = list[int]()
    for seed in range(8):
        sizes = LARGE + random_sizes(seed)
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (
            torch.randn(1, heads, sum(map(sum, sizes)), 16, generator=generator) for heads in (4, 2, 2)
        )
        with torch.no_grad():
            found = attend(nn.Module().eval(), query, key, value, 0.3, tree_mask(sizes, CPU))
        torch.testing.assert_close(found, expected(query, key, value, sizes), rtol=1e-5, atol=1e-5)
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == 1 and compiled[1:] == [2] * 7
