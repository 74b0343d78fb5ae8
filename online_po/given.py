"""Responses that somebody wrote, as the policy would have sampled them: their tokens, and the end of its turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from online_po.errors import ConfigError
from online_po.types import GivenResponse

_MARK = "0nline-po"


class ResponseEncoder:
    """Turns texts into given responses with the policy's tokenizer.

    A response's tokens are those of the text alone, as sampling too begins anew behind the prompt's last token, then
    what the chat template puts behind an assistant's message up to and with its first special token (ChatML:
    `<|im_end|>`); without a chat template the tokenizer's end-of-sequence token.

    `max_length`: tokens of prompt and response that a sequence may have. Raises ConfigError where nothing ends a turn.
    """

    def __init__(self, tokenizer: Any, *, apply_chat_template: bool, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._ending = _template_ending(tokenizer) if apply_chat_template else None
        if self._ending is None:
            if tokenizer.eos_token_id is None:
                raise ConfigError(
                    "model.path: its tokenizer has no end-of-sequence token, and no chat template says what ends a "
                    "response, so given responses cannot be tokenised; set eos_token in its tokenizer_config.json"
                )
            self._ending = [tokenizer.eos_token_id]

    def __call__(self, texts: Sequence[str]) -> list[GivenResponse]:
        """The texts as responses, in order."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return [
            GivenResponse(text=text, token_ids=(*token_ids, *(self._ending or ())))
            for text, token_ids in zip(texts, encoded, strict=True)
        ]


def _template_ending(tokenizer: Any) -> list[int] | None:
    """Token ids that the chat template writes behind an assistant's message, up to and with the first special one;
    None where it writes no special token there."""
    messages = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    behind = tokenizer(text[text.rindex(_MARK) + len(_MARK) :], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
    places = [place for place, token in enumerate(behind) if token in special]
    return behind[: places[0] + 1] if places else None
