"""The `implicit` judge: a DPO model as its own reward model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from judges.asking import Answer, Asker, Question
from judges.batching import Batcher, ask_all
from judges.protocol import JudgeError, scored, to_score
from judges.reward_files import context_of
from online_po.errors import ConfigError, first_line
from online_po.given import ResponseEncoder
from online_po.judge_configs import Implicit
from online_po.model_config import (
    adapter_base,
    adapter_base_name,
    find_checkpoint,
    is_adapter,
    load_tokenizer,
    read_model_config,
)
from online_po.model_content import content_hash
from online_po.types import Group, Judgement, Message

if TYPE_CHECKING:
    from online_po.logps import LogpModel

NAMES = ("path", "reference")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What there is to know of the two before their weights are loaded."""

    folders: tuple[Path, Path]
    """Checkpoint and reference: whole models or adapters."""
    bases: tuple[Path, Path]
    """The whole model of each: itself, or what the adapter is put on."""
    tokenizer: Any
    context: int


def find_folders(config: Implicit) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """((checkpoint, reference), the whole model of each). Raises ConfigError where one is not there."""
    checkpoint, reference = (find_checkpoint(getattr(config, name), f"judge.{name}") for name in NAMES)
    # An adapter belongs on the model it was trained on. Where that is the reference, one copy serves both.
    reference_base = adapter_base(reference, "judge.reference") if is_adapter(reference) else reference
    checkpoint_base = reference_base if is_adapter(checkpoint) else checkpoint
    if is_adapter(reference) and checkpoint_base != reference_base:
        raise ConfigError(
            f"judge.reference is {config.reference!r}, an adapter, but judge.path is {config.path!r}, a whole model; "
            "merge the adapter into its model (peft: merge_and_unload, then save_pretrained) and give that folder"
        )
    return (checkpoint, reference), (checkpoint_base, reference_base)


def read_checkpoints(config: Implicit) -> Checkpoints:
    """Reads configs and the tokenizer. Raises ConfigError where the two cannot be compared."""
    (checkpoint, reference), (checkpoint_base, reference_base) = find_folders(config)
    for name, folder in zip(NAMES, (checkpoint, reference), strict=True):
        if not list(folder.glob("*.safetensors")):
            raise ConfigError(f"judge.{name} is {str(folder)!r}, which holds no .safetensors file; save it as such")
    if is_adapter(checkpoint):
        _require_trained_on(config, checkpoint, checkpoint_base)
    tokenizer, other = (
        load_tokenizer(folder, getattr(config, name), setting=f"judge.{name}")
        for name, folder in zip(NAMES, (checkpoint_base, reference_base), strict=True)
    )
    if not same_tokens(tokenizer, other):
        raise ConfigError(
            f"judge.path is {config.path!r} and judge.reference is {config.reference!r}, whose tokenizers differ: "
            "their log-probabilities are not of the same tokens; give a checkpoint and the model it was trained from"
        )
    return Checkpoints(
        folders=(checkpoint, reference),
        bases=(checkpoint_base, reference_base),
        tokenizer=tokenizer,
        context=shared_context(config, (checkpoint_base, reference_base)),
    )


def _require_trained_on(config: Implicit, adapter: Path, base: Path) -> None:
    """Raises ConfigError where an adapter names another local model than it would be put on; one that is not there
    (any more) cannot be compared."""
    named = Path(adapter_base_name(adapter, "judge.path")[0])
    if named.is_dir() and named.resolve() != base and content_hash(named) != content_hash(base):
        raise ConfigError(
            f"judge.path is {config.path!r}, an adapter of {str(named)!r}, but judge.reference is "
            f"{config.reference!r}, another model; give the adapter's own, or merge the adapter into it (peft: "
            "merge_and_unload, then save_pretrained) and give that folder"
        )


def shared_context(config: Implicit, bases: tuple[Path, Path]) -> int:
    """Tokens that both read. Raises ConfigError for what is no causal language model."""
    contexts = []
    for name, folder in zip(NAMES, bases, strict=True):
        contexts.append(context_of(read_model_config(folder, getattr(config, name), setting=f"judge.{name}")))
    return min(contexts)


