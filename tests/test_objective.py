"""What a step minimises, apart from any model: sums and means of metrics, running means, what is read together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from online_po.loss_configs import LOSS_BY_NAME
from online_po.objective import METRICS, Objective

CHOSEN, REJECTED = torch.tensor([-3.0, -4.0, -8.0]), torch.tensor([-5.0, -3.5, -9.0])
PAIRS = {
    "chosen_logps": CHOSEN,
    "rejected_logps": REJECTED,
    "reference_chosen_logps": torch.tensor([-4.0, -4.0, -6.0]),
    "reference_rejected_logps": torch.tensor([-5.0, -5.0, -6.0]),
}
LABELS = {
    "logps": torch.tensor([-3.0, -4.0, -8.0]),
    "reference_logps": torch.tensor([-4.0, -5.0, -6.0]),
    "desirable": torch.tensor([True, False, False]),
}


def objective(*names: str, **options: Any) -> Objective:
    return Objective([LOSS_BY_NAME[name](**options) for name in names])


def test_what_the_losses_of_a_run_read_decides_what_is_computed() -> None:
    plain, parts, whole = objective("sigmoid", "sft"), objective("sigmoid", "ld_dpo"), objective("sigmoid", "aot")
    assert not (plain.with_prefix or plain.with_weights or plain.with_kl or plain.whole_batch)
    assert parts.with_prefix and not parts.whole_batch
    assert whole.whole_batch and not whole.with_prefix
    assert objective("wpo").with_weights and objective("kto").with_kl
    custom = objective("custom", function=f"{__name__}:centred")
    assert custom.whole_batch  # a running mean is known once the whole step is


def centred(log_ratio_mean: Tensor, chosen_logps: Tensor) -> Tensor:
    return log_ratio_mean - chosen_logps


def test_a_custom_loss_may_name_a_running_mean_first() -> None:
    custom = objective("custom", function=f"{__name__}:centred")
    means = custom.moved_means(PAIRS)
    assert custom(PAIRS, [None], means, None).tolist() == pytest.approx((means["log_ratio_mean"] - CHOSEN).tolist())


def test_running_means_start_at_the_first_batch_and_move_by_a_tenth() -> None:
    # log-ratios: chosen 1, 0, -2; rejected 0, 1.5, -3; margins 1, -1.5, 1
    for name, key, now in (("bco_pair", "log_ratio_mean", -2.5 / 6), ("beta_dpo", "margin_mean", 0.5 / 3)):
        found = objective(name)
        assert found.moved_means(PAIRS) == {key: pytest.approx(now)}
        assert found.means == {}  # the caller says whether the step was made
        found.means = {key: 5.0}
        assert found.moved_means(PAIRS) == {key: pytest.approx(4.5 + 0.1 * now)}
    assert objective("bco").moved_means(LABELS) == {"log_ratio_mean": pytest.approx(0.0)}


def test_metrics_of_pairs() -> None:
    found = objective("sigmoid", beta=0.5)
    start = {"chosen_logps": CHOSEN - 1, "rejected_logps": REJECTED}
    metrics = found.metrics(found.sums(torch.tensor([1.0, 2.0, 6.0]), PAIRS, start, [None]))
    assert metrics == pytest.approx(
        {
            "loss": 3.0,
            "margin": 0.5 * 0.5 / 3,
            "chosen_reward": 0.5 * -1 / 3,
            "rejected_reward": 0.5 * -1.5 / 3,
            "chosen_logps": -5.0,
            "rejected_logps": -17.5 / 3,
            "kl_reference": -2.5 / 6,
            "kl_start": 0.5,
            "accuracy": 2 / 3,
        }
    )
    assert set(metrics) == set(METRICS) - {"importance_weight"}, "which is asked for"
    free = {name: value for name, value in PAIRS.items() if "reference" not in name}
    metrics = objective("simpo").metrics(objective("simpo").sums(torch.zeros(3), free, {}, [0.5]))
    assert metrics["chosen_reward"] == -2.5 and not {"kl_reference", "kl_start"} & metrics.keys()


def test_metrics_of_labels_are_by_kind() -> None:
    found = objective("apo_zero_unpaired", beta=0.5)
    sums = found.sums(torch.tensor([1.0, 2.0, 6.0]), LABELS, {}, [None])
    expected = {
        "loss": 3.0,
        "chosen_reward": 0.5,
        "rejected_reward": -0.25,
        "margin": 0.75,
        "chosen_logps": -3.0,
        "rejected_logps": -6.0,
        "kl_reference": 0.0,
        "accuracy": 2 / 3,
    }
    assert found.metrics(sums) == pytest.approx(expected)
    one = found.sums(torch.tensor([1.0]), {name: value[:1] for name, value in LABELS.items()}, {}, [None])
    other = found.sums(torch.tensor([2.0, 6.0]), {name: value[1:] for name, value in LABELS.items()}, {}, [None])
    assert found.metrics(one + other) == pytest.approx(expected)  # cut as you like
    assert not {"rejected_reward", "rejected_logps", "margin"} & found.metrics(one).keys()


def test_the_kl_of_kto_is_never_negative_and_zero_of_nothing() -> None:
    assert Objective.kl(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -3.0])).item() == 2.0
    assert Objective.kl(torch.tensor([-4.0]), torch.tensor([-1.0])).item() == 0.0
    assert Objective.kl(torch.empty(0), torch.empty(0)).item() == 0.0


def test_a_list_of_betas_needs_the_rounds() -> None:
    found = objective("sigmoid", beta=[0.1, 0.2])
    with pytest.raises(Exception, match="say which round's"):
        found(PAIRS, [None], {}, None)
    losses = found(PAIRS, [0.2], {}, None)
    assert losses[0].item() == pytest.approx(math.log1p(math.exp(-0.2)))
