"""Reward models as functions from token ids to a number: the protocol, and transformers behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from judges.reward_files import SETTING, RewardFiles
from online_po.errors import ConfigError, first_line
from online_po.judge_configs import RewardModel

if TYPE_CHECKING:
    import torch


class RewardScorer(Protocol):
    """A loaded reward model."""

    batch_tokens: int | None
    """Tokens of a batch that it is best given, padding included; None: it makes its own batches."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One number per sequence of token ids, in order, whatever it is given together with: the reward, or the
        log-odds that the first response is the better one. None is empty, or longer than `RewardFiles.limit`."""
        ...


MakeScorer = Callable[[RewardModel, RewardFiles], RewardScorer]
"""Loads a model. Raises ConfigError where it cannot be loaded."""


def make_scorer(config: RewardModel, files: RewardFiles) -> RewardScorer:
    """A scorer of this process: `judge.engine: transformers`. Raises ConfigError for another engine."""
    if config.engine != "transformers":
        raise ConfigError(
            f"judge.engine is {config.engine}, which runs in the judge processes of a run only; set judge.engine: "
            "transformers"
        )
    return TransformersScorer(config, files)


class TransformersScorer:
    """A classifier's `score` head, or two rows of an LM head, on the last token's hidden state.

    Hidden states are the model's type, the head is float32. Sequences are padded on the right, where causal attention
    sees no padding: no pad token and no attention mask are needed, and the tokenizer's padding side does not matter.
    Raises ConfigError where the model does not load, or has no such head.
    """

    def __init__(self, config: RewardModel, files: RewardFiles) -> None:
        import torch

        self._device, dtype = device_and_dtype(config.dtype)
        self._letters = files.letters
        self._model: Any = _load(files, dtype, config.path).to(self._device)
        self._bias = None  # classifiers' heads have none
        if files.letters is None:
            # As stored: the loaded one is rounded to the layers' type.
            self._weight = _stored(files.folder, "score.weight").to(self._device, torch.float32)  # (1, D)
        else:
            head, rows = self._model.get_output_embeddings(), list(files.letters)
            self._weight = head.weight.detach()[rows].float()  # (2, D)
            self._bias = None if head.bias is None else head.bias.detach()[rows].float()
        self._backbone = getattr(self._model, self._model.base_model_prefix)
        self._inference = torch.inference_mode
        self.batch_tokens: int | None = config.batch_tokens or default_batch_tokens(self._device)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """See `RewardScorer`; one pass through the model."""
        import torch

        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.long)  # (B, T)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        ends = torch.tensor([len(sequence) - 1 for sequence in sequences])
        with self._inference():
            hidden = self._backbone(input_ids=ids.to(self._device), use_cache=False).last_hidden_state  # (B, T, D)
            last = hidden[torch.arange(len(ends), device=hidden.device), ends.to(hidden.device)].float()  # (B, D)
            logits = torch.nn.functional.linear(last, self._weight, self._bias)  # (B, 1 or 2) float32
            if self._letters is not None:
                from online_po.logps import scaled_logits

                logits = scaled_logits(logits, self._model.config.get_text_config())
                logits = logits[:, :1] - logits[:, 1:]
        return logits[:, 0].tolist()


def device_and_dtype(wanted: str) -> tuple[torch.device, torch.dtype]:
    """Where a judge's model runs and in what type: the process's GPU, else its CPU."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted != "auto":
        return device, getattr(torch, wanted)
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if bfloat16 else torch.float32


def default_batch_tokens(device: torch.device) -> int:
    """What `judge.batch_tokens: null` means."""
    return 1 if device.type == "cpu" else 16384


def _stored(folder: Path, name: str) -> torch.Tensor:
    """A tensor of a model's weight files, in which it is."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            if name in names:
                return file.get_tensor(name)
    raise ConfigError(f"{SETTING} is {str(folder)!r}, whose .safetensors files hold no {name}")


def _load(files: RewardFiles, dtype: torch.dtype, written: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    auto = AutoModelForSequenceClassification if files.letters is None else AutoModelForCausalLM
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = auto.from_pretrained(
            files.folder,
            config=files.settings,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers, safetensors and torch raise many types; each means the same to the user
        raise ConfigError(f"{SETTING} is {written!r}, which does not load: {first_line(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if info["missing_keys"] or info["mismatched_keys"]:
        keys = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ConfigError(
            f"{SETTING} is {written!r}, whose weight files do not fit its config.json: {', '.join(keys[:3])} would be "
            "random; give a complete, trained reward model"
        )
    head = getattr(model, "score", None) if files.letters is None else model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(
            f"{SETTING} is {written!r}, a {type(model).__name__}, which does not read its last token's hidden state by "
            "one linear layer; give a decoder's sequence classifier (such as LlamaForSequenceClassification)"
        )
    return model.eval()
