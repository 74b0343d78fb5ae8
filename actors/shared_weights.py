"""A policy's weights in Ray's object store: engines of the learner's machine map them, to others Ray sends them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError, OwnerDiedError, RayError
from torch import Tensor

from online_po.errors import EngineError, PolicyGoneError, first_line
from online_po.memory import memory
from online_po.types import Policy, SharedWeights

STORE_SHARE = 0.5
"""Of a node's object store that one policy may take: two may be there while one takes the other's place."""
MEMORY_SHARE = 0.5
"""Of the memory that is free on the learner's machine."""


def prepare(needed: int) -> bool:
    """Whether the store has room for so many bytes. It then takes the memory for them, and keeps it for what is shared:
    fresh memory is slow, and a round would wait for it."""
    stores = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    if needed > STORE_SHARE * min(stores) or needed > MEMORY_SHARE * memory().available:
        return False
    return _put(np.empty(needed, np.uint8)) is not None


def _put(value: Any) -> Any:
    try:
        return ray.put(value)
    except RayError:  # the store is full, and so is what it spills to
        return None


def share(tensors: Mapping[str, Tensor]) -> SharedWeights | None:
    """Copies tensors that are on the CPU into the store, where they stay as long as this process lives and anybody
    holds what is returned. None where it takes no more, though it was `prepare`d."""
    # As bytes: numpy knows no bfloat16, and of torch's own tensors Ray makes copies.
    packed = {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy())
        for name, tensor in tensors.items()
    }
    reference = _put(packed)
    return None if reference is None else SharedWeights(handle=reference)


def shared_tensors(policy: Policy) -> dict[str, Tensor] | None:
    """A policy's tensors, read-only; None where its folder is to be read.

    Raises PolicyGoneError if they are gone with the learner, and the folder is not there, EngineError if they do not
    arrive for another reason."""
    if policy.shared is None or policy.shared.handle is None:
        return None
    try:
        packed = ray.get(policy.shared.handle)
    except RayError as error:
        if policy.path.is_dir():  # saved in the meantime
            return None
        if type(error) in (OwnerDiedError, ObjectLostError):
            raise PolicyGoneError(f"policy {policy.version} is gone with the learner that shared it") from error
        raise EngineError(
            f"policy {policy.version} did not arrive from Ray's object store: {first_line(error)}"
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes
        return {name: torch.from_numpy(raw).view(dtype).view(shape) for name, (dtype, shape, raw) in packed.items()}