def require_same_tokens(config: Implicit, tokenizer: Any) -> None:
    """Raises ConfigError unless the checkpoint reads token ids as the policy, whose tokenizer this is, writes them."""
    if not same_tokens(read_checkpoints(config).tokenizer, tokenizer):
        raise ConfigError(
            f"judge.path is {config.path!r}, whose tokenizer is not the policy's (model.path): it cannot read the "
            "token ids that the policy samples; give a checkpoint of the same family, or judge.kind: reward_model"
        )


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same id to every token."""
    return one.get_vocab() == other.get_vocab()


class ImplicitJudge:
    """beta x (log pi(y|x) - log ref(y|x)), summed over the response's tokens or averaged, float32.

    The token ids are those that the policy read and sampled, never re-tokenised: `require_same_tokens` holds for them.
    A prompt or response without token ids (known pairs, a file) is written by the checkpoint's own chat template; the
    response then ends as `online_po.given.ResponseEncoder` ends it. Nothing is cut: what is longer than the context is
    a failure.
    """

    def __init__(self, config: Implicit, asker: Asker) -> None:
        self._config, self._asker = config, asker
        self._files = read_checkpoints(config)
        self._encode = ResponseEncoder(
            self._files.tokenizer,
            apply_chat_template=bool(self._files.tokenizer.chat_template),
            max_length=self._files.context,
        )
        self._scorer = ImplicitScorer(config, self._files)
        self._batcher: Batcher[tuple[list[int], list[int]], float] = Batcher(
            self._scorer.score, lambda item: len(item[0]) + len(item[1]), self._scorer.batch_tokens
        )

    async def judge(self, group: Group) -> Judgement:
        return scored(group, await ask_all(self._ask, group, [(response,) for response in group.responses]))

    async def _ask(self, question: Question) -> float:
        async def call() -> Answer:
            prompt, response = self.token_ids(question)
            value = self._config.beta * await self._batcher.ask((prompt, response))
            if self._config.average_logps:
                value /= len(response)
            return Answer(value=to_score(value, "the implicit reward"), prompt_tokens=len(prompt) + len(response))

        return float((await self._asker.ask(question, call)).value)

    def token_ids(self, question: Question) -> tuple[list[int], list[int]]:
        """(prompt, response) as both models read them. Raises JudgeError for what is empty or too long."""
        prompt, (response,) = list(question.prompt.token_ids), question.responses
        if not prompt:
            prompt = self._written(question.prompt.messages)
        ids = list(response.token_ids or self._encode([response.text])[0].token_ids)
        if not ids:
            raise JudgeError("bad_value", "a response without a token has no log-probability")
        if len(prompt) + len(ids) > self._files.context:
            raise JudgeError(
                "too_long",
                f"prompt and response have {len(prompt) + len(ids)} tokens, but judge.path and judge.reference read "
                f"{self._files.context}; lower prompts.max_tokens or generator.max_tokens",
            )
        return prompt, ids

    def _written(self, messages: Sequence[Message]) -> list[int]:
        tokenizer, text = self._files.tokenizer, messages[-1]["content"]
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]

    def shown(self, question: Question) -> str:
        """What both models read, special tokens and all. Raises JudgeError."""
        prompt, response = self.token_ids(question)
        return self._files.tokenizer.decode(
            prompt + response, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class ImplicitScorer:
    """Both models in one process; where they have the same base, one copy of it, and adapters that are switched."""

    def __init__(self, config: Implicit, files: Checkpoints) -> None:
        import torch

        from judges.reward_scorer import default_batch_tokens, device_and_dtype
        from online_po.logps import LogpModel
        from online_po.policy_model import load_causal_lm
        from online_po.prefix_sharing import Sharing, share_prompts
        from online_po.scoring import Scoring
        from online_po.sections import LearnerConfig, ModelConfig

        device, dtype = device_and_dtype(config.dtype)
        self.batch_tokens = config.batch_tokens or default_batch_tokens(device)
        self._adapted: Any = None
        self._adapters = tuple(folder != base for folder, base in zip(files.folders, files.bases, strict=True))
        models: list[LogpModel] = []
        sharings: list[Sharing] = []
        for name, base in zip(NAMES, files.bases, strict=True):
            if models and files.bases[0] == files.bases[1]:
                models.append(models[0])
                sharings.append(sharings[0])
                continue
            files_of = ModelConfig(path=str(base))  # type: ignore[call-arg]
            model = load_causal_lm(files_of, dtype, f"judge.{name}")
            sharings.append(share_prompts(model))
            models.append(LogpModel(model.to(device)))
        for name, folder, adapter in zip(NAMES, files.folders, self._adapters, strict=True):
            if adapter:
                self._add(models[0], folder, name)
        settings = LearnerConfig(micro_batch_tokens=self.batch_tokens)  # type: ignore[call-arg]
        self._scoring = tuple(
            Scoring(model.eval(), settings, device, with_prefix=False, longest_shared=sharing.longest)
            for model, sharing in zip(models, sharings, strict=True)
        )
        self._no_grad = torch.no_grad

    def _add(self, model: LogpModel, folder: Path, name: str) -> None:
        from peft import PeftModel

        if not (folder / "adapter_model.safetensors").exists():
            raise ConfigError(f"judge.{name} is {str(folder)!r}, an adapter without adapter_model.safetensors")
        try:
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(model.model, folder, adapter_name=name)
            else:
                self._adapted.load_adapter(folder, adapter_name=name)
        except Exception as error:  # peft and torch raise many types; each means the same to the user
            raise ConfigError(
                f"judge.{name} is {str(folder)!r}, an adapter that does not fit its model: {first_line(error)}"
            ) from error
        self._adapted.eval()

    @contextmanager
    def _as(self, place: int) -> Iterator[None]:
        """Inside the block a shared base computes as the checkpoint (0) or as the reference (1)."""
        if self._adapted is None:
            yield
        elif self._adapters[place]:
            self._adapted.set_adapter(NAMES[place])
            yield
        else:
            with self._adapted.disable_adapter():
                yield

    def score(self, items: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """log pi - log ref of each response in nats, summed over its tokens; (prompt, response) token ids."""
        import numpy as np

        from online_po.batching import Examples

        tokens = Examples(
            pa.table(
                {
                    name: pa.array([item[place] for item in items], pa.list_(pa.int32()))
                    for place, name in enumerate(("prompt_token_ids", "response_token_ids"))
                }
            )
        )
        rows = np.arange(len(items))
        found = []
        for place, scoring in enumerate(self._scoring):
            with self._as(place), self._no_grad():
                found.append(scoring.collect(tokens, rows, ("response",))["response"])
        return (found[0] - found[1]).tolist()
