"""A model's config.json and tokenizer: read without running code from its folder, and held to be a causal LM's.

One place for the plan, the learner and the engine, so that what the one lets pass the others can use. Loads no
weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from online_po.errors import ConfigError, first_line


def find_model(written: str, revision: str | None = None, setting: str = "model.path") -> Path:
    """The local folder of a model: itself, or the hub's snapshot. `written`: what the user wrote as `setting`.

    Raises ConfigError.
    """
    path = Path(written)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"{setting} is {str(path)!r}, a folder without config.json; give a Hugging Face folder")
        return path.resolve()
    if path.is_absolute() or written.startswith((".", "~")) or written.count("/") != 1:
        raise ConfigError(
            f"{setting} is {written!r}, but no such folder exists; give a local Hugging Face folder or a "
            "hub id such as `organisation/name`"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(written, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"{setting} is {written!r}: no such local folder, and the hub gave nothing "
            f"({type(error).__name__}: {first_line(error)}); check the name, the network and HF_HUB_OFFLINE"
        ) from error


def kv_numbers_per_token(text_config: Any) -> int:
    """Numbers in the KV cache of one token, over all layers."""
    queries = getattr(text_config, "num_attention_heads", None) or 1
    heads = getattr(text_config, "num_key_value_heads", None) or queries
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // queries
    return 2 * text_config.num_hidden_layers * heads * head_dim


ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a whole model."""
    return (Path(folder) / ADAPTER_CONFIG).exists() and not (Path(folder) / "config.json").exists()


def adapter_base(folder: str | Path, setting: str) -> Path:
    """The folder of the model that an adapter was trained on. Raises ConfigError where it is not there any more."""
    written, revision = adapter_base_name(folder, setting)
    return find_model(written, revision, f"{setting}: base_model_name_or_path of its {ADAPTER_CONFIG}")


def adapter_base_name(folder: str | Path, setting: str) -> tuple[str, str | None]:
    """(folder or hub name, revision) of the model that an adapter says it was trained on. Raises ConfigError."""
    try:
        settings = json.loads((Path(folder) / ADAPTER_CONFIG).read_text())
        return str(settings["base_model_name_or_path"]), settings.get("revision")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{setting} is {str(folder)!r}, whose {ADAPTER_CONFIG} names no model: {error}") from error


def find_checkpoint(written: str, setting: str) -> Path:
    """As `find_model`, but a local folder may hold an adapter."""
    return Path(written).resolve() if is_adapter(written) else find_model(written, None, setting)


def read_model_config(
    folder: str | Path, written: str, revision: str | None = None, setting: str = "model.path"
) -> Any:
    """The transformers config of a causal language model's folder or hub id. `written`: what the user wrote as
    `setting`.

    Raises ConfigError if it cannot be read, needs code of its own, or is no causal language model's.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = read_any_config(folder, written, revision, setting)
    architecture = next(iter(settings.architectures or []), settings.model_type)
    other_head = any(part in architecture for part in ("Classification", "Reward"))
    if other_head or settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"{setting} is {written!r}, a {architecture}: not a causal language model; give the folder or hub id of one"
        )
    return settings


def read_any_config(folder: str | Path, written: str, revision: str | None = None, setting: str = "model.path") -> Any:
    """The transformers config of any model. Raises ConfigError if it cannot be read or needs code of its own."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = "its config.json is not one transformers knows"
        if not Path(folder).exists():
            reason = "there is no such folder, and no such model at the hub (with HF_HUB_OFFLINE=1: in its cache)"
        raise ConfigError(
            own_code(written, error, setting) or f"{setting} is {written!r}, but {reason}: {first_line(error)}"
        ) from error


def load_tokenizer(folder: str | Path, written: str, revision: str | None = None, setting: str = "model.path") -> Any:
    """The tokenizer of a model folder or hub id. `written`: what the user wrote as `setting`. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            own_code(written, error, setting)
            or f"{setting} is {written!r}, but its tokenizer does not load: {first_line(error)}"
        ) from error


def own_code(written: str, error: BaseException, setting: str = "model.path") -> str | None:
    """What to tell the user where transformers refused to load a model that brings code; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"{setting} is {written!r}, which needs its own code to load, and code from model folders is never run; give "
        "a model whose architecture and tokenizer transformers knows"
    )
