"""A chat model behind an OpenAI-compatible endpoint. One call is one attempt: the Asker asks again, not the client."""

from __future__ import annotations

import email.utils
import os
import time
from datetime import UTC
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from judges.chat import Reply, Token, Wording, charged
from judges.protocol import JudgeError
from online_po.errors import ConfigError
from online_po.judge_configs import Endpoint as EndpointConfig
from online_po.types import Group, Message

OPENAI = "https://api.openai.com/v1"
TOP_LOGPS = 20
"""Tokens whose logps are asked for at each place: as many as OpenAI and vLLM give."""
NO_KEY = "EMPTY"
"""What the client sends where the endpoint wants no key; it insists on one."""
MAX_SAID = 160
"""Characters of a server's own words that are repeated."""


class Endpoint:
    """Asks `judge.model` at `judge.base_url`. Serves one event loop.

    How it answers is found out with the first question that is put by JSON schema: where the endpoint refuses that
    and takes the same question as text, all are put as text from then on.

    Raises ConfigError where the key is not in the environment. No message, not even one that repeats what a server
    says, holds the key.
    """

    about = ""
    varies = True
    """Even at temperature 0: servers are not exact, and they get well."""

    def __init__(self, config: EndpointConfig) -> None:
        import openai

        self._config = config
        self._key = read_key(config)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or NO_KEY,
            base_url=config.base_url or OPENAI,
            max_retries=0,
            timeout=config.timeout_s,
            # A call takes less CPU time by it than by httpx, and CPU time bounds how many can be under way.
            http_client=openai.DefaultAioHttpClient(),
        )
        self._as_json = config.answers != "text"
        self._sure = config.answers != "auto"

    def for_group(self, group: Group) -> Endpoint:
        return self

    async def close(self) -> None:
        """See `judges.chat.ChatModel`."""
        await self._client.close()

    async def chat(self, wording: Wording, *, seed: int, logps: bool = False) -> Reply:
        """See `judges.chat.Chat`. Raises JudgeError: timeout, transport, refusal, unparsable."""
        if not self._as_json:
            return await self._ask(wording.as_text, None, seed, logps)
        try:
            reply = await self._ask(wording.as_json, wording.schema, seed, logps)
        except _BadRequest:
            if self._sure:
                raise
            # It may be the schema, or something that text would not mend: then that is said, and nothing is learned.
            reply = await self._ask(wording.as_text, None, seed, logps)
            self._as_json = False
        self._sure = True
        return reply

    def shown(self, wording: Wording) -> str:
        """See `judges.chat.Chat`: the messages, by role."""
        messages = wording.as_json if self._as_json else wording.as_text
        return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)

    async def _ask(self, messages: list[Message], schema: dict[str, Any] | None, seed: int, logps: bool) -> Reply:
        text = await self._send(self._request(messages, schema, seed, logps))
        return self._read(text, schema is not None, logps)

    def _request(
        self, messages: list[Message], schema: dict[str, Any] | None, seed: int, logps: bool
    ) -> dict[str, Any]:
        config = self._config
        # OpenAI's newer models refuse max_tokens; few others know its successor.
        limit = "max_completion_tokens" if config.base_url is None else "max_tokens"
        request: dict[str, Any] = {
            "model": config.model, "messages": messages, "temperature": config.temperature, limit: config.max_tokens
        }  # fmt: skip
        if config.temperature > 0:
            request["seed"] = seed
        if schema is not None:
            form = {"name": "verdict", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        if logps:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPS}
        return request

    async def _send(self, request: dict[str, Any]) -> str:
        """The body of a good answer. Raises JudgeError."""
        import openai

        try:
            # Not chat.completions.create: it goes through every field of request and answer, which takes it as long
            # as all the rest (scripts/bench_judge.py), and what comes is checked here anyway.
            return await self._client.post("/chat/completions", cast_to=str, body=request)
        except openai.APIStatusError as error:
            fault = self._refused(error.response, error.code)
        except openai.APIConnectionError as error:
            cause = _origin(error)
            if isinstance(cause, TimeoutError):
                what = f"no answer within judge.timeout_s = {self._config.timeout_s:g} s"
                fault = JudgeError("timeout", what, retry=True)
            else:
                what = f"{type(cause).__name__}: {self._said(str(cause))}"
                what = f"no whole answer from judge.base_url = {self._url} ({what})"
                fault = JudgeError("transport", what, retry=True)
        # Out here, so that the client's error, which holds the request and with it the key, is no part of this one.
        raise fault

    def _refused(self, response: Any, code: str | None) -> JudgeError:
        """What a status other than success means."""
        status, said = response.status_code, self._said(response.text)
        if code == "content_filter":
            return JudgeError("refusal", f"the endpoint's filter let the question not pass: {said}")
        if code == "context_length_exceeded" or "maximum context length" in response.text:
            return JudgeError("too_long", f"the question is longer than judge.model can read: {said}")
        if status == 401 or status == 403:
            variable = self._config.api_key_env
            key = f"the key in ${variable}" if variable else "calls without a key"
            return JudgeError(
                "transport",
                f"judge.base_url = {self._url} refuses {key} (judge.api_key_env), status {status}: {said}",
            )
        if status == 404:
            return JudgeError(
                "transport",
                f"judge.base_url = {self._url} has no judge.model = {self._config.model!r}, or no chat/completions, "
                f"status 404: {said}",
            )
        if status == 408:
            return JudgeError("timeout", f"the endpoint gave up waiting, status 408: {said}", retry=True)
        if status == 429 and code == "insufficient_quota":
            return JudgeError("transport", f"the account's quota at judge.base_url = {self._url} is spent: {said}")
        if status in (409, 425, 429) or status >= 500:
            wait = retry_after(response.headers.get("retry-after"))
            return JudgeError("transport", f"status {status}: {said}", retry=True, retry_after=wait)
        return _BadRequest("transport", f"the endpoint does not take the question, status {status}: {said}")

    def _read(self, body: str, is_json: bool, logps: bool) -> Reply:
        """Raises JudgeError for what is no whole answer."""
        completion = self._completion(body)
        if isinstance(completion, JudgeError):
            raise completion
        usage, choice = completion.usage or _Usage(), completion.choices[0]
        config = self._config
        prompt_tokens, response_tokens = usage.prompt_tokens or 0, usage.completion_tokens or 0
        asked, answered = config.prompt_price or 0.0, config.response_price or 0.0
        content = choice.logprobs.content if choice.logprobs is not None else None
        reply = Reply(
            text=self._without_key(choice.message.content or ""),
            is_json=is_json,
            tokens=tuple(token.token_of_answer() for token in content or ()),
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            cost=(prompt_tokens * asked + response_tokens * answered) / 1e6,
        )
        if choice.message.refusal:
            fault = JudgeError("refusal", f"it declined to judge: {self._said(choice.message.refusal)}")
        elif choice.finish_reason == "content_filter":
            fault = JudgeError("refusal", "the endpoint's filter cut its answer")
        elif choice.finish_reason == "length":
            message = f"half an answer: it ran into judge.max_tokens = {config.max_tokens}; raise it"
            fault = JudgeError("unparsable", message, retry=True)
        elif logps and not reply.tokens:
            fault = JudgeError("unparsable", "judge.soft is true, but the endpoint gives no logps; set it to false")
        else:
            return reply
        raise charged(fault, reply)

    def _completion(self, body: str) -> _Completion | JudgeError:
        """The error is not raised here: it would carry pydantic's, which repeats what the server said, keys and all."""
        try:
            return _Completion.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"
            message = f"no chat completion came, but {self._said(body)!r} ({what})"
            return JudgeError("unparsable", message, retry=True)

    @property
    def _url(self) -> str:
        return self._config.base_url or OPENAI

    def _said(self, text: str) -> str:
        """A server's words on one line, short, without the key should it repeat it."""
        text = " ".join(self._without_key(text).split())
        return text if len(text) <= MAX_SAID else text[: MAX_SAID - 1] + "…"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def read_key(config: EndpointConfig) -> str | None:
    """The key; None where none is wanted. Raises ConfigError where it is not in the environment, or cannot be one."""
    variable = config.api_key_env
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(
            f"judge.api_key_env is {variable}, but the environment has no such variable; set it to the key, or set "
            "judge.api_key_env: null for an endpoint without keys"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"judge.api_key_env is {variable}, whose value holds a space, a line break or a letter that no key has; "
            "set it to the key alone"
        )
    return key


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date (RFC 9110, 10.2.3). None without a good one."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
    return max(0.0, seconds) if seconds < float("inf") else None


def _origin(error: BaseException) -> BaseException:
    """The error that it all began with: on the way up, a connection refused is taken for a time-out."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class _BadRequest(JudgeError):
    """The endpoint does not take the question as it is."""


# What is read of an answer; endpoints add much else.


class _Logp(BaseModel):
    token: str
    logprob: float


class _TokenLogps(_Logp):
    top_logprobs: list[_Logp] = []

    def token_of_answer(self) -> Token:
        return Token(
            text=self.token,
            logps={top.token: top.logprob for top in self.top_logprobs} | {self.token: self.logprob},
        )


class _Logprobs(BaseModel):
    content: list[_TokenLogps] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


_Count = Annotated[int, Field(ge=0, le=2**31)]


class _Usage(BaseModel):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
