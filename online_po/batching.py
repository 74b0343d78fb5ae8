"""Which pairs go through the model when, and as which arrays. Pure functions over numpy; no torch.

Nothing is dropped, nothing is repeated: a round's last global batch may be smaller. Losses are divided by
the number of pairs of the global batch, so how it is cut into ranks and micro-batches changes
nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from online_po.seeds import stable_seed


class TokenLists:
    """A list<int32> column as numpy, row by row, without copying what is in one chunk already."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        # combine_chunks copies even a single chunk.
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        self._values = array.values.to_numpy(zero_copy_only=True)  # (all tokens,)
        self._offsets = array.offsets.to_numpy()  # (N + 1,)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens in each row."""
        return np.diff(self._offsets).astype(np.int64)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[self._offsets[row] : self._offsets[row + 1]]


class PairTokens:
    """The token ids and scores of a pair table. Token ids of a row are read when they are asked for."""

    def __init__(self, pairs: pa.Table) -> None:
        self.prompt = TokenLists(pairs.column("prompt_token_ids"))
        self.chosen = TokenLists(pairs.column("chosen_token_ids"))
        self.rejected = TokenLists(pairs.column("rejected_token_ids"))
        self.widths = self.prompt.lengths + np.maximum(self.chosen.lengths, self.rejected.lengths)
        """(N,) tokens of the longer of a pair's two sequences."""
        self.scores = {side: pairs.column(f"{side}_score").to_numpy() for side in ("chosen", "rejected")}
        """(N,) float64 of the judge's scores."""

    def __len__(self) -> int:
        return len(self.widths)


def epoch_order(count: int, seed: int, round_: int, epoch: int) -> np.ndarray:
    """(count,) int64: the order in which an epoch visits the pairs, a function of the arguments alone."""
    return np.random.default_rng(stable_seed(seed, "order", round_, epoch)).permutation(count)


def global_batches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cuts an order into the fewest optimizer steps of at most `size` pairs, as equal as can be: the update of a
    step is normalised, so a remainder of one pair would count as much as a whole batch."""
    yield from np.array_split(order, -(-len(order) // size))


def rank_plans(rows: np.ndarray, widths: np.ndarray, ranks: int, token_limit: int) -> list[list[np.ndarray]]:
    """For each rank, its micro-batches of `rows`: the same number for every rank, some maybe empty.

    Rows are sorted by width (longest first) and dealt out like cards, so that ranks have equal work and
    little padding. `widths` is (N,), of all pairs. A micro-batch holds two sequences a pair, padded to the
    longest, in at most `token_limit` tokens; a pair that is longer by itself goes alone.
    """
    ordered = rows[np.argsort(-widths[rows], kind="stable")]
    plans = [_micro_batches(ordered[rank::ranks], widths, token_limit) for rank in range(ranks)]
    passes = max(len(plan) for plan in plans)
    empty = np.empty(0, dtype=np.int64)
    return [plan + [empty] * (passes - len(plan)) for plan in plans]


def _micro_batches(ordered: np.ndarray, widths: np.ndarray, token_limit: int) -> list[np.ndarray]:
    batches, begin = [], 0
    while begin < len(ordered):
        size = max(1, token_limit // (2 * int(widths[ordered[begin]])))
        batches.append(ordered[begin : begin + size])
        begin += size
    return batches


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """m pairs as arrays: rows 0 to m-1 are prompt + chosen, rows m to 2m-1 prompt + rejected."""

    input_ids: np.ndarray
    """(2m, T) int64, padded with zeros on the right."""
    positions: np.ndarray
    """(S,) int64: places in the flattened (2m * T,) sequences whose outputs predict response tokens."""
    targets: np.ndarray
    """(S,) int64: those response tokens, row after row."""
    lengths: list[int]
    """2m response lengths; they sum to S."""


def collate(tokens: PairTokens, rows: np.ndarray) -> MicroBatch:
    """The arrays of some pairs. Without rows: one stand-in token, so that a rank that has run out of pairs
    can go through the same passes as the others; it has no lengths, so it counts nowhere."""
    if len(rows) == 0:
        one = np.zeros(1, dtype=np.int64)
        return MicroBatch(input_ids=np.zeros((1, 2), dtype=np.int64), positions=one, targets=one, lengths=[])
    width = int(tokens.widths[rows].max())
    input_ids = np.zeros((2 * len(rows), width), dtype=np.int64)
    positions, targets = [], []
    sequences = [(tokens.prompt[row], side[row]) for side in (tokens.chosen, tokens.rejected) for row in rows]
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[i, : len(prompt)] = prompt
        input_ids[i, len(prompt) : end] = response
        first = i * width + len(prompt) - 1  # the prompt's last token predicts the response's first
        positions.append(np.arange(first, first + len(response)))
        targets.append(response)
    return MicroBatch(
        input_ids=input_ids,
        positions=np.concatenate(positions),
        targets=np.concatenate(targets).astype(np.int64),
        lengths=[len(response) for _, response in sequences],
    )
