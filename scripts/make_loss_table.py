"""Writes docs/losses.md, the table of all losses, from their classes and functions; `--check` only compares.

python scripts/make_loss_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from online_po.loss_configs import LOSSES, Custom, LossBase
from online_po.losses.dispatch import FUNCTIONS, tensor_parameters

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"
HEAD = """# Losses

<!-- Written by scripts/make_loss_table.py; edit online_po/loss_configs/ instead. -->

Every loss is one pure function in `online_po/losses/`, checked in `tests/test_losses.py` against an independent
formula. In a config, `loss: {name: rdpo, label_smoothing: 0.2}` is one loss; a list of such entries is a mixture, the
sum of the losses times their `weight`.

In the formulas, a = log pi(chosen) - log ref(chosen), b the same for the rejected response and m = a - b; s is the
sigmoid, |c| and |r| are the lengths of chosen and rejected in tokens. Logs are natural, and log-probabilities are
summed over response tokens unless divided by a length. Higher beta keeps the policy closer to the reference.

- **data**: pairs of a chosen and a rejected response, or single responses labelled desirable or not.
- **ref**: whether reference log-probabilities enter; without, no reference is loaded.
- **scores**: what the judge must give besides the order.
- **also reads**: further inputs, from the responses, the model or the run.
- **batch**: whether the loss of one pair depends on the others it is handed in with.
"""
NOTES = """## Choices

- `ipo` averages log-ratios over tokens, as the paper's authors say they do; `average_logps: false` is eq. 17 as it is
  written. The two need different betas.
- `sppo` sums over the two responses of a pair. `probability: soft` takes the judge's probability that chosen beats
  rejected (`judge.bradley_terry_scale`), where the paper takes that of beating the policy's average response.
- `bco_pair`, `bco` and `beta_dpo` shift by running means over optimizer steps, which go on from round to round until
  the reference is another one; where none is given, by the mean over what is handed in.
- `kto` estimates its KL over a step, from each prompt with a response to the next prompt of the round.
- `custom` is handed micro-batches, not the step's whole batch, unless a parameter of it is a running mean.
- `beta_dpo` keeps the pairs nearest to the running mean, where the paper draws them with normal weights: the likeliest
  draw, and repeatable. Margins are in nats, without beta, as in the authors' code.
- `madpo` takes its weights from the author's code; a score gap is taken as log-odds, which a reward model's is.
- `xpo` takes its bonus over both responses of a pair, which all come from the sampling policy here.
- `bco` leaves out the paper's density-ratio weights.
- `cpo` and `orpo` take the likelihood of response tokens only, per token; `cpo`'s preference term is of sums.
- [trl.md](trl.md) has the losses beside TRL's, measured, with what differs and why.
- exp(-alpha log u) in `f_dpo` and `alphapo` goes on as a straight line past exp(20), and `orpo` holds mean
  log-probabilities at or below -1e-6: all losses and gradients are finite for log-probabilities of +-10,000.
"""
READS = {
    "lengths": "lengths",
    "prefix_logps": "logps of the first min(\\|c\\|, \\|r\\|) tokens",
    "weight_logps": "token weights",
    "log_ratio_mean": "running mean of log-ratios (optional)",
    "margin_mean": "running mean of m (optional)",
    "kl": "estimate of the KL",
}


def options(loss: type[LossBase]) -> str:
    """Options and their defaults."""
    fields = {name: field for name, field in loss.model_fields.items() if name not in ("name", "weight")}
    return ", ".join(f"`{name}` {_yaml(field.get_default())}" for name, field in fields.items())


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return {"None": "null", "PydanticUndefined": "(required)"}.get(str(value), str(value))


def also_reads(loss: type[LossBase]) -> str:
    """What the function takes beyond log-probabilities, scores and labels."""
    if loss is Custom:
        return "what its parameters name"
    names = tensor_parameters(FUNCTIONS[loss.model_fields["name"].default])
    return ", ".join(text for ending, text in READS.items() if any(name.endswith(ending) for name in names))


def scores(loss: type[LossBase]) -> str:
    if loss is Custom:
        return "as named"
    names = tensor_parameters(FUNCTIONS[loss.model_fields["name"].default])
    if "preference_probabilities" in names:
        return "probabilities, if soft"
    return "yes" if loss.needs_scores else ""


def row(loss: type[LossBase]) -> str:
    """One loss as a row of the table."""
    cells = [
        f"`{loss.model_fields['name'].default}`",
        f"`{loss.formula}`".replace("|", "\\|") if loss is not Custom else loss.formula,
        "pairs" if loss.kind == "paired" else "single",
        "yes" if loss.needs_reference else "",
        scores(loss),
        also_reads(loss),
        "yes" if loss.batchwise else "",
        options(loss),
        loss.use_when.replace("|", "\\|"),
        loss.paper,
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    lines = [
        HEAD,
        "| name | formula | data | ref | scores | also reads | batch | options | use when | paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(row, LOSSES),
        "",
        NOTES,
    ]
    return "\n".join(lines)


def main() -> None:
    new = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != new:
            raise SystemExit("docs/losses.md is out of date; run scripts/make_loss_table.py")
        return
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
