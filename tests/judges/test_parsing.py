import json
import math

import pytest

from judges.chat import Reply, Token
from judges.parsing import choice_probability, read_verdict, to_choice, to_scale
from judges.protocol import JudgeError


def as_json(text, id_="123456", rationale=False):
    return read_verdict(Reply(text=text, is_json=True), id_=id_, rationale=rationale)


def as_text(text, id_="123456", rationale=False):
    return read_verdict(Reply(text=text, is_json=False), id_=id_, rationale=rationale)


@pytest.mark.parametrize(
    ("text", "id_", "rationale", "verdict"),
    [
        ('{"id": "123456", "verdict": 7}', "123456", False, (7, None)),
        (' {"verdict": "A", "id": "123456"}\n', "123456", False, ("A", None)),
        ('```json\n{"id": "123456", "verdict": 7}\n```', "123456", False, (7, None)),
        ('{"verdict": 7}', None, False, (7, None)),
        ('{"id": "123456", "reasons": "so {}", "verdict": 7}', "123456", True, (7, "so {}")),
    ],
)
def test_json_with_a_verdict(text, id_, rationale, verdict):
    assert as_json(text, id_, rationale) == verdict


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty answer"),
        (" \n", "an empty answer"),
        ("7", "without exactly the keys id, verdict"),
        ("[7]", "without exactly the keys"),
        ("null", "without exactly the keys"),
        ('{"id": "123456", "verd', "not the JSON asked for.*judge.answers: text"),
        ('The verdict: {"id": "123456", "verdict": 7}', "not the JSON asked for"),
        ('{"id": "123456", "verdict": 7} and {"id": "123456", "verdict": 3}', "not the JSON asked for"),
        ('{"id": "123456", "verdict": 7, "verdict": 3}', "a key comes twice"),
        ('{"id": "123456", "score": 7}', "without exactly the keys"),
        ('{"id": "123456", "verdict": 7, "confidence": 1}', "without exactly the keys"),
        ('{"verdict": 7}', "without exactly the keys"),
        ('{"id": "123457", "verdict": 7}', "an answer to another question: it repeats the id '123457', not '123456'"),
        ('{"id": 123456, "verdict": 7}', "an answer to another question"),
        ('{"id": null, "verdict": 7}', "an answer to another question"),
    ],
)
def test_json_without_one(text, message):
    with pytest.raises(JudgeError, match=message) as caught:
        as_json(text)
    assert caught.value.kind == "unparsable" and caught.value.retry


def test_reasons_must_be_text():
    with pytest.raises(JudgeError, match="reasons are no text"):
        as_json('{"id": "123456", "reasons": [], "verdict": 7}', rationale=True)


@pytest.mark.parametrize(
    ("text", "id_", "verdict"),
    [
        ("Verdict 123456: 7", "123456", "7"),
        ("verdict 123456 : B\n\n", "123456", "B"),
        ("**Verdict 123456: A**", "123456", "A"),
        ("**Verdict 123456:** A.", "123456", "A"),
        ("### Verdict: `-3`", None, "-3"),
        ("So it is.\nverdict 123456: 7\n\nVerdict 123456: 7", "123456", "7"),
        ("The verdict of A: bad.\nVerdict 123456: B", "123456", "B"),
        ("Verdict 123456: Response A", "123456", "Response A"),
    ],
)
def test_a_verdict_on_the_last_line(text, id_, verdict):
    assert as_text(text, id_) == (verdict, None)


def test_reasons_before_the_last_line():
    assert as_text("It is good.\n\nIt is short.\nVerdict 123456: 7", rationale=True) == (
        "7",
        "It is good.\n\nIt is short.",
    )
    assert as_text("Verdict 123456: 7", rationale=True) == ("7", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty answer"),
        ("7", "no verdict on the last line"),
        ("I would say 7 of 10", "no verdict on the last line"),
        ("Verdict 123456: 7\nI hope that helps!", "no verdict on the last line, but 'I hope"),
        ("Verdict 123456:", "no verdict on the last line"),
        ("My verdict 123456: 7", "no verdict on the last line"),
        ("Verdict 654321: 7", "an answer to another question"),
        ("Verdict: 7", "an answer to another question: it repeats the id None"),
        ("Verdict 123456: 3\nor rather\nVerdict 123456: 7", "two verdicts"),
        ("Verdict: A\nVerdict 123456: B", "two verdicts"),
    ],
)
def test_text_without_a_verdict(text, message):
    with pytest.raises(JudgeError, match=message) as caught:
        as_text(text)
    assert caught.value.kind == "unparsable" and caught.value.retry


