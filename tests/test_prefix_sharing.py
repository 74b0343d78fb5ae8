"""Shared prompts against plain rows: the same log-probabilities, losses and gradients, to float32 rounding; and models
for which that is not so, which are found out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from online_po import prefix_sharing, scoring
from online_po.batching import PAIR_SIDES, Examples
from online_po.learner import TorchLearner
from online_po.logps import LogpModel
from online_po.loss_configs import LOSS_BY_NAME
from online_po.packing import collate
from online_po.policy_model import add_adapters, checkpoint_activations, decoder_layers
from online_po.prefix_sharing import Sharing, share_prompts, window_of
from online_po.scoring import Scored, Scoring, score
from online_po.sections import LoraConfig, ModelConfig
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA
from online_po.tree_attention import ATTENTION, Trees
from scripts.make_tiny_model import make_tiny_model
from tests.learner_setup import VOCABULARY, collect_logps, learner_config, save, start

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 40}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama, each head its own keys": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, **WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=None),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **WINDOW, query_pre_attn_scalar=16),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=40),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0, attention_multiplier=0.1),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
}


def make_model(config: PretrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


def pairs_of_prompts(prompts: int = 4, pairs: int = 3, seed: int = 0) -> pa.Table:
    """Ragged pairs of a few prompts (1 to 9 tokens), of which some share the chosen response."""
    rng = np.random.default_rng(seed)

    def tokens(longest: int) -> list[int]:
        return rng.integers(4, VOCABULARY, rng.integers(1, longest)).tolist()

    rows = []
    for _ in range(prompts):
        prompt, chosen = tokens(10), [tokens(15) for _ in range(pairs)]
        for i in range(pairs):
            scores = {"chosen_score": 1.0 + rng.uniform(), "rejected_score": rng.uniform()}
            sides = {"chosen_token_ids": chosen[i // 2], "rejected_token_ids": tokens(15)}
            rows.append({"prompt_token_ids": prompt} | sides | scores)
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)


def labels_of_prompts() -> pa.Table:
    rows = []
    for i, row in enumerate(pairs_of_prompts(4, 3).to_pylist()):
        for side in PAIR_SIDES:
            prompt = {"prompt_id": f"p{i // 3}", "prompt_token_ids": row["prompt_token_ids"]}
            label = {"label": side == "chosen", "response_score": row[f"{side}_score"]}
            rows.append(prompt | label | {"response_token_ids": row[f"{side}_token_ids"]})
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def both_ways(model: PreTrainedModel) -> Iterator[tuple[Scored, dict[str, Tensor]]]:
    """(what it says, the gradients of a weighted sum of it), with shared prompts and with plain rows."""
    examples, cpu = Examples(pairs_of_prompts()), torch.device("cpu")
    for shared in (True, False):
        batch = collate(examples, np.arange(12), PAIR_SIDES, shared=shared)
        scored = score(LogpModel(model), batch, cpu, with_entropy=True, with_collision=True)
        flat = torch.cat(scored.logps)
        (flat * torch.linspace(-1, 1, len(flat))).sum().backward()
        yield scored, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()


def assert_the_same(model: PreTrainedModel) -> None:
    (found, gradients), (expected, expected_gradients) = both_ways(model)
    for name in ("logps", "entropies", "collisions"):
        mine, others = getattr(found, name), getattr(expected, name)
        assert len(mine) == len(others) == 24
        torch.testing.assert_close(torch.cat(mine), torch.cat(others), rtol=2e-6, atol=5e-6)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


# -- the same --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_logps_entropies_and_gradients_equal_those_of_plain_rows(kind: str) -> None:
    model = make_model(CONFIGS[kind]())
    longest = 40.0 if kind in ("gemma2", "gemma3", "mistral") else float("inf")
    assert share_prompts(model).longest == longest
    assert model.config._attn_implementation == ATTENTION
    assert_the_same(model)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_with_gradient_checkpointing(kind: str) -> None:
    model = make_model(CONFIGS[kind]())
    share_prompts(model)
    layers = decoder_layers(model)
    calls: list[int] = []
    layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(2))
    checkpoint_activations(layers)
    assert_the_same(model)
    assert calls.count(2) == 2 * calls.count(1), "layers were computed again in backward"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_with_adapters(kind: str) -> None:
    model = make_model(CONFIGS[kind]())
    share_prompts(model)
    adapted = add_adapters(model, LoraConfig(rank=4), "x", 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert_the_same(model)
    assert {p.requires_grad for p in model.parameters()} == {True, False}


@pytest.mark.parametrize("name", sorted(LOSS_BY_NAME.keys() - {"custom"}))
def test_every_loss_has_the_same_step(tiny_model: Path, name: str) -> None:
    loss = LOSS_BY_NAME[name]
    examples = pairs_of_prompts() if loss.kind == "paired" else labels_of_prompts()
    found: list[tuple[dict[str, float], list[Tensor]]] = []
    reference: dict[str, np.ndarray] = {}
    for shared in (False, True):
        config = learner_config(global_batch_size=99, micro_batch_tokens=150, prefix_sharing=shared)
        learner = TorchLearner(ModelConfig(path=str(tiny_model)), config, [loss()], seed=7, rounds=3)  # type: ignore[call-arg]
        if not reference:
            rng, logps = np.random.default_rng(5), collect_logps(learner.logps, examples, start(tiny_model))
            reference = {s: (v + rng.normal(0, 2, len(v))).astype(np.float32) for s, v in logps.items()}
        gradients: list[Tensor] = []
        learner.optimizer.register_step_pre_hook(
            lambda *_, of=learner.model, into=gradients: into.extend(
                torch.zeros(1) if p.grad is None else p.grad.clone() for p in of.parameters()
            )
        )
        (step,) = learner.update(1, examples, reference, None)
        del step["seconds"]
        found.append((step, gradients))
    (expected, plain), (step, ours) = found
    assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
    norm = torch.stack([gradient.norm() for gradient in plain]).norm()
    assert norm > 0
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).norm() <= 2e-5 * norm


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_reference_logps_are_the_same(tiny_model: Path, lora: LoraConfig | None) -> None:
    found = []
    for shared in (True, False):
        config = learner_config(prefix_sharing=shared, lora=lora)
        losses = [LOSS_BY_NAME["ld_dpo"]()]  # type: ignore[call-arg]
        learner = TorchLearner(ModelConfig(path=str(tiny_model)), config, losses, seed=7, rounds=3)
        passes: list[int] = []
        learner.scorer.register_forward_pre_hook(lambda _m, args, into=passes: into.append(args[0].numel()))
        found.append((collect_logps(learner.logps, pairs_of_prompts(), start(tiny_model)), sum(passes)))
    (ours, tokens), (plain, plain_tokens) = found
    assert ours.keys() == plain.keys() and len(ours) == 4
    for side, values in plain.items():
        np.testing.assert_allclose(ours[side], values, rtol=1e-5)
    assert tokens < plain_tokens / 2


def test_bfloat16_is_near(tiny_model: Path) -> None:
    """Rounding of 2^-8 in hidden states; the head is float32."""
    found = []
    for shared in (True, False):
        config = learner_config(prefix_sharing=shared, compute_dtype="bfloat16")
        losses = [LOSS_BY_NAME["sigmoid"]()]  # type: ignore[call-arg]
        learner = TorchLearner(ModelConfig(path=str(tiny_model)), config, losses, seed=7, rounds=3)
        found.append(collect_logps(learner.logps, pairs_of_prompts(), start(tiny_model)))
    for side, values in found[1].items():
        assert not np.array_equal(found[0][side], values)
        np.testing.assert_allclose(found[0][side], values, atol=0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_bias_that_gpus_get_it_is_the_same(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Which the CPU knows too; under autocast rotary embeddings leave queries and keys in float32."""
    model = make_model(CONFIGS["qwen3"]())
    share_prompts(model)
    batch, cpu = collate(Examples(pairs_of_prompts()), np.arange(12), PAIR_SIDES, shared=True), torch.device("cpu")
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(scoring, "Trees", lambda sizes, *_, device=device: Trees(sizes, torch.device(device)))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            found.append(torch.cat(score(LogpModel(model), batch, cpu).logps))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5 if dtype == "float32" else 0.5)


