"""Which examples are in which optimizer step. Pure functions over numpy; no torch.

An example is a row that is trained on: a pair (sides chosen and rejected), or a single labelled response (side
response). Nothing is dropped, nothing is repeated: a round's last global batch may be smaller. Losses are divided by
the number of examples of the global batch, so how it is cut into ranks and micro-batches (`online_po.packing`) changes
nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b

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
        "chosen_sampler_logp",
        "rejected_sampler_logp",
        "response_sampler_logp",
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
            name: table.column(name).to_numpy() for name in present & COLUMNS if not name.endswith(("_id", "_ids"))
        }
        """(N,) arrays of what is known of the examples beside their tokens; a missing value is NaN."""
        self._table = table

    def __len__(self) -> int:
        return len(self.prompt.lengths)

    @cached_property
    def partners(self) -> np.ndarray:
        """(N,) int64: of each row, one of the next prompt's (the first follows the last); itself if none."""
        return next_with_another(self._table.column("prompt_id").to_numpy(zero_copy_only=False))

    @cached_property
    def prompt_groups(self) -> np.ndarray:
        """(N,) int64: one number for all examples whose prompts have the same tokens, from 0 as they appear."""
        seen: dict[bytes, int] = {}
        digests = (blake2b(self.prompt[row].tobytes(), digest_size=16).digest() for row in range(len(self)))
        return np.fromiter((seen.setdefault(digest, len(seen)) for digest in digests), dtype=np.int64, count=len(self))

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


ORDER_VERSION = 2
"""Of `epoch_order`: who goes on inside an epoch must visit it in the order that it was begun in."""


def epoch_order(groups: np.ndarray, together: int, seed: int, round_: int, epoch: int) -> np.ndarray:
    """(N,) int64: the order in which an epoch visits N examples, a function of the arguments alone.

    `groups` (N,): their `Examples.prompt_groups`. Up to `together` examples of a prompt, drawn at random, follow each
    other: they are mostly of one optimizer step, where what they share is computed once.
    """
    rng = np.random.default_rng(stable_seed(seed, "order", round_, epoch))
    shuffled = rng.permutation(len(groups))
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    keys = groups[by_group]
    begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))[: len(groups)]  # of each group
    place = np.arange(len(groups)) - np.repeat(begins, np.diff(begins, append=len(groups)))
    cuts = np.flatnonzero(place % together == 0)
    units = np.split(by_group, cuts[1:])
    return np.concatenate([units[i] for i in rng.permutation(len(units))]) if len(groups) else shuffled


def global_batches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cuts an order into the fewest optimizer steps of at most `size` examples, as equal as can be: the update of a
    step is normalised, so a remainder of one example would count as much as a whole batch."""
    yield from np.array_split(order, -(-len(order) // size))
