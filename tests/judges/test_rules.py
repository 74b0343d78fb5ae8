import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.rules import CONSTRAINTS, read_constraints, score_response, validate_constraints
from judges.runtime import build_judge, check_judge, judge_groups
from online_po.errors import ConfigError
from online_po.judge_configs import Rules

from .groups import make_group


def score(text, kind, **parameters):
    return score_response(text, read_constraints({"constraints": [{"type": kind, **parameters}]}))[0]


@pytest.mark.parametrize(
    ("kind", "parameters", "text", "expected"),
    [
        ("lowercase", {}, "all small, 3 of them.", 1.0),
        ("lowercase", {}, "One capital", 1 / 2),
        ("lowercase", {}, "Two Capitals or MORE", 1 / 4),
        ("uppercase", {}, "ALL BIG, 3 OF THEM.", 1.0),
        ("uppercase", {}, "One", 1 / 2),
        ("no_commas", {}, "none here", 1.0),
        ("no_commas", {}, "one, two, three", 1 / 3),
        ("bullet_points", {"count": 3}, "Here you are:\n- a\n* b\n  • c", 1.0),
        ("bullet_points", {"count": 3}, "- a\n- b", 1 / 2),
        ("bullet_points", {"count": 3}, "- a\n- b\n- c\n- d\n- e", 1 / 3),
        ("bullet_points", {"count": 3}, "1. a\n2. b\n3. c", 0.25),
        ("bullet_points", {"count": 3}, "1) a\n2) b", 0.125),
        ("bullet_points", {"count": 3}, "1. a 2. b 3. c", 0.25 / 3),
        ("bullet_points", {"count": 3}, "- a\n1. b\n2. c", 1 / 3),
        ("bullet_points", {"count": 3}, "just prose", 0.0),
        ("bullet_points", {"count": 3}, "- a\n-b\n- \n---", 1 / 3),
        ("bullet_points", {"count": 3}, "- a - b - c", 1 / 3),
        ("ends_with", {"phrase": "The end."}, "A cat sat on a mat. The end.", 1.0),
        ("ends_with", {"phrase": "The end."}, 'a cat sat on a mat. "the  END"!', 1.0),
        ("ends_with", {"phrase": "The end."}, "The end of a long day came.", 0.5),
        ("ends_with", {"phrase": "The end."}, "A long weekend", 0.0),
        ("ends_with", {"phrase": "hope this helps"}, "I hope this is what you wanted", 0.3 * 2 / 3),
        ("ends_with", {"phrase": "The end."}, "The end.", 0.0),
        ("ends_with", {"phrase": "The end."}, "The end. The end.", 0.0),
        ("starts_with", {"phrase": "Well"}, "Well, a cat is small", 1.0),
        ("starts_with", {"phrase": "Well"}, "A cat is well known", 0.5),
        ("starts_with", {"phrase": "Well"}, "Wellington is a city", 0.0),
        ("max_words", {"n": 4}, "one two - three four", 1.0),
        ("max_words", {"n": 4}, "1 2 3 4 5 6 7 8", 0.5 / 4),
        ("min_words", {"n": 4}, "it's four words here", 1.0),
        ("min_words", {"n": 4}, "only two", 0.5 / 4),
        ("words", {"low": 2, "high": 4}, "one two three", 1.0),
        ("words", {"low": 2, "high": 4}, "one", 0.5 / 4),
        ("words", {"low": 2, "high": 4}, "1 2 3 4 5 6 7 8", 0.5 / 4),
        ("sentences", {"count": 2}, "One is 3.5. Two?!", 1.0),
        ("sentences", {"count": 2}, "One. Two. And a rest", 1 / 2),
        ("paragraphs", {"count": 2}, "a\nb\n\n\nc", 1.0),
        ("paragraphs", {"count": 2}, "a\nb", 1 / 2),
        ("includes", {"keywords": ["green", "big cat"]}, "A Green leaf and a big cat", 1.0),
        ("includes", {"keywords": ["green", "cat"]}, "A greenish leaf and a cat", 0.25),
        ("includes", {"keywords": ["green", "cat"]}, "green cat", 0.0),
        ("excludes", {"keywords": ["very", "just"]}, "Every justice", 1.0),
        ("excludes", {"keywords": ["very", "just"]}, "Very very just", 1 / 4),
        ("quoted", {}, '"so it is"', 1.0),
        ("quoted", {}, "“so it is”", 1.0),
        ("quoted", {}, '"so it is', 0.25),
        ("quoted", {}, "so it is", 0.0),
        ("quoted", {}, '"', 0.0),
    ],
)
def test_scores(kind, parameters, text, expected):
    assert score(text, kind, **parameters) == pytest.approx(expected)
    assert score(f"\n {text} \n", kind, **parameters) == pytest.approx(expected)


