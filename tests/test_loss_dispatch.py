"""Losses by name: class and function fit, what they need, mixtures, schedules, a loss of one's own."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from pydantic import ValidationError

from online_po.loss_configs import LOSSES, Simpo
from online_po.losses import FUNCTIONS, LossInputs, UnpairedInputs, pair_losses, tensor_names, unpaired_losses
from online_po.losses.dispatch import tensor_parameters
from tests.loss_cases import (
    ADAPTER,
    CASES,
    NAMED,
    arrays,
    config,
    losses,
    option_values,
    paired_arrays,
    tensors,
    unpaired_arrays,
)
from tests.loss_formulas import FORMULAS


@pytest.mark.parametrize("name", NAMED)
def test_a_class_has_a_function_with_its_options_and_tensors_that_are_inputs(name):
    function, loss = FUNCTIONS[name], NAMED[name]
    parameters = inspect.signature(function).parameters.values()
    options = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert options == set(loss.model_fields) - {"name", "weight"}
    inputs = LossInputs if loss.kind == "paired" else UnpairedInputs
    names = list(tensor_parameters(function))
    assert len(names) + len(options) == len(parameters)
    assert set(names) <= {field.name for field in dataclasses.fields(inputs)}
    assert loss.needs_reference == any(key.startswith("reference") for key in names)
    assert loss.needs_scores == ("chosen_scores" in names)
    assert all(getattr(loss, text) for text in ("formula", "paper", "use_when"))
    assert function.__doc__ is not None and "Fails" in function.__doc__


def test_there_is_a_function_a_class_and_a_formula_for_every_loss():
    assert set(FUNCTIONS) == set(NAMED) == set(FORMULAS)
    assert len(LOSSES) == len(NAMED) + 1  # custom


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_option_has_an_effect(name, options):
    t = tensors(arrays(name))
    if name == "beta_dpo":  # with the batch's own mean and keep 1, beta is the configured one
        t["margin_mean"] = torch.tensor(-1.0, dtype=torch.float64)
    loss = config(name, **options)
    here = losses(loss, t)
    for field, value in option_values(loss).items():
        if not isinstance(value, float):
            continue
        changed = loss.model_copy(update={field: value * 0.5 + 0.02})
        assert not torch.equal(losses(changed, t), here), field


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "simpo", "gama": 1}, "gama"),
        ({"name": "simpo", "beta": 0}, "greater than 0"),
        ({"name": "rdpo", "label_smoothing": 0.5}, "less than 0.5"),
        ({"name": "nope"}, "does not match any of the expected tags"),
        ({"name": "f_dpo", "divergence": "alpha"}, "give alpha"),
        ({"name": "f_dpo", "alpha": 0.5}, "give alpha"),
        ({"name": "sigmoid", "label_smoothing": 0.1}, "label_smoothing"),
        ({"name": "custom", "function": "nocolon"}, "match pattern"),
        ({"name": "sft", "beta": 1.0}, "beta"),
    ],
)
def test_options_that_a_loss_does_not_have_are_refused(data, message):
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(data)


def test_a_missing_input_is_named():
    t = tensors(paired_arrays())
    del t["chosen_scores"]
    with pytest.raises(ValueError, match="odpo, which needs chosen_scores"):
        losses(config("odpo"), t)
    del t["preference_probabilities"]
    with pytest.raises(ValueError, match="soft needs preference_probabilities"):
        losses(config("sppo", probability="soft"), t)


def test_pairs_and_single_responses_are_not_mixed_up():
    with pytest.raises(ValueError, match="kto, which is unpaired, but the data are paired"):
        pair_losses(config("kto"), LossInputs(**tensors(paired_arrays())))
    with pytest.raises(ValueError, match="sigmoid, which is paired, but the data are unpaired"):
        unpaired_losses(config("sigmoid"), UnpairedInputs(**tensors(unpaired_arrays())))


def test_a_mixture_is_the_weighted_sum():
    t = tensors(paired_arrays())
    mixture = [config("sigmoid", weight=0.8), config("bco_pair", weight=0.2), config("sft")]
    parts = [losses(config(name), t) for name in ("sigmoid", "bco_pair", "sft")]
    torch.testing.assert_close(losses(mixture, t), 0.8 * parts[0] + 0.2 * parts[1] + parts[2])
    with pytest.raises(ValueError, match="empty list"):
        pair_losses([], LossInputs(**t))


def test_a_scheduled_beta_replaces_the_configured_one():
    t = tensors(paired_arrays())
    torch.testing.assert_close(losses(config("sigmoid"), t, 0.3), losses(config("sigmoid", beta=0.3), t))
    mixture = [config("sigmoid"), config("simpo"), config("sft")]
    one_for_all = losses([config("sigmoid", beta=0.3), config("simpo", beta=0.3), config("sft")], t)
    torch.testing.assert_close(losses(mixture, t, 0.3), one_for_all)
    one_each = losses([config("sigmoid", beta=0.3), config("simpo"), config("sft")], t)
    torch.testing.assert_close(losses(mixture, t, [0.3, None, None]), one_each)
    with pytest.raises(ValueError, match="2 betas were given for 3 losses"):
        losses(mixture, t, [0.3, 0.2])


def test_tensor_names_say_what_the_learner_must_compute():
    assert tensor_names(config("sft")) == {"chosen_logps", "chosen_lengths"}
    assert "preference_probabilities" not in tensor_names(config("sppo"))
    assert "preference_probabilities" in tensor_names(config("sppo", probability="soft"))
    assert config("sppo", probability="soft").needs_probabilities and not config("sppo").needs_probabilities
    mixture = [config("simpo"), config("wpo")]
    assert tensor_names(mixture) == tensor_names(mixture[0]) | tensor_names(mixture[1])
    assert not any("reference" in name for name in tensor_names(config("simpo")))
    assert "chosen_weight_logps" in tensor_names(mixture)


# --- a loss of one's own ---------------------------------------------------------------------------------------------

OWN = """
import torch

