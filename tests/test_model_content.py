"""The hash of a model folder, and the count of its weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from online_po.errors import ConfigError
from online_po.model_content import WHOLE, content_hash, count_weights


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "m").mkdir()
    tensors = {"large": torch.randn(WHOLE // 4 + 50_000), "small": torch.randn(16), "other": torch.randn(4, 4)}
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    (tmp_path / "m" / "config.json").write_text('{"a": 1, "_name_or_path": "x"}')
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "m"


def change(folder, name, tensor):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensor(tensors[name].clone())}, folder / "model.safetensors", {"format": "pt"})


def bump(place):
    def change_one(tensor):
        tensor.view(-1)[place] += 1e-4
        return tensor

    return change_one


CHANGES = {
    "one number of a small tensor": lambda m: change(m, "small", bump(7)),
    "the first number of a large one": lambda m: change(m, "large", bump(0)),
    "its last": lambda m: change(m, "large", bump(-1)),
    "all of a large one, a little": lambda m: change(m, "large", lambda t: t + 1e-6),
    "a type": lambda m: change(m, "large", lambda t: t.bfloat16()),
    "a shape": lambda m: change(m, "other", lambda t: t.view(2, 8)),
    "the template": lambda m: (m / "chat_template.jinja").write_text("{{ messages[0] }}"),
    "a setting": lambda m: (m / "config.json").write_text('{"a": 2}'),
    "a file more": lambda m: (m / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_hash(folder, name):
    before = content_hash(folder)
    CHANGES[name](folder)
    assert content_hash(folder) != before


def test_what_does_not(folder, tmp_path):
    before = content_hash(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / "config.json").write_text('{\n "_name_or_path": "y",\n "a": 1, "transformers_version": "6"}')
    (moved / "README.md").write_text("words")
    (moved / "generation_config.json").write_text('{"temperature": 2}')
    assert content_hash(moved) == before


def test_weights_are_counted(folder, tiny_model):
    from transformers import AutoModelForCausalLM

    assert count_weights(folder) == WHOLE // 4 + 50_000 + 16 + 16
    counted = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert count_weights(tiny_model) == counted


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:5], lambda data: b"\xff" * 100])
def test_a_damaged_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for function in (content_hash, count_weights):
        with pytest.raises(ConfigError, match=r"model\.safetensors' is damaged or cut"):
            function(folder)


def test_a_folder_without_weights_has_no_hash(tmp_path):
    with pytest.raises(ConfigError, match="holds no .safetensors file"):
        content_hash(tmp_path)
