"""What a vLLM worker does to take new weights. vLLM mixes this class into its worker, one per device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class WeightSync:
    """Mixed into `vllm.v1.worker.gpu_worker.Worker` (`worker_extension_cls`) and called through `collective_rpc`."""

    model_runner: Any
    reload_weights: Callable[..., None]
    """The worker's own, in vLLM's context."""

    def load_policy(self, path: str) -> None:
        """Replaces all weights by those of a Hugging Face folder on a disk this process sees."""
        self.reload_weights(weights_path=path)
        self._renew_head()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces all weights by tensors named as in a Hugging Face folder's files; they may be read-only. Only where
        the worker is in the caller's process."""
        self.reload_weights(weights_iterator=iter(tensors.items()))
        self._renew_head()

    def load_merged(self, adapter: str) -> None:
        """Replaces all weights by the starting model's with the adapter of a folder added."""
        from vllm.model_executor.model_loader import get_model_loader

        from online_po.adapters import merged

        runner = self.model_runner
        loader: Any = get_model_loader(runner.vllm_config.load_config)
        weights = partial(loader.get_all_weights, runner.model_config, runner.get_model())
        self.reload_weights(weights_iterator=merged(weights, Path(adapter)))
        self._renew_head()

    def _renew_head(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        # On the CPU a layer's matrix multiplication is built from its weight when the weight is loaded. A
        # checkpoint with tied embeddings has no `lm_head.weight`, so nothing rebuilds the head's, and the old
        # head would go on answering.
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
