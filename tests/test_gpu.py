"""What a learner's process sets for a GPU, as far as it is seen without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from online_po import gpu


@pytest.fixture
def restored() -> Iterator[None]:
    precision, fill = torch.get_float32_matmul_precision(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@pytest.mark.parametrize(("there", "dtype", "precision"), [
    (False, "bfloat16", "highest"), (True, "float32", "highest"), (True, "bfloat16", "high"),
])  # fmt: skip
def test_only_a_gpu_under_bfloat16_gets_tf32(
    restored: None, monkeypatch: pytest.MonkeyPatch, there: bool, dtype: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    torch.set_float32_matmul_precision("highest")
    gpu.prepare(dtype)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.are_deterministic_algorithms_enabled() == there


def test_memory_is_given_back_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = list[int]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    gpu.let_go(torch.device("cpu"))
    assert emptied == []
    gpu.let_go(torch.device("cuda", 0))
    assert emptied == [1]
