"""Given responses end as the chat template ends an assistant's turn."""

from __future__ import annotations

import pytest

from make_tiny_model import EOS, make_tiny_tokenizer
from online_po.errors import ConfigError
from online_po.given import ResponseEncoder


def test_a_text_gets_its_tokens_and_the_end_of_the_turn():
    tokenizer = make_tiny_tokenizer()
    (hello, empty) = ResponseEncoder(tokenizer, apply_chat_template=True, max_length=9)(["hello there", ""])
    assert hello.token_ids == (*tokenizer("hello there")["input_ids"], EOS) and hello.text == "hello there"
    assert empty.token_ids == (EOS,)
    # What the policy reads of a whole conversation begins with prompt + response.
    prompt = [{"role": "user", "content": "hi"}]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "hello there"}], return_dict=False)
    assert whole[: len(asked) + len(hello.token_ids)] == [*asked, *hello.token_ids]


@pytest.mark.parametrize(
    ("template_end", "expected"),
    [("<|pad|>\n", [3]), (" <|im_end|><|pad|>", "space, then end"), ("\n", [EOS])],
)
def test_the_template_says_what_ends_a_turn(template_end, expected):
    """Its first special token, with what stands before; without one the tokenizer's end of sequence."""
    tokenizer = make_tiny_tokenizer()
    end = "{{ message['content'] }}" + template_end
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}" + end + "{% else %}"
        "{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    (given,) = ResponseEncoder(tokenizer, apply_chat_template=True, max_length=9)(["a"])
    if expected == "space, then end":
        expected = tokenizer(" <|im_end|>")["input_ids"]
        assert len(expected) == 2
    assert list(given.token_ids) == [*tokenizer("a")["input_ids"], *expected]


def test_plain_text_ends_with_the_tokenizer_s_end_and_nothing_is_refused():
    tokenizer = make_tiny_tokenizer(chat_template=False)
    (given,) = ResponseEncoder(tokenizer, apply_chat_template=False, max_length=9)(["a"])
    assert given.token_ids[-1] == EOS
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        ResponseEncoder(tokenizer, apply_chat_template=False, max_length=9)
