"""What a process that computes with a model makes of a CPU: its variables, and whose matrix products it uses."""

from __future__ import annotations

from pathlib import Path

MALLOC = {
    # Large tensors in large pages: clearing small ones takes longer than filling them.
    "hugetlb": 1,
    # What was freed is kept for the next tensor; else each is mapped, and cleared, anew. All threads share it.
    "mmap_threshold": 1 << 30,
    "trim_threshold": 1 << 40,
    "arena_max": 1,
}
"""Settings of glibc's allocator."""

SHAPES = ((64, 576, 512), (341, 512, 96))
"""(rows, inner, columns) of the products that are tried."""
TOLERANCE = 1e-5
"""How far a float32 product may be off, relative to the norms of row and column: rounding is below 1e-6, bfloat16's
above 1e-4."""


def variables(threads: int, keeps_memory: bool = True) -> dict[str, str]:
    """Variables of such a process, which are read when it starts, or imports torch. `keeps_memory`: see `MALLOC`; not
    for one that computes on a GPU, and holds a whole model on the CPU only now and then."""
    kept = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())}
    return (kept if keeps_memory else {}) | {
        "OMP_NUM_THREADS": str(max(1, threads)),
        "MKL_NUM_THREADS": str(max(1, threads)),
        # Idle threads sleep instead of spinning: another process may run on the same cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def use_onednn_products() -> bool:
    """Lets this process's float32 matrix products be oneDNN's where the CPU is AMD's, and says whether they are.

    torch leaves them to MKL, whose kernels do half of the work per second there (docs/performance.md). It takes
    oneDNN's where bfloat16 is allowed inside ("medium"), which oneDNN makes use of only with AMX units: without them
    its products are float32 as any. That is tried here, not trusted; where it is otherwise nothing is changed. Torch's
    GPU builds are left alone: asking whether there is a GPU would keep vLLM from forking.
    """
    import torch

    if torch.backends.cuda.is_built() or not made_by_amd():
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if all(is_float32(*shape) for shape in SHAPES):
        return True
    torch.set_float32_matmul_precision(before)
    return False


def made_by_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        return "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:  # no Linux
        return False


def is_float32(rows: int, inner: int, columns: int) -> bool:
    """Whether products of this shape, of matrices as they lie and transposed, are off by no more than rounding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
    exact = left.double() @ right.double()
    norms = left.double().norm(dim=1, keepdim=True) * right.double().norm(dim=0, keepdim=True)
    lefts, rights = (left, left.t().contiguous().t()), (right, right.t().contiguous().t())
    errors = [((a @ b).double() - exact).abs() / norms for a in lefts for b in rights]
    return bool(torch.stack(errors).max() <= TOLERANCE)