def flat(chosen_logps, rejected_logps, *, beta, slope=1.0):
    return torch.relu(slope - beta * (chosen_logps - rejected_logps))

def scored(chosen_logps, chosen_scores):
    return -chosen_logps * chosen_scores

def strange(chosen_logps, rejected_logp):
    return chosen_logps

def greedy(chosen_logps, **rest):
    return chosen_logps

def needy(chosen_logps, *, power):
    return chosen_logps ** power
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_losses_of_a_test"


def test_a_loss_of_ones_own_gets_the_tensors_it_names_and_its_options(own):
    t = tensors(paired_arrays())
    loss = config("custom", function=f"{own}:flat", beta=0.2, options={"slope": 3})
    margins = t["chosen_logps"] - t["rejected_logps"]
    torch.testing.assert_close(losses(loss, t), torch.relu(3 - 0.2 * margins))
    torch.testing.assert_close(losses(loss, t, 0.5), torch.relu(3 - 0.5 * margins))
    assert tensor_names(loss) == {"chosen_logps", "rejected_logps"}
    scored = config("custom", function=f"{own}:scored", weight=0.5)
    torch.testing.assert_close(losses(scored, t), -0.5 * t["chosen_logps"] * t["chosen_scores"])


@pytest.mark.parametrize(
    ("function", "extra", "message"),
    [
        ("strange", {}, "parameter 'rejected_logp' is no input of a loss; did you mean 'rejected_logps'"),
        ("greedy", {}, "parameter 'rest' is no input of a loss"),
        ("needy", {}, "option 'power' has no value; give it in loss.options"),
        ("flat", {"options": {"slop": 1}}, r"loss.options has 'slop', but the options of .* are: slope"),
        ("scored", {"beta": 0.2}, "takes no option beta, but loss.beta is 0.2"),
        ("flatt", {}, "has no 'flatt'; did you mean 'flat'"),
    ],
)
def test_a_loss_of_ones_own_that_cannot_be_called_is_refused(own, function, extra, message):
    with pytest.raises(ValueError, match=message):
        losses(config("custom", function=f"{own}:{function}", **extra), tensors(paired_arrays()))


def test_a_module_that_is_not_there_is_refused(own):
    with pytest.raises(ValueError, match="loss.function is 'own_losses_of_a_tost:flat'.* did you mean 'own_losses_of"):
        losses(config("custom", function="own_losses_of_a_tost:flat"), tensors(paired_arrays()))


def test_a_loss_is_a_frozen_section():
    with pytest.raises(ValidationError):
        Simpo().beta = 1.0  # type: ignore[misc]
