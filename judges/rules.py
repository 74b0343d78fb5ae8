"""The `rules` judge: constraints that a program can verify, from the prompt's metadata column `constraints`.

A constraint is {"type": name, ...parameters}. A prompt's score is the mean over its constraints. Each gives 1.0
if and only if it is met, else partial credit by how far off the response is, always at most 0.5 at the first
fault: groups then tie less often, and "all met" stays plain to see (1.0). An empty response gets 0 everywhere,
and so does one that is nothing but the phrase or the keywords it was asked to contain.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from judges.protocol import JudgeError, scored
from online_po.errors import ConfigError
from online_po.types import Group, Judgement

_OWN_WORDS = 3
"""Words a response needs besides the phrase or keywords it was given."""
_BULLET = re.compile(r"\s*[-*•]\s+\S")
_NUMBERED = re.compile(r"\s*\d+[.)]\s+\S")
_WORD = re.compile(r"\S*\w\S*")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")

Check = tuple[float, str, object]
"""Score in [0, 1], what was asked in a few words, what was found (shown when the constraint is not met)."""


def lowercase(text: str) -> Check:
    """No capital letter. Else 1 / (1 + words with one)."""
    capitals = sum(word != word.lower() for word in text.split())
    return _fewer(capitals), "lowercase", _count(capitals, "word with capitals", "words with capitals")


def uppercase(text: str) -> Check:
    """No small letter. Else 1 / (1 + words with one)."""
    small = sum(word != word.upper() for word in text.split())
    return _fewer(small), "uppercase", _count(small, "word with small letters", "words with small letters")


def no_commas(text: str) -> Check:
    """No comma. Else 1 / (1 + commas)."""
    commas = text.count(",")
    return _fewer(commas), "no commas", commas


def bullet_points(text: str, *, count: int) -> Check:
    """Exactly `count` lines that begin with "- ", "* " or "• ". Else 1 / (1 + difference).

    Without any, a numbered list gets a quarter of that: nearer than prose.
    """
    lines = text.splitlines()
    found = sum(bool(_BULLET.match(line)) for line in lines)
    numbered = sum(bool(_NUMBERED.match(line)) for line in lines)
    score = _fewer(abs(found - count)) if found else 0.25 * _fewer(abs(numbered - count)) * bool(numbered)
    return score, _count(count, "bullet point", "bullet points"), found


def ends_with(text: str, *, phrase: str) -> Check:
    """Ends with the phrase, case, quotes and closing punctuation aside. Else at most 0.5, if it is in the text."""
    return (
        _phrase_at(text, phrase, lambda body, wanted: body.endswith(wanted)),
        f"ends with “{phrase}”",
        "not there",
    )


def starts_with(text: str, *, phrase: str) -> Check:
    """Begins with the phrase, case and quotes aside. Else at most 0.5, if it is in the text."""
    return (
        _phrase_at(text, phrase, lambda body, wanted: body.startswith(wanted)),
        f"starts with “{phrase}”",
        "not there",
    )


def max_words(text: str, *, n: int) -> Check:
    """At most n words. Else (n / words)² / 2."""
    found = len(_WORD.findall(text))
    return 1.0 if found <= n else 0.5 * (n / found) ** 2, f"at most {_count(n, 'word', 'words')}", found


def min_words(text: str, *, n: int) -> Check:
    """At least n words. Else (words / n)² / 2."""
    found = len(_WORD.findall(text))
    return 1.0 if found >= n else 0.5 * (found / n) ** 2, f"at least {_count(n, 'word', 'words')}", found


def words(text: str, *, low: int, high: int) -> Check:
    """`low` to `high` words. Else as `min_words` or `max_words`."""
    found = len(_WORD.findall(text))
    score = min_words(text, n=low)[0] if found < low else max_words(text, n=high)[0]
    return score, f"{low} to {high} words", found


def sentences(text: str, *, count: int) -> Check:
    """Exactly `count` sentences (what is left after the last full stop counts as one). Else 1 / (1 + difference)."""
    found = sum(bool(_WORD.search(part)) for part in _SENTENCE_END.split(text))
    return _fewer(abs(found - count)), _count(count, "sentence", "sentences"), found


def paragraphs(text: str, *, count: int) -> Check:
    """Exactly `count` paragraphs, parted by blank lines. Else 1 / (1 + difference)."""
    found = sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))
    return _fewer(abs(found - count)), _count(count, "paragraph", "paragraphs"), found


def includes(text: str, *, keywords: list[str]) -> Check:
    """Every keyword, as a whole word or phrase, case aside. Else half the share that is there."""
    there = [keyword for keyword in keywords if _occurrences(text, keyword)]
    missing = [keyword for keyword in keywords if keyword not in there]
    own = len(_WORD.findall(text)) - sum(len(keyword.split()) for keyword in there)
    score = 1.0 if not missing else 0.5 * len(there) / len(keywords)
    return (
        score if own >= _OWN_WORDS else 0.0,
        f"includes {', '.join(keywords)}",
        f"without {', '.join(missing)}",
    )


def excludes(text: str, *, keywords: list[str]) -> Check:
    """None of the keywords, case aside. Else 1 / (1 + times they occur)."""
    found = sum(_occurrences(text, keyword) for keyword in keywords)
    return _fewer(found), f"without {', '.join(keywords)}", found


def quoted(text: str) -> Check:
    """The whole response in double quotes. Else 0.25 for a quote on one side."""
    begin, end = text[0] in '"“', text[-1] in '"”' and len(text) > 1
    met = begin and end and bool(_WORD.search(text[1:-1]))
    return 1.0 if met else 0.25 * (begin != end), "in double quotes", "not wrapped"


CONSTRAINTS: dict[str, Callable[..., Check]] = {
    function.__name__: function
    for function in (
        lowercase,
        uppercase,
        no_commas,
        bullet_points,
        ends_with,
        starts_with,
        max_words,
        min_words,
        words,
        sentences,
        paragraphs,
        includes,
        excludes,
        quoted,
    )
}
"""Type of a constraint -> what checks it; its keyword arguments are the constraint's parameters."""


