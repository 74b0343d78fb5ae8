"""Loading the starting model, and what the learner leaves in a policy folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, PreTrainedModel

from make_tiny_model import make_tiny_model
from online_po import policy_model
from online_po.errors import ConfigError
from online_po.policy_model import decoder_layers
from online_po.sections import LoraConfig, ModelConfig
from online_po.tensor_file import write_tensors
from online_po.types import Policy, SharedWeights
from tests.learner_setup import (
    collect_logps,
    learner_config,
    make_learner,
    make_pairs,
    plain_logps,
    save,
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
    with pytest.raises(ConfigError, match=f"model.path is '{path}', but there is no such folder"):
        make_learner(path, learner_config())  # type: ignore[arg-type]


def test_models_that_are_no_causal_lm(model: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "reward", kind="reward")
    with pytest.raises(ConfigError, match="reward', a LlamaForSequenceClassification: not a causal language model"):
        make_learner(tmp_path / "reward", learner_config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="its config.json is not one transformers knows"):
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


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_in_a_model_folder_is_neither_run_nor_asked_about(
    model: Path, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "odd")
    ran = tmp_path / "ran"
    (tmp_path / "odd" / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n")
    if part == "model":
        changes, file = {"model_type": "odd", "auto_map": {"AutoConfig": "code.Config"}}, "config.json"
    else:
        changes = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
        file = "tokenizer_config.json"
    settings = json.loads((model / file).read_text())
    (tmp_path / "odd" / file).write_text(json.dumps(settings | changes))
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(
        ConfigError, match=r"model.path is '.*odd', .* its own code to load, and code from model folders is never run"
    ):
        make_learner(tmp_path / "odd", learner_config())
    assert asked == [] and not ran.exists()


# -- layers ----------------------------------------------------------------------------------------


def test_layers_are_found_where_the_model_does_not_name_them() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=5,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config)
    named = decoder_layers(lm)
    lm._no_split_modules = None
    for layer in lm.base_model.layers:  # a longer list, but inside the layers
        layer.parts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(7))
    assert decoder_layers(lm) == named == list(lm.base_model.layers)
    lm._no_split_modules = []
    assert decoder_layers(lm) == named
    lm.base_model.layers = torch.nn.Identity()
    assert decoder_layers(lm) == []


@pytest.mark.parametrize("has_list", [True, False])
def test_gradient_checkpointing_is_never_ignored(model: Path, has_list: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    load = policy_model.load_causal_lm

    def unnamed(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
        lm = load(config, dtype)
        lm._no_split_modules = None
        if not has_list:
            monkeypatch.setattr(policy_model, "_outer_lists", lambda _module: iter(()))
        return lm

    monkeypatch.setattr(policy_model, "load_causal_lm", unnamed)
    if not has_list:
        with pytest.raises(ConfigError, match=r"learner.gradient_checkpointing is true, but LlamaForCausalLM .* false"):
            make_learner(model, learner_config(gradient_checkpointing=True))
        make_learner(model, learner_config())
        return
    learner = make_learner(model, learner_config(gradient_checkpointing=True))
    calls: list[int] = []
    learner.scorer.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    reference = {side: np.zeros(1, np.float32) for side in ("chosen", "rejected")}
    train(learner, 1, make_pairs(1), reference)
    assert len(calls) == 2  # once more in backward


# -- adapters --------------------------------------------------------------------------------------


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
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
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


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_shared_is_what_is_saved(tied: bool, tmp_path: Path) -> None:
    learner = make_learner(make_tiny_model(tmp_path / "model", tied=tied), learner_config())
    shared = learner.share_policy(lambda tensors: SharedWeights(handle=tensors))
    learner.save_policy(1, tmp_path / "policy")
    saved = load_file(tmp_path / "policy" / "model.safetensors")
    assert shared.handle.keys() == saved.keys()
    assert all(torch.equal(shared.handle[name], saved[name]) for name in saved)
    assert learner.share_policy() is None  # it has nowhere to put them


def test_what_engines_read_stays_in_the_page_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, past = make_learner(model, learner_config()), list[bool]()

    def write(path: Path, tensors: Any, tick: Any, metadata: Any, direct: bool) -> str:
        past.append(direct)
        return write_tensors(path, tensors, tick, metadata, direct)

    monkeypatch.setattr(policy_model, "write_tensors", write)
    learner.save_policy(1, tmp_path / "1")
    learner.share_policy(lambda tensors: SharedWeights(handle=tensors))
    learner.save_policy(2, tmp_path / "2")
    learner.save_policy(3, tmp_path / "3")
    learner.share_policy(lambda _tensors: None)  # there was no room
    learner.save_policy(4, tmp_path / "4")
    assert past == [False, True, False, False]


def test_names_in_the_folder_and_in_the_model(model: Path, tmp_path: Path) -> None:
    """Engines know a model by its files; transformers keeps experts in one tensor."""
    config = MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    make_tiny_model(tmp_path / "untied", tied=False)
    for folder, same in ((model, True), (tmp_path / "untied", True), (tmp_path / "experts", False)):
        source = ModelConfig(path=str(folder))
        loaded = policy_model.load_causal_lm(source, torch.float32)
        assert policy_model.saved_as_named(loaded, source) == same, folder
        # Either way the folder is what transformers itself writes.
        out = tmp_path / f"{folder.name}-out"
        hashes = policy_model.write_policy(out, loaded, policy_model.policy_tensors(loaded), same)
        loaded.save_pretrained(tmp_path / "plain")
        assert {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in hashes} == hashes
        assert bool(hashes) == same and {f.name for f in out.iterdir()} == {"config.json", *hashes} | {
            f.name for f in (tmp_path / "plain").iterdir()
        }
        written, plain = (load_file(where / "model.safetensors") for where in (out, tmp_path / "plain"))
        assert written.keys() == plain.keys() and all(torch.equal(written[name], plain[name]) for name in plain)
        assert AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]["missing_keys"] in ([], set())


def test_a_saved_adapter_is_a_peft_folder(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(8)
    learner = make_learner(model, learner_config(lora=LORA))
    train(learner, 1, pairs, collect_logps(learner.logps, pairs, start(model)))
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    settings = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)
    assert settings["target_modules"] == sorted(settings["target_modules"])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "policy"))
    expected = plain_logps(adapted.eval(), pairs, "chosen")
    policy = Policy(version=1, path=tmp_path / "policy", is_adapter=True)
    found = collect_logps(learner.logps, pairs, policy)["chosen"]
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert not np.allclose(found, plain_logps(AutoModelForCausalLM.from_pretrained(model), pairs, "chosen"), atol=0.01)
    save(learner, 2, tmp_path / "again", tmp_path / "trainer")  # saving is repeatable, and ends no training
    assert (tmp_path / "again" / "adapter_config.json").read_text() == json.dumps(settings, indent=2, sort_keys=True)
    assert train(learner, 3, pairs, collect_logps(learner.logps, pairs, start(model)))


def test_a_generation_config_that_transformers_would_not_save_stops_nothing(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.6}))
    learner = make_learner(tmp_path / "model", learner_config())
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    assert json.loads((tmp_path / "policy" / "generation_config.json").read_text())["temperature"] == 0.6


def test_nothing_saved_is_a_pickle(model: Path, tmp_path: Path) -> None:
    learner = make_learner(model, learner_config())
    pairs = make_pairs(8)
    train(learner, 1, pairs, collect_logps(learner.logps, pairs, start(model)))
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    suffixes = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".jinja", ".safetensors"}


def test_model_config_revision_is_for_the_hub_only(model: Path) -> None:
    assert (
        policy_model.load_causal_lm(ModelConfig(path=str(model), revision="main"), torch.float32).dtype == torch.float32
    )


def test_two_threads_may_load_at_once(model: Path) -> None:
    """A learner that blends and an engine that takes weights, where both are in one process."""
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(policy_model.load_causal_lm, ModelConfig(path=str(model)), torch.float32) for _ in range(8)
        ]
        assert all(found.result(60).get_output_embeddings() is not None for found in asked)
