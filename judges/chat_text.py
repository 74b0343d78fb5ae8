"""Conversations as the token ids that a judge's model reads: its own chat template, one BOS, nothing spelled out by a
response taken for a special token, and what is too long cut from the prompt's left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from judges.calls import describe
from judges.protocol import JudgeError
from online_po.errors import ConfigError
from online_po.types import Message

PROBE = ("0nline-po asks", "0nline-po answers")
"""What stands for a prompt and a response when a template is tried."""


class ChatText:
    """A tokenizer with its chat template.

    `limit`: the most tokens. `generation_prompt`: whether the template opens the assistant's turn at the end. `setting`
    and `written`: what names the model, and how, for errors. Raises ConfigError without a template, or with one that
    does not write what it is given, or that begins with two BOS tokens.
    """

    def __init__(self, tokenizer: Any, limit: int, *, generation_prompt: bool, setting: str, written: str) -> None:
        self._tokenizer, self._limit, self._generation_prompt = tokenizer, limit, generation_prompt
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._bos: int | None = tokenizer.bos_token_id
        # Tokenizers that put a BOS in front of everything were trained with it; the template may write it, or not.
        self._adds_bos = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]
        name = f"{setting} is {written!r}"
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{name}, whose tokenizer has no chat template, so nobody knows how a conversation is written for it; "
                "put the one it was trained with into its folder as chat_template.jinja"
            )
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), PROBE, strict=True)]
        if generation_prompt:
            messages = messages[:1]
        try:
            text = self._apply(messages)
        except (TemplateError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{name}, whose chat template fails on one question and answer: {describe(error)}"
            ) from error
        if missing := [message["content"] for message in messages if message["content"] not in text]:
            raise ConfigError(f"{name}, whose chat template leaves out what is said: {missing[0]!r} is not in {text!r}")
        if self._bos is not None and self._plain(text)[:2] == [self._bos, self._bos]:
            raise ConfigError(
                f"{name}, whose chat template begins with two BOS tokens ({text[:60]!r}); take one out of its "
                "chat_template.jinja"
            )

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, whole. Raises JudgeError where the template refuses it."""
        contents = [message["content"] for message in messages]
        mark = "\ue000"  # of the private use area: no template writes it
        while any(mark in content for content in contents):
            mark += "\ue000"
        spelled: list[str] = []

        def hide(match: re.Match[str]) -> str:
            spelled.append(match.group())
            return f"{mark}{len(spelled) - 1}{mark}"

        hidden = [{**message, "content": self._special.sub(hide, message["content"])} for message in messages]
        try:
            text = self._apply(hidden)
        except (TemplateError, ValueError, TypeError) as error:
            raise JudgeError("error", f"the judge's chat template refuses this prompt: {describe(error)}") from error
        # What a person or a model spelled out is text: it ends no turn and opens none.
        ids: list[int] = []
        for place, piece in enumerate(re.split(f"{mark}([0-9]+){mark}", text)):
            ids += self._as_text(spelled[int(piece)]) if place % 2 else self._plain(piece)
        if self._adds_bos and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)  # type: ignore[arg-type]
        return ids

    def fit(
        self, prompt: Sequence[Message], finish: Callable[[Sequence[Message]], list[Message]]
    ) -> tuple[list[int], bool]:
        """(token ids of `finish(prompt)`, whether something was cut).

        What is too long loses its oldest turns first, whole ones, then the system message, then the beginning of the
        last message, token by token. The template's own text is never cut. Raises JudgeError("too_long") where not
        even one token of the last message would be left.
        """
        ids = self.encode(finish(prompt))
        if len(ids) <= self._limit:
            return ids, False
        excess = len(ids) - self._limit
        for shorter in _without_oldest(prompt):
            ids = self.encode(finish(shorter))
            if (excess := len(ids) - self._limit) <= 0:
                return ids, True
        last = prompt[-1]
        tokens = self._as_text(last["content"])
        kept = len(tokens) - excess
        while kept >= 1:
            # A cut may fall inside a letter; its rest is no letter.
            text = self._tokenizer.decode(tokens[-kept:], clean_up_tokenization_spaces=False).lstrip("\ufffd")
            ids = self.encode(finish([{**last, "content": text}]))
            if len(ids) <= self._limit:
                return ids, True
            kept -= len(ids) - self._limit
        raise JudgeError(
            "too_long",
            f"what is judged leaves no room for a token of the prompt: the judge reads {self._limit} tokens; lower "
            "generator.max_tokens, or take a judge with a longer context (judge.max_length)",
        )

    def shown(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens and all."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _apply(self, messages: Sequence[Message]) -> str:
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=self._generation_prompt,
        )

    def _plain(self, text: str) -> list[int]:
        """The template's text: special tokens are those; none is added."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def _as_text(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _without_oldest(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """A prompt with fewer and fewer of its turns, down to the last message; each begins with the user."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    for begin in range(1, len(turns)):
        if turns[begin]["role"] == "user" or begin == len(turns) - 1:
            yield [*system, *turns[begin:]]
    if system and turns:
        yield turns[-1:]
