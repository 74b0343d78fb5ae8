"""A run's pairs, built again from its judgements with other settings: nothing is generated or judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from online_po import files
from online_po.config import Config
from online_po.errors import ConfigError
from online_po.examples import ExampleBuilder
from online_po.ledger import Ledger
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA
from online_po.yaml_text import apply_override

MAY_CHANGE = ("pairs.", "labels.", "loss=", "judge.length.", "judge.bradley_terry_scale")
"""Settings that are read after judging."""


def rebuild(ledger: Ledger, out: Path, changes: Sequence[str] = (), round_: int | None = None) -> dict[int, int]:
    """Writes the pairs (or labels) of all judged rounds, or of one, to a parquet file; returns {round: how many}.

    `changes`: `section.key=value` on top of the run's config. Only what rounds made themselves is built: replayed and
    seed pairs are not mixed in. Raises ConfigError for settings that pairs are not made of, or that need the policy's
    weights.
    """
    config = _changed(ledger, changes)
    if out.suffix != ".parquet":
        raise ConfigError(f"the file to write is {str(out)!r}; let its name end in .parquet")
    if (ledger.root / "rounds").resolve() in out.resolve().parents:
        raise ConfigError(f"the file to write is {str(out)!r}, among the run's own; choose another place")
    judged = [r for r in range(1, config.loop.rounds + 1) if ledger.is_judged(r)]
    if round_ is not None and round_ not in judged:
        raise ConfigError(f"--round is {round_}, but the run has judged rounds {judged or 'none'}")
    made = {}
    schema = PAIR_SCHEMA if config.example_kind == "pairs" else LABEL_SCHEMA
    with files.parquet_writer(out, schema) as writer:
        for number in judged if round_ is None else [round_]:
            made[number] = 0
            for table in ExampleBuilder(config, ledger, number, ledger.prompts(number)).balanced(Counter()):
                made[number] += table.num_rows
                writer.write(table)
    return made


def _changed(ledger: Ledger, changes: Sequence[str]) -> Config:
    for change in changes:
        if not change.startswith(MAY_CHANGE):
            raise ConfigError(
                f"--set {change}: pairs are made of judgements, so only {', '.join(MAY_CHANGE)} may change here; for "
                "anything else start another run"
            )
    data = yaml.safe_load(ledger.config().to_yaml())
    for change in changes:
        apply_override(data, change)
    for mixed in ("replay_share", "seed_share"):
        if any(change.startswith(f"pairs.{mixed}") for change in changes):
            raise ConfigError(f"--set pairs.{mixed}: only what rounds made themselves is built again; drop it")
    config = Config.parse(data)
    if config.pairs.strategy in ("hardest_reward", "spin"):
        raise ConfigError(
            f"pairs.strategy is {config.pairs.strategy}, which needs the policy's weights or the prompt "
            "file besides judgements; build pairs with another one, or start a run"
        )
    return config
