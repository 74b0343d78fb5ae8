import asyncio
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.protocol import JudgeError
from judges.rules import CONSTRAINTS, form, read_constraints, score_response, validate_constraints
from judges.rules.base import WORD, fenced_blocks
from judges.runtime import build_judge, check_judge, judge_groups
from online_po.errors import ConfigError
from online_po.judge_configs import Rules

from .groups import make_group

SCHEMA = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer", "minimum": 0}},
}
GYM_ENTRY = {
    "question": "Calculate 5 - 3 - 6.",
    "answer": "-4",
    "metadata": {"source_dataset": "basic_arithmetic", "source_index": 0, "expression": "5 - 3 - 6"},
}


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
        ("length", {"unit": "words", "low": 2, "high": 4}, "one two three", 1.0),
        ("length", {"unit": "words", "low": 4}, "one two", 0.5 / 4),
        ("length", {"unit": "characters", "high": 4}, "abcdefgh", 0.5 / 4),
        ("length", {"unit": "characters", "high": 8}, "abcd efg", 1.0),
        ("repetition", {"max_share": 0.2}, "a b c d e f", 1.0),
        ("repetition", {"max_share": 0.5}, "a b C a B c a b c", 0.5 * (3 / 7) / 0.5),
        ("repetition", {"max_share": 0.6}, "a b c a b c a b c", 1.0),
        ("repetition", {"max_share": 0.25, "n": 1}, "so so so so", 0.5 * 0.25 / 0.75),
        ("repetition", {"max_share": 0}, "too short", 1.0),
        ("regex", {"pattern": r"\d{3}-\d{4}"}, "call 555-1234", 1.0),
        ("regex", {"pattern": r"^\d{3}-\d{4}$"}, "call 555-1234", 0.0),
        ("regex", {"pattern": "...$"}, "any end", 1.0),
        ("regex", {"pattern": "sorry|cannot", "present": False}, "I can help", 1.0),
        ("regex", {"pattern": "(?i)sorry|cannot", "present": False}, "Sorry, I cannot", 1 / 3),
        ("valid_json", {}, '{"a": [1, 2.5, null]}', 1.0),
        ("valid_json", {}, '```json\n{"a": 1}\n```', 1.0),
        ("valid_json", {}, '"text"', 1.0),
        ("valid_json", {}, 'Here you are: {"a": 1}', 0.25),
        ("valid_json", {}, "Here:\n```json\n[1]\n```\nDone.", 0.25),
        ("valid_json", {}, "{'a': 1}", 0.0),
        ("valid_json", {}, "NaN", 0.0),
        ("valid_json", {}, "[" * 20000 + "1", 0.0),
        ("valid_json", {"schema": SCHEMA}, '{"name": "Ann", "age": 3}', 1.0),
        ("valid_json", {"schema": json.dumps(SCHEMA)}, '{"name": "Ann", "age": 3}', 1.0),
        ("valid_json", {"schema": SCHEMA}, '{"name": "Ann", "age": -3}', 0.5 / 2),
        ("valid_json", {"schema": SCHEMA}, '{"name": "ann", "age": "x"}', 0.5 / 3),
        ("valid_json", {"schema": SCHEMA}, "no data", 0.0),
        ("language", {"code": "de"}, "Guten Morgen, wie geht es dir heute?", 1.0),
        ("language", {"code": "ja"}, "こんにちは世界", 1.0),
        ("language", {"code": "en", "among": ["en", "de"]}, "Yes.", 1.0),
        ("language", {"code": "en", "among": ["en", "de"]}, "42", 0.0),
    ],
)
def test_scores(kind, parameters, text, expected):
    assert score(text, kind, **parameters) == pytest.approx(expected)
    assert score(f"\n {text} \n", kind, **parameters) == pytest.approx(expected)


def test_length_in_tokens_is_the_sampled_ones():
    constraints = read_constraints({"constraints": [{"type": "length", "unit": "tokens", "high": 3}]})
    assert score_response("one", constraints, 3) == (1.0, "at most 3 tokens ✓")
    assert score_response("one", constraints, 6) == (0.125, "at most 3 tokens ✗ (6)")
    with pytest.raises(JudgeError, match="known as text only"):  # gold pairs, files to judge
        score_response("one", constraints)
    group = make_group("one", metadata={"constraints": [{"type": "length", "unit": "tokens", "low": 2}]})
    (verdict,) = asyncio.run(judge_groups(build_judge(Rules()), [group]))
    assert verdict.scores == (0.5 * (1 / 2) ** 2,)  # its one token


def test_another_language_gets_half_its_probability():
    assert 0 < score("Guten Morgen, wie geht es dir", "language", code="nl") < 0.05


def test_a_pattern_that_backtracks_for_ever_is_a_failure_not_a_score():
    metadata = {"constraints": [{"type": "regex", "pattern": r"(a|aa)+$"}]}
    good, bad = make_group("aaa", metadata=metadata), make_group("aaa", "a" * 60 + "!", metadata=metadata)
    verdicts = asyncio.run(judge_groups(build_judge(Rules()), [good, bad]))
    assert verdicts[0].scores == (1.0,)
    assert verdicts[1].scores is None and verdicts[1].failure.kind == "timeout"
    assert "response 1: pattern" in verdicts[1].failure.message


