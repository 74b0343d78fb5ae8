"""Loss and gradient norm of every loss that TRL has too, ours beside TRL's trainers, on fixed batches of a tiny model.

    pip install -e '.[trl]'
    python scripts/compare_trl.py [--write]

Both sides start from the same random weights and the same token ids, on the CPU in float32. TRL's side is its trainers'
own code (scripts/trl_losses.py); ours is the learner where it trains with the loss, else the loss function over
`LogpModel`. Fails if two that should agree do not, if two that are said to differ agree, or if TRL has a loss that this
script does not know. --write puts what was measured into docs/trl.md.
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

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from make_tiny_model import make_tiny_model
from online_po.learner import TorchLearner
from online_po.logps import LogpModel
from online_po.loss_configs import LOSS_BY_NAME
from online_po.losses import LossInputs, UnpairedInputs, kto_kl, pair_losses, tensor_names, unpaired_losses
from online_po.sections import LearnerConfig, ModelConfig
from online_po.tables import PAIR_SCHEMA
from online_po.types import Policy
from trl_cases import AGREEING, DEFAULTS, DIFFERING, NOT_OURS, RAGGED, BatchName, Case, Pair, even_batch

PAGE = Path(__file__).parents[1] / "docs" / "trl.md"
TOLERANCE = 1e-4
"""Relative difference that rounding in float32 may make."""
GIVEN_BY_LEARNER = {
    f"{who}{side}_{what}"
    for side in ("chosen", "rejected")
    for who, what in (("", "logps"), ("reference_", "logps"), ("", "lengths"))
}
"""Inputs that the learner fills in from token ids and reference logps alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Two models in one folder, and the batches."""

    policy: Path
    reference: Path
    batches: dict[BatchName, list[Pair]]


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


# -- models and batches ------------------------------------------------------------------------------------------------


def make_bench(folder: Path) -> Bench:
    """A tiny random Llama, changed a little as policy and otherwise and more as reference."""
    policy = _perturbed(folder / "policy", seed=1, size=0.02)
    reference = _perturbed(folder / "reference", seed=5, size=0.06)
    greedy = [(prompt, _greedy(policy, prompt, 6), _greedy(policy, prompt, 3)) for prompt, _, _ in RAGGED]
    return Bench(policy=policy, reference=reference, batches={"ragged": RAGGED, "even": even_batch(), "greedy": greedy})


def _perturbed(folder: Path, seed: int, size: float) -> Path:
    make_tiny_model(folder, seed=0)
    model = load(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def _greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    model, ids = load(folder), list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# -- our side ----------------------------------------------------------------------------------------------------------


def through_learner(case: Case, pairs: Sequence[Pair], bench: Bench) -> tuple[float, float]:
    """(loss, gradient norm) of the learner's first step on the pairs, in several micro-batches."""
    table = pa.Table.from_pylist(
        [
            {
                "prompt_token_ids": prompt,
                "chosen_token_ids": chosen,
                "rejected_token_ids": rejected,
                "chosen_score": 1.0,
                "rejected_score": 0.0,
            }
            for prompt, chosen, rejected in pairs
        ],
        schema=PAIR_SCHEMA,
    )
    config = LearnerConfig(global_batch_size=len(pairs), micro_batch_tokens=100, warmup_ratio=0.0)
    learner = TorchLearner(ModelConfig(path=str(bench.policy)), config, case.ours, seed=0, rounds=1)
    reference = None
    if any(loss.needs_reference for loss in case.ours):
        reference = {side: np.full(len(pairs), np.nan, dtype=np.float32) for side in ("chosen", "rejected")}
        for part in learner.logps(table, Policy(version=1, path=bench.reference)):
            for side, values in reference.items():
                values[part["row"]] = part[side]
    (metrics,) = learner.update(1, table, reference, None)
    return metrics["loss"], metrics["grad_norm"]


def through_functions(case: Case, pairs: Sequence[Pair], bench: Bench) -> tuple[float, float]:
    """(loss, gradient norm) of the loss functions over logps of `LogpModel`."""
    policy, reference = load(bench.policy), load(bench.reference)
    losses = (_unpaired if case.ours[0].kind == "unpaired" else _paired)(case, pairs, policy, reference)
    losses.mean().backward()
    squares = [p.grad.double().square().sum() for p in policy.parameters() if p.grad is not None]
    return losses.mean().item(), torch.stack(squares).sum().sqrt().item()


