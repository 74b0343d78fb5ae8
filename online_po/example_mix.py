"""What else goes into a round besides its own examples, and how many of its own stay: balance, replay, seed pairs.

All draws are by seed and from what the ledger holds, so that a resumed round draws the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from online_po.config import Config
from online_po.cursor import PromptCursor
from online_po.ledger import Ledger
from online_po.parts import Parts
from online_po.seeds import stable_seed


def balanced(domains: Sequence[str], ratio: float, seed: int) -> np.ndarray:
    """(N,) bool: which of N examples stay, given the domain of each.

    A domain keeps at most `ratio` times as many as the smallest one present has; which ones is drawn by `seed`.
    """
    counts = Counter(domains)
    most = int(ratio * min(counts.values(), default=0))
    of = np.asarray(domains)
    kept = np.zeros(len(domains), dtype=bool)
    for domain in counts:
        rows = np.flatnonzero(of == domain)
        kept[rows[draw(stable_seed(seed, domain), len(rows), min(most, len(rows)))]] = True
    return kept


def draw(seed: int, size: int, count: int) -> np.ndarray:
    """(count,) int64: so many of `size` places, no two alike, in the order they were drawn."""
    # Sorting PCG64's raw stream: unlike `Generator.choice`, numpy promises that it never changes.
    return np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable")[:count]


def wanted(own: int, replay_share: float, seed_share: float) -> tuple[int, int]:
    """(replayed, seed) examples that make up these shares of a round with `own` examples of its own."""
    total = own / (1 - replay_share - seed_share)
    return round(replay_share * total), round(seed_share * total)


def mixed_in(parts: Parts, round_: int, own: int, notes: dict[str, Any]) -> Iterator[pa.Table]:
    """The examples that come on top of a round's `own` ones. `notes` takes what later rounds must know."""
    config = parts.config
    replay, seed = wanted(own, config.pairs.replay_share, config.pairs.seed_share)
    notes["own"] = own
    if replay:
        yield from _replayed(config, parts.ledger, round_, replay)
    if parts.seed_pairs is not None:
        drawn, notes["seed_cursor"] = _seed_pairs(config, parts.ledger, round_, parts.seed_pairs, seed)
        yield drawn


def _replayed(config: Config, ledger: Ledger, round_: int, count: int) -> Iterator[pa.Table]:
    """`count` examples, fewer where there are not so many, of those that earlier rounds made themselves."""
    back = config.pairs.replay_rounds or round_
    earlier = range(max(1, round_ - back), round_)
    # A round's own examples come first in its file.
    sizes = np.array([ledger.example_notes(r, config.example_kind)["own"] for r in earlier], dtype=np.int64)
    total = int(sizes.sum())
    places = np.sort(draw(stable_seed(config.run.seed, "replay", round_), total, min(count, total)))
    begin = 0
    for number, size in zip(earlier, sizes.tolist(), strict=True):
        rows = places[(places >= begin) & (places < begin + size)] - begin
        begin += size
        if len(rows):
            table = ledger.examples(number, config.example_kind).take(pa.array(rows))
            yield _with_source(table, "replay")


def _with_source(table: pa.Table, source: str) -> pa.Table:
    column = pa.array([source] * table.num_rows, pa.string())
    return table.set_column(table.schema.get_field_index("source"), table.schema.field("source"), column)


def _seed_pairs(
    config: Config, ledger: Ledger, round_: int, pairs: pa.Table, count: int
) -> tuple[pa.Table, dict[str, Any]]:
    """(`count` seed pairs, at most all of them; the cursor's state). Each comes once before any comes again."""
    cursor = PromptCursor(pairs.num_rows, stable_seed(config.run.seed, "seed pairs"))
    if round_ > 1:
        cursor.load_state_dict(ledger.example_notes(round_ - 1, "pairs")["seed_cursor"])
    rows = cursor.draw(min(count, pairs.num_rows))
    return pairs.take(pa.array(rows, pa.int64())), cursor.state_dict()


def count_sources(examples: pa.Table) -> dict[str, int]:
    """Examples by source."""
    counted = pc.value_counts(examples["source"].combine_chunks())
    return {item["values"]: item["counts"] for item in counted.to_pylist()}
