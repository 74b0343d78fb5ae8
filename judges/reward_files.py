"""A reward model's folder: found, read and held to be usable, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges.chat_text import ChatText
from online_po.errors import ConfigError
from online_po.judge_configs import RewardModel
from online_po.model_config import find_model, is_adapter, load_tokenizer, read_any_config

SETTING = "judge.path"
LETTERS = ("A", "B")
"""What a causal language model that compares answers with: the first response, or the second."""


@dataclass(frozen=True, kw_only=True)
class RewardFiles:
    """What there is to know of a reward model before its weights are loaded."""

    folder: Path
    settings: Any
    """Its transformers config."""
    chat: ChatText
    limit: int
    """Tokens that it reads at most."""
    letters: tuple[int, int] | None
    """Token ids of LETTERS, where it answers with them; None: it has a head of one output."""

    @property
    def pad(self) -> int | None:
        return self.settings.get_text_config().pad_token_id


def read_reward_files(config: RewardModel) -> RewardFiles:
    """Reads config.json and the tokenizer. Raises ConfigError, saying what to do, for a model that cannot judge."""
    written = f"{SETTING} is {config.path!r}"
    if is_adapter(config.path):
        raise ConfigError(
            f"{written}, an adapter; merge it into the model it was trained on (peft: merge_and_unload, then "
            "save_pretrained, with the tokenizer) and give that folder"
        )
    folder = find_model(config.path, config.revision, SETTING)
    settings = read_any_config(folder, config.path, setting=SETTING)
    letters = _check_architecture(config, settings, written)
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{written}, which holds no .safetensors file; other formats can execute code when loaded, so convert it "
            "first (load with transformers, then save_pretrained)"
        )
    context = context_of(settings)
    if config.max_length is not None and config.max_length > context:
        raise ConfigError(f"judge.max_length is {config.max_length}, beyond the reward model's context of {context}")
    tokenizer = load_tokenizer(folder, config.path, setting=SETTING)
    limit = config.max_length or context
    chat = ChatText(tokenizer, limit, generation_prompt=letters, setting=SETTING, written=config.path)
    return RewardFiles(
        folder=folder,
        settings=settings,
        chat=chat,
        limit=limit,
        letters=_letter_ids(tokenizer, written) if letters else None,
    )


def context_of(settings: Any) -> int:
    """Tokens that a model reads at most, by its transformers config."""
    return int(getattr(settings.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def _check_architecture(config: RewardModel, settings: Any, written: str) -> bool:
    """Whether it answers with letters. Raises ConfigError for an architecture that cannot judge, or not like this."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    architecture = next(iter(settings.architectures or []), "an architecture that its config.json does not name")
    if config.compares and architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(settings.model_type):
        return True
    if architecture != MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(settings.model_type):
        wanted = "a sequence classifier with one label" + (", or a causal language model" if config.compares else "")
        raise ConfigError(
            f"{written}, a {architecture}; judge.kind: reward_model takes {wanted}, of an architecture that "
            f"transformers has itself (such as LlamaForSequenceClassification){_advice(architecture)}"
        )
    if settings.num_labels != 1:
        raise ConfigError(
            f"{written}, a classifier with {settings.num_labels} labels; which of them is the reward is not known, so "
            "give a model with one (num_labels: 1), trained on preferences"
        )
    text = settings.get_text_config()
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise ConfigError(
            f"{written}, whose tokens attend to later ones, so also to padding: a score would depend on what else is "
            "in its batch; give a causal model"
        )
    return False


def _advice(architecture: str) -> str:
    if "ForCausalLM" not in architecture and "LMHead" not in architecture:
        return ""
    return (
        "; one that compares two responses is set up with judge.compares: true, one that judges in words with "
        "judge.kind: llm_score"
    )


def _letter_ids(tokenizer: Any, written: str) -> tuple[int, int]:
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in LETTERS]
    if any(len(found) != 1 for found in ids):
        raise ConfigError(
            f"{written}, whose tokenizer has no single token for A and for B, so it cannot name the better"
        )
    return ids[0][0], ids[1][0]
