"""References: which weights they are, round by round, and how LoRA runs hold them. Two ranks: test_reference_ranks.py;
the ledger's side: test_ledger.py and test_loop.py."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from make_tiny_model import make_tiny_model
from online_po import policy_model
from online_po.adapters import adapter_config, blend_adapters, lora_layers, most_terms
from online_po.config import Config
from online_po.errors import ConfigError
from online_po.learner import TorchLearner
from online_po.policy_model import add_adapters, policy_tensors, write_policy
from online_po.reference import next_reference
from online_po.reference_configs import ReferenceConfig
from online_po.sections import LoraConfig
from online_po.types import Policy, Reference
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
from tests.reference_runs import (
    LORA,
    REFERENCES,
    ROUNDS,
    SIDES,
    assert_as_by_hand,
    load,
    logps_again,
    mean_model,
    reference_config,
    run,
    stored,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def torch_learner(config: Config) -> TorchLearner:
    return TorchLearner(config.model, config.learner, config.loss, seed=config.run.seed, rounds=config.loop.rounds)


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", list(LORA))
@pytest.mark.parametrize("kind", list(REFERENCES))
def test_reference_logps_are_those_of_a_model_built_by_hand_before_and_after_a_resume(
    model: Path, kind: str, weights: str, tmp_path: Path
) -> None:
    whole, stopped = (
        reference_config(tmp_path / name, model, REFERENCES[kind], LORA[weights]) for name in ("whole", "stopped")
    )
    straight = run(whole, torch_learner)
    run(stopped, torch_learner, stop_after=2)
    resumed = run(stopped, torch_learner)
    assert_as_by_hand(kind, model, resumed.ledger, LORA[weights] is not None)
    for parts in (straight, resumed):  # every reference, of the learner of the last round
        for again, then in zip(logps_again(parts), stored(straight.ledger), strict=True):
            assert all(np.array_equal(again[side], then[side]) for side in SIDES)
    for found, expected in zip(stored(resumed.ledger), stored(straight.ledger), strict=True):
        assert all(np.array_equal(found[side], expected[side]) for side in SIDES)
    for path in straight.ledger.root.glob("rounds/*/[pr]*/*.safetensors"):
        assert path.read_bytes() == (resumed.ledger.root / path.relative_to(straight.ledger.root)).read_bytes()


@pytest.mark.parametrize("weights", list(LORA))
def test_with_alpha_1_the_mean_is_the_policy(model: Path, weights: str, tmp_path: Path) -> None:
    found = []
    for reference in ({"kind": "ema", "alpha": 1, "every": 2}, {"kind": "refresh", "every": 2}):
        config = reference_config(tmp_path / reference["kind"], model, reference, LORA[weights])
        ledger = run(config, torch_learner).ledger
        (name,) = [path.name for path in (ledger.round_dir(ROUNDS) / "policy").glob("*.safetensors")]
        found.append((stored(ledger), (ledger.round_dir(ROUNDS) / "policy" / name).read_bytes()))
    (means, policy), (refreshed, other_policy) = found
    for mean, fresh in zip(means, refreshed, strict=True):
        assert all(np.array_equal(mean[side], fresh[side]) for side in SIDES)
    assert policy == other_policy


def test_no_reference_is_kept_where_there_is_none(model: Path, tmp_path: Path) -> None:
    config = reference_config(tmp_path, model, {"kind": "none"}, LORA["lora"], loss={"name": "simpo"})
    ledger = run(config, torch_learner).ledger
    assert [ledger.committed(r).reference for r in range(ROUNDS + 1)] == [Reference(round=0)] * (ROUNDS + 1)
    assert not list(ledger.root.glob("rounds/*/reference*"))


# -- when it changes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "fixed"}, [0, 0, 0, 0, 0, 0]),
        ({"kind": "none"}, [0, 0, 0, 0, 0, 0]),
        ({"kind": "refresh"}, [1, 2, 3, 4, 5, 6]),
        ({"kind": "refresh", "every": 3}, [0, 0, 3, 3, 3, 6]),
        ({"kind": "ema", "alpha": 0.5, "every": 2}, [0, 2, 2, 4, 4, 6]),
        ({"kind": "kl", "above": 2.0}, [0, 0, 3, 3, 5, 5]),
    ],
)
def test_the_round_of_the_reference(settings: dict[str, Any], expected: list[int]) -> None:
    measured: list[float | None] = [-1.0, 2.0, 2.001, float("nan"), 90.0, None]
    held, rounds = Reference(round=0), []
    for round_, kl in enumerate(measured, 1):
        held = next_reference(ReferenceConfig(**settings), round_, held, kl)
        assert held.blended == (settings["kind"] == "ema" and held.round > 0)
        rounds.append(held.round)
    assert rounds == expected


# -- another adapter in the trained one's place ----------------------------------------------------


def trained(model: Path, out: Path, lora: LoraConfig, alpha: float, **settings: Any) -> tuple[Any, list[Policy]]:
    """A learner that holds policy 2, and policies 1, 2 and the mean that round 2 leaves."""
    learner, pairs = make_learner(model, learner_config(lora=lora, epochs=2, **settings)), make_pairs(12)
    policies, mean = [], start(model)
    for round_ in (1, 2):
        train(learner, round_, pairs, collect_logps(learner.logps, pairs, start(model)))
        save(learner, round_, out / f"policy{round_}", out / f"trainer{round_}")
        learner.blend(mean, alpha, out / f"reference{round_}")
        mean = Policy(version=round_, path=out / f"reference{round_}", is_adapter=True, blended=True)
        policies.append(Policy(version=round_, path=out / f"policy{round_}", is_adapter=True))
    return learner, [*policies, mean]


def flags(learner: Any) -> list[tuple[str, int, bool, int]]:
    """Of every parameter, in order: its name, which object it is, whether it is trained, how often it was written."""
    return [(name, id(p), p.requires_grad, p._version) for name, p in learner.model.named_parameters()]


def test_looking_at_other_policies_changes_nothing_in_training(model: Path, tmp_path: Path) -> None:
    pairs, lora = make_pairs(12), LoraConfig(rank=4, dropout=0.3)
    ends = []
    for looks in (False, True):
        learner, policies = trained(model, tmp_path / str(looks), lora, 0.6, gradient_checkpointing=True)
        before = flags(learner)
        if looks:
            for policy in (start(model), policies[0], policies[2]):
                collect_logps(learner.logps, pairs, policy)
                half_read = learner.logps(pairs, policy)
                next(half_read)
                half_read.close()
        assert flags(learner) == before
        steps = train(learner, 3, pairs, {side: np.zeros(12, np.float32) for side in SIDES})
        save(learner, 3, tmp_path / str(looks) / "policy3", tmp_path / str(looks) / "trainer3")
        ends.append((steps, *((tmp_path / str(looks) / name).read_bytes() for name in
                              ("policy3/adapter_model.safetensors", "trainer3/optimizer.safetensors"))))  # fmt: skip
    assert ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head"), ("q_proj", "embed_tokens")], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_says_the_same_from_its_folder_as_it_did_when_it_was_trained(
    model: Path, targets: Any, dtype: str, tmp_path: Path
) -> None:
    """Bit for bit; and the mean of policies says what PEFT makes of its folder."""
    pairs = make_pairs(12)
    lora = LoraConfig(rank=4, target_modules=targets)
    learner, policies = trained(model, tmp_path, lora, 0.6, param_dtype=dtype, compute_dtype=dtype)
    own = collect_logps(learner.logps, pairs, policies[1])
    mean = collect_logps(learner.logps, pairs, policies[2])
    train(learner, 3, pairs, own)
    again = collect_logps(learner.logps, pairs, policies[1])
    at_start = collect_logps(learner.logps, pairs, start(model))
    for side in SIDES:
        assert np.array_equal(again[side], own[side])
        assert np.abs(mean[side] - own[side]).max() > 1e-3 and np.abs(mean[side] - at_start[side]).max() > 1e-3
    if dtype == "float32":
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(policies[2].path)).eval()
        np.testing.assert_allclose(mean["chosen"], plain_logps(adapted, pairs, "chosen"), rtol=3e-6, atol=3e-5)
        by_hand = mean_model(model, [p.path for p in policies[:2]], True, 0.6)
        if "lm_head" not in targets and "embed_tokens" not in targets:  # merging would untie the two
            np.testing.assert_allclose(mean["chosen"], plain_logps(by_hand, pairs, "chosen"), rtol=3e-6, atol=3e-5)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_adapters_of_experts_are_blended_too(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (model / file).unlink()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, initializer_range=0.1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    pairs = make_pairs(12)
    learner, policies = trained(model, tmp_path, LoraConfig(rank=2), 0.6)
    assert {type(layer).__name__ for layer in lora_layers(learner.model).values()} == {"Linear", "ParamWrapper"}
    mean = collect_logps(learner.logps, pairs, policies[2])["chosen"]
    np.testing.assert_allclose(mean, plain_logps(load(model, policies[2].path, True), pairs, "chosen"), rtol=3e-6)
    by_hand = mean_model(model, [policy.path for policy in policies[:2]], True, 0.6)
    np.testing.assert_allclose(mean, plain_logps(by_hand, pairs, "chosen"), rtol=3e-6)
    assert np.abs(mean - collect_logps(learner.logps, pairs, policies[1])["chosen"]).max() > 1e-4


def held_bytes() -> int:
    """Memory of all tensors that are alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_a_lora_run_holds_no_second_base_model(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(30)
    learner, (first, _, mean) = trained(model, tmp_path, LoraConfig(rank=2), 0.6)
    whole = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    adapter = sum(p.numel() * 4 for p in policy_tensors(learner.model).values())
    before = held_bytes()
    for policy, adapters in ((start(model), 0), (first, 1), (mean, 2)):
        reader = learner.logps(pairs, policy)
        next(reader)
        grown = held_bytes() - before
        assert adapters * adapter <= grown < adapters * adapter + 4096 < whole / 4
        reader.close()
        assert held_bytes() - before < 4096
    # The measure sees a copy where there is one: with all weights trained, their own are put aside.
    full = make_learner(model, learner_config())
    train(full, 1, pairs, collect_logps(full.logps, pairs, start(model)))
    before, reader = held_bytes(), full.logps(pairs, start(model))
    next(reader)
    assert held_bytes() - before >= whole


def test_layers_whose_adapter_cannot_be_exchanged_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_causal_lm = policy_model.load_causal_lm

    def with_more(*args: Any) -> Any:
        lm = load_causal_lm(*args)
        lm.base_model.layers[0].conv = nn.Conv1d(4, 4, 1)
        lm.base_model.layers[1].attention = nn.MultiheadAttention(8, 2)
        return lm

    monkeypatch.setattr(policy_model, "load_causal_lm", with_more)
    for target, kind in (("conv", "Conv1d"), ("attention", "MultiheadAttention")):
        lora = LoraConfig(target_modules=("q_proj", target))
        with pytest.raises(
            ConfigError, match=rf"target_modules is \['q_proj', '{target}'\], .*{target}', a {kind}; name"
        ):
            make_learner(model, learner_config(lora=lora))


# -- means of adapters -----------------------------------------------------------------------------


def test_adapters_that_no_longer_count_are_left_out() -> None:
    assert [most_terms(alpha) for alpha in (1.0, 1 - 1e-9, 0.99, 0.5)] == [1, 1, 4, 24]
    assert most_terms(1e-12) > 1e13


@pytest.mark.parametrize(
    ("rank", "alpha", "ranks"),
    [
        # Rank 1, and at alpha 0.5 at most 24 adapters: the sum stays below full rank (32 for k and v, else 64).
        (1, 0.5, {32: 24, 64: 24}),
        # Rank 3, never negligible: more than full rank after 11 and 22 means, and then the product itself.
        (3, 0.05, {32: 32, 64: 64}),
    ],
)
def test_a_mean_of_many_adapters_is_exact_and_its_rank_is_bounded(
    model: Path, rank: int, alpha: float, ranks: dict[int, int], tmp_path: Path
) -> None:
    lm = add_adapters(AutoModelForCausalLM.from_pretrained(model), LoraConfig(rank=rank, alpha=7), str(model), 0)
    tensors = policy_tensors(lm)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    exact = {module: torch.zeros((), dtype=torch.float64) for module in modules}
    other, generator = None, torch.Generator().manual_seed(0)
    for _ in range(30):
        own = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
        other = blend_adapters(lm, own, other, alpha)
        for module in modules:
            product = own[f"{module}.lora_B.weight"].double() @ own[f"{module}.lora_A.weight"].double()
            exact[module] = alpha * product + (1 - alpha) * exact[module]
    assert other is not None
    for module, expected in exact.items():
        a, b = other[f"{module}.lora_A.weight"], other[f"{module}.lora_B.weight"]
        assert len(a) == ranks[min(expected.shape)]
        assert (b.double() @ a.double() - expected).abs().max() < 1e-6 * expected.abs().max()
    write_policy(tmp_path / "mean", lm, other)
    merged = load(model, tmp_path / "mean", True).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        module = "base_model.model." + name.removesuffix(".weight")
        added = 7 / rank * exact[module] if module in exact else torch.zeros(())
        torch.testing.assert_close(merged[name], (weight.double() + added).float(), rtol=0, atol=2e-6)


def test_the_scale_of_a_mean_is_that_of_the_trained_adapter(model: Path, tmp_path: Path) -> None:
    lm = add_adapters(AutoModelForCausalLM.from_pretrained(model), LoraConfig(rank=3, alpha=10), str(model), 0)
    own = {name: tensor.detach() for name, tensor in policy_tensors(lm).items()}
    assert (settings := adapter_config(lm, own)).r == 3 and settings.lora_alpha == 10
    mean = blend_adapters(lm, own, blend_adapters(lm, own, None, 0.6), 0.6)
    write_policy(tmp_path, lm, mean)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (6, 20, {})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path))
    trained_scales, scales = (
        {layer.scaling["default"] for layer in lora_layers(each).values()} for each in (lm, loaded)
    )
    assert scales == trained_scales == {10 / 3}
