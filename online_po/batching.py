"""Which examples go through the model when, and as which arrays. Pure functions over numpy; no torch.

An example is a row that is trained on: a pair (sides chosen and rejected), or a single labelled response (side
response). Nothing is dropped, nothing is repeated: a round's last global batch may be smaller. Losses are divided by
the number of examples of the global batch, so how it is cut into ranks and micro-batches changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from online_po.seeds import stable_seed

PAIR_SIDES = ("chosen", "rejected")
MISMATCHED = "mismatched"
"""Side of labelled responses: each prompt with a response to another one, as KTO's KL estimate wants it."""

COLUMNS = frozenset(
    (
        "prompt_id",
        "prompt_token_ids",
        "chosen_token_ids",
        "rejected_token_ids",
        "response_token_ids",
        "chosen_score",
        "rejected_score",
        "preference_probability",
        "label",
    )
)
"""What the learner reads of a table of examples, as far as it is there."""


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


class Examples:
    """The token ids and labels of a table of pairs or of labelled responses. Token ids are read when asked for."""

    def __init__(self, table: pa.Table) -> None:
        present = set(table.column_names)
        self.sides: tuple[str, ...] = PAIR_SIDES if "chosen_token_ids" in present else ("response",)
        self.prompt = TokenLists(table.column("prompt_token_ids"))
        self.responses = {side: TokenLists(table.column(f"{side}_token_ids")) for side in self.sides}
        self.values = {
            name: table.column(name).to_numpy()
            for name in ("chosen_score", "rejected_score", "preference_probability", "label")
            if name in present
        }
        """(N,) arrays of what labels the examples; a missing value is NaN."""
        self._table = table

    def __len__(self) -> int:
        return len(self.prompt.lengths)

    @cached_property
    def partners(self) -> np.ndarray:
        """(N,) int64: of each row, one of the next prompt's (the first follows the last); itself if none."""
        return next_with_another(self._table.column("prompt_id").to_numpy(zero_copy_only=False))

    @cached_property
    def _mismatched(self) -> np.ndarray:
        """(N,) tokens of the partners' responses that follow a prompt: no more than fit into the longest of the own
        sequences, as the model's context ends somewhere."""
        own = self.responses["response"].lengths
        room = (self.prompt.lengths + own).max() - self.prompt.lengths
        return np.minimum(own[self.partners], room)

    def widths(self, sides: Sequence[str]) -> np.ndarray:
        """(N,) tokens of the longest of an example's sequences."""
        return self.prompt.lengths + np.max([self.lengths(side) for side in sides], axis=0)

    def lengths(self, side: str) -> np.ndarray:
        """(N,) response tokens of a side."""
        return self._mismatched if side == MISMATCHED else self.responses[side].lengths

    def sequence(self, side: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(P,) prompt tokens and (R,) response tokens."""
        if side == MISMATCHED:
            partner = self.responses["response"][int(self.partners[row])]
            return self.prompt[row], partner[: self._mismatched[row]]
        return self.prompt[row], self.responses[side][row]


def next_with_another(keys: np.ndarray) -> np.ndarray:
    """(N,) int64: for each place one with another key, itself where there is none.

    Neighbours with the same key are a run. The i-th of a run gets the i-th of the next run, both counted cyclically: so
    a prompt's responses do not all get the same one.
    """
    count = len(keys)
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))  # (runs,)
    sizes = np.diff(starts, append=count)
    run = np.repeat(np.arange(len(starts)), sizes)  # (N,)
    after = (run + 1) % len(starts)
    # The first run and the last may have the same key.
    after = np.where(keys[starts[after]] == keys, (after + 1) % len(starts), after)
    return np.where(
        keys[starts[after]] == keys, np.arange(count), starts[after] + (np.arange(count) - starts[run]) % sizes[after]
    )


def epoch_order(count: int, seed: int, round_: int, epoch: int) -> np.ndarray:
    """(count,) int64: the order in which an epoch visits the pairs, a function of the arguments alone."""
    return np.random.default_rng(stable_seed(seed, "order", round_, epoch)).permutation(count)


def global_batches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cuts an order into the fewest optimizer steps of at most `size` pairs, as equal as can be: the update of a
    step is normalised, so a remainder of one pair would count as much as a whole batch."""
    yield from np.array_split(order, -(-len(order) // size))


def rank_plans(
    rows: np.ndarray, widths: np.ndarray, ranks: int, token_limit: int, sequences: int = 2
) -> list[list[np.ndarray]]:
    """For each rank, its micro-batches of `rows`: the same number for every rank, some maybe empty.

    Rows are sorted by width (longest first) and dealt out like cards, so that ranks have equal work and
    little padding. `widths` is (N,), of all examples. A micro-batch holds so many `sequences` an example, padded to
    the longest, in at most `token_limit` tokens; an example that is longer by itself goes alone.
    """
    ordered = rows[np.argsort(-widths[rows], kind="stable")]
    plans = [_micro_batches(ordered[rank::ranks], widths, token_limit // sequences) for rank in range(ranks)]
    passes = max(len(plan) for plan in plans)
    empty = np.empty(0, dtype=np.int64)
    return [plan + [empty] * (passes - len(plan)) for plan in plans]


def _micro_batches(ordered: np.ndarray, widths: np.ndarray, width_limit: int) -> list[np.ndarray]:
    batches, begin = [], 0
    while begin < len(ordered):
        size = max(1, width_limit // int(widths[ordered[begin]]))
        batches.append(ordered[begin : begin + size])
        begin += size
    return batches


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """m examples of k sides as arrays: rows 0 to m-1 are prompt + first side, the next m prompt + second side."""

    input_ids: np.ndarray
    """(km, T) int64, padded with zeros on the right."""
    positions: np.ndarray
    """(S,) int64: places in the flattened (km * T,) sequences whose outputs predict response tokens."""
    targets: np.ndarray
    """(S,) int64: those response tokens, row after row."""
    lengths: np.ndarray
    """(k, m) int64 response lengths; they sum to S, unless the batch is a stand-in."""


def collate(examples: Examples, rows: np.ndarray, sides: Sequence[str]) -> MicroBatch:
    """The arrays of some examples. Without rows: one stand-in token, so that a rank that has run out of examples
    can go through the same passes as the others; it has no lengths, so it counts nowhere."""
    if len(rows) == 0:
        one, none = np.zeros(1, dtype=np.int64), np.empty((len(sides), 0), dtype=np.int64)
        return MicroBatch(input_ids=np.zeros((1, 2), dtype=np.int64), positions=one, targets=one, lengths=none)
    sequences = [examples.sequence(side, row) for side in sides for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    positions, targets = [], []
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
        lengths=np.array([len(response) for _, response in sequences]).reshape(len(sides), -1),
    )
