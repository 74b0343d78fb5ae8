"""How examples are dealt to ranks and laid out: nothing is lost, nothing is there twice, limits are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from online_po.batching import MISMATCHED, PAIR_SIDES, Examples
from online_po.packing import ATTENDED, MicroBatch, batch_tokens, collate, rank_plans
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA
from tests.learner_setup import make_labels, make_pairs

LAYOUTS = pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])


def examples_of(*rows: tuple[list[int], list[int], list[int]]) -> Examples:
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return Examples(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=PAIR_SCHEMA))


def grouped(prompts: int, pairs: int) -> Examples:
    """Pairs that share prompts, and now and then a chosen response."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(prompts):
        prompt = rng.integers(4, 99, rng.integers(1, 20)).tolist()
        responses = [rng.integers(4, 99, rng.integers(1, 12)).tolist() for _ in range(pairs)]
        rows += [(prompt, responses[i // 2], rng.integers(4, 99, rng.integers(1, 12)).tolist()) for i in range(pairs)]
    return examples_of(*rows)


# -- who computes what -----------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_ranks_share_every_example_once_in_equally_many_passes(ranks: int, count: int, shared: bool) -> None:
    examples = Examples(make_pairs(30))
    rows = np.random.default_rng(0).permutation(30)[:count]
    plans = rank_plans(examples, rows, PAIR_SIDES, ranks, 100, shared=shared)
    assert len(plans) == ranks
    assert len({len(plan) for plan in plans}) == 1
    dealt = np.concatenate([share for plan in plans for share in plan])
    assert sorted(dealt) == sorted(rows)
    sizes = [sum(len(share) for share in plan) for plan in plans]
    assert max(sizes) - min(sizes) <= 1  # prompts differ: a prompt's pairs stay together


@LAYOUTS
@pytest.mark.parametrize("limit", [1, 40, 150, 10_000])
def test_micro_batches_keep_the_token_limit_and_long_examples_go_alone(limit: int, shared: bool) -> None:
    examples, rows = grouped(8, 5), np.arange(40)
    (plan,) = rank_plans(examples, rows, PAIR_SIDES, 1, limit, shared=shared)
    assert sorted(np.concatenate(plan)) == rows.tolist()
    for share in plan:
        tokens = batch_tokens(examples, share, PAIR_SIDES, shared=shared)
        assert tokens >= collate(examples, share, PAIR_SIDES, shared=shared).input_ids.size
        assert tokens <= limit or len(share) == 1
    if limit == 150 and shared:  # neighbours do not fit into one: nothing is wasted
        sizes = [batch_tokens(examples, share, PAIR_SIDES, shared=True) for share in plan]
        assert sum(sizes) / len(sizes) > 90


def test_plain_rows_are_sorted() -> None:
    """As few passes as the limit allows: 60 | 50 | 10 10 | 9 8 | 3 2."""
    lengths = [60, 10, 9, 10, 3, 8, 50, 2]
    examples = examples_of(*(([1] * (n - 1), [2], [3]) for n in lengths))
    (plan,) = rank_plans(examples, np.arange(8), PAIR_SIDES, 1, 40, shared=False)
    assert [sorted(share.tolist()) for share in plan] == [[0], [6], [1, 3], [2, 5], [4, 7]]


def test_a_prompts_examples_are_parted_only_where_they_must_be() -> None:
    examples = grouped(3, 6)
    (plan,) = rank_plans(examples, np.arange(18), PAIR_SIDES, 1, 10_000, shared=True)
    assert [len(share) for share in plan] == [18]
    assert len(collate(examples, plan[0], PAIR_SIDES, shared=True).trees or ()) == 3
    (plan,) = rank_plans(examples, np.arange(6), PAIR_SIDES, 1, 50, shared=True)
    assert 1 < len(plan) < 6


def test_what_branches_attend_to_is_bounded_too() -> None:
    """A long prompt with many short responses: each branch's attention holds the prompt again."""
    examples = examples_of(*(([7] * 400, [i, 1, 2, 3], [i, 4, 5, 6]) for i in range(20)))
    (plan,) = rank_plans(examples, np.arange(20), PAIR_SIDES, 1, 500, shared=True)
    assert len(plan) == 3  # by their tokens they would fit into two
    for share in plan:
        trees = collate(examples, share, PAIR_SIDES, shared=True).trees or ()
        assert sum(prompt + own for prompt, *branches in trees for own in branches) <= ATTENDED * 500


@LAYOUTS
def test_fewer_examples_than_ranks_leave_empty_passes(shared: bool) -> None:
    plans = rank_plans(Examples(make_pairs(5)), np.array([4]), PAIR_SIDES, 3, 100, shared=shared)
    assert [[len(share) for share in plan] for plan in plans] == [[1], [0], [0]]


# -- arrays ----------------------------------------------------------------------------------------


def sequences_of(batch: MicroBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """For each distinct response: the tokens that its tokens are predicted from (all that attention lets them see is
    not looked at here), their places in sequences of their own, and its tokens."""
    flat, cursor, found = batch.input_ids.flatten(), 0, []
    width = batch.input_ids.shape[1]
    places = np.arange(width) if batch.position_ids is None else batch.position_ids[0]
    for length in batch.lengths.tolist():
        at = batch.positions[cursor : cursor + length]
        found.append((flat[at].tolist(), places[at % width].tolist(), batch.targets[cursor : cursor + length].tolist()))
        cursor += length
    assert cursor == len(batch.positions) == len(batch.targets)
    return found


@LAYOUTS
def test_every_response_token_is_predicted_from_the_one_before_it(shared: bool) -> None:
    examples, rows = grouped(4, 5), np.array([3, 0, 17, 5, 4])
    batch = collate(examples, rows, PAIR_SIDES, shared=shared)
    found = sequences_of(batch)
    assert batch.which.shape == (2, 5)
    for k, side in enumerate(PAIR_SIDES):
        for m, row in enumerate(rows):
            prompt, response = (part.tolist() for part in examples.sequence(side, row))
            before, places, targets = found[batch.which[k, m]]
            assert targets == response
            assert before == [prompt[-1], *response[:-1]]
            assert places == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))


def test_plain_rows_hold_prompt_and_response_and_zeros() -> None:
    examples, rows = Examples(make_pairs(6, seed=1)), np.array([3, 0, 5])
    batch = collate(examples, rows, PAIR_SIDES, shared=False)
    assert batch.input_ids.shape == (6, examples.widths(PAIR_SIDES)[rows].max())
    for i, (side, row) in enumerate((side, row) for side in PAIR_SIDES for row in rows):
        sequence = np.concatenate(examples.sequence(side, row))
        assert batch.input_ids[i, : len(sequence)].tolist() == sequence.tolist()
        assert (batch.input_ids[i, len(sequence) :] == 0).all()
    assert batch.which.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_trees_hold_each_prompt_and_each_response_once() -> None:
    examples = examples_of(
        ([1, 2, 3], [4, 5, 6], [7, 8]), ([9], [4, 5, 6], [4, 5, 6]), ([1, 2, 3], [4, 5, 6], [10, 11, 12])
    )
    batch = collate(examples, np.arange(3), PAIR_SIDES, shared=True)
    assert batch.trees == ((3, 2, 1, 2), (1, 2))
    # What a response's last token would predict is not asked for.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 10, 11, 9, 4, 5]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2]]
    assert batch.which.tolist() == [[0, 3, 0], [1, 3, 2]]
    assert batch.lengths.tolist() == [3, 2, 3, 3] and len(batch.targets) == 11


def test_short_responses_have_no_branch() -> None:
    batch = collate(examples_of(([5, 6], [], [7]), ([5, 6], [8, 9], [])), np.arange(2), PAIR_SIDES, shared=True)
    assert batch.trees == ((2, 1),) and batch.input_ids.tolist() == [[5, 6, 8]]
    assert batch.lengths.tolist() == [0, 1, 2] and batch.positions.tolist() == [1, 1, 2]
    assert batch.targets.tolist() == [7, 8, 9] and batch.which.tolist() == [[0, 2], [1, 0]]
    nothing = collate(examples_of(([5, 6], [], [])), np.arange(1), PAIR_SIDES, shared=True)
    assert nothing.targets.tolist() == [] and nothing.targets.dtype == np.int64


def test_an_empty_response_has_no_positions() -> None:
    batch = collate(examples_of(([5, 6], [], [7])), np.array([0]), PAIR_SIDES, shared=False)
    assert batch.lengths.tolist() == [0, 1] and batch.targets.tolist() == [7]


@LAYOUTS
@pytest.mark.parametrize("sides", [PAIR_SIDES, ("response",)])
def test_a_stand_in_counts_nowhere(sides: tuple[str, ...], shared: bool) -> None:
    table = make_pairs(2) if sides == PAIR_SIDES else make_labels(2)
    batch = collate(Examples(table), np.empty(0, dtype=np.int64), sides, shared=shared)
    assert batch.which.shape == (len(sides), 0) and len(batch.targets) == 1 and len(batch.lengths) == 0
    assert (batch.trees == ((2,),)) is shared


def test_others_responses_share_the_prompt_too() -> None:
    names = ("prompt_id", "prompt_token_ids", "response_token_ids")
    rows: list[tuple[Any, ...]] = [("a", [1, 2], [3, 4]), ("b", [5], [6, 7, 8])]
    examples = Examples(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=LABEL_SCHEMA))
    batch = collate(examples, np.arange(2), ["response", MISMATCHED], shared=True)
    assert batch.trees == ((2, 1, 1), (1, 2, 1)), "cut where the longest sequence ends"
    assert batch.which.tolist() == [[0, 2], [1, 3]]
