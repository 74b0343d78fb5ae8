import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from online_po.batching import (
    MISMATCHED,
    Examples,
    TokenLists,
    epoch_order,
    global_batches,
    next_with_another,
)
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA
from tests.learner_setup import make_pairs

SINGLE = np.arange(50)
"""Fifty examples of as many prompts."""


def test_order_visits_every_example_once_and_depends_on_seed_round_and_epoch() -> None:
    for groups in (SINGLE, SINGLE // 5, np.random.default_rng(0).integers(0, 9, 50)):
        orders = [epoch_order(groups, 4, *key) for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]]
        assert all(sorted(order) == list(range(50)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4
        assert (orders[0] == epoch_order(groups, 4, 0, 1, 0)).all()
    assert epoch_order(np.empty(0, dtype=np.int64), 4, 0, 1, 0).tolist() == []


def test_order_is_the_same_in_another_process() -> None:
    code = """
import numpy as np
from online_po.batching import epoch_order
print(*epoch_order(np.arange(20) // 3, 2, 3, 2, 1))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in printed.split()] == epoch_order(np.arange(20) // 3, 2, 3, 2, 1).tolist()


@pytest.mark.parametrize("together", [1, 2, 3, 99])
def test_examples_of_a_prompt_are_together_but_not_more_than_asked(together: int) -> None:
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(12), 7))  # 7 examples each
    order = epoch_order(groups, together, 0, 1, 0)
    runs = np.diff(np.flatnonzero(np.diff(groups[order], prepend=-1, append=-1) != 0))
    expected = -(-7 // together) * 12  # runs, but where two of a prompt happen to meet
    assert expected * 0.7 <= len(runs) <= expected
    members = [order[groups[order] == group].tolist() for group in range(12)]
    assert sum(rows == sorted(rows) for rows in members) < 6, "which are together is drawn at random"


def test_global_batches_are_as_equal_as_can_be_and_keep_every_example() -> None:
    assert [len(batch) for batch in global_batches(np.arange(49), 16)] == [13, 12, 12, 12]
    order = epoch_order(np.arange(11), 1, 0, 1, 0)
    batches = list(global_batches(order, 4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert np.concatenate(batches).tolist() == order.tolist()


def test_examples_of_equal_prompts_are_one_group() -> None:
    prompts = [[1, 2], [1], [1, 2], [3], [1]]
    rows = [{"prompt_token_ids": p, "chosen_token_ids": [4], "rejected_token_ids": [5]} for p in prompts]
    assert Examples(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)).prompt_groups.tolist() == [0, 1, 0, 2, 1]


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