@pytest.mark.parametrize("shared", [True, False])
def test_empty_responses_have_nothing_to_say(shared: bool) -> None:
    model = make_model(CONFIGS["llama"]())
    share_prompts(model)
    rows = [([5, 6], [], []), ([5, 6], [], [7, 8])]
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    examples = Examples(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=PAIR_SCHEMA))
    for several in (np.arange(1), np.arange(2)):
        batch = collate(examples, several, PAIR_SIDES, shared=shared)
        scored = score(LogpModel(model), batch, torch.device("cpu"), with_entropy=True, with_collision=True)
        sizes = [len(examples.sequence(side, row)[1]) for side in PAIR_SIDES for row in several]
        for values in (scored.logps, scored.entropies, scored.collisions):
            assert [len(value) for value in values] == sizes


# -- where it is not the same ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "longest", "says"),
    [
        (LlamaConfig(**SHAPE), float("inf"), None),
        (Qwen2Config(**SHAPE, sliding_window=16), float("inf"), None),  # use_sliding_window is false
        (Qwen2Config(**SHAPE, sliding_window=32, use_sliding_window=True, max_window_layers=0), 32, "windows of 32"),
        (MistralConfig(**SHAPE, sliding_window=40), 40, "slides over windows of 40 tokens"),
        (MistralConfig(**SHAPE, sliding_window=None), float("inf"), None),
        (Gemma3TextConfig(**SHAPE, **WINDOW), 40, "windows of 40"),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            64,
            r"\(dynamic\) change beyond 64",
        ),
        (
            Phi3Config(
                **SHAPE,
                original_max_position_embeddings=32,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                },
            ),
            32,
            r"\(longrope\) change beyond 32",
        ),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            float("inf"),
            None,
        ),
    ],
)
def test_how_long_sequences_may_be(config: PretrainedConfig, longest: float, says: str | None) -> None:
    found, why = window_of(config)
    assert found == longest
    assert (why is None) if says is None else re.search(says, why or "")


