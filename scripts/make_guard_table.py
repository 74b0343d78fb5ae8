"""Writes docs/guards.md, the table of all guards, from their classes; `--check` only compares.

python scripts/make_guard_table.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from online_po.guard_configs import Guard, GuardsConfig
from online_po.guards import CHECKS

PAGE = Path(__file__).parents[1] / "docs" / "guards.md"
HEAD = """# Guards

<!-- Written by scripts/make_guard_table.py; edit online_po/guard_configs.py instead. -->

Guards look at every committed round, and at every evaluation, and say in one sentence what they saw and what to try:
on the screen, in `online-po status`, in the report, and as `guards` in the round's row of `metrics.jsonl` and in
`eval.json`. Each has an `action`:

- `off`;
- `warn`: say it (the default);
- `stop`: the run ends with the round committed; `online-po resume` goes on past it (not past a step that is not finite:
  its round is not committed, and is trained again);
- `roll_back`: the run goes back to the last good round, and on from there.

```yaml
guards:
  kl: {action: stop, max_nats: 20}
  nonfinite: {action: roll_back}
  flat: {action: off}
```
"""
TAIL = """**shown by**: the policy at fault. What a round's responses show is the fault of the policy that sampled them,
the rest that of the policy that the round made.

## Going back

The last good round is the newest one before the policy that shows the fault, of those that no guard wants back (for
`over_optimisation`: the one with the best held-out score). Later rounds are moved, nothing of them lost, to
`rolled_back/NNN/` in the run folder. Weights, optimizer, reference, beta and prompt cursor are those that the good
round was committed with, as after a resume; only the sampling seeds are new, since the same ones would lead to the
same place. `roll_backs.json` holds one entry for each time. After `guards.max_roll_backs` of them a further one ends
the run, at the good round; every `online-po resume` from there is one more try.

Going back needs weights: `checkpoint.keep` must be null or at least 2 + 2 x `loop.max_staleness`. The best
evaluated round keeps its own, whatever it is, where `over_optimisation` rolls back. Where the last good round's are
gone all the same (a second roll-back right after a first), the run stops instead of throwing more good rounds away.

## Early stop

`eval.early_stop: {patience: 3, min_gain: 0.0}` ends the run after `patience` evaluations on end whose mean held-out
score was not more than `min_gain` above the best before them. The best policy's weights are never pruned, and
`online-po export` takes them unless `--round` says otherwise.
"""


def bounds(guard: Guard) -> str:
    """Bounds and their defaults."""
    return ", ".join(f"`{key}` {value:g}" for key, value in guard if key != "action")


def row(name: str, guard: Guard) -> str:
    """One guard as a row of the table."""
    _, of_sampler = CHECKS.get(name, (None, False))
    shown_by = "sampling policy" if of_sampler else "the round's policy"
    cells = [f"`{name}`", guard.sees, bounds(guard), shown_by, guard.remedy]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    rows = [row(name, guard) for name, guard in GuardsConfig.model_validate({}).each().items()]
    head = ["| guard | fires on | bounds | shown by | what to try |", "|---|---|---|---|---|"]
    return "\n".join([HEAD, *head, *rows, "", TAIL])


def main() -> None:
    new = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != new:
            raise SystemExit("docs/guards.md is out of date; run scripts/make_guard_table.py")
        return
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
