"""The policy in a learner's memory: its weights between ranks, other policies, engines and folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from online_po import files, policy_model
from online_po.adapters import adapter_replaced, blend_adapters
from online_po.errors import OnlinePOError
from online_po.model_config import load_tokenizer
from online_po.sections import LearnerConfig, ModelConfig
from online_po.types import Policy, SharedWeights

Put: TypeAlias = Callable[[dict[str, Tensor]], SharedWeights | None]


class HeldPolicy:
    """A rank's part of the policy. All ranks make the same calls with the same arguments; rank 0 reads and writes
    files.

    `reshard` is called before weights are written into the model, and after others were computed with. `tick` is
    called after each tensor that was gathered from ranks or spread over them.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        source: ModelConfig,
        learner: LearnerConfig,
        device: torch.device,
        reshard: Callable[[], None],
        tick: Callable[[], None],
    ) -> None:
        self.model, self.source, self.device = model, source, device
        self.param_dtype: torch.dtype = getattr(torch, learner.param_dtype)
        # FSDP computes with weights that it casts as it gathers them; so is another adapter's.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._adapter_dtype: torch.dtype = getattr(torch, learner.compute_dtype) if several else torch.float32
        self._reshard, self._tick = reshard, tick
        self.version: int | None = 0
        """The policy version whose weights are held; None between an optimizer step and the next save."""
        self._first_adapters: dict[str, Tensor] = {}
        if isinstance(model, PeftModel):
            self._first_adapters = {
                name: policy_model.local(tensor).detach().to("cpu", copy=True) for name, tensor in self.tensors.items()
            }
        self.as_named = False
        """On rank 0 whether a policy's folder has the names of `tensors`."""
        self._is_shared = False
        """On rank 0 whether engines have the weights as they are now from memory."""
        if policy_model.is_rank_0():
            if isinstance(model, PreTrainedModel):
                self.as_named = policy_model.saved_as_named(model, source)
            self.tokenizer = load_tokenizer(source.path, source.path, source.revision)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The model's own, see `online_po.policy_model.policy_tensors`."""
        return policy_model.policy_tensors(self.model)

    @contextmanager
    def replaced_by(self, policy: Policy) -> Iterator[None]:
        """Inside the block the model computes with the policy's weights; afterwards it is as before, bit for bit."""
        if policy.version == self.version and not policy.blended:
            yield
            self._reshard()
        elif isinstance(self.model, PeftModel):
            adapter = None
            if policy.version != 0:
                adapter = policy_model.replicate(self._read(policy), self.device, self._adapter_dtype)
            try:
                with adapter_replaced(self.model, adapter):
                    yield
            finally:
                self._reshard()
        else:
            tensors = self.tensors
            kept = {name: policy_model.local(tensor).detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            try:
                self.take(self._read(policy))
                yield
            finally:
                self._reshard()
                with torch.no_grad():
                    for name, tensor in tensors.items():
                        policy_model.local(tensor).copy_(kept[name])

    # -- between ranks -----------------------------------------------------------------------------

    def gathered(self, copy: bool = False) -> dict[str, Tensor]:
        """`tensors`, whole, on rank 0's CPU, see `online_po.policy_model.gather`."""
        found = {}
        for name, tensor in self.tensors.items():
            found[name] = policy_model.gather(tensor, copy)
            self._tick()
        return found

    def take(self, whole: dict[str, Tensor] | None) -> None:
        """Writes rank 0's `tensors` into the model; what the others pass is not looked at."""
        self._reshard()
        for name, tensor in self.tensors.items():
            policy_model.spread(whole[name] if whole is not None else None, tensor)
            self._tick()

    # -- engines and folders -----------------------------------------------------------------------

    def share(self, put: Put) -> SharedWeights | None:
        """Hands `gathered` to `put` on rank 0."""
        whole = self.gathered()
        shared = put(whole) if policy_model.is_rank_0() else None
        self._is_shared = shared is not None
        return shared

    def save(self, folder: Path) -> dict[str, str]:
        """Writes the policy's folder, durably; returns the SHA-256 of files that were hashed, by name, on rank 0.
        Raises LedgerError where the disk is full."""
        hashes: dict[str, str] = {}
        whole = self.gathered()
        if policy_model.is_rank_0():
            with files.explained(folder):
                direct, self._is_shared = self._is_shared, False
                hashes |= policy_model.write_policy(folder, self.model, whole, self.as_named, self._tick, direct)
                if not isinstance(self.model, PeftModel):
                    self.tokenizer.save_pretrained(folder)
                self._tick()
                files.sync_folder(folder)  # here too: the ledger's machine may be another one
        return hashes

    def blend(self, reference: Policy, alpha: float, folder: Path) -> None:
        """Writes alpha * own + (1 - alpha) * reference as a policy's folder. Means of all weights are taken in float32,
        those of adapters as adapters of higher rank (`online_po.adapters`)."""
        own = self.gathered()
        if not policy_model.is_rank_0():
            return
        if isinstance(self.model, PeftModel):
            other = None if reference.version == 0 else self._read(reference)
            policy_model.write_policy(folder, self.model, blend_adapters(self.model, own, other, alpha))
        else:
            whole = self._read(reference)
            assert whole is not None
            policy_model.blend_weights(own, whole, alpha)
            policy_model.write_policy(folder, self.model, whole, self.as_named, self._tick)
            self.tokenizer.save_pretrained(folder)

    def load(self, policy: Policy) -> None:
        """Takes a policy's weights. Version 0 is the starting model's, or adapters as they were first drawn."""
        if policy.version == 0 and isinstance(self.model, PeftModel):
            self._reshard()
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    policy_model.local(tensor).copy_(self._first_adapters[name])
        else:
            self.take(self._read(policy))
        self.version = policy.version

    def _read(self, policy: Policy) -> dict[str, Tensor] | None:
        """On rank 0 the tensors of a policy folder, whole, on the CPU; None elsewhere."""
        if not policy_model.is_rank_0():
            return None
        path = Path(self.source.path) if policy.version == 0 else policy.path
        whole = policy_model.read_policy(path, self.source, self.param_dtype, policy.is_adapter)
        if odd := sorted(whole.keys() ^ self.tensors.keys()):
            raise OnlinePOError(
                f"the policy in {str(policy.path)!r} is not one of this run: it differs in {', '.join(odd[:3])}; give "
                "the run its own folder, made with the same learner.lora"
            )
        return whole