class RulesJudge:
    """Scores each response by its prompt's constraints; the rationale says which were met."""

    async def judge(self, group: Group) -> Judgement:
        try:
            constraints = read_constraints(group.prompt.metadata)
        except ConfigError as error:
            raise JudgeError("error", str(error)) from error
        verdicts = [score_response(response.text, constraints) for response in group.responses]
        return scored(group, [score for score, _ in verdicts], [rationale for _, rationale in verdicts])


def score_response(text: str, constraints: list[tuple[str, dict[str, Any]]]) -> tuple[float, str]:
    """(mean score in [0, 1], rationale such as "lowercase ✓ · at most 30 words ✗ (41)")."""
    text = text.strip()
    if not _WORD.search(text):
        return 0.0, "empty response"
    checks = [CONSTRAINTS[kind](text, **parameters) for kind, parameters in constraints]
    notes = [f"{asked} ✓" if score == 1.0 else f"{asked} ✗ ({found})" for score, asked, found in checks]
    return sum(score for score, _, _ in checks) / len(checks), " · ".join(notes)


def validate_constraints(metadata: dict[str, Any]) -> None:
    """Raises ConfigError, naming the constraint and what is wrong with it, unless the judge can use them."""
    read_constraints(metadata)


def read_constraints(metadata: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(type, parameters) of each constraint in a prompt's metadata. Raises ConfigError.

    A CSV file gives the list as JSON text. Parameters that are None are left out: parquet gives every
    constraint of a column the parameters of all of them.
    """
    if "constraints" not in metadata:
        known = ", ".join(map(repr, metadata)) or "none"
        raise ConfigError(
            f"judge.kind: rules reads the prompt column 'constraints', but a prompt has only: {known}; add a list "
            'such as [{"type": "max_words", "n": 30}], or choose another judge'
        )
    value = metadata["constraints"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"constraints {value!r} is not valid JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise ConfigError(f'constraints is {value!r}; it must be a list such as [{{"type": "lowercase"}}], not empty')
    return [_read_constraint(item) for item in value]


def _read_constraint(item: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        raise ConfigError(f'constraint {item!r} has no type; write it as {{"type": "max_words", "n": 30}}')
    parameters = {name: value for name, value in item.items() if name != "type" and value is not None}
    kind = item["type"]
    if kind not in CONSTRAINTS:
        near = difflib.get_close_matches(kind, CONSTRAINTS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"types are {', '.join(CONSTRAINTS)}"
        raise ConfigError(f"constraint {item!r}: there is no type {kind!r}; {hint}")
    wanted = dict(list(inspect.signature(CONSTRAINTS[kind]).parameters.items())[1:])
    if parameters.keys() != wanted.keys():
        names = ", ".join(wanted) or "none"
        raise ConfigError(
            f"constraint {item!r} has the parameters {', '.join(parameters) or 'none'}; {kind} takes {names}"
        )
    for name, value in parameters.items():
        if not _VALID[wanted[name].annotation](value):
            raise ConfigError(f"constraint {item!r}: {name} must be {_WANTED[wanted[name].annotation]}, not {value!r}")
    if kind == "words" and parameters["low"] > parameters["high"]:
        raise ConfigError(f"constraint {item!r}: low is {parameters['low']}, above high = {parameters['high']}")
    return kind, parameters


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(_WORD.search(value))


# By annotation, as the text that `from __future__ import annotations` makes of it.
_VALID: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
    "str": _is_text,
    "list[str]": lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
}
_WANTED = {"int": "a whole number of at least 1", "str": "text", "list[str]": "a list of words, not empty"}


def _fewer(faults: int) -> float:
    return 1.0 / (1.0 + faults)


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _plain(text: str) -> str:
    """Case folded, white space single, quotes and punctuation off both ends."""
    return " ".join(text.casefold().split()).strip("\"'“”‘’*_.!?,;:() ")


def _phrase_at(text: str, phrase: str, there: Callable[[str, str], bool]) -> float:
    """1.0 with the phrase in its place; 0.5 elsewhere; else 0.3 x the share of its words that come in a row."""
    body, wanted = _plain(text), _plain(phrase)
    if len(_WORD.findall(body)) - len(wanted.split()) < _OWN_WORDS:
        return 0.0
    if _occurrences(body, wanted):
        return 1.0 if there(body, wanted) else 0.5
    words = wanted.split()
    longest = max(
        (
            j - i
            for i in range(len(words))
            for j in range(i + 1, len(words))
            if _occurrences(body, " ".join(words[i:j]))
        ),
        default=0,
    )
    return 0.3 * longest / len(words)


def _occurrences(text: str, phrase: str) -> int:
    """Times a phrase stands in a text as whole words, case aside."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text.casefold()))