EXAMPLES = {
    "bullet_points": {"count": 2},
    "ends_with": {"phrase": "a b"},
    "starts_with": {"phrase": "a b"},
    "max_words": {"n": 2},
    "min_words": {"n": 2},
    "words": {"low": 2, "high": 3},
    "sentences": {"count": 2},
    "paragraphs": {"count": 2},
    "includes": {"keywords": ["a", "b"]},
    "excludes": {"keywords": ["a"]},
}


@given(st.text(alphabet='aB ,.!?\n-*"é7', max_size=40), st.sampled_from(sorted(CONSTRAINTS)))
def test_full_score_says_it_is_met_and_nothing_else_does(text, kind):
    value, rationale = score_response(text, [(kind, EXAMPLES.get(kind, {}))])
    assert 0.0 <= value <= 1.0
    assert (value == 1.0) == rationale.endswith("✓")
    assert value == 1.0 or value <= 0.5  # no near miss looks like success


@pytest.mark.parametrize("text", ["", "  \n", "...", "- - -", '""'])
@pytest.mark.parametrize("kind", sorted(CONSTRAINTS))
def test_empty_responses_get_nothing(kind, text):
    assert score(text, kind, **EXAMPLES.get(kind, {})) == 0.0


def test_mean_and_rationale():
    constraints = read_constraints({"constraints": [{"type": "lowercase"}, {"type": "max_words", "n": 2}]})
    assert score_response("one two three four", constraints) == (
        (1.0 + 0.125) / 2,
        "lowercase ✓ · at most 2 words ✗ (4)",
    )


def test_judge():
    group = make_group("a, b", "a b", "", metadata={"constraints": [{"type": "no_commas"}]})
    bad = make_group("a", metadata={"constraints": [{"type": "no_comas"}]})
    none = make_group("a")
    config = Rules()
    check_judge(config)
    verdicts = asyncio.run(judge_groups(build_judge(config), [group, bad, none]))
    assert verdicts[0].scores == (0.5, 1.0, 0.0)
    assert verdicts[0].rationales == ("no commas ✗ (1)", "no commas ✓", "empty response")
    assert [v.failure.kind for v in verdicts[1:]] == ["error", "error"] and verdicts[1].scores is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"topic": "x"}, "'constraints', but a prompt has only: 'topic'"),
        ({"constraints": []}, "not empty"),
        ({"constraints": None}, "it must be a list"),
        ({"constraints": "[{"}, "is not valid JSON"),
        ({"constraints": [{"n": 3}]}, "has no type"),
        ({"constraints": ["lowercase"]}, "has no type"),
        ({"constraints": [{"type": "max_word", "n": 3}]}, "no type 'max_word'; did you mean 'max_words'"),
        ({"constraints": [{"type": "max_words"}]}, "parameters none; max_words takes n"),
        ({"constraints": [{"type": "max_words", "count": 3}]}, "parameters count; max_words takes n"),
        ({"constraints": [{"type": "lowercase", "n": 3}]}, "parameters n; lowercase takes none"),
        ({"constraints": [{"type": "max_words", "n": 0}]}, "n must be a whole number of at least 1, not 0"),
        ({"constraints": [{"type": "max_words", "n": True}]}, "n must be a whole number"),
        ({"constraints": [{"type": "max_words", "n": "3"}]}, "n must be a whole number"),
        ({"constraints": [{"type": "words", "low": 5, "high": 4}]}, "low is 5, above high = 4"),
        ({"constraints": [{"type": "ends_with", "phrase": " ."}]}, "phrase must be text"),
        ({"constraints": [{"type": "includes", "keywords": "a"}]}, "keywords must be a list of words"),
        ({"constraints": [{"type": "includes", "keywords": []}]}, "keywords must be a list of words"),
    ],
)
def test_bad_constraints(metadata, message):
    with pytest.raises(ConfigError, match=message):
        validate_constraints(metadata)


def test_constraints_as_parquet_and_csv_give_them():
    assert read_constraints({"constraints": [{"type": "lowercase", "n": None, "phrase": None}]}) == [("lowercase", {})]
    assert read_constraints({"constraints": '[{"type": "max_words", "n": 3}]'}) == [("max_words", {"n": 3})]
