"""FlexAttention of trees, on a CPU: uncompiled it goes forward and backward there, compiled forward only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers.integrations import flex_attention as transformers_flex

from online_po import gpu_attention, scoring
from online_po.gpu_attention import BLOCK, TRIAL_SIZES, Shape, attend, is_proven, seen_pairs, tree_mask, try_shapes
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

    def counted(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[2])
        return attend(module, query, *args, **kwargs)

    class OnGpu(Trees):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.on_cpu = False

    monkeypatch.setattr(gpu_attention, "attend", counted)
    monkeypatch.setattr(scoring, "Trees", OnGpu)
    return calls


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_models_say_what_they_say_of_plain_rows(
    through_it: list[int], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Log-probabilities, entropies and gradients; what was not tried, and short rows, go piece by piece."""
    model = make_model(CONFIGS[kind]())
    sharing = share_prompts(model)
    assert_the_same(model)
    assert through_it == [], "not tried yet"
    assert try_shapes(sharing.shapes) is None
    through_it.clear()
    assert_the_same(model)
    assert through_it == [184] * model.config.num_hidden_layers
    monkeypatch.setattr(gpu_attention, "BLOCK", 184)
    assert_the_same(model)
    assert len(through_it) == model.config.num_hidden_layers, "no row is long enough any more"


# -- the trial -------------------------------------------------------------------------------------

SHAPE = Shape(device=CPU, dtype=torch.float32, heads=4, key_heads=2, key_dim=16, value_dim=16, scaling=0.25)


