"""Reward models that are well made, or made badly in one way each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

BOS = "<|endoftext|>"
BOS_TEMPLATE = "{{ bos_token }}" + (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def copy_of(model: Path, folder: Path, **config: Any) -> Path:
    """A copy with other entries in its config.json; None drops one."""
    shutil.copytree(model, folder)
    if config:
        settings = json.loads((folder / "config.json").read_text()) | config
        kept = {key: value for key, value in settings.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
    return folder


def with_template(model: Path, folder: Path, template: str | None, *, adds_bos: bool | None = None) -> Path:
    """A copy with another chat template. `adds_bos`: the tokenizer has a BOS, and does or does not put it in front of
    what it is given; None: it has none."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    copy_of(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    if adds_bos is not None:
        tokenizer.bos_token = BOS
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.bos_token_id)]
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def two_labels(model: Path, folder: Path) -> Path:
    return copy_of(model, folder, id2label={"0": "worse", "1": "better"}, label2id={"worse": 0, "better": 1})


def no_safetensors(model: Path, folder: Path) -> Path:
    copy_of(model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def cut_file(model: Path, folder: Path) -> Path:
    copy_of(model, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def without_head(model: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    copy_of(model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapter(model: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    return folder


def no_config(model: Path, folder: Path) -> Path:
    copy_of(model, folder)
    (folder / "config.json").unlink()
    return folder


BAD: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "two labels": (two_labels, r"a classifier with 2 labels; .*num_labels: 1"),
    "no template": (lambda m, f: with_template(m, f, None), r"no chat template.*chat_template\.jinja"),
    "double BOS": (
        lambda m, f: with_template(m, f, BOS + BOS_TEMPLATE, adds_bos=True),
        r"begins with two BOS tokens .*take one out",
    ),
    "broken template": (lambda m, f: with_template(m, f, "{{ nothing.there }}"), r"template fails on one question"),
    "deaf template": (
        lambda m, f: with_template(m, f, "{{ messages[0]['content'] }}"),
        r"template leaves out what is said: '0nline-po answers'",
    ),
    "own code": (
        lambda m, f: copy_of(m, f, model_type="strange", auto_map={"AutoConfig": "configuration_strange.Strange"}),
        r"judge\.path is .*, which needs its own code to load",
    ),
    "unknown type": (lambda m, f: copy_of(m, f, model_type="strange"), r"judge\.path is .*not one transformers knows"),
    "own head": (
        lambda m, f: copy_of(m, f, architectures=["LlamaForRewardModel"]),
        r"a LlamaForRewardModel; judge.kind: reward_model takes a sequence classifier with one label",
    ),
    "language model": (
        lambda m, f: copy_of(m, f, architectures=["LlamaForCausalLM"]),
        r"a LlamaForCausalLM; .*judge\.compares: true.*judge\.kind: llm_score",
    ),
    "looks ahead": (
        lambda m, f: copy_of(m, f, is_causal=False),
        r"attend to later ones, so also to padding.*causal model",
    ),
    "no safetensors": (no_safetensors, r"holds no \.safetensors file.*can execute code"),
    "adapter": (adapter, r"an adapter; merge it .*merge_and_unload"),
    "no config": (no_config, r"judge\.path is .*without config\.json"),
    "no folder": (lambda m, f: f, r"judge\.path is .*no such folder exists"),
}
"""What makes a folder unusable, and what is said of it, before a weight is loaded."""
