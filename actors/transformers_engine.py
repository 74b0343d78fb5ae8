"""Sampling with transformers alone: for machines without vLLM, and as a second opinion on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from online_po import policy_model
from online_po.model_config import load_tokenizer
from online_po.sections import GeneratorConfig, ModelConfig, SamplingConfig
from online_po.types import FinishReason, Group, Policy, Request, Response

# Shapes: B rows decoded together, T tokens of the longest prompt, V vocabulary.


@dataclass(eq=False, slots=True)
class _Row:
    """One response in the making."""

    prompt_ids: tuple[int, ...]
    place: int
    index: int
    seed: int
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    token_logps: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class TransformersEngine:
    """Implements `actors.engines.Engine`. Rows are sorted nowhere: batches are cut in order of the requests.

    A response is a function of its seed, its prompt and the weights; what else is in its batch changes its
    log-probabilities by float rounding only. Raises ConfigError if the model cannot be loaded.
    """

    def __init__(self, model: ModelConfig, config: GeneratorConfig, *, max_model_len: int) -> None:
        self._model_config, self._config, self._max_model_len = model, config, max_model_len
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype: str = config.dtype
        if config.dtype == "auto":
            self.dtype = "bfloat16" if self._device.type == "cuda" else "float32"
        self._path = self._start_path = model.path
        self._model: Any = self._read(model.path)
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(model.path, model.path, model.revision)
        self._eos_ids = _eos_ids(self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id)
        self.version = 0

    def _read(self, path: str) -> Any:
        config = self._model_config.model_copy(update={"path": path})
        return policy_model.load_causal_lm(config, getattr(torch, self.dtype)).to(self._device)

    def load(self, policy: Policy, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Takes a policy's weights."""
        from peft import PeftModel

        if isinstance(self._model, PeftModel):
            self._model = self._model.unload()
        if tensors is not None:
            with torch.no_grad():
                for name, tensor in policy_model.policy_tensors(self._model).items():
                    tensor.copy_(tensors[name])
            self._path = str(policy.path)
        elif policy.is_adapter:
            self._model = PeftModel.from_pretrained(self._model, str(policy.path)).eval()
        elif not str(policy.path) == self._path == self._start_path:  # others may have been written again
            self._model, self._path = None, ""  # the old weights go before the new ones come
            self._model = self._read(str(policy.path))
            self._path = str(policy.path)
        self.version = policy.version

    def close(self) -> None:
        """Frees the weights."""
        self._model = None

    @torch.inference_mode()
    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """(T,) token ids -> (T - 1,) logps in nats of token_ids[1:], each given all tokens before it."""
        ids = torch.tensor([list(token_ids)], device=self._device)  # (1, T)
        logps = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)  # (T - 1, V)
        return logps.gather(-1, ids[0, 1:, None])[:, 0].tolist()

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[dict[int, Group]]:
        """All responses to one chunk: {place among `requests`: group} as groups finish; {} after other steps."""
        groups = [
            [
                _Row(
                    prompt_ids=request.prompt.token_ids,
                    place=place,
                    index=i,
                    seed=seed,
                    generator=torch.Generator(self._device).manual_seed(seed),
                )
                for i, seed in enumerate(request.seeds)
            ]
            for place, request in enumerate(requests)
        ]
        rows = [row for group in groups for row in group]
        for start in range(0, len(rows), self._config.max_num_seqs):
            for ended in self._decode(rows[start : start + self._config.max_num_seqs], sampling):
                places = sorted({row.place for row in ended})
                whole = [p for p in places if all(row.finish_reason is not None for row in groups[p])]
                yield {
                    p: Group(prompt=requests[p].prompt, responses=tuple(map(self._response, groups[p]))) for p in whole
                }

    def _response(self, row: _Row) -> Response:
        assert row.finish_reason is not None
        return Response(
            index=row.index,
            text=self._text(row.token_ids),
            token_ids=tuple(row.token_ids),
            token_logps=tuple(row.token_logps),
            finish_reason=row.finish_reason,
            policy_version=self.version,
            seed=row.seed,
        )

    def _text(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], sampling: SamplingConfig) -> Iterator[list[_Row]]:
        """Decodes rows together, prompts padded on the left, until each has ended; yields those that end, by step."""
        width = max(len(row.prompt_ids) for row in rows)
        ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in rows], device=self._device)
        pads = torch.tensor([width - len(row.prompt_ids) for row in rows], device=self._device)  # (B,)
        mask = (torch.arange(width, device=self._device) >= pads[:, None]).long()  # (B, T)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
        seen = _seen(rows, self._model.config.get_text_config().vocab_size, self._device, sampling)
        cache = DynamicCache(config=self._model.config)
        while True:
            logits = (
                self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )  # (B, V)
            tokens = sample(logits, seen, [row.generator for row in rows], sampling)  # (B,)
            logps = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]  # (B,)
            for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                row.token_ids.append(token)
                row.token_logps.append(logp)
                row.finish_reason = self._finished(row, sampling)
            going = [i for i, row in enumerate(rows) if row.finish_reason is None]
            yield [row for row in rows if row.finish_reason is not None]
            if not going:
                return
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            if len(going) < len(rows):
                keep = torch.tensor(going, device=self._device)
                rows = [rows[i] for i in going]
                cache.batch_select_indices(keep)
                mask, ids, positions = mask[keep], ids[keep], positions[keep]
                seen = seen[keep] if seen is not None else None

    def _finished(self, row: _Row, sampling: SamplingConfig) -> FinishReason | None:
        if row.token_ids[-1] in self._eos_ids:
            return "stop"
        if sampling.stop:
            # A character is at most 4 bytes and a token at least one: no stop string reaches further back.
            tail = self._text(row.token_ids[-4 * max(map(len, sampling.stop)) - 4 :])
            if any(stop in tail for stop in sampling.stop):
                return "stop"
        full = len(row.token_ids) >= sampling.max_tokens
        return "length" if full or len(row.prompt_ids) + len(row.token_ids) >= self._max_model_len else None


def sample(
    logits: Tensor, seen: Tensor | None, generators: Sequence[torch.Generator], sampling: SamplingConfig
) -> Tensor:
    """(B, V) float32 logits -> (B,) token ids, row i drawn by generators[i] alone.

    In vLLM's order: repetition penalty on `seen` (B, V) tokens (None: no penalty), temperature, min_p, top_k,
    top_p. Ties at a threshold are kept.
    """
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, -1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        # Up to and with the token that reaches the mass; the likeliest always stays.
        outside = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    probs = logits.softmax(-1)
    # Exponential races: argmax of p / Exp(1) is a draw from p (the Gumbel trick), one stream per row.
    noise = torch.stack([torch.empty_like(p).exponential_(generator=g) for p, g in zip(probs, generators, strict=True)])
    return (probs / noise).argmax(-1)


def _seen(rows: Sequence[_Row], vocabulary: int, device: torch.device, sampling: SamplingConfig) -> Tensor | None:
    """(B, V) bool, True where a row's prompt holds the token; None if no penalty asks for it."""
    if sampling.repetition_penalty == 1:
        return None
    seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
    for line, row in zip(seen, rows, strict=True):
        line[torch.tensor(row.prompt_ids, device=device)] = True
    return seen


def _eos_ids(configured: int | list[int] | None, tokenizers: int | None) -> frozenset[int]:
    """What ends a response, as vLLM takes it: the tokenizer's EOS and generation_config's, one or several."""
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizers] if i is not None)
