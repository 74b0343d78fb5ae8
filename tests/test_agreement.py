"""Krippendorff's alpha, by published examples and by its definition."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_po.agreement import Agreement, krippendorff_alpha, shared_ranks
from online_po.types import JudgeFailure, Judgement, MemberScores

N = None
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D: four observers, missing data.
FOUR = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]
# The example of the article "Krippendorff's alpha" in Wikipedia: three coders, interval 0.811.
THREE = [
    [N, N, N, N, N, 3, 4, 1, 2, 1, 1, 3, 3, N, 3],
    [1, N, 2, 1, 3, 3, 4, 3, N, N, N, N, N, N, N],
    [N, N, 2, 1, 3, 4, 4, N, 2, 1, 1, 3, 3, N, 4],
]


@pytest.mark.parametrize(("ratings", "alpha"), [(FOUR, 0.849), (THREE, 0.811)])
def test_published_examples(ratings, alpha):
    assert krippendorff_alpha(ratings) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize(
    ("ratings", "alpha"),
    [
        ([[0, 1, 2], [0, 1, 2]], 1.0),
        ([[0, 1], [1, 0]], -0.5),  # observed 1, expected 2/3
        ([[1, 1], [1, 1]], None),
        ([[0.1] * 3, [0.1] * 3], None),  # their mean is rounded
        ([[1, None], [None, 2]], None),
        ([], None),
        ([[], []], None),
    ],
)
def test_by_hand(ratings, alpha):
    assert krippendorff_alpha(ratings) == (alpha if alpha is None else pytest.approx(alpha))


units = st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=5, max_size=5)


@given(st.lists(units, min_size=2, max_size=4))
def test_by_its_definition(ratings):
    columns = [[v for v in column if v is not None] for column in zip(*ratings, strict=True)]
    columns = [column for column in columns if len(column) > 1]
    values = [v for column in columns for v in column]
    n = len(values)
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2)) / (n * (n - 1)) if n else 0
    found = krippendorff_alpha(ratings)
    if expected == 0:
        assert found is None
        return
    observed = sum(
        sum((a - b) ** 2 for a, b in itertools.permutations(column, 2)) / (len(column) - 1) for column in columns
    )
    assert found == pytest.approx(1 - observed / n / expected)


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [((5, 1, 3), (1, 0, 0.5)), ((2, 2, 1), (0.75, 0.75, 0)), ((7, 7), (0.5, 0.5)), ((7,), (0.5,))],
)
def test_ranks(scores, ranks):
    assert shared_ranks(scores) == pytest.approx(ranks)


def test_a_round():
    def judged(*rows, **settings):
        members = tuple(MemberScores(name=name, scores=row) for name, row in zip("ab", rows, strict=True))
        return Judgement(prompt_id="p", members=members, **({"scores": rows[0]} | settings))

    round_ = Agreement()
    assert round_.result() == {}
    round_.add(Judgement(prompt_id="p", scores=(1.0,)))
    assert round_.result() == {}
    # Units of the two judges do not matter, only their order of the responses to one prompt.
    round_.add(judged((1.0, 2.0, 3.0), (100.0, 900.0, 901.0)))
    assert round_.result() == {"judge_agreement": pytest.approx(1.0)}
    # A group without a label because they disagree counts: else they would always seem to agree.
    round_.add(judged((1.0, 2.0), (2.0, 1.0), scores=None, failure=JudgeFailure(kind="abstained", message="")))
    (alpha,) = round_.result().values()
    rows = [[0, 0.5, 1, 0, 1], [0, 0.5, 1, 1, 0]]
    assert alpha == pytest.approx(krippendorff_alpha(rows)) and alpha < 0.8
