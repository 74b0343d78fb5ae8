"""Constraints on the shape of a response: case, punctuation, lists, length, repetition."""

from __future__ import annotations

import re
from typing import Literal

from judges.protocol import JudgeError
from judges.rules.base import WORD, Check, counted, fewer, within

_BULLET = re.compile(r"\s*[-*•]\s+\S")
_NUMBERED = re.compile(r"\s*\d+[.)]\s+\S")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+(?=\s|$)")


def lowercase(text: str) -> Check:
    """No capital letter. Else 1 / (1 + words with one)."""
    capitals = sum(word != word.lower() for word in text.split())
    return fewer(capitals), "lowercase", counted(capitals, "word with capitals", "words with capitals")


def uppercase(text: str) -> Check:
    """No small letter. Else 1 / (1 + words with one)."""
    small = sum(word != word.upper() for word in text.split())
    return fewer(small), "uppercase", counted(small, "word with small letters", "words with small letters")


def no_commas(text: str) -> Check:
    """No comma. Else 1 / (1 + commas)."""
    commas = text.count(",")
    return fewer(commas), "no commas", commas


def bullet_points(text: str, *, count: int) -> Check:
    """Exactly `count` lines that begin with "- ", "* " or "• ". Else 1 / (1 + difference).

    Without any, a numbered list gets a quarter of that: nearer than prose.
    """
    lines = text.splitlines()
    found = sum(bool(_BULLET.match(line)) for line in lines)
    numbered = sum(bool(_NUMBERED.match(line)) for line in lines)
    score = fewer(abs(found - count)) if found else 0.25 * fewer(abs(numbered - count)) * bool(numbered)
    return score, counted(count, "bullet point", "bullet points"), found


def max_words(text: str, *, n: int) -> Check:
    """At most n words. Else (n / words)² / 2."""
    found = len(WORD.findall(text))
    return within(found, None, n), f"at most {counted(n, 'word', 'words')}", found


def min_words(text: str, *, n: int) -> Check:
    """At least n words. Else (words / n)² / 2."""
    found = len(WORD.findall(text))
    return within(found, n, None), f"at least {counted(n, 'word', 'words')}", found


def words(text: str, *, low: int, high: int) -> Check:
    """`low` to `high` words. Else as `min_words` or `max_words`."""
    found = len(WORD.findall(text))
    return within(found, low, high), f"{low} to {high} words", found


def sentences(text: str, *, count: int) -> Check:
    """Exactly `count` sentences (what is left after the last full stop counts as one). Else 1 / (1 + difference)."""
    found = sum(bool(WORD.search(part)) for part in _SENTENCE_END.split(text))
    return fewer(abs(found - count)), counted(count, "sentence", "sentences"), found


def paragraphs(text: str, *, count: int) -> Check:
    """Exactly `count` paragraphs, parted by blank lines. Else 1 / (1 + difference)."""
    found = sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))
    return fewer(abs(found - count)), counted(count, "paragraph", "paragraphs"), found


def quoted(text: str) -> Check:
    """The whole response in double quotes. Else 0.25 for a quote on one side."""
    begin, end = text[0] in '"“', text[-1] in '"”' and len(text) > 1
    met = begin and end and bool(WORD.search(text[1:-1]))
    return 1.0 if met else 0.25 * (begin != end), "in double quotes", "not wrapped"


def length(
    text: str, tokens: int, *, unit: Literal["words", "characters", "tokens"], low: int = 0, high: int = 0
) -> Check:
    """`low` to `high` words, characters, or tokens as the policy sampled them (its end of sequence included); either
    bound may be left out. Else half the square of how far it got."""
    if unit == "tokens" and not tokens:  # a text that no policy sampled, in `judge.gold` or a file to judge
        raise JudgeError(
            "error", "a length in tokens needs a response that was sampled; this one is known as text only"
        )
    found = {"words": len(WORD.findall(text)), "characters": len(text), "tokens": tokens}[unit]
    window = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
    return within(found, low or None, high or None), f"{window} {unit}", found


def repetition(text: str, *, max_share: float, n: int = 3) -> Check:
    """At most `max_share` of its n-grams of words are repeats of earlier ones. Else half of what is new over what had
    to be."""
    words_ = [word.casefold() for word in WORD.findall(text)]
    grams = list(zip(*(words_[start:] for start in range(n)), strict=False))
    share = 1 - len(set(grams)) / len(grams) if grams else 0.0
    met = share <= max_share
    score = 1.0 if met else 0.5 * (1 - share) / (1 - max_share)
    return score, f"at most {max_share:.0%} repeated {n}-grams", f"{share:.0%}"
