"""Constraints on what a response says: phrases, patterns, language."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from judges.protocol import JudgeError
from judges.rules.base import OWN_WORDS, WORD, Check, fewer
from online_po.errors import ConfigError

Pattern = str
PATTERN_SECONDS = 1.0
"""What a pattern may take on one response: some take longer than the run would."""


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


def includes(text: str, *, keywords: list[str]) -> Check:
    """Every keyword, as a whole word or phrase, case aside. Else half the share that is there."""
    there = [keyword for keyword in keywords if _occurrences(text, keyword)]
    missing = [keyword for keyword in keywords if keyword not in there]
    own = len(WORD.findall(text)) - sum(len(keyword.split()) for keyword in there)
    score = 1.0 if not missing else 0.5 * len(there) / len(keywords)
    return (
        score if own >= OWN_WORDS else 0.0,
        f"includes {', '.join(keywords)}",
        f"without {', '.join(missing)}",
    )


def excludes(text: str, *, keywords: list[str]) -> Check:
    """None of the keywords, case aside. Else 1 / (1 + times they occur)."""
    found = sum(_occurrences(text, keyword) for keyword in keywords)
    return fewer(found), f"without {', '.join(keywords)}", found


def regex(text: str, *, pattern: Pattern, present: bool = True) -> Check:
    """The pattern is found in the response (Python's syntax; `^...$` for all of it), or, with present: false, is not.
    Else 0, or 1 / (1 + times it is found).

    Raises JudgeError("timeout") for a pattern that backtracks for more than `PATTERN_SECONDS`.
    """
    compiled = _pattern(pattern)
    try:
        if present:
            met = compiled.search(text, timeout=PATTERN_SECONDS) is not None
            return float(met), f"matches /{pattern}/", "not found"
        found = sum(1 for _ in compiled.finditer(text, timeout=PATTERN_SECONDS))
    except TimeoutError as error:
        raise JudgeError(
            "timeout", f"pattern {pattern!r} took more than {PATTERN_SECONDS:g} s; write it without nested repeats"
        ) from error
    return fewer(found), f"without /{pattern}/", found


@functools.lru_cache(maxsize=1024)
def _pattern(pattern: str) -> Any:
    import regex as engine  # `re` knows no time-out

    return engine.compile(pattern)


def check_regex(parameters: dict[str, Any]) -> None:
    """Raises ConfigError for a pattern that is none."""
    import regex as engine

    try:
        _pattern(parameters["pattern"])
    except engine.error as error:
        raise ConfigError(f"pattern is not a regular expression: {error}") from error


def language(text: str, *, code: str, among: list[str] | None = None) -> Check:
    """Of the languages in question, the one with this ISO 639 code is the likeliest by py3langid. Else half its
    probability.

    `among`: the languages in question; all 140 without it. Of a few words nobody can tell one of so many: name two
    or three, and "Yes." is told from "Ja.". Text without a trace of any language is of none.
    """
    ranked = dict(_identifier().rank(text))
    shares = {name: ranked[name] for name in (among or ranked)}
    total = sum(shares.values())
    best = max(shares, key=lambda name: shares[name])
    told = max(shares.values()) > min(shares.values())
    met = told and best == code
    score = 1.0 if met else 0.5 * shares[code] / total if told else 0.0
    return score, f"in {code}", f"{best}, {shares[best] / total:.0%}" if told else "cannot be told"


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    """py3langid 0.4: 5 MB, no pickle, softmax over languages that is calibrated for short texts."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_language(parameters: dict[str, Any]) -> None:
    """Raises ConfigError for languages that nobody tells apart here."""
    code, among = parameters["code"], parameters.get("among")
    known = _identifier().labels
    for name in [code, *(among or [])]:
        if name not in known:
            raise ConfigError(f"language {name!r} is not known; known are {', '.join(sorted(known))}")
    if among is not None and (code not in among or len(set(among)) < 2):
        raise ConfigError(f"among is {among!r}; it must name {code!r} and at least one other language")


def _plain(text: str) -> str:
    """Case folded, white space single, quotes and punctuation off both ends."""
    return " ".join(text.casefold().split()).strip("\"'“”‘’*_.!?,;:() ")


def _phrase_at(text: str, phrase: str, there: Callable[[str, str], bool]) -> float:
    """1.0 with the phrase in its place; 0.5 elsewhere; else 0.3 x the share of its words that come in a row."""
    body, wanted = _plain(text), _plain(phrase)
    if len(WORD.findall(body)) - len(wanted.split()) < OWN_WORDS:
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
