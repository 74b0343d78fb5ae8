"""What a judge is asked, and what it answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from online_po.types import Prompt, Response


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a judge is asked, as the cache knows it."""

    prompt: Prompt
    responses: tuple[Response, ...]
    """In the order in which the judge is shown them."""
    sample: int = 0
    """The same asked again on purpose (`samples`)."""
    about: str = ""
    """What else the question says, drawn principles say."""

    def key(self, judge: str, *, by_ids: bool = False) -> str:
        """Hash of the judge's identity and all that is asked: prompt, metadata, responses, order. `by_ids`: the very
        token ids of the responses too, not only the text that they make."""
        parts = [judge, self.prompt.messages, self.prompt.metadata, self.sample, self.about]
        parts += [(response.text, response.token_ids if by_ids else None) for response in self.responses]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def tokens(self) -> int:
        """Tokens of prompt and responses, by the policy's tokenizer."""
        return len(self.prompt.token_ids) + sum(len(response.token_ids) for response in self.responses)

    def size(self) -> int:
        """Bytes of prompt and responses: no tokenizer makes more tokens of them."""
        texts = [message["content"] for message in self.prompt.messages]
        return sum(len(text.encode()) for text in [*texts, *(response.text for response in self.responses)])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a judge says, checked already: only verdicts are ever remembered, never failures."""

    value: Any
    """JSON: a score, the probability that the first response is the better one, or a list of scores."""
    rationale: str | None = None
    prompt_tokens: int = 0
    response_tokens: int = 0
    cost: float = 0.0
    cut: bool = False
    """Whether something was longer than the judge's context."""


@runtime_checkable
class Shows(Protocol):
    """A judge that reads a text of ours, and can show it."""

    def shown(self, question: Question) -> str:
        """What it reads of a question, special tokens and all. Raises JudgeError for what cannot be put."""
        ...
