"""How the examples of a step are dealt to ranks, cut into micro-batches, and laid out as arrays. Numpy only; no torch.

Two layouts. Shared: a prompt and all its distinct responses are a tree (see `online_po.tree_attention`), and trees lie
one after the other in one row, without padding. Plain: each response with its prompt is a row, padded to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from online_po.batching import Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """m examples of k sides as arrays. The u distinct responses are scored once, whoever of the examples has them."""

    input_ids: np.ndarray
    """(B, T) int64: plain, B rows padded with zeros on the right; shared, B is 1."""
    positions: np.ndarray
    """(S,) int64: places in the flattened (B * T,) sequences whose outputs predict response tokens."""
    targets: np.ndarray
    """(S,) int64: those response tokens, response after response."""
    lengths: np.ndarray
    """(u,) int64 response tokens; they sum to S, unless the batch is a stand-in."""
    which: np.ndarray
    """(k, m) int64: of each side and example, its response among the u."""
    position_ids: np.ndarray | None = None
    """(1, T) int64 places of shared tokens in sequences of their own; None: plain."""
    trees: tuple[tuple[int, ...], ...] | None = None
    """For each tree the tokens of its prompt, then of each branch; they sum to T. None: plain."""


ATTENDED = 16
"""A branch's attention may hold its prompt's keys and values once more: so many tokens attended to count as one. By
count: of what a layer keeps for a token, keys and values are about a fifteenth, and less where heads share them."""


@dataclass(kw_only=True, slots=True)
class _Tree:
    """A prompt and the distinct responses to it."""

    prompt: np.ndarray
    responses: dict[bytes, np.ndarray] = field(default_factory=dict)

    def grow(self, responses: Sequence[np.ndarray]) -> None:
        for response in responses:
            self.responses.setdefault(response.tobytes(), response)

    def grown(self, responses: Sequence[np.ndarray]) -> _Tree:
        """Another tree, with some more responses."""
        more = _Tree(prompt=self.prompt, responses=dict(self.responses))
        more.grow(responses)
        return more

    @property
    def tokens(self) -> int:
        """What the tree counts for: its tokens, or a share of those that its branches attend to, if that is more."""
        branches = [branch_tokens(response) for response in self.responses.values()]
        attended = sum(len(self.prompt) + tokens for tokens in branches if tokens)
        return max(len(self.prompt) + sum(branches), -(-attended // ATTENDED))


def branch_tokens(response: np.ndarray) -> int:
    """Tokens of a response that the model must see: its last one predicts nothing that is asked for."""
    return max(0, len(response) - 1)


# -- who computes what -----------------------------------------------------------------------------


def rank_plans(
    examples: Examples, rows: np.ndarray, sides: Sequence[str], ranks: int, token_limit: int, *, shared: bool
) -> list[list[np.ndarray]]:
    """For each rank its micro-batches of `rows`, of which `sides` go through the model: the same number for every
    rank, some maybe empty.

    A micro-batch has at most `token_limit` tokens, padding included, and where prompts are shared its branches attend
    to at most `ATTENDED` times as many; an example that is longer by itself goes alone. The largest come first and are
    dealt out like cards, so that ranks have equal work and little padding.
    """
    cut = _shared_plan if shared else _plain_plan
    plans = cut(examples, rows, sides, ranks, token_limit)
    passes = max(len(plan) for plan in plans)
    empty = np.empty(0, dtype=np.int64)
    return [plan + [empty] * (passes - len(plan)) for plan in plans]


def _plain_plan(
    examples: Examples, rows: np.ndarray, sides: Sequence[str], ranks: int, token_limit: int
) -> list[list[np.ndarray]]:
    widths = examples.widths(sides)
    ordered = rows[np.argsort(-widths[rows], kind="stable")]
    plans = []
    for rank in range(ranks):
        mine, batches, begin = ordered[rank::ranks], list[np.ndarray](), 0
        while begin < len(mine):
            size = max(1, token_limit // (len(sides) * int(widths[mine[begin]])))
            batches.append(mine[begin : begin + size])
            begin += size
        plans.append(batches)
    return plans


def _shared_plan(
    examples: Examples, rows: np.ndarray, sides: Sequence[str], ranks: int, token_limit: int
) -> list[list[np.ndarray]]:
    pieces = _pieces(examples, rows, sides, token_limit)
    pieces.sort(key=lambda piece: -piece[1])  # stable
    plans = []
    for rank in range(ranks):
        batches, room = list[list[np.ndarray]](), 0
        for piece, tokens in pieces[rank::ranks]:
            if not batches or tokens > room:
                batches.append([])
                room = token_limit
            batches[-1].append(piece)
            room -= tokens
        plans.append([np.concatenate(batch) for batch in batches])
    return plans


def _pieces(
    examples: Examples, rows: np.ndarray, sides: Sequence[str], token_limit: int
) -> list[tuple[np.ndarray, int]]:
    """(rows of one prompt, tokens of their tree): prompts whole as far as the limit allows."""
    groups = examples.prompt_groups[rows]
    order = np.argsort(groups, kind="stable")
    members = np.split(rows[order], np.flatnonzero(np.diff(groups[order])) + 1) if len(rows) else []
    found = []
    for same in members:
        tree, piece = _Tree(prompt=examples.prompt[int(same[0])]), list[int]()
        for row in same.tolist():
            responses = [examples.sequence(side, row)[1] for side in sides]
            if piece and tree.grown(responses).tokens > token_limit:
                found.append((np.array(piece), tree.tokens))
                tree, piece = _Tree(prompt=tree.prompt), []
            tree.grow(responses)
            piece.append(row)
        found.append((np.array(piece), tree.tokens))
    return found


def batch_tokens(examples: Examples, rows: np.ndarray, sides: Sequence[str], *, shared: bool) -> int:
    """What the micro-batch of some rows counts for: its tokens, padding included, or a share of those attended to."""
    if shared:
        return sum(tree.tokens for tree in _trees(examples, rows, sides)[0])
    return len(sides) * len(rows) * int(examples.widths(sides)[rows].max())


# -- arrays ----------------------------------------------------------------------------------------


def collate(examples: Examples, rows: np.ndarray, sides: Sequence[str], *, shared: bool) -> MicroBatch:
    """The arrays of some examples. Without rows: a stand-in, so that a rank that has run out of examples can go
    through the same passes as the others; it has no lengths, so it counts nowhere."""
    if len(rows) == 0:
        one, none = np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64)
        return MicroBatch(
            input_ids=np.zeros((1, 2), dtype=np.int64),
            positions=one,
            targets=one,
            lengths=none,
            which=none.reshape(len(sides), 0),
            position_ids=np.arange(2)[None] if shared else None,
            trees=((2,),) if shared else None,
        )
    return (_collate_shared if shared else _collate_plain)(examples, rows, sides)


def _collate_plain(examples: Examples, rows: np.ndarray, sides: Sequence[str]) -> MicroBatch:
    """Rows 0 to m-1 are prompt + first side, the next m prompt + second side."""
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
        lengths=np.array([len(response) for _, response in sequences]),
        which=np.arange(len(sequences)).reshape(len(sides), -1),
    )


def _collate_shared(examples: Examples, rows: np.ndarray, sides: Sequence[str]) -> MicroBatch:
    trees, which = _trees(examples, rows, sides)
    ids, places, positions, targets, sizes = [], [], [], [], []
    at = 0
    for tree in trees:
        prompt = len(tree.prompt)
        ids.append(tree.prompt)
        places.append(np.arange(prompt))
        last, at = at + prompt - 1, at + prompt
        size = [prompt]
        for response in tree.responses.values():
            if len(response):  # its first token is predicted by the prompt's last
                positions.append(np.append(last, np.arange(at, at + len(response) - 1)))
                targets.append(response)
            if tokens := branch_tokens(response):
                ids.append(response[:-1])
                places.append(np.arange(prompt, prompt + tokens))
                size.append(tokens)
                at += tokens
        sizes.append(tuple(size))
    return MicroBatch(
        input_ids=np.concatenate(ids).astype(np.int64)[None],
        positions=np.concatenate([np.empty(0, dtype=np.int64), *positions]),
        targets=np.concatenate([np.empty(0, dtype=np.int64), *targets]).astype(np.int64),
        lengths=np.array([len(response) for tree in trees for response in tree.responses.values()]),
        which=which,
        position_ids=np.concatenate(places)[None],
        trees=tuple(sizes),
    )


def _trees(examples: Examples, rows: np.ndarray, sides: Sequence[str]) -> tuple[list[_Tree], np.ndarray]:
    """The trees of some rows, and (k, m) of each side and row its response among all distinct ones, tree by tree."""
    trees: dict[int, _Tree] = {}
    groups = examples.prompt_groups
    held = [[examples.sequence(side, row) for row in rows] for side in sides]
    for place, row in enumerate(rows):
        for side in held:
            prompt, response = side[place]
            trees.setdefault(int(groups[row]), _Tree(prompt=prompt)).grow([response])
    number: dict[tuple[int, bytes], int] = {}
    for group, tree in trees.items():
        for name in tree.responses:
            number[group, name] = len(number)
    which = [
        [number[int(groups[row]), response.tobytes()] for row, (_, response) in zip(rows, side, strict=True)]
        for side in held
    ]
    return list(trees.values()), np.array(which, dtype=np.int64)