def test_an_id_that_nobody_asked_for():
    with pytest.raises(JudgeError, match="no verdict on the last line"):
        as_text("Verdict 7: 3", id_=None)


@pytest.mark.parametrize("value", [7, 7.0, "7", "+7"])
def test_scores(value):
    assert to_scale(value, 1, 10) == 7


@pytest.mark.parametrize(
    "value",
    [0, 11, -7, 7.5, True, None, "seven", "7.0", "7/10", "", [7], {"a": 1}, math.nan, math.inf, "٧", "1_0", "9" * 5000],
)
def test_what_is_no_score(value):
    with pytest.raises(JudgeError, match="the score is") as caught:
        to_scale(value, 1, 10)
    assert caught.value.kind == "bad_value" and len(str(caught.value)) < 200


@pytest.mark.parametrize(("value", "choice"), [("A", "A"), ("b", "B"), (" B ", "B")])
def test_choices(value, choice):
    assert to_choice(value) == choice


@pytest.mark.parametrize("value", ["C", "AB", "", "A or B", "Response A", 1, None, True, ["A"]])
def test_what_is_no_choice(value):
    with pytest.raises(JudgeError, match="neither A nor B") as caught:
        to_choice(value)
    assert caught.value.kind == "bad_value"


# -- probabilities -------------------------------------------------------------------------------------


def reply(*texts, is_json=True, **logps):
    """The tokens; `logps` are of the verdict's, which is the one token with an alternative."""
    tokens = [Token(text=text, logps={text: -0.5, **{k: v for k, v in logps.items()}}) for text in texts]
    return Reply(text="".join(texts).removesuffix("<|im_end|>"), is_json=is_json, tokens=tuple(tokens))


HEAD = ('{"', "id", '": "', "314159", '", "', "ver", 'dict": "')


@pytest.mark.parametrize(
    ("texts", "is_json"),
    [
        ((*HEAD, "A", '"}'), True),
        ((*HEAD[:-1], 'dict":', ' "A', '"}'), True),
        ((*HEAD, 'A"}'), True),
        (('{"verdict": "', "A", '", "id": "', "BABA", '"}'), True),
        ((*HEAD, "A", '"}', "<|im_end|>"), True),
        (("A good one. ", "B", " is bad.\nVerdict", " 314159", ":", " A", "\n"), False),
    ],
)
def test_probability_at_the_verdict(texts, is_json):
    p, q = math.exp(-0.5), math.exp(-2.0)
    found = reply(*texts, is_json=is_json, B=-2.0, C=-0.1)
    assert choice_probability(found) == pytest.approx(p / (p + q))


def test_spellings_of_a_letter_count_together():
    token = Token(text="B", logps={"A": -1.0, " A": -1.5, "B": -2.0, '"B': -3.0, "Because": -0.1, "ab": -0.1})
    found = Reply(text="Verdict: B", is_json=False, tokens=(Token(text="Verdict: ", logps={}), token))
    a, b = math.exp(-1.0) + math.exp(-1.5), math.exp(-2.0) + math.exp(-3.0)
    assert choice_probability(found) == pytest.approx(a / (a + b))


def test_the_other_letter_is_not_even_listed():
    assert choice_probability(reply(*HEAD, "B", '"}')) == 0.0


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            Reply(text='{"verdict": "A"}', is_json=True, tokens=(Token(text="A", logps={"A": -1.0}),)),
            "not of its answer",
        ),
        (reply('{"verdict": "A"', "}"), "stands inside the token"),
        (reply('{"verdict": "', "\\u0041", '"}'), "is escaped"),
    ],
)
def test_no_probability(found, message):
    assert json.loads(found.text) == {"verdict": "A"}
    with pytest.raises(JudgeError, match=message):
        choice_probability(found)