@given(st.text("a.!?\"') \n`", max_size=30))
def test_words_sentences_and_fences_are_found_as_the_plainest_patterns_find_them(text):
    assert WORD.findall(text) == re.findall(r"\S*\w\S*", text)
    assert form._SENTENCE_END.split(text) == re.split(r"[.!?]+[\"')\]]*(?=\s|$)", text)
    fence = re.compile(r"^ {0,3}```[^\n`]*\n(.*?)^ {0,3}```[ \t]*$", re.DOTALL | re.MULTILINE)
    lines = text.replace("a", "```a\n").replace("!", "\n```\n").replace("?", "word ")
    assert fenced_blocks(lines) == fence.findall(lines)


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("!" * 10**6, {"type": "max_words", "n": 3}),
        ("!" * 10**5 + '"' * 10**5 + "x", {"type": "sentences", "count": 2}),
        ("```python\n" * 10**5 + "x", {"type": "code", "tests": ["pass"]}),
    ],
)
def test_pages_of_one_sign_are_no_trouble(text, constraint):
    """Patterns that backtrack take minutes or hours for these."""
    assert score_response(text, read_constraints({"constraints": [constraint]}))[0] < 1


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.com/schema.json"}, "cannot be applied"),
        ({"type": "object", "properties": {"name": {"pattern": r"(a|aa)+$"}}}, "cannot be applied"),
    ],
)
def test_a_schema_that_cannot_be_applied_is_a_failure(schema, message):
    with pytest.raises(JudgeError, match=message):
        score(json.dumps({"name": "a" * 60 + "!"}), "valid_json", schema=schema)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4), st.floats(0, 0.99))
def test_repetition_counts_repeats(words, n, bound):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    value, _, _ = CONSTRAINTS["repetition"](" ".join(words), max_share=bound, n=n)
    assert (value == 1.0) == (not grams or repeats / len(grams) <= bound + 1e-12)
    assert value == 1.0 or value <= 0.5


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
    "length": {"unit": "words", "low": 2, "high": 3},
    "repetition": {"max_share": 0.1, "n": 1},
    "regex": {"pattern": "a.*B"},
    "valid_json": {"schema": {"type": "number"}},
    "language": {"code": "en", "among": ["en", "de"]},
    "code": {"tests": ["assert f(1) == 2"]},
    "math": {"answer": "7"},
    "reasoning_gym": {"entry": GYM_ENTRY},
}
RUNNING = {"code", "math", "reasoning_gym"}
"""Their own tests are in test_rules_that_run.py."""


@given(st.text(alphabet='aB ,.!?\n-*"é7', max_size=40), st.sampled_from(sorted(set(CONSTRAINTS) - RUNNING)))
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
        ({"constraints": [{"type": "length", "unit": "words"}]}, "no bound; give low, high or both"),
        ({"constraints": [{"type": "length", "unit": "lines", "low": 1}]}, "unit must be words, characters or tokens"),
        ({"constraints": [{"type": "length", "unit": "words", "low": 5, "high": 4}]}, "low is 5, above high = 4"),
        ({"constraints": [{"type": "length", "low": 1}]}, r"length takes unit, low \(optional\), high \(optional\)"),
        ({"constraints": [{"type": "length", "unit": "words", "low": 1, "tokens": 2}]}, "length takes unit"),
        ({"constraints": [{"type": "repetition", "max_share": 1}]}, "max_share must be a number from 0 to below 1"),
        ({"constraints": [{"type": "regex", "pattern": "a("}]}, "pattern is not a regular expression: missing"),
        ({"constraints": [{"type": "regex", "pattern": "a", "present": "no"}]}, "present must be true or false"),
        ({"constraints": [{"type": "valid_json", "schema": {"type": "objekt"}}]}, "schema is not a JSON schema"),
        (
            {"constraints": [{"type": "valid_json", "schema": {"items": [{"patternProperties": {"^(a+)+$": {}}}]}}]},
            "schema has patternProperties.*write propertyNames with a pattern",
        ),
        ({"constraints": [{"type": "valid_json", "schema": "{"}]}, "schema must be an object, or one as JSON text"),
        ({"constraints": [{"type": "language", "code": "xx"}]}, "language 'xx' is not known; known are "),
        ({"constraints": [{"type": "language", "code": "en", "among": ["de", "fr"]}]}, "it must name 'en'"),
        ({"constraints": [{"type": "language", "code": "en", "among": ["en"]}]}, "at least one other language"),
    ],
)
def test_bad_constraints(metadata, message):
    with pytest.raises(ConfigError, match=message):
        validate_constraints(metadata)


def test_constraints_as_parquet_and_csv_give_them():
    assert read_constraints({"constraints": [{"type": "lowercase", "n": None, "phrase": None}]}) == [("lowercase", {})]
    assert read_constraints({"constraints": '[{"type": "max_words", "n": 3}]'}) == [("max_words", {"n": 3})]
