"""The losses beside TRL's trainers: the page, the script's verdicts, and, where TRL is installed, the comparison."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import compare_trl
from online_po.loss_configs import LOSS_BY_NAME
from trl_cases import AGREEING, DEFAULTS, DIFFERING, EOS, RAGGED, even_batch

PAGE = (Path(__file__).parents[1] / "docs" / "trl.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_losses_and_gradients_are_trls():
    pytest.importorskip("trl")
    rows = compare_trl.compare()
    odd = {f"{row.case.ours_text} beside {row.case.trl_text}": row.difference for row in rows if not row.as_expected}
    assert odd == {}
    assert compare_trl.unknown_types() == set()


@pytest.mark.parametrize("case", AGREEING + DIFFERING, ids=lambda case: f"{case.ours_text}-{case.trainer}")
def test_the_page_has_every_case(case):
    row = f"| `{case.ours_text}` | `{case.trl_text}` | {case.batch} |"
    lines = [line for line in PAGE.splitlines() if line.startswith(row)]
    assert len(lines) == 1
    assert case.note in lines[0]


def test_the_page_has_our_defaults():
    for name, option, trainer, _ in DEFAULTS:
        default = LOSS_BY_NAME[name].model_fields[option].default
        assert f"| `{name}` | `{option}` | {default:g} | {trainer}Trainer `" in PAGE


def test_every_loss_is_compared_or_said_to_be_ours_alone():
    alone = compare_trl.only_ours()
    assert ", ".join(f"`{name}`" for name in alone) in PAGE
    assert set(alone) == {"r_dpo", "dpop", "odpo", "madpo", "beta_dpo", "xpo", "bco", "custom"}


def test_batches_are_ragged_and_even():
    lengths = [len(response) for _, *pair in RAGGED for response in pair]
    assert len(set(lengths)) > 4
    cut_off = [response for _, *pair in RAGGED for response in pair if response[-1] != EOS]
    assert len(cut_off) == 2
    assert {len(prompt) for prompt, _, _ in even_batch()} == {1}
    assert len({len(chosen) for _, chosen, _ in even_batch()}) == 1


def test_what_is_not_as_expected_is_told():
    row = compare_trl.Measured(case=AGREEING[0], loss=(0.5, 0.50001), grad_norm=(2.0, 2.0), through="learner")
    assert row.difference == pytest.approx(2e-5)
    assert row.as_expected
    assert not dataclasses.replace(row, grad_norm=(2.0, 2.001)).as_expected
    assert not dataclasses.replace(row, loss=(0.5, float("nan"))).as_expected
    assert not dataclasses.replace(row, case=DIFFERING[0]).as_expected
    assert dataclasses.replace(row, case=DIFFERING[0], loss=(0.5, 0.6)).as_expected
