"""Losses: values and gradients against `loss_formulas`, special cases, extremes, invariances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from online_po.losses import FUNCTIONS, kto_kl
from online_po.losses.dispatch import tensor_parameters
from tests.loss_cases import (
    CASES,
    NAMED,
    PAIRED,
    UNPAIRED,
    B,
    arrays,
    config,
    losses,
    option_values,
    paired_arrays,
    policy_fields,
    tensors,
)
from tests.loss_formulas import FORMULAS

# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_values_are_those_of_the_independent_formula(name, options, seed):
    x, loss = arrays(name, seed), config(name, **options)
    expected = FORMULAS[name](x, x, **option_values(loss))
    found = losses(loss, tensors(x))
    assert found.shape == (B,)
    assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    in_float32 = losses(loss, tensors(x, torch.float32))
    assert in_float32.dtype == torch.float32
    assert in_float32.numpy() == pytest.approx(expected, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradients_are_those_of_the_independent_formula(name, options):
    x, loss = arrays(name), config(name, **options)
    t = tensors(x)
    fields = policy_fields(name)
    for field in fields:
        t[field].requires_grad_(True)
    cotangent = np.random.default_rng(5).uniform(0.5, 1.5, B)
    (losses(loss, t) * torch.tensor(cotangent)).sum().backward()
    step = 1e-6
    for field in fields:
        numeric = np.zeros(B)
        for i in range(B):
            for sign in (1, -1):
                moved = {**x, field: x[field] + sign * step * (np.arange(B) == i)}
                numeric[i] += sign * (cotangent * FORMULAS[name](moved, x, **option_values(loss))).sum() / (2 * step)
        grad = t[field].grad
        found = np.zeros(B) if grad is None else grad.numpy()  # None: the branch does not read the field
        assert found == pytest.approx(numeric, rel=1e-5, abs=1e-7), field


@pytest.mark.parametrize("name", ["bco_pair", "beta_dpo", "bco"])
def test_running_means_take_the_place_of_the_batchs(name):
    field = "margin_mean" if name == "beta_dpo" else "log_ratio_mean"
    x = {**arrays(name), field: np.array(1.3)}
    loss = config(name)
    found = losses(loss, tensors(x)).numpy()
    assert found == pytest.approx(FORMULAS[name](x, x, **option_values(loss)), rel=1e-9)
    assert found != pytest.approx(losses(loss, tensors(arrays(name))).numpy(), rel=1e-3)


def test_dpo_by_hand():
    # log-ratios: chosen 2 - 1 = 1, rejected -3 - (-1) = -2; margin = 0.5 * (1 + 2) = 1.5
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    loss = FUNCTIONS["sigmoid"](chosen, rejected, torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))  # 0.2014133
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 + math.exp(1.5)))  # -beta * sigmoid(-margin)
    assert rejected.grad.item() == pytest.approx(0.5 / (1 + math.exp(1.5)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [  # policy = reference, lengths 10 and 5, logps -10 and -10, scores 2 and 1, all by hand
        ("sigmoid", {}, math.log(2)),
        ("cdpo", {}, math.log(2)),
        ("rdpo", {"label_smoothing": 0.2}, math.log(2)),
        ("ipo", {"beta": 0.5}, 1.0),
        ("hinge", {}, 1.0),
        ("exo_pair", {"label_smoothing": 0.25}, math.log(2 / math.sqrt(3))),  # KL of (1/2, 1/2) to (3/4, 1/4)
        ("nca_pair", {}, 2 * math.log(2)),
        ("bco_pair", {}, 2 * math.log(2)),
        ("sppo", {"beta": 0.25}, 8.0),
        ("aot", {}, math.log(2)),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("discopop", {}, 0.5 * math.log(2) + 0.5),
        ("r_dpo", {"alpha": 0.1}, math.log(1 + math.exp(-0.5))),
        ("odpo", {}, math.log(2)),  # log of the gap 1 is 0
        ("odpo", {"transform": "identity"}, math.log(1 + math.e)),
        ("madpo", {"threshold": 1.0}, math.log(2)),  # the gap is the threshold: the weight is 1
        ("f_dpo", {}, math.log(2)),
        ("xpo", {"alpha": 0.01}, math.log(2) - 0.1),
        ("simpo", {"beta": 2.0, "gamma": 0.5}, math.log(1 + math.exp(-1.5))),  # 2 * (-1 + 2) - 0.5
        ("cpo", {}, math.log(2) + 1.0),
        ("sft", {}, 1.0),
        ("kto", {}, 1 - 1 / (1 + math.exp(0.1 * 0.7))),  # a - kl = -0.7
        ("bco", {}, math.log(2)),
    ],
)
def test_numbers_by_hand_where_policy_is_reference(name, options, expected):
    one = {key: value[:1] if value.ndim else value for key, value in arrays(name).items()}
    for key in one:
        if key.endswith("logps"):
            one[key] = np.array([-10.0])
    if name in PAIRED:
        one |= {"chosen_lengths": np.array([10.0]), "rejected_lengths": np.array([5.0])}
        one |= {"chosen_scores": np.array([2.0]), "rejected_scores": np.array([1.0])}
    assert losses(config(name, **options), tensors(one)).item() == pytest.approx(expected)


# --- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpo", {"label_smoothing": 0}),
        ("rdpo", {"label_smoothing": 0}),
        ("ld_dpo", {"alpha": 1}),
        ("r_dpo", {"alpha": 0}),
        ("dpop", {"penalty": 0, "beta": 0.1}),
        ("odpo", {"alpha": 0}),
        ("madpo", {"amplify": 1 + 1e-12, "dampen": 1 - 1e-12}),
        ("beta_dpo", {"alpha": 0, "keep": 1}),
        ("f_dpo", {"divergence": "reverse_kl"}),
        ("xpo", {"alpha": 0}),
    ],
)
def test_special_cases_are_dpo(name, options):
    t = tensors(paired_arrays())
    torch.testing.assert_close(losses(config(name, **options), t), losses(config("sigmoid"), t))


def test_madpo_on_labels_of_a_reward_model_teaches_its_margin_times_a_factor():
    gap, threshold, amplify, dampen = 1.2, 2.0, 3.0, 0.4
    k = (amplify - 1) / (1 - dampen)
    factor = dampen + (amplify - dampen) / (1 + k * math.exp(gap - threshold))
    loss = config("madpo", beta=0.1, amplify=amplify, dampen=dampen, threshold=threshold)
    better = 1 / (1 + math.exp(-gap))  # how often the response of the higher score is the chosen one

    def slope(margin: float) -> float:
        """Of the expected loss in the margin of the response of the higher score."""
        moved = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
        none, zero = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        t = {name: none for name in tensor_parameters(FUNCTIONS["madpo"])}
        scores = {"chosen_scores": zero + gap, "rejected_scores": zero}
        flipped = {"chosen_scores": zero, "rejected_scores": zero + gap}
        right = losses(loss, {**t, **scores, "chosen_logps": moved})
        wrong = losses(loss, {**t, **flipped, "rejected_logps": moved})
        (better * right + (1 - better) * wrong).sum().backward()
        assert moved.grad is not None
        return moved.grad.item()

    assert slope(factor * gap / 0.1) == pytest.approx(0, abs=1e-9)
    assert slope(factor * gap / 0.1 - 1) < -1e-5
    assert slope(factor * gap / 0.1 + 1) > 1e-5


def test_madpo_leaves_labels_against_clear_scores_as_they_are():
    t = tensors(paired_arrays())
    t["chosen_scores"] = t["rejected_scores"] - 2.5
    torch.testing.assert_close(losses(config("madpo"), t), losses(config("sigmoid"), t))
    t["chosen_scores"] = t["rejected_scores"] - 1.5
    assert (losses(config("madpo"), t) < losses(config("sigmoid"), t)).all()


def test_dpop_is_dpo_where_the_chosen_response_grew_likelier():
    t = tensors(paired_arrays())
    t["chosen_logps"] = t["reference_chosen_logps"] + 1
    torch.testing.assert_close(losses(config("dpop", beta=0.1), t), losses(config("sigmoid"), t))


def test_wpo_with_weights_of_1_or_more_is_dpo():
    t = tensors(paired_arrays())
    t["chosen_weight_logps"], t["rejected_weight_logps"] = torch.zeros(B), torch.full((B,), 0.3)
    torch.testing.assert_close(losses(config("wpo"), t), losses(config("sigmoid"), t))


@pytest.mark.parametrize(
    ("name", "field"),
    [("wpo", "chosen_weight_logps"), ("bco_pair", "log_ratio_mean"), ("beta_dpo", "margin_mean"), ("kto", "kl")],
)
def test_no_gradient_flows_through_what_the_paper_holds_constant(name, field):
    t = {**tensors(arrays(name)), "log_ratio_mean": torch.tensor(0.5, dtype=torch.float64)}
    t["margin_mean"] = torch.tensor(0.5, dtype=torch.float64)
    t = {key: t[key] for key in (*tensor_parameters(FUNCTIONS[name]),)}
    t[field].requires_grad_(True)
    t["logps" if name == "kto" else "chosen_logps"].requires_grad_(True)
    losses(config(name), t).sum().backward()
    assert t[field].grad is None


def test_ln_dpo_of_responses_of_one_token_is_dpo():
    t = tensors(paired_arrays())
    t["chosen_lengths"] = t["rejected_lengths"] = torch.ones(B)
    torch.testing.assert_close(losses(config("ln_dpo", beta=0.1), t), losses(config("sigmoid"), t))
    torch.testing.assert_close(losses(config("ipo"), t), losses(config("ipo", average_logps=False), t))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_of_one_pair_is_dpo(name):
    t = {key: value[:1] for key, value in tensors(paired_arrays()).items()}
    torch.testing.assert_close(losses(config(name), t), losses(config("sigmoid"), t))


@pytest.mark.parametrize(("alpha", "divergence"), [(1e-6, "reverse_kl"), (1 - 1e-9, "forward_kl")])
def test_the_ends_of_the_alpha_divergence(alpha, divergence):
    t = tensors(paired_arrays())
    found = losses(config("f_dpo", divergence="alpha", alpha=alpha), t)
    torch.testing.assert_close(found, losses(config("f_dpo", divergence=divergence), t), rtol=1e-4, atol=1e-6)


def test_alphapo_towards_0_is_simpo():
    t = tensors(paired_arrays())
    simpo = losses(config("simpo", beta=2.5, gamma=0.1), t)
    torch.testing.assert_close(losses(config("alphapo", alpha=0), t), simpo)
    torch.testing.assert_close(losses(config("alphapo", alpha=1e-6), t), simpo, rtol=1e-4, atol=1e-6)


def test_orpo_without_odds_and_cpo_without_preference_are_sft():
    t = tensors(paired_arrays())
    torch.testing.assert_close(losses(config("orpo", odds_weight=0), t), losses(config("sft"), t))
    cpo = losses(config("cpo"), t) - losses(config("cpo", nll_weight=0), t)
    torch.testing.assert_close(cpo, losses(config("sft"), t))


def test_soft_sppo_with_certainty_is_hard_sppo():
    t = tensors(paired_arrays())
    t["preference_probabilities"] = torch.ones(B, dtype=torch.float64)
    torch.testing.assert_close(losses(config("sppo", probability="soft"), t), losses(config("sppo"), t))


def minimum(name: str, options: dict[str, Any], field: str, grid: np.ndarray) -> float:
    """Where on the grid of log-ratios of one field the loss is least; everything else at the reference."""
    t = tensors({key: value[:1] for key, value in paired_arrays().items()})
    zero = torch.zeros(len(grid), dtype=torch.float64)
    t = {key: value.expand(len(grid)) for key, value in t.items()}
    t |= {k: zero for k in ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps")}
    t[field] = torch.tensor(grid)
    return float(grid[losses(config(name, **options), t).argmin()])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ipo", {"beta": 0.4, "average_logps": False}, 1 / (2 * 0.4)),
        ("cdpo", {"beta": 0.5, "label_smoothing": 0.1}, math.log(0.9 / 0.1) / 0.5),  # sigmoid(beta m) = 1 - e
        ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1}, math.log(0.9 / 0.1) / 0.5),
        ("nca_pair", {"beta": 0.5}, math.log(2) / 0.5),  # sigmoid(beta a) = 2/3
        ("sppo", {"beta": 0.2}, 0.5 / 0.2),
    ],
)
def test_minimum_is_where_the_paper_has_it(name, options, expected):
    grid = np.linspace(-8, 8, 3201)
    assert minimum(name, options, "chosen_logps", grid) == pytest.approx(expected, abs=0.006)


def test_ipo_averaged_has_its_minimum_at_a_margin_per_token():
    length = paired_arrays()["chosen_lengths"][0]
    found = minimum("ipo", {"beta": 0.4}, "chosen_logps", np.linspace(-30, 30, 12001))
    assert found / length == pytest.approx(1 / (2 * 0.4), abs=0.006)


def test_rdpo_over_flipped_labels_is_dpo_in_the_mean():
    t = tensors(paired_arrays())
    swap = {"chosen": "rejected", "rejected": "chosen"}
    flipped = {
        key: t[key.replace(side, swap[side])] for side in swap for key in t if side in key and key.endswith("logps")
    }
    robust = config("rdpo", label_smoothing=0.2)
    mean = 0.8 * losses(robust, t) + 0.2 * losses(robust, {**t, **flipped})
    torch.testing.assert_close(mean, losses(config("sigmoid"), t))


def test_beta_dpo_leaves_out_the_outlier_and_lowers_beta_with_the_margin():
    t = tensors(paired_arrays())
    for key in ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps"):
        t[key] = torch.zeros(5, dtype=torch.float64)
    t["chosen_logps"] = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0], dtype=torch.float64)
    t = {key: t[key] for key in tensor_parameters(FUNCTIONS["beta_dpo"]) if key in t}
    t["margin_mean"] = torch.tensor(4.5, dtype=torch.float64)
    found = losses(config("beta_dpo", beta=0.5, alpha=0.3, keep=0.8), t)
    own_beta = 0.5 * (1 + 0.3 * (2.5 - 4.5))  # mean of the kept four is 2.5: 0.2
    assert own_beta == pytest.approx(0.2)
    expected = [1.25 * math.log(1 + math.exp(-own_beta * margin)) for margin in (1, 2, 3, 4)]
    assert found.tolist() == pytest.approx([*expected, 0.0])


def test_kto_kl_is_the_mean_log_ratio_but_never_negative():
    logps = torch.tensor([-1.0, -5.0, -6.0], requires_grad=True)
    found = kto_kl(logps, torch.tensor([-4.0, -4.0, -4.0]))
    assert found.item() == 0.0  # (3 - 1 - 2) / 3
    found = kto_kl(logps, torch.tensor([-4.0, -4.0, -7.0]))
    assert found.item() == pytest.approx(1.0)
    assert found.shape == () and not found.requires_grad
    assert kto_kl(logps, torch.zeros(3)).item() == 0.0


# --- extremes --------------------------------------------------------------------------------------------------------

EXTREMES = [(c, r) for c in (1e4, 0.0, -1e4) for r in (1e4, 0.0, -1e4)]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_extreme_logps_give_finite_losses_and_gradients(name, options):
    n = len(EXTREMES)
    ones = torch.ones(n)
    t: dict[str, Tensor] = {}
    for field in {*tensor_parameters(FUNCTIONS[name]), *(["rejected_logps"] if name == "sft" else [])}:
        t[field] = ones.clone()
        if field.endswith("logps"):
            chosen = "chosen" in field or field == "logps"
            sign = -1 if field.startswith("reference") else 1  # log-ratios of up to +-2e4
            t[field] = torch.tensor([sign * (c if chosen else r) for c, r in EXTREMES])
    t |= {key: torch.zeros(()) for key in ("log_ratio_mean", "margin_mean") if key in t}
    if name in UNPAIRED:
        t["desirable"] = torch.arange(n) % 2 == 0
        t["kl"] = torch.tensor(1e4)
    for field in policy_fields(name):
        t[field].requires_grad_(True)
    found = losses(config(name, **options), t)
    assert torch.isfinite(found).all(), found
    found.sum().backward()
    for field in policy_fields(name):
        grad = t[field].grad
        assert grad is None or torch.isfinite(grad).all(), (field, grad)
        assert grad is None or torch.isfinite(grad.square().sum()), (field, grad)  # so is the norm


@pytest.mark.parametrize(("name", "options"), [("f_dpo", {"divergence": "forward_kl"}), ("alphapo", {})])
def test_past_the_exponents_cap_the_gradient_does_not_die(name, options):
    t = {key: torch.full((1,), -5.0) for key in tensor_parameters(FUNCTIONS[name])}
    t |= {key: torch.ones(1) for key in ("chosen_lengths", "rejected_lengths") if key in t}
    t["chosen_logps"] = torch.tensor([-3000.0], requires_grad=True)
    losses(config(name, **options), t).sum().backward()
    assert t["chosen_logps"].grad is not None
    assert t["chosen_logps"].grad.item() < -1e3


# --- properties ------------------------------------------------------------------------------------------------------

SHIFTS_WITH_REFERENCE = [name for name in NAMED if NAMED[name].needs_reference and name != "xpo"]
SHIFTS_OF_BOTH = [
    *("sigmoid", "cdpo", "rdpo", "hinge", "exo_pair", "aot", "aot_unpaired", "discopop", "r_dpo", "odpo", "madpo"),
    *("beta_dpo", "wpo"),
]
"""Losses of the margin alone: the same added to both responses' logps changes nothing."""
FALLS_WITH_MARGIN = [
    *("sigmoid", "rdpo", "hinge", "ln_dpo", "ld_dpo", "r_dpo", "dpop", "odpo", "madpo", "wpo", "f_dpo", "apo_zero"),
    *("simpo", "orpo", "cpo", "alphapo", "bco_pair"),
]
finite = st.floats(-50, 50, allow_nan=False)