def _paired(case: Case, pairs: Sequence[Pair], policy: PreTrainedModel, reference: PreTrainedModel) -> Tensor:
    tensors: dict[str, Tensor] = {name: torch.tensor(value) for name, value in case.inputs.items()}
    shorter = [min(len(chosen), len(rejected)) for _, chosen, rejected in pairs]
    for side, column in (("chosen", 1), ("rejected", 2)):
        rows = [(pair[0], pair[column]) for pair in pairs]
        tensors[f"{side}_lengths"] = torch.tensor([float(len(response)) for _, response in rows])
        for who, model in (("", policy), ("reference_", reference)):
            tokens = token_logps(model, rows, with_gradient=model is policy)
            tensors[f"{who}{side}_logps"] = torch.stack([t.sum() for t in tokens])
            prefixes = [t[:length].sum() for t, length in zip(tokens, shorter, strict=True)]
            tensors[f"{who}{side}_prefix_logps"] = torch.stack(prefixes)
        tensors[f"{side}_weight_logps"] = torch.stack([weight_logps(policy, *row) for row in rows])
    return pair_losses(case.ours, LossInputs(**tensors))


def _unpaired(case: Case, pairs: Sequence[Pair], policy: PreTrainedModel, reference: PreTrainedModel) -> Tensor:
    rows = [(p, chosen) for p, chosen, _ in pairs] + [(p, rejected) for p, _, rejected in pairs]
    others = [(prompt, rows[(i + case.kl_offset) % len(rows)][1]) for i, (prompt, _) in enumerate(rows)]

    def sums(model: PreTrainedModel, of: list[tuple[list[int], list[int]]]) -> Tensor:
        return torch.stack([t.sum() for t in token_logps(model, of, with_gradient=model is policy and of is rows)])

    inputs = UnpairedInputs(
        logps=sums(policy, rows),
        reference_logps=sums(reference, rows),
        desirable=torch.tensor([True] * len(pairs) + [False] * len(pairs)),
        kl=kto_kl(sums(policy, others), sums(reference, others)),
    )
    return unpaired_losses(case.ours, inputs)


def token_logps(
    model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]], *, with_gradient: bool
) -> list[Tensor]:
    """(|response|,) logps of every row's response, given its prompt."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, positions, targets = torch.zeros(len(rows), longest, dtype=torch.long), [], []
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        start = i * longest + len(prompt) - 1
        positions += range(start, start + len(response))
        targets += response
    with torch.set_grad_enabled(with_gradient):
        logps, _ = LogpModel(model)(ids, torch.tensor(positions), torch.tensor(targets))
    return list(logps.split([len(response) for _, response in rows]))


@torch.no_grad()
def weight_logps(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """() mean over response tokens of log p - log sum_v p_v^2: WPO's weight."""
    logps = torch.log_softmax(model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1], -1)
    chosen = logps.gather(1, torch.tensor(response)[:, None]).squeeze(1)
    return (chosen - torch.logsumexp(2 * logps, -1)).mean()


# -- the comparison ----------------------------------------------------------------------------------------------------


def measure(case: Case, bench: Bench) -> Measured:
    """One case on both sides."""
    from trl_losses import Example, loss_and_grad_norm

    pairs = bench.batches[case.batch]
    examples = [Example(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in pairs]
    theirs = loss_and_grad_norm(
        case.trainer, case.settings, examples, bench.policy, bench.reference, one_by_one=case.one_by_one
    )
    by_learner = all(loss.trains for loss in case.ours) and tensor_names(case.ours) <= GIVEN_BY_LEARNER
    ours = (through_learner if by_learner else through_functions)(case, pairs, bench)
    return Measured(
        case=case,
        loss=(theirs[0], ours[0]),
        grad_norm=(theirs[1], ours[1]),
        through="learner" if by_learner else "function",
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
    from trl_losses import loss_types

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
    from trl_losses import VERSION, default

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
ours come from the learner, or from the loss function where the learner does not train with the loss by itself. Make
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

Also different, in all losses: TRL averages a loss over the pairs of a micro-batch and then over micro-batches, we over
the pairs of the optimizer step, so that a last micro-batch of fewer pairs does not count more. Losses that look at the
batch (`aot`, `aot_unpaired`, `kto`) see TRL's micro-batch, but the whole step of ours.

## Defaults

| ours | option | default | TRL | default |
|---|---|---|---|---|
{defaults}

Why ours: those of the paper or its authors' code, as the page of each loss in [losses.md](losses.md) says. TRL has one
`beta` for many losses, so that its default fits DPO alone; without label smoothing `exo_pair` is refused and `robust`
is DPO.

## What TRL has and we have not

{not_ours}
- Label smoothing in `aot`, `aot_unpaired`, and in CPOTrainer's and TPOTrainer's losses.
- f-divergences in losses other than DPO's (`hinge`, `ipo`, `exo_pair`, `robust`, `discopop`, `sigmoid_norm`); ours is
  `f_dpo`. The same for WPO's weights and LD-DPO's: options of every loss there, the losses `wpo` and `ld_dpo` here.
- TPOTrainer's third, gold response.

## What we have and TRL has not

{only_ours}; and `sppo` with the judge's probabilities. TRL's trainers of BCO, XPO and Nash-MD went with version 1.15.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/trl.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare()
    console = Console()
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
