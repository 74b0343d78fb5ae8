"""Reading answers, strictly: a verdict is there in the form that was asked for, or there is none."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from judges.chat import Reply, Token
from judges.protocol import JudgeError

_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_LINE = re.compile(
    r"[*_`#>\s]*verdict(?:\s+(?P<id>[0-9a-z]+))?\s*[*_`]*:[*_`\s]*(?P<value>.+?)[*_`.\s]*", re.IGNORECASE
)
_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")
_JSON_CHOICE = re.compile(r'"verdict"\s*:\s*"\s*[AB]', re.IGNORECASE)
CHOICES = ("A", "B")


def read_verdict(reply: Reply, *, id_: str | None, rationale: bool) -> tuple[Any, str | None]:
    """The verdict as it was written (JSON value, or text of a line), and the reasons, if asked for.

    `id_`: what the answer must repeat; None: nothing. Raises JudgeError("unparsable") where there is no verdict, or
    more than one, or one on another question. Asking again may help: models are sampled, and servers get well.
    """
    if not reply.text.strip():
        raise _unparsable("an empty answer")
    return _from_json(reply.text, id_, rationale) if reply.is_json else _from_text(reply.text, id_, rationale)


def _from_json(text: str, id_: str | None, rationale: bool) -> tuple[Any, str | None]:
    fenced = _FENCED.fullmatch(text.strip())
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        hint = "if the endpoint ignores JSON schemas, set judge.answers: text"
        raise _unparsable(f"not the JSON asked for, but {_show(text)} ({error}); {hint}") from None
    keys = {"verdict"} | ({"id"} if id_ is not None else set()) | ({"reasons"} if rationale else set())
    if not isinstance(value, dict) or value.keys() != keys:
        raise _unparsable(f"JSON without exactly the keys {', '.join(sorted(keys))}: {_show(text)}")
    if id_ is not None:
        _require_id(value["id"], id_)
    if rationale and not isinstance(value["reasons"], str):
        raise _unparsable(f"JSON whose reasons are no text: {_show(text)}")
    return value["verdict"], value["reasons"] if rationale else None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _from_text(text: str, id_: str | None, rationale: bool) -> tuple[str, str | None]:
    *before, last = text.strip().splitlines()
    found = _LINE.fullmatch(last)
    if found is None:
        raise _unparsable(f"no verdict on the last line, but {_show(last)}")
    if id_ is not None:
        _require_id(found["id"], id_)
    elif found["id"] is not None:
        raise _unparsable(f"no verdict on the last line, but {_show(last)}")
    others = [other for line in before if (other := _LINE.fullmatch(line)) is not None]
    if any(other["value"].casefold() != found["value"].casefold() for other in others):
        raise _unparsable(f"two verdicts: {_show(others[0][0])} and {_show(last)}")
    return found["value"], "\n".join(before).strip() if rationale else None


def _require_id(given: Any, wanted: str) -> None:
    if not isinstance(given, str) or given.casefold() != wanted:
        raise _unparsable(f"an answer to another question: it repeats the id {_show(given)}, not {wanted!r}")


def to_scale(value: Any, low: int, high: int) -> int:
    """A whole number of the scale. Raises JudgeError("bad_value")."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise JudgeError("bad_value", f"the score is {_show(value)}, not a whole number", retry=True)
    if not low <= value <= high:
        raise JudgeError("bad_value", f"the score is {_show(value)}, outside {low} to {high}", retry=True)
    return value


def to_choice(value: Any) -> str:
    """A or B. Raises JudgeError("bad_value")."""
    if not isinstance(value, str) or value.strip().upper() not in CHOICES:
        raise JudgeError("bad_value", f"the verdict is {_show(value)}, neither A nor B", retry=True)
    return value.strip().upper()


def choice_probability(reply: Reply) -> float:
    """Probability of A against B in an answer that was read already, from the logps at the verdict's place.

    Raises JudgeError("unparsable") where the endpoint's tokens do not make up its answer, or hold the letter together
    with others.
    """
    # Behind the text there may be what ends an answer.
    if not "".join(token.text for token in reply.tokens).startswith(reply.text):
        raise _unparsable("the endpoint's logps are not of its answer; set judge.soft: false")
    place, begin = _place(reply), 0
    for token in reply.tokens:
        if begin <= place < begin + len(token.text):
            return _share_of_a(token)
        begin += len(token.text)
    raise AssertionError("the place is inside the text")


def _place(reply: Reply) -> int:
    """Where the letter stands in an answer that was read already."""
    if reply.is_json:
        if (found := _JSON_CHOICE.search(reply.text)) is None:
            raise _unparsable(f"its verdict is escaped, so it has no logp of its own: {_show(reply.text)}")
        return found.end() - 1
    last = reply.text.rstrip().splitlines()[-1]
    line = _LINE.fullmatch(last)
    assert line is not None
    return reply.text.rindex(last) + line.start("value")


def _share_of_a(token: Token) -> float:
    """Probability mass of tokens that put an A there, over that of an A or a B."""
    if _letter(token.text) not in CHOICES:
        where = f"its verdict stands inside the token {_show(token.text)}"
        raise _unparsable(f"{where}, so it has no logp of its own; set judge.soft: false")
    mass = dict.fromkeys(CHOICES, 0.0)
    for text, logp in token.logps.items():
        if _letter(text) in mass:
            mass[_letter(text)] += math.exp(logp)
    return mass["A"] / (mass["A"] + mass["B"])


def _letter(text: str) -> str:
    """What a token says; ' A' and '"A' say the same as 'A'."""
    return text.strip(" \"'*_`.}\n").upper()


def _unparsable(message: str) -> JudgeError:
    return JudgeError("unparsable", message, retry=True)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
