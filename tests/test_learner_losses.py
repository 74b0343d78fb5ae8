"""Every loss in the learner: cut into micro-batches and passes, it is the formula on the whole batch."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from online_po.console import ConsoleObserver
from online_po.examples import count_examples
from online_po.learner import TorchLearner
from online_po.loss_configs import LOSS_BY_NAME, LossBase
from online_po.losses import LossInputs, UnpairedInputs, kto_kl, pair_losses, unpaired_losses
from online_po.metrics import PER_STEP, round_means
from online_po.report_charts import TRAINING
from online_po.sections import LoraConfig, ModelConfig
from online_po.types import Policy
from scripts.make_tiny_model import make_tiny_model
from tests.learner_setup import (
    collect_logps,
    learner_config,
    make_labels,
    make_learner,
    make_pairs,
    save,
    start,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRED = sorted(name for name, loss in LOSS_BY_NAME.items() if loss.kind == "paired" and name != "custom")
UNPAIRED = sorted(name for name, loss in LOSS_BY_NAME.items() if loss.kind == "unpaired")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def losses_of(*names: str, **options: Any) -> tuple[LossBase, ...]:
    return tuple(LOSS_BY_NAME[name](**options) for name in names)


def make_examples(name: str, count: int = 11) -> pa.Table:
    return make_pairs(count) if LOSS_BY_NAME[name].kind == "paired" else make_labels(count)


def learn(model: Path, losses: Sequence[LossBase], **changes: Any) -> Any:
    config = learner_config(**({"global_batch_size": 16} | changes))
    return TorchLearner(ModelConfig(path=str(model)), config, losses, seed=7, rounds=3)


def noisy_reference(learner: Any, examples: pa.Table, model: Path) -> dict[str, np.ndarray]:
    """The start's logps, off by a few nats: nothing cancels."""
    rng = np.random.default_rng(5)
    found = collect_logps(learner.logps, examples, start(model))
    return {side: (values + rng.normal(0, 2, len(values))).astype(np.float32) for side, values in found.items()}


# -- the same from full logits, all examples at once ----------------------------------------------------


def token_logps(lm: Any, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor]:
    """(R,) logps of a response's tokens and (R,) log sum_v p_v^2."""
    logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits, dim=-1)
    return logps.gather(1, torch.tensor(response)[:, None])[:, 0], logps.exp().square().sum(-1).log()


def plain_pair_losses(lm: Any, pairs: pa.Table, reference: dict[str, np.ndarray], losses: Sequence[LossBase]) -> Tensor:
    values: dict[str, list[Any]] = {}
    for row in pairs.to_pylist():
        shorter = min(len(row["chosen_token_ids"]), len(row["rejected_token_ids"]))
        for side in ("chosen", "rejected"):
            logps, collisions = token_logps(lm, row["prompt_token_ids"], row[f"{side}_token_ids"])
            for name, value in {
                f"{side}_logps": logps.sum(),
                f"{side}_prefix_logps": logps[:shorter].sum(),
                f"{side}_weight_logps": (logps - collisions).mean().detach(),
                f"{side}_lengths": torch.tensor(float(len(logps))),
                f"{side}_scores": torch.tensor(row[f"{side}_score"], dtype=torch.float32),
            }.items():
                values.setdefault(name, []).append(value)
        if row["preference_probability"] is not None:
            probability = torch.tensor(row["preference_probability"], dtype=torch.float32)
            values.setdefault("preference_probabilities", []).append(probability)
    tensors = {name: torch.stack(items) for name, items in values.items()}
    tensors |= {f"reference_{side}_logps": torch.tensor(logps) for side, logps in reference.items()}
    return pair_losses(losses, LossInputs(**tensors)).mean()


def plain_label_losses(
    lm: Any, labels: pa.Table, reference: dict[str, np.ndarray], losses: Sequence[LossBase]
) -> Tensor:
    rows = labels.to_pylist()
    logps = [token_logps(lm, row["prompt_token_ids"], row["response_token_ids"])[0].sum() for row in rows]
    kl = None
    if "mismatched" in reference:
        groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["prompt_id"])]
        longest = max(len(row["prompt_token_ids"]) + len(row["response_token_ids"]) for row in rows)
        others = []
        for group, following in zip(groups, [*groups[1:], groups[0]], strict=True):
            for row, other in zip(group, itertools.cycle(following), strict=False):
                prompt = row["prompt_token_ids"]
                response = other["response_token_ids"][: longest - len(prompt)]
                others.append(token_logps(lm, prompt, response)[0].sum())
        kl = kto_kl(torch.stack(others), torch.tensor(reference["mismatched"]))
    inputs = UnpairedInputs(
        logps=torch.stack(logps),
        reference_logps=torch.tensor(reference["response"]),
        desirable=torch.tensor(labels["label"].to_pylist()),
        kl=kl,
    )
    return unpaired_losses(losses, inputs).mean()


