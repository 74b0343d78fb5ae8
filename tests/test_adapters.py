"""An adapter added to a model's weights, name by name, is what PEFT makes of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from online_po.adapters import merged, require_mergeable
from online_po.errors import ConfigError, OnlinePOError
from online_po.policy_model import stored_shapes
from online_po.sections import ModelConfig


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    torch.manual_seed(1)
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **given))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def base_weights(base: Path) -> dict[str, Tensor]:
    return load_file(base / "model.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 1}},
        {"use_rslora": True},
    ],
    ids=["all", "some", "patterns", "rslora"],
)
def test_it_is_what_peft_merges(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_adapter(tiny_model, tmp_path / "adapter", **settings)
    base = base_weights(tiny_model)
    found = dict(merged(base.items, folder))
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == base.keys()
    changed = 0
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        changed += not torch.equal(weight, base[name])
    assert changed == (4 if "target_modules" in settings else 14)


def test_small_updates_are_not_rounded_away(tiny_model: Path, tmp_path: Path) -> None:
    """Of a model whose files are bfloat16, as most are."""
    folder = save_adapter(tiny_model, tmp_path / "adapter")
    base = {name: weight.bfloat16() for name, weight in base_weights(tiny_model).items()}
    exact = dict(merged({name: weight.float() for name, weight in base.items()}.items, folder))
    found = dict(merged(base.items, folder))
    assert all(torch.equal(weight.float(), exact[name]) for name, weight in found.items())
    assert sum(weight.dtype == torch.float32 for weight in found.values()) == 14


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_what_cannot_be_added_is_named(tiny_model: Path, tmp_path: Path, targets: list[str]) -> None:
    """With tied embeddings the head has no weight of its own in the file."""
    folder = save_adapter(tiny_model, tmp_path / "adapter", target_modules=targets)
    with pytest.raises(OnlinePOError, match=rf"'[\w.]*{targets[1]}[\w.]*' belongs to; set generator.lora: adapter"):
        next(merged(base_weights(tiny_model).items, folder))


def test_a_weight_of_another_shape_is_not_taken(tiny_model: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_model, tmp_path / "adapter")
    weights = {name: weight[:-1] if "q_proj" in name else weight for name, weight in base_weights(tiny_model).items()}
    with pytest.raises(OnlinePOError, match=r"q_proj.* belongs to"):
        next(merged(weights.items, folder))


def test_what_cannot_be_added_is_said_before_anything_is_trained(tiny_model: Path) -> None:
    shapes = stored_shapes(ModelConfig(path=str(tiny_model)))

    def adapted(**targets: Any) -> Any:
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=4, **targets))

    linear = adapted(target_modules="all-linear", task_type="CAUSAL_LM")
    require_mergeable(linear, shapes)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    transposed = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=["attn.c_proj"]))
    square = {"model.transformer.h.0.attn.c_proj.weight": [32, 32], "transformer.h.0.attn.c_proj.weight": [32, 32]}
    for model, files in (
        (adapted(target_modules=["embed_tokens"]), shapes),
        (adapted(target_modules=["lm_head"]), shapes | {"lm_head.weight": shapes["model.embed_tokens.weight"]}),
        (transposed, square),
        (linear, {name.replace("q_proj", "qkv"): shape for name, shape in shapes.items()}),
        (linear, shapes | {"model.layers.0.mlp.up_proj.weight": [64, 32, 2]}),
    ):
        with pytest.raises(ConfigError, match=r"puts an adapter on '.*no linear layer of its own.*generator\.lora"):
            require_mergeable(model, files)
