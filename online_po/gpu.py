"""What a process that trains makes of its GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Of such a process, before it starts: what deterministic matrix products need."""


def prepare(compute_dtype: str) -> None:
    """Makes results the same each time, and under bfloat16 lets float32 products, the head's, be TF32: hidden states
    lose nothing by that, weights less than they do in every layer. Nothing where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if compute_dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")


def let_go(device: torch.device) -> None:
    """Gives memory that nothing uses back to the GPU, whoever else is on it. Nothing on a CPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