def assert_the_step_is_the_formulas(model: Path, examples: pa.Table, losses: Sequence[LossBase]) -> None:
    """Loss and every gradient of one step, against the whole batch in one plain forward of each response."""
    learner = learn(model, losses, micro_batch_tokens=90, max_grad_norm=1e9)
    reference = noisy_reference(learner, examples, model)
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        found.update({name: p.grad.clone() for name, p in learner.model.named_parameters()})

    learner.optimizer.register_step_pre_hook(keep)
    uses = any(loss.needs_reference for loss in losses)
    (step,) = learner.update(1, examples, reference if uses else None, None)
    lm = AutoModelForCausalLM.from_pretrained(model)
    plain = plain_pair_losses if losses[0].kind == "paired" else plain_label_losses
    expected = plain(lm, examples, reference, losses)
    expected.backward()
    assert step["loss"] == pytest.approx(expected.item(), rel=2e-5, abs=1e-5)
    gradients = {name: p.grad for name, p in lm.named_parameters()}
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    assert scale > 0 and found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-4 * scale, msg=name)


@pytest.mark.parametrize("name", [*PAIRED, *UNPAIRED])
def test_a_step_is_the_formula_on_the_whole_batch(model: Path, name: str) -> None:
    assert_the_step_is_the_formulas(model, make_examples(name), losses_of(name))


@pytest.mark.parametrize("names", [("beta_dpo", "wpo", "ld_dpo"), ("bco_pair", "sigmoid", "sft"), ("kto", "bco")])
def test_so_is_a_mixture(model: Path, names: tuple[str, ...]) -> None:
    losses = tuple(LOSS_BY_NAME[name](weight=0.3 + i) for i, name in enumerate(names))  # type: ignore[call-arg]
    assert_the_step_is_the_formulas(model, make_examples(names[0]), losses)


def with_probabilities(pairs: pa.Table, values: np.ndarray) -> pa.Table:
    place = pairs.column_names.index("preference_probability")
    return pairs.set_column(place, "preference_probability", pa.array(values, pa.float64()))


def test_soft_sppo_reads_the_probability_of_each_pair(model: Path) -> None:
    values = np.random.default_rng(3).uniform(0.5, 1, 11)
    soft = losses_of("sppo", probability="soft", beta=0.2)
    assert_the_step_is_the_formulas(model, with_probabilities(make_pairs(11), values), soft)


def test_soft_sppo_with_certainty_is_hard_sppo(model: Path) -> None:
    found = []
    for probability, value in (("soft", 1.0), ("hard", None), ("hard", 0.6), ("soft", 0.6)):
        learner = learn(model, losses_of("sppo", probability=probability, beta=0.2))
        pairs = with_probabilities(make_pairs(11), np.full(11, np.nan if value is None else value))
        (step,) = learner.update(1, pairs, noisy_reference(learner, pairs, model), None)
        found.append((step["loss"], step["grad_norm"], learner.token_logps([5, 6, 7, 8])))
    assert found[0] == found[1] == found[2] != found[3]


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAIRED, *UNPAIRED])
def test_every_loss_prefers_the_better_response(model: Path, name: str) -> None:
    examples = make_examples(name, 8)
    learner = make_learner(model, learner_config(epochs=8), name)
    reference = None
    if LOSS_BY_NAME[name].needs_reference:
        reference = collect_logps(learner.logps, examples, start(model))
    steps = list(learner.update(1, examples, reference, None))
    assert ("kl_reference" in steps[0]) == (reference is not None) and "kl_start" not in steps[0]
    assert steps[-1]["loss"] < steps[0]["loss"]
    better = "chosen_logps" if name == "sft" else "margin"
    if name != "discopop":  # whose slope at a margin of 0 is positive: it may settle in its minimum below 0
        assert steps[-1][better] > steps[0][better] + 1e-6


