from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from online_po import logps as logps_module
from online_po.batching import PAIR_SIDES, Examples
from online_po.errors import ConfigError
from online_po.logps import LogpModel, float32_weights, logits_of, require_known_head
from online_po.packing import MicroBatch, collate
from tests.learner_setup import VOCABULARY, make_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(
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
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    # The window is shorter than the rows, and both softcaps are on.
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=8, final_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
}


def make_model(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=attention).float().eval()


def make_batch() -> tuple[MicroBatch, torch.Tensor]:
    """Six pairs of ragged lengths, and the attention mask that marks their real tokens."""
    tokens = Examples(make_pairs(6, seed=3))
    batch = collate(tokens, np.arange(6), PAIR_SIDES, shared=False)
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.long)
    lengths = [len(tokens.prompt[i % 6]) + batch.lengths[i] for i in range(12)]
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return batch, mask


def run(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arrays = (batch.input_ids, batch.positions, batch.targets)
    ids, positions, targets = (torch.from_numpy(array) for array in arrays)
    return LogpModel(model)(ids, positions, targets, with_entropy=True, with_collision=True)


def plain(model: PreTrainedModel, batch: MicroBatch, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same from full logits of the model's own forward, padding masked."""
    logits = model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=mask).logits.float()
    logps = torch.log_softmax(logits, dim=-1).flatten(0, 1)[torch.from_numpy(batch.positions)]
    found = logps.gather(1, torch.from_numpy(batch.targets)[:, None])[:, 0]
    return found, -(logps.exp() * logps).sum(-1), logps.exp().square().sum(-1).log()


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_logps_entropies_and_gradients_equal_full_logits(
    kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logps_module.CHUNK_LOGITS, "cpu", 7 * VOCABULARY)  # chunks of 7 tokens, the last ragged
    model = make_model(kind, attention)
    batch, mask = make_batch()
    weights = torch.linspace(-1, 1, len(batch.targets))

    logps, entropies, collisions = run(model, batch)
    assert not entropies.requires_grad and not collisions.requires_grad
    (logps * weights).sum().backward()
    found = gradients(model)

    expected_logps, expected_entropies, expected_collisions = plain(model, batch, mask)
    (expected_logps * weights).sum().backward()
    expected = gradients(model)

    torch.testing.assert_close(logps, expected_logps, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(entropies, expected_entropies, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(collisions, expected_collisions, rtol=2e-6, atol=5e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


def test_padding_changes_nothing() -> None:
    model = make_model("gemma2")
    batch, _ = make_batch()
    noise = batch.input_ids.copy()
    real = np.zeros(noise.size, dtype=bool)
    real[batch.positions] = real[batch.positions + 1] = True
    width = noise.shape[1]
    for row in range(len(noise)):  # prompts: everything left of a row's first predicting place
        own = batch.positions[(batch.positions // width) == row]
        real[row * width : own.min()] = True
    noise.flat[~real] = 99
    assert (noise != batch.input_ids).any()
    padded = replace(batch, input_ids=noise)
    with torch.no_grad():
        assert torch.equal(run(model, batch)[0], run(model, padded)[0])


def test_logits_of_the_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 4
    monkeypatch.setitem(logps_module.CHUNK_LOGITS, "cpu", chunk * VOCABULARY)
    model = make_model("llama")
    batch, _ = make_batch()
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (VOCABULARY,):
            saved.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, batch)
    assert saved == []  # nothing as wide as the vocabulary is kept for backward
    heads: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: heads.append(out.shape[0]))
    run(model, batch)[0].sum().backward()
    forward = -(-len(batch.targets) // chunk)
    assert max(heads) == chunk and sum(heads) == 2 * len(batch.targets) and len(heads) == 2 * forward


def test_entropies_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    batch, _ = make_batch()
    lists: list[logps_module.TokenStatistics] = []
    original = LogpModel._chunk_logps

    def spy(
        self: LogpModel,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weights: dict,
        statistics: logps_module.TokenStatistics,
    ) -> torch.Tensor:
        lists.append(statistics)
        return original(self, hidden, targets, weights, statistics)

    monkeypatch.setattr(LogpModel, "_chunk_logps", spy)
    run(model, batch)[0].sum().backward()
    assert len(lists) == 2 and len(lists[0].entropies) == 1  # one chunk, forward and recomputation, one entropy


# -- bfloat16 --------------------------------------------------------------------------------------

LARGE = 8192


def wide_model(tied: bool = False, bias: bool = False) -> PreTrainedModel:
    """A large vocabulary and logits of about +-30: in bfloat16 they are 0.125 apart."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SHAPE | {"vocab_size": LARGE, "initializer_range": 1.0}), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    if bias:
        head = torch.nn.Linear(64, LARGE)
        head.weight = model.get_output_embeddings().weight
        model.set_output_embeddings(head)
    return model


def last_hidden(model: PreTrainedModel) -> list[torch.Tensor]:
    """Fills with the backbone's outputs (B, T, D) as they come."""
    seen: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state.detach()))
    return seen


def chosen_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("head", ["plain", "tied", "bias", "lora"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_under_bfloat16_the_head_computes_in_float32(head: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logps_module.CHUNK_LOGITS, "cpu", 7 * LARGE)  # chunks of 7 tokens, the last ragged
    model = wide_model(tied=head == "tied", bias=head == "bias").to(getattr(torch, kept))
    if head == "lora":
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
        assert next(p for name, p in adapted.named_parameters() if "lora_B" in name).dtype == torch.float32
    module = model.get_output_embeddings()
    batch, _ = make_batch()
    hidden = last_hidden(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _, _ = run(model, batch)
    scales = torch.linspace(-1, 1, len(logps))
    (logps * scales).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    model.zero_grad()

    states, targets = hidden[0].flatten(0, 1)[torch.from_numpy(batch.positions)], torch.from_numpy(batch.targets)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = chosen_logps(module(states), targets)
    model.float()
    expected = chosen_logps(module(states.float()), targets)
    (expected * scales).sum().backward()
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=2e-5)
    assert (rounded - expected).abs().mean() > 0.02  # what the head's own rounding would have cost
    if head == "tied":  # the embeddings' gradient is in there too
        assert found["weight"].isfinite().all() and found["weight"].any()
        return
    assert found.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        # Rounded once, as a whole, where the weights are bfloat16; adding chunks up in bfloat16 rounds each time.
        rtol = 2**-8 if kept == "bfloat16" and head != "lora" else 1e-4
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[name].float(), parameter.grad, rtol=rtol, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_in_float32_the_head_is_the_module_to_the_bit(kind: str) -> None:
    model = make_model(kind)
    head = model.get_output_embeddings()
    hidden = torch.randn(11, 64)
    runs = []
    for logits in (logits_of(model, hidden, float32_weights(head)), scaled(model, head(hidden))):
        logits.square().sum().backward()
        runs.append((logits.detach(), gradients(model)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1].keys() == runs[1][1].keys() and len(runs[0][1]) == 1
    assert all(torch.equal(gradient, runs[1][1][name]) for name, gradient in runs[0][1].items())


def scaled(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """What the three families with scaled or capped logits do to them."""
    match model.config:
        case GraniteConfig():
            return logits / 3.0
        case CohereConfig():
            return logits * 0.3
        case Gemma2Config():
            return 5.0 * torch.tanh(logits / 5.0)
    return logits


# -- heads the learner does not know ---------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_known_heads_pass(kind: str) -> None:
    require_known_head(make_model(kind), kind)
    require_known_head(make_model(kind).bfloat16(), kind)


def test_the_heads_rounding_is_not_taken_for_an_unknown_head() -> None:
    model = wide_model().bfloat16()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 4
    ids = torch.linspace(0, LARGE - 1, 9).long()[None]
    with torch.no_grad():
        own = chosen_logps(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        found, _, _ = LogpModel(model)(ids, torch.arange(8), ids[0, 1:])
    assert (own - found).abs().max() > 0.1
    require_known_head(model, "wide")
    assert model(input_ids=ids).logits.dtype == torch.bfloat16  # its own forward is what it was


def test_flash_attention_which_no_cpu_has_does_not_stop_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    # transformers would not let anybody ask for it here.
    monkeypatch.setattr(type(model), "_check_and_adjust_attn_implementation", lambda _self, name, **_: name)
    model.set_attn_implementation("flash_attention_2")
    with pytest.raises((ImportError, TypeError, ValueError)):
        model(input_ids=torch.arange(4, 13)[None])
    require_known_head(model, "llama")
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_head_is_refused_by_name(dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    forward = model.forward

    def halved(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = halved
    with pytest.raises(ConfigError, match=r"model.path is 'odd/model': LlamaForCausalLM .* way the learner does not"):
        require_known_head(model, "odd/model")
