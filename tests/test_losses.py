import math

import pytest
import torch

from online_po.losses import LossInputs, pair_losses, sigmoid
from online_po.sections import LossConfig


def logps(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, requires_grad=grad)


def test_dpo_is_the_papers_formula_by_hand() -> None:
    # log-ratios: chosen 2 - 1 = 1, rejected -3 - (-1) = -2; margin = 0.5 * (1 + 2) = 1.5
    loss = sigmoid(logps(2.0), logps(-3.0), logps(1.0), logps(-1.0), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))  # -log sigmoid(1.5) = 0.2014133


def test_dpo_is_log_2_where_policy_is_reference() -> None:
    loss = sigmoid(logps(-5.0, -7.0), logps(-6.0, -1.0), logps(-5.0, -7.0), logps(-6.0, -1.0), beta=0.3)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_gradient_pushes_chosen_up_and_rejected_down_by_the_same() -> None:
    chosen, rejected = logps(2.0, grad=True), logps(-3.0, grad=True)
    sigmoid(chosen, rejected, logps(1.0), logps(-1.0), beta=0.5).sum().backward()
    # d loss / d chosen = -beta * sigmoid(-margin): eq. after eq. 7 in the paper
    expected = -0.5 / (1 + math.exp(1.5))
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(expected)
    assert rejected.grad.item() == pytest.approx(-expected)


def test_label_smoothing_mixes_both_labels() -> None:
    right = math.log(1 + math.exp(-1.5))
    wrong = math.log(1 + math.exp(1.5))
    loss = sigmoid(logps(2.0), logps(-3.0), logps(1.0), logps(-1.0), beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * right + 0.1 * wrong)


def test_label_smoothing_has_its_minimum_where_the_labels_are_right_with_that_probability() -> None:
    chosen = logps(math.log(0.9 / 0.1), grad=True)  # margin with sigmoid(margin) = 0.9
    sigmoid(chosen, logps(0.0), logps(0.0), logps(0.0), beta=1.0, label_smoothing=0.1).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_large_margins_stay_finite() -> None:
    loss = sigmoid(logps(1e4, -1e4), logps(-1e4, 1e4), logps(0.0, 0.0), logps(0.0, 0.0), beta=1.0)
    assert loss.tolist() == [0.0, 2e4]


def test_the_config_chooses_the_loss_and_its_settings() -> None:
    inputs = LossInputs(
        chosen_logps=logps(2.0, 1.0),
        rejected_logps=logps(-3.0, 0.0),
        reference_chosen_logps=logps(1.0, 1.0),
        reference_rejected_logps=logps(-1.0, 2.0),
    )
    found = pair_losses(LossConfig(name="sigmoid", beta=0.5, label_smoothing=0.2), inputs)
    expected = sigmoid(
        logps(2.0, 1.0), logps(-3.0, 0.0), logps(1.0, 1.0), logps(-1.0, 2.0), beta=0.5, label_smoothing=0.2
    )
    assert found.shape == (2,)
    assert torch.equal(found, expected)