def test_the_rounds_beta_replaces_the_configured_one(model: Path) -> None:
    pairs = make_pairs(6)
    learner = learn(model, losses_of("ipo", average_logps=False))
    reference = collect_logps(learner.logps, pairs, start(model))
    (step,) = learner.update(1, pairs, reference, None, [0.05])
    assert step["loss"] == pytest.approx((1 / (2 * 0.05)) ** 2, rel=1e-4)
    rewards = step["chosen_reward"] - step["rejected_reward"]
    assert step["margin"] == pytest.approx(rewards, abs=1e-6)


def test_running_means_move_by_a_tenth_and_are_restored(model: Path, tmp_path: Path) -> None:
    labels = make_labels(12)
    learner = learn(model, losses_of("bco"), global_batch_size=6)
    reference = noisy_reference(learner, labels, model)
    expected: list[float] = []
    for step in learner.update(1, labels, reference, None):
        expected.append(step["kl_reference"])  # the mean log-ratio, which is what the running mean takes in
    first, second = expected
    assert learner.objective.means == {"log_ratio_mean": pytest.approx(0.9 * first + 0.1 * second, rel=1e-5)}
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    again = learn(model, losses_of("bco"), global_batch_size=6)
    again.load(Policy(version=1, path=tmp_path / "policy"), tmp_path / "trainer")
    assert again.objective.means == learner.objective.means
    left, right = (list(which.update(2, labels, reference, None)) for which in (learner, again))
    assert [step["loss"] for step in left] == [step["loss"] for step in right]


@pytest.mark.parametrize("name", ["bco", "bco_pair", "beta_dpo"])
def test_running_means_begin_anew_with_another_reference(model: Path, name: str) -> None:
    """They are of distances to the reference: what was measured to the last one says nothing."""
    examples = make_examples(name, 6)
    learner = learn(model, losses_of(name))
    reference = noisy_reference(learner, examples, model)
    list(learner.update(1, examples, {side: logps - 40 for side, logps in reference.items()}, None))
    (kept,) = learner.objective.means.values()
    list(learner.update(2, examples, reference, None, None, False))
    (carried,) = learner.objective.means.values()
    steps = list(learner.update(3, examples, reference, None, None, True))
    (fresh,) = learner.objective.means.values()
    if name != "beta_dpo":  # whose margins do not see what moves both sides
        assert kept > 35 and carried > 30
        assert fresh == pytest.approx(steps[0]["kl_reference"], abs=1e-4)
    else:
        assert fresh == pytest.approx(steps[0]["margin"] / 0.1, abs=1e-3) != carried


def test_a_custom_loss_may_read_running_means(model: Path) -> None:
    losses = losses_of("custom", function=f"{__name__}:below_the_mean")
    pairs = make_pairs(9)
    learner = learn(model, losses, global_batch_size=3, learning_rate=1e-12, micro_batch_tokens=90)
    reference = noisy_reference(learner, pairs, model)
    steps = list(learner.update(1, pairs, reference, None))
    mean, margins = None, [step["margin"] / 0.1 for step in steps]
    for step, margin in zip(steps, margins, strict=True):
        mean = margin if mean is None else 0.9 * mean + 0.1 * margin
        assert step["loss"] == pytest.approx(mean - margin, abs=1e-3)