def test_what_does_not_compile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself has no backward of it for a CPU."""
    monkeypatch.setattr(gpu_attention, "_faults", {})
    fault = try_shapes([SHAPE])
    assert fault is not None and fault.startswith("NotImplementedError: FlexAttention does not support backward on CPU")
    assert not is_proven(SHAPE, 999)


def test_a_device_without_memory_is_no_fault(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gpu_attention, "attend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        try_shapes([SHAPE])


def uniform(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    mean = value.mean(dim=2, keepdim=True).repeat(1, 2, query.shape[2], 1).transpose(1, 2)
    return mean + 0 * (query + key.mean()).sum()


def undefined(*args: Any, **kwargs: Any) -> Tensor:
    return attend(*args, **kwargs) * torch.nan


def without_gradient(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return attend(module, *args, **kwargs).detach() + 0 * sum(tensor.sum() for tensor in args[:3])


def with_sizes(change: Callable[[list[list[int]]], None]) -> Callable[..., Tensor]:
    """Computes with the mask of other trees of as many tokens."""

    def broken(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: object) -> Tensor:
        (sizes,) = [sizes for sizes in TRIAL_SIZES if sum(map(sum, sizes)) == query.shape[2]]
        changed = [list(tree) for tree in sizes]
        change(changed)
        return attend(module, query, key, value, scaling, tree_mask(changed, CPU))

    return broken


def too_much(trees: list[list[int]]) -> None:
    trees[0][0] += 1  # the second branch sees the first one's first token
    trees[0][1] -= 1


def too_little(trees: list[list[int]]) -> None:
    trees[0][0] -= 1  # and here not the prompt's last
    trees[0][1] += 1


BROKEN = [uniform, undefined, without_gradient, with_sizes(too_much), with_sizes(too_little)]
NAMES = ["uniform", "undefined", "without gradient", "too much", "too little"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", BROKEN, ids=NAMES)
def test_what_computes_something_else_is_not_used(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    shape = replace(SHAPE, dtype=dtype)
    monkeypatch.setattr(gpu_attention, "attend", broken)
    fault = try_shapes([shape, replace(shape, scaling=0.5)])
    assert fault is not None and "what a token sees is off by" in fault
    assert not is_proven(shape, 999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes(uncompiled: None, dtype: torch.dtype) -> None:
    shapes = [replace(SHAPE, dtype=dtype, value_dim=dim, heads=heads) for dim in (16, 24) for heads in (4, 6)]
    assert try_shapes(shapes) is None
    assert all(is_proven(shape, BLOCK + 1) and not is_proven(shape, BLOCK) for shape in shapes)


def test_one_shape_that_fails_fails_all(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert query.shape[1] == 4, "no such kernel"
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(gpu_attention, "attend", broken)
    assert try_shapes([SHAPE, replace(SHAPE, heads=8)]) == "AssertionError: no such kernel"
    assert not is_proven(SHAPE, 999)


def test_ranks_come_to_the_same(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(gpu_attention.dist, "get_world_size", lambda: 2)

    def gathered(into: list[list[str | None]], own: list[str | None]) -> None:
        into[:] = [own, ["the other rank's card is older"]]

    monkeypatch.setattr(gpu_attention.dist, "all_gather_object", gathered)
    assert try_shapes([SHAPE]) == "the other rank's card is older"
    assert not is_proven(SHAPE, 999)


def test_what_is_tried_and_told_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the model's layers ask in, as it computes there."""
    asked = list[Shape]()
    monkeypatch.setattr("online_po.prefix_sharing.try_shapes", lambda shapes: asked.extend(shapes) or "it broke")
    gpu = torch.device("cuda", 0)
    model = make_model(CONFIGS["granite"]())
    sharing = replace(share_prompts(model), longest=99, why_not="its windows")
    assert sharing.shapes == {replace(SHAPE, scaling=0.1)}
    assert with_kernels(sharing, CPU, torch.bfloat16) is sharing
    assert with_kernels(Sharing(), gpu, torch.bfloat16) == Sharing() and asked == []
    found = with_kernels(sharing, gpu, torch.bfloat16)
    assert asked == [replace(SHAPE, device=gpu, dtype=torch.bfloat16, scaling=0.1)]
    assert len(found.told) == 2 and found.told[1].endswith("failed on a trial: it broke")
    monkeypatch.setattr("online_po.prefix_sharing.try_shapes", lambda shapes: None)
    assert with_kernels(replace(sharing, why_not=None), gpu, torch.bfloat16).told == []


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_rows_of_several_blocks_compile_nothing_anew() -> None:
    """A row's length and trees are input: one compilation for the first, one for all others. Forward only: torch has no
    more for a CPU."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = list[int]()
    for seed in range(8):
        sizes = LARGE + random_sizes(seed)
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (
            torch.randn(1, heads, sum(map(sum, sizes)), 16, generator=generator) for heads in (4, 2, 2)
        )
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=seed % 2 == 1):
            found = attend(nn.Module().eval(), query, key, value, 0.3, tree_mask(sizes, CPU))
        torch.testing.assert_close(found, expected(query, key, value, sizes), rtol=1e-5, atol=1e-5)
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == 1 and compiled[1:] == [2] * 7


@pytest.mark.slow
def test_the_trial_leaves_nothing_to_compile(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dynamo traces it, without kernels: with gradients and without, recomputed, under autocast, and where the keys
    of a first layer have no gradient."""
    graphs = list[int]()

    def counted(graph: Any, _inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    traced = torch.compile(torch_flex.flex_attention, backend=counted)
    monkeypatch.setattr(
        transformers_flex,
        "compile_friendly_flex_attention",
        lambda *args, training=False, **kwargs: traced(*args, **kwargs),
    )
    assert try_shapes([SHAPE]) is None
    tried = len(graphs)
    for seed in range(4):
        sizes = LARGE + random_sizes(seed)
        tokens, mask = sum(map(sum, sizes)), tree_mask(sizes, CPU)
        query, key, value = (torch.randn(1, tokens, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                attend(nn.Module(), query, key, value, 0.25, mask)
            query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
            attend(nn.Module(), query, key, value, 0.25, mask).sum().backward()
            checkpoint(attend, nn.Module(), query, key, value, 0.25, mask, use_reentrant=False).sum().backward()
    assert len(graphs) == tried
    attend(nn.Module(), query, key.detach(), value, 0.25, mask).sum().backward()
    assert len(graphs) == tried + 1 <= 6, "of the eight that torch compiles at most"
