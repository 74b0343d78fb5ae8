"""Beta as configured, by round, and held by a controller."""

from __future__ import annotations

import pytest

from online_po.betas import drifted, next_scale, round_betas
from online_po.errors import ConfigError
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.loss_configs import LOSS_BY_NAME
from online_po.reference_configs import BetaControlConfig
from online_po.types import Reference
from tests.fakes import make_config
from tests.test_loop import make_parts


def control(**changes):
    return BetaControlConfig(**({"target_kl": 4.0} | changes))


def test_a_list_gives_each_round_its_own_and_the_scale_touches_references_only():
    losses = [LOSS_BY_NAME["sigmoid"](beta=[0.1, 0.2, 0.4]), LOSS_BY_NAME["cpo"](), LOSS_BY_NAME["sft"]()]
    assert round_betas(losses, 1, 1.0) == [0.1, 0.1, None]
    assert round_betas(losses, 3, 0.5) == [0.2, 0.1, None]


def test_the_controller_raises_beta_where_the_policy_is_too_far_and_the_error_is_clipped():
    assert next_scale(control(), 1.0, 4.0) == 1.0
    assert next_scale(control(), 1.0, 4.4) == pytest.approx(1.1)
    assert next_scale(control(), 2.0, 100.0) == pytest.approx(2.4)
    assert next_scale(control(gain=0.5), 1.0, -3.0) == pytest.approx(0.9)
    assert next_scale(control(max_scale=1.05), 1.0, 100.0) == 1.05
    assert next_scale(control(min_scale=0.95), 1.0, 0.0) == 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"beta": [0.1, 0.2]}}, "loss.beta of sigmoid is a list of 2, but loop.rounds is 3"),
        ({"loss": {"beta": []}}, "loss"),
        ({"loss": {"beta": [0.1, -1, 0.1]}}, "loss"),
        ({"beta_control": {"target_kl": 0}}, "beta_control.target_kl"),
        ({"beta_control": {"target_kl": 1, "gain": 5, "max_error": 0.5}}, "keep it below 1"),
        ({"beta_control": {"target_kl": 1}, "loss": {"name": "simpo"}}, "no beta against a reference"),
        ({"beta_control": {"target_kl": 1}, "reference": {"kind": "refresh"}}, "zero before it is measured"),
        (
            {"beta_control": {"target_kl": 1}, "reference": {"kind": "refresh", "every": 2}, "loop__max_staleness": 1},
            "zero before it is measured",
        ),
        ({"beta_control": {"target_kl": 1}, "reference": {"kind": "ema", "alpha": 1}}, "zero before it is measured"),
        ({"beta_control": {"target_kl": 1}, "loop__rounds": 1}, "beta_control is set, but loop.rounds is 1"),
        (
            {"beta_control": {"target_kl": 5}, "reference": {"kind": "kl", "above": 5}},
            "beta_control.target_kl is 5, but at reference.above = 5 the reference takes the policy's place",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **change)


def test_only_a_policy_that_left_the_reference_tells_of_beta():
    assert drifted(Reference(round=0), 1) and drifted(Reference(round=2), 3)
    assert not drifted(Reference(round=2), 2)
    assert not drifted(Reference(round=2), 1)  # sampled by an older policy, under loop.max_staleness
    assert drifted(Reference(round=2, blended=True), 2)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"kind": "fixed"}, [False] * 4),
        ({"kind": "refresh"}, [False, True, True, True]),
        ({"kind": "refresh", "every": 2}, [False, False, True, False]),
        ({"kind": "ema", "alpha": 0.5}, [False, True, True, True]),
    ],
)
def test_the_learner_is_told_of_another_reference(tmp_path, reference, expected):
    parts = make_parts(make_config(tmp_path, reference=reference, loop__rounds=4))
    run_rounds(parts)
    assert parts.learner.new_references == expected


def test_the_learner_gets_the_rounds_betas(tmp_path):
    parts = make_parts(make_config(tmp_path, loss={"beta": [0.1, 0.2, 0.3]}))
    run_rounds(parts)
    assert parts.learner.betas == [[0.1], [0.2], [0.3]]
    assert parts.ledger.config().loss[0].beta == (0.1, 0.2, 0.3)


def test_the_controllers_scale_is_in_the_ledger_and_waits_for_a_policy_that_moved(tmp_path):
    config = make_config(tmp_path, beta_control={"target_kl": 1e-3, "max_error": 0.5}, loop__rounds=4)
    parts = make_parts(config)
    run_rounds(parts)
    scales = [Ledger(config.run_dir).committed(round_).beta_scale for round_ in range(5)]
    assert scales[:2] == [1.0, 1.0]  # round 1 was sampled by the reference itself
    assert scales[2] != 1.0 and parts.learner.betas == [[0.1 * scale] for scale in scales[:-1]]