def below_the_mean(
    margin_mean: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Tensor:
    return margin_mean - (chosen_logps - rejected_logps - reference_chosen_logps + reference_rejected_logps)


# -- dropout, number types, limits -------------------------------------------------------------------------


DROPOUT = LoraConfig(rank=4, dropout=0.4)


def test_both_passes_of_a_step_leave_the_same_out(model: Path) -> None:
    """beta_dpo with alpha 0 that keeps all pairs is DPO, cut into the same micro-batches."""
    pairs = make_pairs(10)
    runs = []
    for losses in (losses_of("sigmoid"), losses_of("beta_dpo", alpha=0.0, keep=1.0)):
        learner = learn(model, losses, lora=DROPOUT, epochs=3, micro_batch_tokens=90)
        reference = noisy_reference(learner, pairs, model)
        runs.append(list(learner.update(1, pairs, reference, None)))
    for dpo, same in zip(*runs, strict=True):
        for name in ("loss", "margin", "grad_norm"):
            assert same[name] == pytest.approx(dpo[name], rel=1e-5), name


def test_the_kl_of_kto_is_of_the_policy_without_dropout(model: Path, tmp_path: Path) -> None:
    labels = make_labels(10)
    learner = learn(model, losses_of("kto"), lora=DROPOUT, epochs=4, learning_rate=1e-2)
    reference = collect_logps(learner.logps, labels, start(model))
    list(learner.update(1, labels, reference, None))
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    policy = Policy(version=1, path=tmp_path / "policy", is_adapter=True)
    own = collect_logps(learner.logps, labels, policy)["mismatched"]
    lower = {side: logps - 5 for side, logps in reference.items()}  # so that the KL is above 0 for sure
    step = next(learner.update(2, labels, lower, None))
    assert step["kto_kl"] == pytest.approx((own - lower["mismatched"]).mean(), rel=1e-5)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("names", [("aot", "beta_dpo", "wpo"), ("ld_dpo", "bco_pair"), ("kto", "bco")])
def test_in_bfloat16_a_step_is_the_same_but_for_rounding(
    model: Path, names: tuple[str, ...], lora: LoraConfig | None
) -> None:
    examples, found = make_examples(names[0], 8), []
    for dtype in ("float32", "bfloat16"):
        learner = learn(model, losses_of(*names), lora=lora, compute_dtype=dtype, micro_batch_tokens=90)
        if dtype == "float32":
            reference = noisy_reference(learner, examples, model)
        gradients: list[Tensor] = []
        trained = [p for p in learner.model.parameters() if p.requires_grad]
        learner.optimizer.register_step_pre_hook(
            lambda *_, into=gradients, of=trained: into.extend(p.grad.flatten().clone() for p in of)
        )
        (step,) = learner.update(1, examples, reference, None)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        found.append((step, torch.cat(gradients)))
    (exact, gradient), (rounded, rounded_gradient) = found
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.03)
    assert (rounded_gradient - gradient).norm() < 0.1 * gradient.norm()


@pytest.mark.parametrize("names", [("kto", "bco"), ("aot", "ld_dpo", "wpo")])
def test_no_pass_holds_more_tokens_than_it_may(model: Path, names: tuple[str, ...]) -> None:
    examples, limit = make_examples(names[0], 17), 60
    learner = learn(model, losses_of(*names), micro_batch_tokens=limit)
    sizes: list[int] = []
    learner.scorer.register_forward_pre_hook(lambda _module, args: sizes.append(args[0].numel()))
    reference = collect_logps(learner.logps, examples, start(model))
    list(learner.update(1, examples, reference, None))
    assert limit / 2 < max(sizes) <= limit, "no example is longer by itself"


@pytest.mark.parametrize("names", [("kto", "bco"), ("aot", "ld_dpo", "wpo")])
def test_no_pass_of_plain_rows_holds_more_tokens_than_it_may(model: Path, names: tuple[str, ...]) -> None:
    examples, limit = make_examples(names[0], 17), 60
    learner = learn(model, losses_of(*names), micro_batch_tokens=limit, prefix_sharing=False)
    shapes: list[tuple[int, int]] = []
    learner.scorer.register_forward_pre_hook(lambda _module, args: shapes.append(tuple(args[0].shape)))
    reference = collect_logps(learner.logps, examples, start(model))
    list(learner.update(1, examples, reference, None))
    assert {sequences for sequences, _ in shapes} > {2}
    for sequences, width in shapes:
        assert sequences * width <= limit or sequences <= 2  # one example alone, of one side or two
    longest = max(
        len(row["prompt_token_ids"]) + len(row[side])
        for row in examples.to_pylist()
        for side in row
        if side in ("chosen_token_ids", "rejected_token_ids", "response_token_ids") and row[side] is not None
    )
    assert max(width for _, width in shapes) == longest  # also of prompts with others' responses


def test_labels_are_counted_and_averaged_by_kind(model: Path) -> None:
    labels = make_labels(9)
    learner = learn(model, losses_of("kto"))
    reference = noisy_reference(learner, labels, model)
    (step,) = learner.update(1, labels, reference, None)
    good = np.array(labels["label"].to_pylist())
    own = collect_logps(make_learner(model, learner_config(), "kto").logps, labels, start(model))
    ratios = 0.1 * (own["response"] - reference["response"])
    assert step["labels"] == 9 and "pairs" not in step
    assert step["chosen_reward"] == pytest.approx(ratios[good].mean(), abs=1e-4)
    assert step["rejected_reward"] == pytest.approx(ratios[~good].mean(), abs=1e-4)
    assert step["margin"] == pytest.approx(ratios[good].mean() - ratios[~good].mean(), abs=1e-4)
    assert step["accuracy"] == pytest.approx(((ratios > 0) == good).mean())
    assert step["kto_kl"] == pytest.approx(max(0.0, (own["mismatched"] - reference["mismatched"]).mean()), abs=1e-4)


