"""What a round trains on, built from its judged groups: preference pairs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from online_po.errors import NoPairsError
from online_po.metrics import SampleStats
from online_po.pairs import build_pairs
from online_po.parts import Parts
from online_po.seeds import stable_seed
from online_po.tables import PAIR_SCHEMA, PromptRows, pairs_to_table
from online_po.types import Judgement, Pair


def make_pairs(parts: Parts, round_: int, prompts: PromptRows) -> tuple[pa.Table, dict[str, Any]]:
    """(the round's pairs, metrics of its sampling), read part by part so that memory stays flat.

    Raises NoPairsError if there is nothing to train on.
    """
    config, ledger = parts.config, parts.ledger
    size = config.generator.chunk_prompts
    stats = SampleStats(seed=stable_seed(config.run.seed, "metrics", round_))
    skips: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    version = 0
    with ledger.pairs_writer(round_, PAIR_SCHEMA) as writer:
        for part, begin in enumerate(range(0, len(prompts), size)):
            groups = ledger.responses(round_, part, prompts[begin : begin + size])
            judgements = ledger.judgements(round_, part)
            rows: list[tuple[Pair, Judgement]] = []
            for group, judgement in zip(groups, judgements, strict=True):
                stats.add(group, judgement)
                seed = stable_seed(config.run.seed, "pairs", round_, group.prompt.id)
                built, skip = build_pairs(group, judgement, config.pairs, seed)
                rows.extend((pair, judgement) for pair in built)
                if skip is not None:
                    skips[skip] += 1
                if judgement.failure is not None:
                    failures[judgement.failure.kind] += 1
                version = group.responses[0].policy_version
            writer.write_table(pairs_to_table(rows))
    pairs = ledger.pairs(round_)
    if pairs.num_rows == 0:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skips.most_common())
        raise NoPairsError(
            f"round {round_} gave no pair to train on from {len(prompts)} prompts ({reasons}). Start a new run "
            "(another run.name) with other settings: for identical and tie, raise generator.temperature or "
            "loop.responses_per_prompt, or use a judge with finer scores; for below_min_margin, lower "
            "pairs.min_margin; for judge_failed, see the round's judgements/"
        )
    metrics = {"pair_skips": dict(skips), "judge_failures": dict(failures), "policy_version_sampled": version}
    return pairs, metrics | stats.result()