@pytest.mark.parametrize("name", SHIFTS_WITH_REFERENCE)
@given(shift=finite, seed=st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_the_same_added_to_policy_and_reference_changes_nothing(name, shift, seed):
    t = tensors(arrays(name, seed))
    moved = {key: value + shift if key.endswith("logps") and "weight" not in key else value for key, value in t.items()}
    torch.testing.assert_close(losses(config(name), moved), losses(config(name), t), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SHIFTS_OF_BOTH)
@given(shift=finite, seed=st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_the_same_added_to_both_responses_changes_nothing_in_losses_of_the_margin(name, shift, seed):
    t = tensors(paired_arrays(seed))
    moved = {**t, "chosen_logps": t["chosen_logps"] + shift, "rejected_logps": t["rejected_logps"] + shift}
    torch.testing.assert_close(losses(config(name), moved), losses(config(name), t), rtol=1e-7, atol=1e-9)


def test_anchored_losses_do_change_with_both_responses():
    t = tensors(paired_arrays())
    moved = {**t, "chosen_logps": t["chosen_logps"] + 1, "rejected_logps": t["rejected_logps"] + 1}
    for name in ("nca_pair", "apo_zero", "apo_down", "sppo", "dpop", "cpo", "f_dpo", "xpo"):
        assert not torch.allclose(losses(config(name), moved), losses(config(name), t), rtol=1e-6), name


@pytest.mark.parametrize("name", FALLS_WITH_MARGIN)
@given(seed=st.integers(0, 50), step=st.floats(0.01, 5))
@settings(max_examples=15, deadline=None)
def test_the_loss_falls_as_the_chosen_response_grows_likelier_and_rises_with_the_rejected(name, seed, step):
    t = tensors(paired_arrays(seed))
    t["log_ratio_mean"] = torch.zeros((), dtype=torch.float64)
    loss = config(name)
    here = losses(loss, t)
    up = {k: v + step * 0.05 if k in ("chosen_logps", "chosen_prefix_logps") else v for k, v in t.items()}
    if name == "orpo":  # probabilities stay below 1
        up["chosen_logps"] = t["chosen_logps"].clamp(max=-1) * 0.999
        t = {**t, "chosen_logps": t["chosen_logps"].clamp(max=-1)}
        here = losses(loss, t)
    assert (losses(loss, up) <= here).all()
    assert (losses(loss, up) < here).any()
    down = {k: v - step if k in ("rejected_logps", "rejected_prefix_logps") else v for k, v in t.items()}
    assert (losses(loss, down) <= here).all()


@pytest.mark.parametrize("name", NAMED)
@given(order=st.permutations(range(B)), seed=st.integers(0, 50))
@settings(max_examples=8, deadline=None)
def test_losses_move_with_their_pairs(name, order, seed):
    t = tensors(arrays(name, seed))
    moved = {key: value[list(order)] if value.ndim else value for key, value in t.items()}
    torch.testing.assert_close(losses(config(name), moved), losses(config(name), t)[list(order)])


@pytest.mark.parametrize("name", NAMED)
def test_batchwise_says_whether_a_loss_depends_on_the_others(name):
    t = tensors(arrays(name))
    whole = losses(config(name), t)
    alone = torch.cat(
        [losses(config(name), {k: v[i : i + 1] if v.ndim else v for k, v in t.items()}) for i in range(B)]
    )
    # kto's KL comes from the batch, but from outside of the function.
    assert torch.allclose(whole, alone) == (not NAMED[name].batchwise or name == "kto")
