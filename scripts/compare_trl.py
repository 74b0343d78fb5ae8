"""Loss and gradient norm of every loss that TRL has too, ours beside TRL's trainers, on fixed batches of a tiny model.

    pip install -e '.[trl]'
    python scripts/compare_trl.py [--write]

Both sides start from the same random weights and token ids, on the CPU in float32. TRL's side is its trainers' own code
(trl_theirs.py); ours is the learner where it trains with the loss, else the loss function over `LogpModel`
(trl_ours.py). Fails if two that should agree do not, if two that are said to differ agree, or if TRL has a loss that
this script does not know. --write puts what was measured into docs/trl.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import trl_ours
from online_po.loss_configs import LOSS_BY_NAME
from trl_cases import AGREEING, DEFAULTS, DIFFERING, NOT_OURS, Case
from trl_ours import Bench, make_bench

PAGE = Path(__file__).parents[1] / "docs" / "trl.md"
TOLERANCE = 1e-4
"""Relative difference that rounding in float32 may make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One case's figures."""

    case: Case
    loss: tuple[float, float]
    """TRL's, ours."""
    grad_norm: tuple[float, float]
    """TRL's, ours."""
    through: str
    """Which code of ours: learner or function."""

    @property
    def difference(self) -> float:
        """The larger of the two relative differences."""
        return max(abs(ours - trl) / max(abs(trl), 1e-12) for trl, ours in (self.loss, self.grad_norm))

    @property
    def as_expected(self) -> bool:
        return (self.difference <= TOLERANCE) == self.case.agrees and math.isfinite(self.difference)


# -- the comparison ----------------------------------------------------------------------------------------------------


def measure(case: Case, bench: Bench) -> Measured:
    """One case on both sides."""
    import trl_theirs

    examples = [
        trl_theirs.Example(prompt=prompt, chosen=chosen, rejected=rejected)
        for prompt, chosen, rejected in bench.batches[case.batch]
    ]
    theirs = trl_theirs.loss_and_grad_norm(
        case.trainer, case.settings, examples, bench.policy, bench.reference, one_by_one=case.one_by_one
    )
    ours = trl_ours.loss_and_grad_norm(case, bench)
    return Measured(
        case=case,
        loss=(theirs[0], ours[0]),
        grad_norm=(theirs[1], ours[1]),
        through="learner" if trl_ours.by_learner(case) else "function",
    )


def compare(cases: Sequence[Case] = AGREEING + DIFFERING) -> list[Measured]:
    """Every case, on models made for it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(Path(folder))
        return [measure(case, bench) for case in cases]


def compared_types() -> set[tuple[str, str]]:
    """(trainer, loss type) of TRL that a case that agrees has."""
    found = set()
    for case in AGREEING:
        types = case.settings.get("loss_type", "")
        found |= {(case.trainer, name) for name in ([types] if isinstance(types, str) else types)}
    return found


def unknown_types() -> set[tuple[str, str]]:
    """(trainer, loss type) of the installed TRL that is neither compared nor listed as not ours."""
    from trl_theirs import loss_types

    return loss_types() - compared_types() - set(NOT_OURS)


def only_ours() -> list[str]:
    """Our losses that no case of TRL agrees with."""
    compared = {loss.name for case in AGREEING for loss in case.ours}
    return [name for name in LOSS_BY_NAME if name not in compared]


# -- what is shown -----------------------------------------------------------------------------------------------------


def show(rows: Sequence[Measured], console: Console) -> None:
    table = Table(title="ours beside TRL: loss and gradient norm")
    for name in ("ours", "TRL", "batch"):
        table.add_column(name, overflow="fold")
    for name in ("loss TRL", "loss ours", "grad TRL", "grad ours", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        verdict = "agrees" if row.difference <= TOLERANCE else "differs"
        style = ("green" if row.case.agrees else "yellow") if row.as_expected else "bold red"
        text = verdict if row.as_expected else f"{verdict.upper()}, UNEXPECTED"
        figures = [f"{value:.6g}" for value in (*row.loss, *row.grad_norm)] + [f"{row.difference:.1e}"]
        table.add_row(row.case.ours_text, row.case.trl_text, row.case.batch, *figures, f"[{style}]{text}[/]")
    console.print(table)


def page(rows: Sequence[Measured]) -> str:
    """docs/trl.md."""
    from trl_theirs import VERSION, default

    agreeing = [_cells(row) for row in rows if row.case.agrees]
    differing = [_cells(row) for row in rows if not row.case.agrees]
    defaults = [
        f"| `{name}` | `{option}` | {_value(LOSS_BY_NAME[name].model_fields[option].default)} "
        f"| {trainer}Trainer `{theirs}` | {_value(default(trainer, theirs))} |"
        for name, option, trainer, theirs in DEFAULTS
    ]
    not_ours = [f"- {trainer}Trainer `{name}`: {what}." for (trainer, name), what in NOT_OURS.items()]
    head = "| ours | TRL | batch | loss, TRL | loss, ours | gradient norm, TRL | gradient norm, ours | by | note |"
    return PAGE_TEXT.format(
        version=VERSION,
        torch=torch.__version__.split("+")[0],
        tolerance=f"{TOLERANCE:g}",
        head=f"{head}\n{'|---' * 9}|",
        agreeing="\n".join(agreeing),
        differing="\n".join(differing),
        defaults="\n".join(defaults),
        not_ours="\n".join(not_ours),
        only_ours=", ".join(f"`{name}`" for name in only_ours()),
    )


def _cells(row: Measured) -> str:
    case = row.case
    figures = [f"{value:.5g}" for value in (*row.loss, *row.grad_norm)]
    cells = [f"`{case.ours_text}`", f"`{case.trl_text}`", case.batch, *figures, row.through, case.note]
    return f"| {' | '.join(cells)} |"


def _value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


PAGE_TEXT = """# Beside TRL

