"""Truncated importance weights (learner.importance_cap) for responses that an older policy sampled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from online_po.errors import ConfigError
from online_po.learner import TorchLearner
from online_po.loss_configs import LOSS_BY_NAME
from online_po.objective import Objective
from online_po.sections import ModelConfig
from tests.fakes import make_config
from tests.learner_setup import collect_logps, learner_config, make_labels, make_pairs, start

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")


def weights_of(cap: float, **values: list[float]) -> list[float]:
    names = ("sigmoid",) if "chosen_logps" in values else ("kto",)
    objective = Objective([LOSS_BY_NAME[name]() for name in names], cap)  # type: ignore[call-arg]
    return objective.importance_weights({name: torch.tensor(value) for name, value in values.items()}).tolist()


def test_the_ratio_is_a_responses_per_token_and_the_mean_of_both() -> None:
    found = weights_of(
        9.0,
        chosen_logps=[-10.0, -10.0],
        sampler_chosen_logps=[-14.0, -10.0],  # likelier now, by 4 nats over 4 tokens
        chosen_lengths=[4.0, 5.0],
        rejected_logps=[-20.0, -9.0],
        sampler_rejected_logps=[-20.0, -6.0],  # less likely now, by 3 nats over 3 tokens
        rejected_lengths=[10.0, 3.0],
    )
    assert found == pytest.approx([math.exp(0.5), math.exp(-0.5)])


def test_weights_are_cut_from_above_and_unknown_samplers_count_as_the_policy() -> None:
    given = {"logps": [-1.0, -9.0, -3.0], "sampler_logps": [-9.0, -1.0, NAN], "lengths": [2.0, 2.0, 2.0]}
    assert weights_of(2.0, **given) == pytest.approx([2.0, math.exp(-4.0), 1.0])


def with_samplers(examples: pa.Table, logps: dict[str, np.ndarray]) -> pa.Table:
    for side, values in logps.items():
        name = f"{side}_sampler_logp"
        place = examples.column_names.index(name)
        examples = examples.set_column(place, examples.schema.field(name), pa.array(values.astype(float)))
    return examples


def step_of(model: Path, examples: pa.Table, loss: str, reference: Any, **changes: Any) -> tuple[Any, list[Any]]:
    """The metrics of one step, and its gradients."""
    config = learner_config(global_batch_size=99, micro_batch_tokens=60, **changes)
    losses = [LOSS_BY_NAME[loss]()]  # type: ignore[call-arg]
    learner = TorchLearner(ModelConfig(path=str(model)), config, losses, seed=7, rounds=3)
    if reference is None:
        return collect_logps(learner.logps, examples, start(model)), []
    gradients: list[Any] = []
    parameters = list(learner.model.parameters())
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)
    )
    (step,) = learner.update(1, examples, reference, None)
    return step, gradients


CASES = ["sigmoid", "bco_pair", "kto"]


@pytest.mark.parametrize("loss", CASES)
def test_what_the_policy_sampled_itself_has_weight_one(tiny_model: Path, loss: str) -> None:
    examples = make_labels(9) if loss == "kto" else make_pairs(9)
    logps, _ = step_of(tiny_model, examples, loss, None)
    reference = {side: values - 1 for side, values in logps.items()}
    own = {side: values for side, values in logps.items() if side != "mismatched"}
    plain, expected = step_of(tiny_model, examples, loss, reference)
    step, gradients = step_of(tiny_model, with_samplers(examples, own), loss, reference, importance_cap=3.0)
    assert step["importance_weight"] == pytest.approx(1, abs=1e-5) and "importance_weight" not in plain
    assert step["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", CASES)
def test_examples_count_by_their_weight_whatever_the_passes(tiny_model: Path, loss: str) -> None:
    """All responses are twice as likely per token as when they were sampled: loss and gradients double."""
    examples = make_labels(9) if loss == "kto" else make_pairs(9)
    logps, _ = step_of(tiny_model, examples, loss, None)
    reference = {side: values - 1 for side, values in logps.items()}
    older = {}
    for side, values in logps.items():
        if side != "mismatched":
            lengths = np.array([len(row[f"{side}_token_ids"]) for row in examples.to_pylist()])
            older[side] = values - lengths * math.log(2)
    plain, expected = step_of(tiny_model, examples, loss, reference, max_grad_norm=1e9)
    table = with_samplers(examples, older)
    for cap, factor in ((3.0, 2.0), (1.5, 1.5)):
        step, gradients = step_of(tiny_model, table, loss, reference, importance_cap=cap, max_grad_norm=1e9)
        assert step["importance_weight"] == pytest.approx(factor, rel=1e-4)
        assert step["loss"] == pytest.approx(factor * plain["loss"], rel=1e-4)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, factor * other, rtol=1e-3, atol=1e-5)


def test_a_cap_below_one_is_refused(tmp_path: Path) -> None:
    """It would weigh what the policy samples now less than it is worth."""
    with pytest.raises(ConfigError, match="learner.importance_cap"):
        make_config(tmp_path, learner={"importance_cap": 0.5})