@pytest.mark.parametrize("attention", ["eager"])
def test_another_attention_is_left_as_it_is(attention: str) -> None:
    model = make_model(CONFIGS["llama"](), attention)
    sharing = share_prompts(model)
    assert sharing.longest == 0 and "model.attention is eager" in sharing.told[0]
    assert model.config._attn_implementation == attention


def test_a_window_that_is_too_short_for_the_trial() -> None:
    model = make_model(MistralConfig(**SHAPE, sliding_window=8))
    assert share_prompts(model).told[0].endswith("its attention slides over windows of 8 tokens")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["convolutions", "recurrent"])
def test_a_model_that_looks_back_otherwise_is_found_out(kind: str, dtype: torch.dtype) -> None:
    """Also where weights are so small that it hardly shows."""
    small = {k: v for k, v in SHAPE.items() if k != "head_dim"} | {"initializer_range": 0.02}
    config: PretrainedConfig = Lfm2Config(**small, layer_types=["conv", "full_attention"])
    if kind == "recurrent":
        config = RecurrentGemmaConfig(**small | {"num_hidden_layers": 3}, lru_width=64, attention_window_size=32)
    model = make_model(config).to(dtype)
    sharing = share_prompts(model)
    assert sharing.longest == 0 and "computes something else with them" in sharing.told[0]
    assert model.config._attn_implementation == "sdpa"


def test_a_model_in_bfloat16_is_tried_in_float32_and_left_as_it_was() -> None:
    model = make_model(CONFIGS["qwen3"]()).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert share_prompts(model).longest == float("inf")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_that_takes_no_trees_goes_on_without() -> None:
    model = make_model(CONFIGS["llama"]())

    def refuses(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        assert "trees" not in kwargs, "what is this?"

    handle = model.model.layers[0].register_forward_pre_hook(refuses, with_kwargs=True)
    assert "does not take them (AssertionError: what is this?)" in share_prompts(model).told[0]
    handle.remove()
    assert model.config._attn_implementation == "sdpa"


class Blurred(nn.Module):
    """A layer that mixes neighbours in the row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden + torch.roll(hidden, 1, dims=1))


def test_a_model_that_looks_at_neighbours_is_found_out() -> None:
    model = make_model(CONFIGS["llama"]())
    model.model.layers[1].mlp = Blurred(model.model.layers[1].mlp)
    sharing = share_prompts(model)
    assert sharing.longest == 0 and "LlamaForCausalLM computes something else with them" in sharing.told[0]
    assert model.config._attn_implementation == "sdpa"


def test_a_difference_that_is_no_number_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([float("nan"), 0.0])
    original = prefix_sharing.score

    def broken(*args: Any) -> Scored:
        found = original(*args)
        return Scored(logps=[part * next(errors, 1.0) for part in found.logps], entropies=[], collisions=[])

    monkeypatch.setattr(prefix_sharing, "score", broken)
    assert share_prompts(make_model(CONFIGS["llama"]())).longest == 0


def test_longer_sequences_go_as_plain_rows(tmp_path: Path) -> None:
    """Of a step where all fit the prompts are shared; of one with a sequence beyond the window none."""
    model = make_model(MistralConfig(**SHAPE, sliding_window=20))
    sharing = share_prompts(model)
    assert sharing == Sharing(longest=20, why_not="its attention slides over windows of 20 tokens")
    assert sharing.told[0].startswith("learner.prefix_sharing: responses beyond 20 tokens do not share")
    examples = Examples(pairs_of_prompts(8, 3))
    sharing_one = Scoring(
        LogpModel(model), learner_config(), torch.device("cpu"), with_prefix=False, longest_shared=sharing.longest
    )
    plain = Scoring(
        LogpModel(make_model(MistralConfig(**SHAPE, sliding_window=20))),
        learner_config(),
        torch.device("cpu"),
        with_prefix=False,
    )
    widths = examples.widths(PAIR_SIDES)
    short, every = np.flatnonzero(widths <= 20), np.arange(24)
    assert 0 < len(short) < 24
    assert sharing_one.shares(examples, short, PAIR_SIDES) and not sharing_one.shares(examples, every, PAIR_SIDES)
    for rows in (short, every):
        found, expected = (one.collect(examples, rows, PAIR_SIDES) for one in (sharing_one, plain))
        for side in PAIR_SIDES:
            torch.testing.assert_close(found[side], expected[side], rtol=1e-5, atol=1e-5)


def test_a_learner_says_where_it_cannot_and_is_silent_where_it_is_not_asked(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    losses = [LOSS_BY_NAME["simpo"]()]  # type: ignore[call-arg]
    for attention, asked, why in (("sdpa", True, None), ("eager", True, "eager"), ("eager", False, None)):
        source = ModelConfig(path=str(folder), attention=attention)  # type: ignore[arg-type]
        learner = TorchLearner(source, learner_config(prefix_sharing=asked), losses, seed=7, rounds=3)
        assert (why or "None") in str(learner.sharing.why_not)
        save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
        assert ATTENTION not in (tmp_path / "policy" / "config.json").read_text()