<!-- Written by scripts/compare_trl.py --write; edit scripts/trl_cases.py instead. -->

The losses that TRL has too, measured: one batch, one tiny random Llama as policy, another as reference, float32 on the
CPU, TRL {version}, torch {torch}. TRL's figures are its trainers' own (collator, forward pass, loss, backward pass);
ours come from the learner, or from the loss function where a case sets an input by hand. Make
them again with `pip install -e '.[trl]' && python scripts/compare_trl.py`.

Batches: `ragged` has six pairs of random tokens and lengths, most ending with EOS and two cut off; `even` the same with
prompts of one token and chosen responses of one length; `greedy` the policy's own likeliest tokens.

## The same function

With these settings loss and gradient norm agree to a relative {tolerance}.

{head}
{agreeing}

## Different as they come

The same losses, where one of the two has another idea of them. Both are measured as they are.

{head}
{differing}

Not measured here, where TRL gets the batch as one micro-batch: TRL takes the mean of a loss over the pairs of a
micro-batch, and then the mean over micro-batches; we take it over the pairs of the optimizer step, so that in a
micro-batch of fewer pairs none counts more. Losses that look at the other pairs (`aot`, `aot_unpaired`, `kto`) see, in
TRL, those of a micro-batch.

## Defaults

| ours | option | default | TRL | default |
|---|---|---|---|---|
{defaults}

TRL has one `beta`, and one `label_smoothing`, for all losses of a trainer, whose defaults suit the first of them: with
a label smoothing of 0 `robust` is DPO and `exo_pair` is refused. Ours are each loss's own; those of `discopop`,
`ln_dpo`, `simpo`, `alphapo`, `rdpo` and `exo_pair` are from the papers or their authors' code.

## What TRL has and we have not

{not_ours}
- Label smoothing in `aot`, `aot_unpaired`, and in CPOTrainer's and TPOTrainer's losses.
- f-divergences in losses other than DPO's (`hinge`, `ipo`, `exo_pair`, `robust`, `discopop`, `sigmoid_norm`); ours is
  `f_dpo`. The same for WPO's weights and LD-DPO's: options of every loss there, the losses `wpo` and `ld_dpo` here.
- TPOTrainer's third, gold response.

## What we have and TRL has not

{only_ours}; and `sppo` with the judge's probabilities.

TRL's trainers of BCO, XPO and Nash-MD are there in version 1.13 and gone in 1.15. That BCOTrainer was measured once, in
the same way: on the ragged batch, as first step, where its running mean is the batch's, loss (0.58116) and gradient
norm (0.88107) are those of `bco`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/trl.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare()
    console = Console(width=max(160, Console().width))
    show(rows, console)
    faults = [f"{r.case.ours_text} beside {r.case.trl_text}" for r in rows if not r.as_expected]
    faults += [f"{trainer}Trainer's loss {name!r} is not known to this script" for trainer, name in unknown_types()]
    if faults:
        sys.exit("not as expected: " + "; ".join(faults))
    if args.write:
        PAGE.write_text(page(rows), encoding="utf-8")
        console.print(f"written: {PAGE.name}")


if __name__ == "__main__":
    main()