def test_a_rounds_means_of_labels_are_those_of_one_step_over_all(model: Path) -> None:
    """Also where the kinds are spread unevenly over steps; and all that screen and report read is there."""
    labels = make_labels(14, seed=3)
    found = []
    for size in (4, 16):
        changes = {"global_batch_size": size, "learning_rate": 1e-12, "importance_cap": 2.0}
        learner = learn(model, losses_of("apo_zero_unpaired"), **changes)
        reference = noisy_reference(learner, labels, model)
        steps = list(learner.update(1, labels, reference, reference))
        assert all(step["desirable"] + step["undesirable"] == step["labels"] for step in steps)
        found.append(round_means(steps))
    assert len({step["desirable"] / step["labels"] for step in steps}) == 1
    several, one = found
    assert several.keys() == one.keys()
    for name in one.keys() - {*PER_STEP, "seconds"}:
        assert several[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert {metric for _, _, lines, _ in TRAINING for metric, _ in lines} <= one.keys()
    counted = count_examples(labels)
    assert {name: one[name] for name in ("labels", "desirable", "undesirable")} == {
        name: counted[name] for name in ("labels", "desirable", "undesirable")
    }
    screen = io.StringIO()
    ConsoleObserver(Console(file=screen, width=120)).round(
        {"round": 1, "score_mean": 0.5, "wall_seconds": 2.0, **one, **counted}
    )
    assert f"accuracy {one['accuracy']:.0%} · 14 labels" in screen.getvalue()


def test_labels_of_one_kind_or_of_one_prompt_train(model: Path) -> None:
    labels = make_labels(6)
    good = labels.set_column(labels.column_names.index("label"), "label", pa.array([True] * 6))
    one = good.set_column(labels.column_names.index("prompt_id"), "prompt_id", pa.array(["same"] * 6))
    for table, kl in ((good, None), (one, 0.0)):
        learner = learn(model, losses_of("kto"))
        reference = noisy_reference(learner, table, model)
        (step,) = learner.update(1, table, reference, None)
        assert "rejected_reward" not in step and "margin" not in step and step["grad_norm"] > 0
        assert kl is None or step["kto_kl"] == kl


def scaled_hinge(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, *, beta: float, k: float
) -> Tensor:
    return k * torch.relu(1 - beta * (chosen_logps - rejected_logps)) + 0.0 * chosen_lengths


def test_a_custom_loss_gets_what_its_parameters_name(model: Path) -> None:
    losses = losses_of("custom", function=f"{__name__}:scaled_hinge", options={"k": 3.0}, beta=0.2)
    pairs = make_pairs(7)
    learner = learn(model, losses)
    own = collect_logps(learner.logps, pairs, start(model))
    (step,) = learner.update(1, pairs, None, None)
    expected = 3 * np.maximum(0, 1 - 0.2 * (own["chosen"] - own["rejected"])).mean()
    assert step["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_step_that_is_not_finite_can_be_left_out(model: Path) -> None:
    pairs = make_pairs(8)
    config = learner_config(global_batch_size=4)
    learner = TorchLearner(
        ModelConfig(path=str(model)), config, losses_of("sigmoid"), seed=7, rounds=3, skip_nonfinite=True
    )
    reference = collect_logps(learner.logps, pairs, start(model))
    reference["chosen"][3] = np.nan
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    steps = list(learner.update(1, pairs, reference, None))
    skipped = [step for step in steps if "skipped" in step]
    assert len(skipped) == 1 and len(steps) == 2
    # Nothing of it enters the round's means.
    assert skipped[0].keys() == {"skipped", "pairs", "tokens", "seconds", "learning_rate"}
    assert all(np.isfinite(value) for step in steps for value in step.values())
    means = round_means(steps)
    assert means["skipped"] == 1 and means["accuracy"] == next(s for s in steps if s not in skipped)["accuracy"]
    moved = [name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])]
    assert moved and all(torch.isfinite(p).all() for p in learner.model.parameters())
