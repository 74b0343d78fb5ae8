"""Policies out of a run folder: full weights, adapters, adapters merged into the starting model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from online_po import files
from online_po.errors import ConfigError, LedgerError
from online_po.export import export
from online_po.ledger import Ledger
from online_po.types import Probe, Reference
from tests.fakes import make_config

PROBE = Probe(token_ids=(1, 2), token_logps=(-1.0,))


def make_run(tmp_path: Path, model: Path, *, is_adapter: bool) -> Ledger:
    """A run of one trained round, with weights unlike the start's."""
    config = make_config(tmp_path, model={"path": str(model)})
    ledger = Ledger(config.run_dir)
    ledger.begin(config, {})
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    policy = AutoModelForCausalLM.from_pretrained(model)
    if is_adapter:
        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    with ledger.weights(1, "policy") as (policy_dir, _):
        policy.save_pretrained(policy_dir)
        AutoTokenizer.from_pretrained(model).save_pretrained(policy_dir)
    with ledger.weights(1, "trainer") as (trainer_dir, _):
        (trainer_dir / "trainer.json").write_text("{}")
    ledger.commit(1, is_adapter=is_adapter, reference=Reference(round=0), probe=PROBE)
    return ledger


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def test_full_weights_need_no_starting_model(tmp_path, tiny_model):
    start = tmp_path / "start"
    shutil.copytree(tiny_model, start)
    ledger = make_run(tmp_path / "runs", start, is_adapter=False)
    shutil.rmtree(start)
    out = export(ledger.root, tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(ledger.round_dir(1) / "policy")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(expected))
    assert AutoTokenizer.from_pretrained(out).chat_template
    with pytest.raises(ConfigError, match="--merge is for LoRA runs"):
        export(ledger.root, tmp_path / "merged", merge=True)


def test_an_adapter_is_copied_or_merged(tmp_path, tiny_model):
    ledger = make_run(tmp_path / "runs", tiny_model, is_adapter=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(export(ledger.root, tmp_path / "adapter"))))
    merged = logits(AutoModelForCausalLM.from_pretrained(export(ledger.root, tmp_path / "merged", merge=True)))
    assert (adapted - before).abs().max() > 0.01
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_an_exported_adapter_names_what_the_user_wrote(tmp_path, tiny_model):
    ledger = make_run(tmp_path / "runs", tiny_model, is_adapter=True)
    written = {"path": "organisation/name", "revision": "v2"}
    config = make_config(tmp_path / "runs", model=written)
    files.write_yaml(ledger.root / "config.yaml", config.to_yaml())
    inside = (ledger.round_dir(1) / "policy" / "adapter_config.json").read_text()
    assert json.loads(inside)["base_model_name_or_path"] == str(tiny_model)
    exported = json.loads((export(ledger.root, tmp_path / "out") / "adapter_config.json").read_text())
    assert exported == json.loads(inside) | {"base_model_name_or_path": "organisation/name", "revision": "v2"}
    assert (ledger.round_dir(1) / "policy" / "adapter_config.json").read_text() == inside


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_without_a_name_is_refused_as_any_other(tmp_path, tiny_model, monkeypatch, out):
    ledger = make_run(tmp_path / "runs", tiny_model, is_adapter=False)
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(ConfigError, match=rf"OUT is '{out}', but '/.*' exists already; give a new folder"):
        export(ledger.root, Path(out))
    assert export(ledger.root, Path("new")) == tmp_path / "runs" / "new"


def test_what_cannot_be_exported(tmp_path, tiny_model):
    ledger = make_run(tmp_path / "runs", tiny_model, is_adapter=False)
    for round_ in (0, 2):
        with pytest.raises(ConfigError, match=rf"--round is {round_}; .* trained rounds 1 to 1"):
            export(ledger.root, tmp_path / "out", round_)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export(ledger.root, tmp_path / "there")
    (ledger.round_dir(1) / "policy" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(LedgerError, match="is damaged"):
        export(ledger.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LedgerError, match="is not a run folder"):
        export(tmp_path / "nothing", tmp_path / "out")
