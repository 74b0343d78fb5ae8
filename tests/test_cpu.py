"""What a model's process makes of a CPU: memory that is kept, and products that stay float32."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from online_po import cpu

COUNT_FAULTS = """
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for _ in range(40)][-8:]))
"""


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def faults(settings: dict[str, str]) -> int:
    """Page faults of eight large tensors where others as large were freed before, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    assert faults({"GLIBC_TUNABLES": ""}) >= 8 * 32 > 32 >= faults(cpu.variables(1))


def test_threads_are_at_least_one() -> None:
    assert [cpu.variables(threads)["OMP_NUM_THREADS"] for threads in (0, 3)] == ["1", "3"]
    assert cpu.variables(1, keeps_memory=False) == {k: v for k, v in cpu.variables(1).items() if k != "GLIBC_TUNABLES"}


@pytest.mark.parametrize(("text", "found"), [("vendor_id\t: AuthenticAMD", True), ("vendor_id\t: GenuineIntel", False)])
def test_whose_cpu_it_is(tmp_path: Path, text: str, found: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{text}\n")
    assert cpu.made_by_amd(tmp_path / "cpuinfo") is found
    assert not cpu.made_by_amd(tmp_path / "none")


def test_products_of_other_makers_cpus_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "made_by_amd", lambda: False)
    assert not cpu.use_onednn_products() and torch.get_float32_matmul_precision() == "highest"


def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product as AMX makes it of float32 that may be rounded."""
    if left.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        left, right = left.bfloat16().float(), right.bfloat16().float()
    return torch.matmul(left, right)


def test_products_that_are_rounded_are_not_taken(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "made_by_amd", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not cpu.use_onednn_products() and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(torch.backends.cuda.is_built() or not cpu.made_by_amd(), reason="for CPUs of AMD")
def test_products_are_float32_with_onednn() -> None:
    assert cpu.use_onednn_products()
    generator = torch.Generator().manual_seed(1)
    inputs, weights = (torch.randn(shape, generator=generator) for shape in ((200, 576), (1536, 576)))
    exact = inputs.double() @ weights.double().t()
    assert (torch.nn.functional.linear(inputs, weights) - exact).abs().max() < 1e-3  # bfloat16's: 0.4
    inputs.requires_grad_()
    torch.nn.functional.linear(inputs, weights).square().sum().backward()
    slopes = 2 * exact @ weights.double()
    assert ((inputs.grad - slopes).abs() / slopes.abs().max()).max() < 1e-5
