import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from online_po.batching import (
    MISMATCHED,
    PAIR_SIDES,
    Examples,
    TokenLists,
    collate,
    epoch_order,
    global_batches,
    next_with_another,
    rank_plans,
)
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA
from tests.learner_setup import make_pairs


def test_order_visits_every_pair_once_and_depends_on_seed_round_and_epoch() -> None:
    orders = [epoch_order(50, *key) for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert (orders[0] == epoch_order(50, 0, 1, 0)).all()


def test_order_is_the_same_in_another_process() -> None:
    code = "from online_po.batching import epoch_order; print(*epoch_order(20, 3, 2, 1))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in printed.split()] == epoch_order(20, 3, 2, 1).tolist()


def test_global_batches_are_as_equal_as_can_be_and_keep_every_pair() -> None:
    assert [len(batch) for batch in global_batches(np.arange(49), 16)] == [13, 12, 12, 12]
    order = epoch_order(11, 0, 1, 0)
    batches = list(global_batches(order, 4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert np.concatenate(batches).tolist() == order.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_ranks_share_every_pair_once_in_equally_many_passes(ranks: int, count: int) -> None:
    widths = np.random.default_rng(count).integers(1, 40, 30)
    rows = np.random.default_rng(0).permutation(30)[:count]
    plans = rank_plans(rows, widths, ranks, token_limit=100)
    assert len(plans) == ranks
    assert len({len(plan) for plan in plans}) == 1
    dealt = np.concatenate([share for plan in plans for share in plan])
    assert sorted(dealt) == sorted(rows)
    sizes = [sum(len(share) for share in plan) for plan in plans]
    assert max(sizes) - min(sizes) <= 1


def test_micro_batches_keep_the_token_limit_and_long_pairs_go_alone() -> None:
    widths = np.array([60, 10, 9, 10, 3, 8, 50, 2])
    (plan,) = rank_plans(np.arange(8), widths, 1, token_limit=40)
    for share in plan:
        assert len(share) == 1 or 2 * len(share) * widths[share].max() <= 40
    assert plan[0].tolist() == [0] and plan[1].tolist() == [6]
    # as few passes as the limit allows for sorted rows: 60 | 50 | 10 10 | 9 8 | 3 2
    assert [sorted(share.tolist()) for share in plan] == [[0], [6], [1, 3], [2, 5], [4, 7]]


def test_fewer_pairs_than_ranks_leaves_empty_passes() -> None:
    plans = rank_plans(np.array([4]), np.full(5, 3), 3, token_limit=100)
    assert [[len(share) for share in plan] for plan in plans] == [[1], [0], [0]]


def test_collate_points_at_response_tokens_only() -> None:
    pairs = make_pairs(6, seed=1)
    tokens = Examples(pairs)
    rows = np.array([3, 0, 5])
    batch = collate(tokens, rows, PAIR_SIDES)
    records = pairs.to_pylist()
    assert batch.input_ids.shape == (6, tokens.widths(PAIR_SIDES)[rows].max())
    cursor = 0
    for i, (row, side) in enumerate(
        [(row, side) for side in ("chosen_token_ids", "rejected_token_ids") for row in rows]
    ):
        prompt, response = records[row]["prompt_token_ids"], records[row][side]
        end = len(prompt) + len(response)
        assert batch.input_ids[i, :end].tolist() == prompt + response
        assert (batch.input_ids[i, end:] == 0).all()
        assert batch.lengths.flatten()[i] == len(response)
        places = batch.positions[cursor : cursor + len(response)] - i * batch.input_ids.shape[1]
        assert places.tolist() == list(range(len(prompt) - 1, end - 1))
        assert batch.targets[cursor : cursor + len(response)].tolist() == response
        cursor += len(response)
    assert cursor == len(batch.positions) == len(batch.targets)


def test_collate_of_no_pairs_counts_nowhere() -> None:
    batch = collate(Examples(make_pairs(2)), np.empty(0, dtype=np.int64), PAIR_SIDES)
    assert batch.lengths.shape == (2, 0) and len(batch.targets) == 1


def test_an_empty_response_has_no_positions() -> None:
    row = {"prompt_token_ids": [5, 6], "chosen_token_ids": [], "rejected_token_ids": [7]}
    batch = collate(Examples(pa.Table.from_pylist([row], schema=PAIR_SCHEMA)), np.array([0]), PAIR_SIDES)
    assert batch.lengths.tolist() == [[0], [1]] and batch.targets.tolist() == [7]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("aabbb", [2, 3, 0, 1, 0]),  # each of a run another one, as far as there are
        ("abc", [1, 2, 0]),
        ("aabba", [2, 3, 4, 4, 2]),  # the first run follows the last, unless it has the same key
        ("aba", [1, 2, 1]),
        ("aaa", [0, 1, 2]),
        ("a", [0]),
        ("", []),
    ],
)
def test_the_next_with_another_key(keys: str, expected: list[int]) -> None:
    assert next_with_another(np.array(list(keys), dtype=object)).tolist() == expected


def test_anothers_response_is_cut_where_the_longest_sequence_ends() -> None:
    rows = [("a", [1] * 9, [2]), ("b", [3], [4, 5, 6, 7]), ("b", [3], [8, 9])]
    names = ("prompt_id", "prompt_token_ids", "response_token_ids")
    examples = Examples(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=LABEL_SCHEMA))
    assert [examples.sequence(MISMATCHED, row)[1].tolist() for row in range(3)] == [[4], [2], [2]]
    assert examples.lengths(MISMATCHED).tolist() == [1, 1, 1]
    assert examples.widths([MISMATCHED]).tolist() == [10, 2, 2]


def test_token_lists_read_slices_and_several_chunks() -> None:
    pairs = make_pairs(10)
    joined = pa.concat_tables([pairs.slice(3, 2), pairs.slice(0, 4)])
    for table in (joined, joined.slice(1, 3), joined.slice(0, 0)):
        lists = TokenLists(table.column("chosen_token_ids"))
        expected = table.column("chosen_token_ids").to_pylist()
        assert [lists[i].tolist() for i in range(table.num_rows)] == expected
        assert lists.lengths.tolist() == [len(row) for row in expected]


def test_one_chunk_is_read_without_a_copy() -> None:
    column = make_pairs(10).column("chosen_token_ids")
    values = column.chunk(0).values.to_numpy()
    assert np.shares_memory(TokenLists(column)[4], values)
