"""What a model folder says, as one hash: a judge's answers belong to its weights, not to where they lie."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from online_po.errors import ConfigError
from online_po.model_config import ADAPTER_CONFIG

WHOLE = 64 * 1024
"""Tensors of up to so many bytes count whole."""
PIECE = 4 * 1024
PIECES = 4
"""Of larger ones so many pieces of `PIECE` bytes count, from their first to their last byte."""
TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
"""Config, adapter config, tokenizer and chat template, in whatever files they are."""
PLACES = ("_name_or_path", "base_model_name_or_path", "transformers_version")
IRRELEVANT = frozenset({"generation_config.json", "trainer_state.json", "training_args.json", "README.txt"})


def content_hash(folder: str | Path) -> str:
    """Hash of a model or adapter folder's weights, config, tokenizer and chat template, wherever the folder lies.

    Of large tensors samples are read: a model that was trained on differs in nearly all numbers of every tensor that
    was trained, so megabytes tell what gigabytes would. Raises ConfigError for a folder without weights, or a damaged
    file.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{str(folder)!r} holds no .safetensors file, so it cannot be told apart from other models")
    digest = hashlib.sha256()
    for path in sorted({path for pattern in TEXTS for path in folder.glob(pattern)} - {*weights}):
        if path.name not in IRRELEVANT:
            _add(digest, path.name.encode(), _text(path))
    for path in weights:
        _add_weights(digest, path)
    return digest.hexdigest()


def _text(path: Path) -> bytes:
    """A file's content; a config however it is written, without the places of models and transformers' version."""
    content = path.read_bytes()
    if path.name not in ("config.json", ADAPTER_CONFIG):
        return content
    try:
        values = json.loads(content) | dict.fromkeys(PLACES)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {error}") from error
    return json.dumps(values, sort_keys=True).encode()


def count_weights(folder: str | Path) -> int:
    """Numbers in a folder's .safetensors files. Raises ConfigError for a damaged one."""
    return sum(
        math.prod(tensor["shape"])
        for path in sorted(Path(folder).glob("*.safetensors"))
        for tensor in _read_header(path)[0].values()
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """({tensor name: dtype, shape, data_offsets}, place where the data begin) of a safetensors file. Raises ConfigError
    unless the file is whole."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max(tensor["data_offsets"][1] for tensor in header.values())
        if 8 + length + end != size:
            raise ValueError(f"it has {size:,} bytes, but says {8 + length + end:,}")
        return header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{str(path)!r} is damaged or cut: {error}") from error


def _add_weights(digest: hashlib._Hash, path: Path) -> None:
    """Names, types and shapes, and bytes of every tensor."""
    header, begin_of_data = _read_header(path)
    with open(path, "rb") as file:
        for name, tensor in sorted(header.items()):
            _add(digest, json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
            for offset, count in _pieces(*tensor["data_offsets"]):
                file.seek(begin_of_data + offset)
                _add(digest, file.read(count))


def _pieces(begin: int, end: int) -> list[tuple[int, int]]:
    """(offset, bytes) of what is read of a tensor."""
    if end - begin <= WHOLE:
        return [(begin, end - begin)]
    last = end - begin - PIECE
    return [(begin + last * i // (PIECES - 1), PIECE) for i in range(PIECES)]


def _add(digest: hashlib._Hash, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
