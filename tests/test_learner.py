"""One rank of the learner. Several ranks: test_learner_ranks.py."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from make_tiny_model import make_tiny_model
from online_po import policy_model
from online_po.errors import ConfigError, DiskError, OnlinePOError
from online_po.schedule import learning_rate, run_progress
from online_po.sections import LoraConfig
from online_po.types import Policy
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
DROPOUT = LoraConfig(rank=4, dropout=0.3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


# -- logps -----------------------------------------------------------------------------------------


def test_logps_are_the_models_own(model: Path) -> None:
    pairs = make_pairs(13)
    learner = make_learner(model, learner_config())
    found = collect_logps(learner.logps, pairs, start(model))
    lm = AutoModelForCausalLM.from_pretrained(model)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(found[side], plain_logps(lm, pairs, side), rtol=2e-6)
    ids = [5, 9, 200, 31, 2]
    with torch.no_grad():
        logps = torch.log_softmax(lm(input_ids=torch.tensor([ids])).logits[0, :-1], dim=-1)
    expected = [logps[i, token].item() for i, token in enumerate(ids[1:])]
    assert learner.token_logps(ids) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA, DROPOUT], ids=["full", "lora", "dropout"])
def test_logps_of_other_policies_leave_the_weights_alone(model: Path, lora: LoraConfig | None, tmp_path: Path) -> None:
    pairs = make_pairs(12)
    learner = make_learner(model, learner_config(lora=lora))
    at_start = collect_logps(learner.logps, pairs, start(model))
    policies = []
    for round_ in (1, 2):
        train(learner, round_, pairs, at_start)
        save(learner, round_, tmp_path / f"policy{round_}", tmp_path / f"trainer{round_}")
        policies.append(Policy(version=round_, path=tmp_path / f"policy{round_}", is_adapter=lora is not None))
    own = collect_logps(learner.logps, pairs, policies[1])
    before = weights(learner)

    again = collect_logps(learner.logps, pairs, start(model))
    first = collect_logps(learner.logps, pairs, policies[0])
    half_read = learner.logps(pairs, policies[0])
    next(half_read)
    half_read.close()  # a reader who leaves early changes nothing either
    assert_same(weights(learner), before)
    fresh = make_learner(model, learner_config(lora=lora))
    fresh.load(policies[0], tmp_path / "trainer1")
    for side in ("chosen", "rejected"):
        assert np.array_equal(again[side], at_start[side])
        assert np.array_equal(first[side], collect_logps(fresh.logps, pairs, policies[0])[side])
        assert np.array_equal(own[side], collect_logps(learner.logps, pairs, policies[1])[side])
        assert not np.allclose(first[side], at_start[side], atol=1e-3)
        assert not np.allclose(first[side], own[side], atol=1e-3)


def test_half_trained_weights_are_not_taken_for_the_last_policy(model: Path) -> None:
    pairs = make_pairs(8)
    learner = make_learner(model, learner_config())
    at_start = collect_logps(learner.logps, pairs, start(model))
    train(learner, 1, pairs, at_start)  # not saved
    assert np.array_equal(collect_logps(learner.logps, pairs, start(model))["chosen"], at_start["chosen"])


# -- update ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_first_loss_is_log_2(model: Path, lora: LoraConfig | None) -> None:
    pairs = make_pairs(8)
    learner = make_learner(model, learner_config(lora=lora))
    reference = collect_logps(learner.logps, pairs, start(model))
    (step,) = learner.update(1, pairs, reference, reference)
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("margin", "chosen_reward", "rejected_reward", "kl_reference", "kl_start"):
        assert step[name] == pytest.approx(0, abs=1e-5)
    assert step["seconds"] > 0


def test_metrics_are_what_they_say(model: Path) -> None:
    pairs = make_pairs(7, seed=5)
    learner = make_learner(model, learner_config(), beta=0.3)
    rng = np.random.default_rng(0)
    lm = AutoModelForCausalLM.from_pretrained(model)
    logps = {side: plain_logps(lm, pairs, side).astype(np.float64) for side in ("chosen", "rejected")}
    reference, begin = (
        {side: (logps[side] + rng.normal(0, 2, 7)).astype(np.float32) for side in logps} for _ in range(2)
    )
    (step,) = learner.update(1, pairs, reference, begin)
    reward = {side: 0.3 * (logps[side] - reference[side]) for side in logps}
    margin = reward["chosen"] - reward["rejected"]
    tokens = sum(len(row[f"{side}_token_ids"]) for row in pairs.to_pylist() for side in logps)
    expected = {
        "loss": np.log1p(np.exp(-margin)).mean(),
        "accuracy": (margin > 0).mean(),
        "margin": margin.mean(),
        "chosen_reward": reward["chosen"].mean(),
        "rejected_reward": reward["rejected"].mean(),
        "chosen_logps": logps["chosen"].mean(),
        "rejected_logps": logps["rejected"].mean(),
        "kl_reference": np.mean([logps[side] - reference[side] for side in logps]),
        "kl_start": np.mean([logps[side] - begin[side] for side in logps]),
        "pairs": 7,
        "tokens": tokens,
        "learning_rate": learning_rate(learner.config, run_progress(1, 0, 1, 3)),
    }
    assert 0 < expected["accuracy"] < 1
    for name, value in expected.items():
        assert step[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert step.keys() == expected.keys() | {"entropy", "grad_norm", "seconds"}
    assert 0 < step["entropy"] < math.log(384)


def test_kl_to_the_start_is_left_out_where_it_is_not_known(model: Path) -> None:
    learner = make_learner(model, learner_config())
    reference = collect_logps(learner.logps, make_pairs(4), start(model))
    (step,) = learner.update(1, make_pairs(4), reference, None)
    assert "kl_start" not in step


def test_the_update_is_the_optimizers_step_on_the_whole_batchs_mean_loss(model: Path) -> None:
    """Against a loop of a few lines: full logits, one pair at a time, torch's own clipping."""
    pairs = make_pairs(6, seed=2)
    config = learner_config(max_grad_norm=0.5, weight_decay=0.1, schedule="constant", warmup_ratio=0.0)
    learner = make_learner(model, config, beta=0.2)
    reference = collect_logps(learner.logps, pairs, start(model))
    reference["chosen"] -= 1.5

    lm = AutoModelForCausalLM.from_pretrained(model)
    decayed = [p for p in lm.parameters() if p.ndim > 1]
    others = [p for p in lm.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=0.1,
    )  # fmt: skip
    for i, row in enumerate(pairs.to_pylist()):
        logps = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_token_ids"] + row[f"{side}_token_ids"]])
            all_logps = torch.log_softmax(lm(input_ids=ids).logits[0, :-1], dim=-1)
            picked = all_logps.gather(1, ids[0, 1:, None])[len(row["prompt_token_ids"]) - 1 :]
            logps[side] = picked.sum() - reference[side][i].item()
        (-torch.nn.functional.logsigmoid(0.2 * (logps["chosen"] - logps["rejected"])) / 6).backward()
    norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 0.5).item()
    optimizer.step()

    (step,) = learner.update(1, pairs, reference, None)
    assert norm > 0.5
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for (name, found), expected in zip(learner.model.named_parameters(), lm.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_one_batch_of_8_equals_8_of_1(model: Path, lora: LoraConfig | None) -> None:
    pairs = make_pairs(24)
    runs = []
    for tokens in (100_000, 1):
        # A larger eps: Adam divides by the root of the second moment, which turns rounding dust into steps.
        learner = make_learner(model, learner_config(lora=lora, micro_batch_tokens=tokens, eps=1e-4))
        reference = collect_logps(learner.logps, pairs, start(model))
        runs.append((train(learner, 1, pairs, reference), weights(learner)))
    (steps, whole), (accumulated_steps, accumulated) = runs
    assert [step["pairs"] for step in steps] == [8, 8, 8]
    for step, other in zip(steps, accumulated_steps, strict=True):
        if abs(step["margin"]) < 1e-4:  # the first: margins are zero but for rounding, and their signs chance
            del step["accuracy"], other["accuracy"]
        assert step == pytest.approx(other, rel=1e-4, abs=2e-5)
    for name, value in whole.items():
        torch.testing.assert_close(value, accumulated[name], rtol=0, atol=2e-6, msg=name)


def test_gradient_checkpointing_changes_nothing(model: Path) -> None:
    pairs = make_pairs(10)
    runs = []
    for on in (False, True):
        learner = make_learner(model, learner_config(gradient_checkpointing=on, lora=DROPOUT))
        layer_calls: list[int] = []
        learner.scorer.model.model.layers[0].self_attn.register_forward_hook(
            lambda *_, calls=layer_calls: calls.append(1)
        )
        reference = collect_logps(learner.logps, pairs, start(model))
        layer_calls.clear()
        runs.append((train(learner, 1, pairs, reference), weights(learner), len(layer_calls)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    assert runs[1][2] == 2 * runs[0][2]  # it did recompute


def test_epochs_visit_all_pairs_again_in_another_order(model: Path) -> None:
    pairs = make_pairs(10)
    learner = make_learner(model, learner_config(epochs=2))
    reference = collect_logps(learner.logps, pairs, start(model))
    steps = train(learner, 2, pairs, reference)
    assert [step["pairs"] for step in steps] == [5, 5, 5, 5]
    assert steps[0]["tokens"] + steps[1]["tokens"] == steps[2]["tokens"] + steps[3]["tokens"]
    assert steps[0]["tokens"] != steps[2]["tokens"]
    expected = [learning_rate(learner.config, run_progress(2, i, 4, 3)) for i in range(4)]
    assert [step["learning_rate"] for step in steps] == expected


@pytest.mark.parametrize("lora", [None, DROPOUT], ids=["full", "lora with dropout"])
def test_a_run_repeats_bit_for_bit_and_continues_so_after_a_load(
    model: Path, lora: LoraConfig | None, tmp_path: Path
) -> None:
    pairs, more = make_pairs(20, seed=1), make_pairs(11, seed=2)
    config = learner_config(lora=lora, weight_decay=0.01)

    def run(stop: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        learner = make_learner(model, config)
        reference = collect_logps(learner.logps, pairs, start(model))
        steps = train(learner, 1, pairs, reference)
        save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
        policy = Policy(version=1, path=tmp_path / "policy", is_adapter=lora is not None)
        if stop:
            learner = make_learner(model, config)
            learner.load(policy, tmp_path / "trainer")
        reference = collect_logps(learner.logps, more, policy)
        return steps + train(learner, 2, more, reference), weights(learner)

    (steps, kept), (steps_again, kept_again), (steps_resumed, resumed) = run(False), run(False), run(True)
    assert steps == steps_again == steps_resumed
    assert_same(kept, kept_again)
    assert_same(kept, resumed)


def test_dropout_of_lora_is_on_in_training_only(model: Path) -> None:
    pairs = make_pairs(8)
    steps = []
    for lora in (LORA, DROPOUT):
        learner = make_learner(model, learner_config(lora=lora, epochs=2))
        reference = collect_logps(learner.logps, pairs, start(model))
        steps.append(train(learner, 1, pairs, reference)[1])
        assert not any(module.training for module in learner.model.modules() if isinstance(module, torch.nn.Dropout))
    assert steps[0]["grad_norm"] != steps[1]["grad_norm"]


def test_the_models_own_dropout_stays_off(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "dropout")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "dropout" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    pairs = make_pairs(8)
    runs = []
    for path in (model, tmp_path / "dropout"):
        learner = make_learner(path, learner_config(gradient_checkpointing=True))
        runs.append(train(learner, 1, pairs, collect_logps(learner.logps, pairs, start(path))))
    assert runs[0] == runs[1]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora_on_the_head_trains_in_bfloat16(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(8)
    settings = LoraConfig(rank=4, target_modules=("q_proj", "lm_head"))
    learner = make_learner(model, learner_config(lora=settings, param_dtype="bfloat16", compute_dtype="bfloat16"))
    before = weights(learner)
    reference = collect_logps(learner.logps, pairs, start(model))
    train(learner, 1, pairs, reference)
    changed = {name for name, value in weights(learner).items() if not torch.equal(value, before[name])}
    assert {name.split(".lora_")[0].split(".")[-1] for name in changed} == {"q_proj", "lm_head"}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_bfloat16(model: Path, lora: LoraConfig | None, tmp_path: Path) -> None:
    pairs = make_pairs(8)
    exact = collect_logps(make_learner(model, learner_config()).logps, pairs, start(model))
    for kept in ("float32", "bfloat16"):
        learner = make_learner(model, learner_config(lora=lora, param_dtype=kept, compute_dtype="bfloat16"))
        found = collect_logps(learner.logps, pairs, start(model))
        np.testing.assert_allclose(found["chosen"], exact["chosen"], rtol=0.03)
        assert not np.array_equal(found["chosen"], exact["chosen"])
        (step,) = train(learner, 1, pairs, found)
        assert step["loss"] == pytest.approx(math.log(2), abs=0.02)
        save(learner, 1, tmp_path / kept, tmp_path / "trainer")
        saved = learner.optimizer.param_groups[0]["params"][0].dtype
        assert saved == (torch.bfloat16 if kept == "bfloat16" and lora is None else torch.float32)
        if lora is None:
            assert AutoModelForCausalLM.from_pretrained(tmp_path / kept, dtype="auto").dtype == saved


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_step(model: Path) -> None:
    pairs = make_pairs(8)
    learner = make_learner(model, learner_config())
    reference = collect_logps(learner.logps, pairs, start(model))
    reference["rejected"][3] = np.nan
    before = weights(learner)
    with pytest.raises(OnlinePOError, match=r"round 1, step 1 of 1: loss is nan, grad_norm is nan.*not applied. Lower"):
        train(learner, 1, pairs, reference)
    assert_same(weights(learner), before)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_trainer_json_is_the_last_file_of_its_folder(
    model: Path, lora: LoraConfig | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(model, learner_config(lora=lora))
    written: list[set[str]] = []
    write_text = Path.write_text

    def spy(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == "trainer.json":
            written.append({file.name for file in self.parent.iterdir()})
        return write_text(self, *args, **kwargs)

    policy, trainer = tmp_path / "policy", tmp_path / "trainer"
    monkeypatch.setattr(Path, "write_text", spy)
    hashes = save(learner, 1, policy, trainer)
    hashed = [trainer / "optimizer.safetensors", *([policy / "model.safetensors"] if lora is None else [])]
    assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in hashed}
    after = {file.name for file in trainer.iterdir()}
    assert written == [after - {"trainer.json"}] and "optimizer.safetensors" in after


@pytest.mark.parametrize("what", ["policy", "moments", "last"])
def test_a_disk_that_is_full_while_it_saves_is_heard(model: Path, tmp_path: Path, monkeypatch, what: str) -> None:
    learner = make_learner(model, learner_config())

    def full(path: Path, *given: Any) -> str:
        raise OSError(28, "No space left on device")

    if what == "policy":
        monkeypatch.setattr(policy_model, "write_policy", full)
    elif what == "moments":
        monkeypatch.setattr("online_po.learner.write_tensors", full)
    else:
        monkeypatch.setattr("online_po.files.sync_folder", full)
    with pytest.raises(DiskError, match="no space left|No space left"):
        save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    assert not (tmp_path / "trainer/trainer.json").exists()


def test_another_trainer_state_is_refused(model: Path, tmp_path: Path) -> None:
    learner = make_learner(model, learner_config())
    save(learner, 4, tmp_path / "policy", tmp_path / "trainer")
    with pytest.raises(OnlinePOError, match=r"the state of version 4, format (\d), not of version 3, format \1;"):
        learner.load(Policy(version=3, path=tmp_path / "policy"), tmp_path / "trainer")


def test_an_adapter_of_another_shape_of_run_is_refused(model: Path, tmp_path: Path) -> None:
    other = make_learner(model, learner_config(lora=LoraConfig(rank=4, target_modules=("q_proj",))))
    save(other, 1, tmp_path / "policy", tmp_path / "trainer")
    learner = make_learner(model, learner_config(lora=LORA))
    with pytest.raises(OnlinePOError, match=r"not one of this run: it differs in .*proj"):
        learner.load(Policy(version=1, path=tmp_path / "policy", is_adapter=True), tmp_path / "trainer")


def test_ranks_that_are_not_there(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner.ranks is 2, but this process is one of 1"):
        make_learner(model, learner_config(ranks=2))
