"""Loading the starting model, and what the learner leaves in a policy folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_tiny_model import make_tiny_model
from online_po.errors import ConfigError
from online_po.sections import LoraConfig, ModelConfig
from online_po.types import Policy
from tests.learner_setup import (
    collect_logps,
    learner_config,
    make_learner,
    make_pairs,
    one_thread,  # noqa: F401
    plain_logps,
    start,
    train,
)

LORA = LoraConfig(rank=4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


# -- models that cannot be loaded ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/folder", "nobody/no-such-model"])
def test_a_model_that_is_not_there(path: str) -> None:
    with pytest.raises(ConfigError, match=f"model.path is '{path}', which cannot be loaded: no such folder"):
        make_learner(path, learner_config())  # type: ignore[arg-type]


def test_models_that_are_no_causal_lm(model: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "reward", kind="reward")
    with pytest.raises(ConfigError, match="reward', a LlamaForSequenceClassification: not a causal language model"):
        make_learner(tmp_path / "reward", learner_config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must be a folder or hub id of a causal language model"):
        make_learner(tmp_path / "empty", learner_config())
    shutil.copytree(model, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ConfigError, match="damaged', which cannot be loaded"):
        make_learner(tmp_path / "damaged", learner_config())


def test_a_model_whose_weights_are_incomplete(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_tiny_model(tmp_path, tied=False)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"weight files lack lm_head.weight"):
        make_learner(tmp_path, learner_config())


def test_lora_on_modules_that_do_not_exist(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner.lora.target_modules is \['wrong'\], which does not fit Llama"):
        make_learner(model, learner_config(lora=LoraConfig(target_modules=("wrong",))))


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_policy_is_a_transformers_folder(tied: bool, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", tied=tied)
    pairs = make_pairs(8)
    learner = make_learner(model, learner_config())
    train(learner, 1, pairs, collect_logps(learner.logps, pairs, start(model)))
    learner.save(1, tmp_path / "policy", tmp_path / "trainer")
    assert {file.name for file in model.iterdir()} == {file.name for file in (tmp_path / "policy").iterdir()}
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = [7, 8, 9, 300]
    with torch.no_grad():
        logps = torch.log_softmax(saved(input_ids=torch.tensor([ids])).logits[0, :-1], dim=-1)
    assert learner.token_logps(ids) == pytest.approx([logps[i, t].item() for i, t in enumerate(ids[1:])], abs=1e-5)
    chat = [{"role": "user", "content": "Hello"}]
    old, new = (AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "policy"))
    assert new.apply_chat_template(chat) == old.apply_chat_template(chat)


def test_a_saved_adapter_is_a_peft_folder(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(8)
    learner = make_learner(model, learner_config(lora=LORA))
    train(learner, 1, pairs, collect_logps(learner.logps, pairs, start(model)))
    learner.save(1, tmp_path / "policy", tmp_path / "trainer")
    settings = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)
    assert settings["target_modules"] == sorted(settings["target_modules"])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "policy"))
    expected = plain_logps(adapted.eval(), pairs, "chosen")
    policy = Policy(version=1, path=tmp_path / "policy", is_adapter=True)
    found = collect_logps(learner.logps, pairs, policy)["chosen"]
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert not np.allclose(found, plain_logps(AutoModelForCausalLM.from_pretrained(model), pairs, "chosen"), atol=0.01)
    learner.save(2, tmp_path / "again", tmp_path / "trainer")  # saving is repeatable, and ends no training
    assert (tmp_path / "again" / "adapter_config.json").read_text() == json.dumps(settings, indent=2, sort_keys=True)
    assert train(learner, 3, pairs, collect_logps(learner.logps, pairs, start(model)))


def test_a_generation_config_that_transformers_would_not_save_stops_nothing(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.6}))
    learner = make_learner(tmp_path / "model", learner_config())
    learner.save(1, tmp_path / "policy", tmp_path / "trainer")
    assert json.loads((tmp_path / "policy" / "generation_config.json").read_text())["temperature"] == 0.6


def test_nothing_saved_is_a_pickle(model: Path, tmp_path: Path) -> None:
    learner = make_learner(model, learner_config())
    pairs = make_pairs(8)
    train(learner, 1, pairs, collect_logps(learner.logps, pairs, start(model)))
    learner.save(1, tmp_path / "policy", tmp_path / "trainer")
    suffixes = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".jinja", ".safetensors"}


def test_model_config_revision_is_for_the_hub_only(model: Path) -> None:
    from online_po.policy_model import load_causal_lm

    assert load_causal_lm(ModelConfig(path=str(model), revision="main"), torch.float32).dtype == torch.float32
