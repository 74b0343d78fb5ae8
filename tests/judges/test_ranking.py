import asyncio
import math
import random

import pytest

from judges.bradley_terry import strengths
from judges.protocol import JudgeError
from judges.ranking import RANKINGS
from online_po.types import Comparison


def rank(name, values, preference=None):
    """The comparisons of players with these values, as they are made."""
    made = []

    async def compare(first, second):
        assert first < second
        a, b = values[first], values[second]
        found = Comparison(first=first, second=second, preference=(a > b) + 0.5 * (a == b), consistent=True)
        made.append(found)
        await asyncio.sleep(0)
        return found

    given = asyncio.run(RANKINGS[name](range(len(values)), compare))
    assert sorted(map(str, given)) == sorted(map(str, made))
    assert len({(c.first, c.second) for c in made}) == len(made)  # nothing is asked twice
    return made


def shuffled(n, seed):
    values = list(range(n))
    random.Random(seed).shuffle(values)
    return values


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("seed", range(4))
def test_how_many_are_asked(n, seed):
    values = shuffled(n, seed)
    assert len(rank("round_robin", values)) == n * (n - 1) // 2
    assert len(rank("best_worst", values)) <= math.ceil(3 * n / 2) - 2 + n % 2
    assert len(rank("tournament", values)) <= n * math.ceil(math.log2(n)) - 2 ** math.ceil(math.log2(n)) + 1


def test_a_knock_out_of_eight():
    assert len(rank("best_worst", shuffled(8, 0))) == 4 + 2 + 1 + 2 + 1


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("seed", range(4))
def test_scores_find_best_and_worst(name, n, seed):
    values = shuffled(n, seed)
    theta = strengths(n, [(c.first, c.second, c.preference) for c in rank(name, values)])
    assert theta.index(max(theta)) == values.index(n - 1) and theta.index(min(theta)) == values.index(0)
    if name != "best_worst":
        assert sorted(range(n), key=theta.__getitem__) == sorted(range(n), key=values.__getitem__)


@pytest.mark.parametrize("name", RANKINGS)
def test_ties(name):
    made = rank(name, [1] * 6)
    assert strengths(6, [(c.first, c.second, c.preference) for c in made]) == [0.0] * 6


@pytest.mark.parametrize("name", RANKINGS)
def test_one_failure_ends_it_and_what_runs_is_let_finish(name):
    finished = []

    async def compare(first, second):
        await asyncio.sleep(0)
        if (first, second) == (0, 1):
            raise JudgeError("refusal", "no")
        await asyncio.sleep(0.01)
        finished.append((first, second))
        return Comparison(first=first, second=second, preference=1.0, consistent=True)

    with pytest.raises(JudgeError, match="no"):
        asyncio.run(RANKINGS[name](range(4), compare))
    assert (2, 3) in finished
