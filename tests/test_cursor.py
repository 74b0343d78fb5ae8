import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_po.cursor import PromptCursor
from online_po.errors import ConfigError

SIZES = st.integers(1, 40)


@st.composite
def walks(draw):
    size = draw(SIZES)
    return size, draw(st.integers(0, 5)), draw(st.lists(st.integers(0, size), max_size=20))


@given(walks())
@settings(max_examples=200)
def test_each_prompt_once_an_epoch_and_once_a_draw(walk):
    size, seed, draws = walk
    cursor = PromptCursor(size, seed)
    seen: list[int] = []
    for k in draws:
        drawn = cursor.draw(k)
        assert len(drawn) == k == len(set(drawn))
        seen += drawn
    for start in range(0, len(seen), size):
        epoch = seen[start : start + size]
        assert len(set(epoch)) == len(epoch)
        if len(epoch) == size:
            assert sorted(epoch) == list(range(size))
    assert cursor.epoch == len(seen) // size


@given(walks(), st.integers(0, 20))
@settings(max_examples=200)
def test_goes_on_from_saved_state(walk, stop):
    size, seed, draws = walk
    whole = PromptCursor(size, seed)
    expected = [whole.draw(k) for k in draws]
    first = PromptCursor(size, seed)
    for k in draws[:stop]:
        first.draw(k)
    second = PromptCursor(size, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.draw(k) for k in draws[stop:]] == expected[stop:]


def test_deferred_prompts_come_last():
    cursor = PromptCursor(10, 0)
    cursor.draw(6)
    over_the_end = cursor.draw(6)
    late, rest = set(over_the_end[:4]), cursor.draw(8)
    assert set(rest[-4:]) == late


def test_epochs_and_seeds_differ():
    cursor = PromptCursor(50, 1)
    first, second = cursor.draw(50), cursor.draw(50)
    assert first != second and first != PromptCursor(50, 2).draw(50) and first == PromptCursor(50, 1).draw(50)
    assert first != list(range(50))


def test_order_is_pinned():
    assert PromptCursor(8, 0).draw(8) == [
        4,
        2,
        3,
        7,
        6,
        0,
        5,
        1,
    ]  # a saved run must find the same order after an upgrade


def test_too_many_at_once():
    with pytest.raises(ConfigError, match=r"loop\.prompts_per_round is 11, but there are only 10"):
        PromptCursor(10, 0).draw(11)


def test_no_prompts():
    with pytest.raises(ConfigError, match="0 prompts"):
        PromptCursor(0, 0)


@pytest.mark.parametrize(
    ("size", "seed", "named"), [(11, 0, "size 10, but this run 11"), (10, 1, "seed 0, but this run 1")]
)
def test_state_of_other_prompts(size, seed, named):
    with pytest.raises(ConfigError, match=named):
        PromptCursor(size, seed).load_state_dict(PromptCursor(10, 0).state_dict())
