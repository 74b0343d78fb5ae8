"""What a judge that is asked in words talks to: a model behind an endpoint, or the policy itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from judges.protocol import JudgeError
from online_po.types import Group, Message

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Wording:
    """One question, in both ways in which it can be put."""

    as_text: list[Message]
    """Asks for a verdict on the answer's last line."""
    as_json: list[Message]
    """Asks for a JSON object."""
    schema: dict[str, Any]
    """JSON schema of that object."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of an answer, and what might have stood in its place."""

    text: str
    logps: dict[str, float]
    """Text -> logp in nats, of itself and of the likeliest others."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said, whole."""

    text: str
    is_json: bool
    """Whether it was asked for JSON."""
    tokens: tuple[Token, ...] = ()
    """Of `text`, in order; empty unless they were asked for."""
    prompt_tokens: int = 0
    response_tokens: int = 0
    cost: float = 0.0


class Chat(Protocol):
    """A model that answers questions about one group."""

    about: str
    """Which weights answer, where the judge's config does not say it: part of what the cache knows a question by."""
    varies: bool
    """Whether the same question, asked again, may get another answer."""

    async def chat(self, wording: Wording, *, seed: int, logps: bool = False) -> Reply:
        """One attempt. `seed`: of the sampling, where that is above temperature 0.

        Raises JudgeError for whatever is not a whole answer."""
        ...

    def shown(self, wording: Wording) -> str:
        """The exact text that is asked."""
        ...


class ChatModel(Protocol):
    """A model to ask."""

    def for_group(self, group: Group) -> Chat: ...

    async def close(self) -> None:
        """Lets go of what it holds open."""
        ...


def charged(error: JudgeError, reply: Reply) -> JudgeError:
    """The error, with what the reply it comes of took."""
    error.prompt_tokens, error.response_tokens, error.cost = reply.prompt_tokens, reply.response_tokens, reply.cost
    return error


async def all_of(calls: Iterable[Awaitable[T]]) -> list[T]:
    """What calls give, in order. Each is let finish, as its answer may have been paid for; then the first error is
    raised, one that is no JudgeError before those that are."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, JudgeError)):
        raise error
    return outcomes  # type: ignore[return-value]
