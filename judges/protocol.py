"""What a judge is, how it fails, and what counts as a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, SupportsFloat

from online_po.types import FailureKind, Group, JudgeFailure, Judgement

MAX_MESSAGE = 300
"""Characters of a failure's message that are kept."""


class Judge(Protocol):
    """Gives a verdict on one group."""

    async def judge(self, group: Group) -> Judgement:
        """Scores for every response of the group. Whatever it raises becomes a JudgeFailure, never a label:
        JudgeError with its own kind, anything else with kind "error"."""
        ...


class JudgeError(Exception):
    """A judge could not label a group."""

    def __init__(
        self,
        kind: FailureKind,
        message: str,
        *,
        retry: bool = False,
        retry_after: float | None = None,
        prompt_tokens: int = 0,
        response_tokens: int = 0,
        cost: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.retry = retry
        """Whether asking again may help."""
        self.retry_after = retry_after
        """Seconds that whoever was asked wants us to wait first."""
        self.prompt_tokens, self.response_tokens, self.cost = prompt_tokens, response_tokens, cost
        """What an answer cost that was of no use."""


def failed(group: Group, kind: FailureKind, message: str) -> Judgement:
    """The judgement that says a group has no label, and why."""
    message = to_text(message)
    short = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
    return Judgement(prompt_id=group.prompt.id, failure=JudgeFailure(kind=kind, message=short))


def scored(group: Group, scores: Sequence[Any], rationales: Sequence[str] | None = None) -> Judgement:
    """The judgement that labels a group: one number per response, in order.

    Raises JudgeError: "bad_length" for another count, "bad_value" for what is no finite number, or no text.
    """
    n = len(group.responses)
    if len(scores) != n:
        raise JudgeError("bad_length", f"{len(scores)} scores for {n} responses")
    if rationales is not None and len(rationales) != n:
        raise JudgeError("bad_length", f"{len(rationales)} rationales for {n} responses")
    if not all(isinstance(rationale, str) for rationale in rationales or ()):
        raise JudgeError("bad_value", f"rationales that are not all text: {_show(rationales)}")
    return Judgement(
        prompt_id=group.prompt.id,
        scores=tuple(to_score(score, f"score of response {index}") for index, score in enumerate(scores)),
        rationales=None if rationales is None else tuple(map(to_text, rationales)),
    )


def to_text(said: str) -> str:
    """What somebody said, as files can hold it: half a surrogate pair, which JSON can escape, becomes a "?"."""
    return said.encode("utf-8", "replace").decode()


def to_score(value: Any, name: str) -> float:
    """A finite float from a bool, int, float, or NumPy or torch scalar.

    Raises JudgeError("bad_value") for NaN, infinities, None, text and everything else.
    """
    if not isinstance(value, SupportsFloat):
        raise JudgeError("bad_value", f"{name} is {_show(value)}, a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ) as error:  # arrays of several values, huge ints
        raise JudgeError("bad_value", f"{name} is {_show(value)}, not one number ({error})") from error
    if not math.isfinite(number):
        raise JudgeError("bad_value", f"{name} is {number}; scores must be finite")
    return number


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
