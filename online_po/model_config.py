"""A model's config.json and tokenizer: read without running code from its folder, and held to be a causal LM's.

One place for the plan, the learner and the engine, so that what the one lets pass the others can use. Loads no
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from online_po.errors import ConfigError, first_line


def read_model_config(folder: str | Path, written: str, revision: str | None = None) -> Any:
    """The transformers config of a model folder or hub id. `written`: what the user wrote as model.path.

    Raises ConfigError if it cannot be read, needs code of its own, or is no causal language model's.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        settings = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = "its config.json is not one transformers knows"
        if not Path(folder).exists():
            reason = "there is no such folder, and no such model at the hub (with HF_HUB_OFFLINE=1: in its cache)"
        raise ConfigError(
            own_code(written, error) or f"model.path is {written!r}, but {reason}: {first_line(error)}"
        ) from error
    architecture = next(iter(settings.architectures or []), settings.model_type)
    other_head = any(part in architecture for part in ("Classification", "Reward"))
    if other_head or settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model.path is {written!r}, a {architecture}: not a causal language model; give the folder or hub id of "
            "one"
        )
    return settings


def load_tokenizer(folder: str | Path, written: str, revision: str | None = None) -> Any:
    """The tokenizer of a model folder or hub id. `written`: what the user wrote as model.path. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            own_code(written, error)
            or f"model.path is {written!r}, but its tokenizer does not load: {first_line(error)}"
        ) from error


def own_code(written: str, error: BaseException) -> str | None:
    """What to tell the user where transformers refused to load a model that brings code; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"model.path is {written!r}, which needs its own code to load, and code from model folders is never run; give "
        "a model whose architecture and tokenizer transformers knows"
    )
