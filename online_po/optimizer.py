"""AdamW over the policy's trained parameters: building it, clipping, and its state as a file of plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from online_po.policy_model import gather, is_rank_0, local, spread
from online_po.sections import LearnerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(trained: dict[str, nn.Parameter], config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); biases and norm weights (fewer than two dimensions) do not decay."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients so that their global L2 norm is at most `max_norm`; returns the norm before.

    A norm that is not finite scales nothing: the caller must not take the step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    total = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if max_norm < total < float("inf"):
        torch._foreach_mul_([local(gradient) for gradient in gradients], max_norm / total)
    return total


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    copy: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """AdamW's state as "parameter name/state name" -> whole tensor, as `gather` gives it: it does not depend on the
    number of ranks. All ranks must call it. `tick` is called after each."""
    found = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = gather(value, copy)
            tick()
    return found


def read_optimizer(
    path: Path,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Replaces the optimizer's state by the one in a file of `optimizer_tensors`, one tensor at a time. All ranks must
    call it. `tick` is called after each."""
    optimizer.state.clear()
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
        for name, parameter in trained.items():
            if f"{name}/step" not in stored:  # saved before its first step
                continue
            state = {"step": file.get_tensor(f"{name}/step").to(parameter.device)}
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                spread(file.get_tensor(f"{name}/{key}") if is_rank_0() else None, state[key])
                tick()
            optimizer.state[parameter] = state
