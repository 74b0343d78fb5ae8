"""The policy as a chat model: questions to it are gathered, and put to the run's generator together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

from jinja2 import TemplateError

from judges.chat import Reply, Wording, charged
from judges.protocol import JudgeError
from online_po.errors import ConfigError
from online_po.judge_configs.prompted import Self
from online_po.sections import SamplingConfig
from online_po.seeds import stable_id
from online_po.types import Group, Message, Prompt, Request, Response

GATHER_S = 0.05
"""Seconds that questions are gathered for before they go to the generator, which is fastest with many at once."""


class Policies(Protocol):
    """The run's policies, to be asked."""

    context: int
    """Tokens of question and answer that the engine takes."""

    def fingerprint(self, version: int) -> str:
        """Names a policy's weights: after the run went back, a version has others."""
        ...

    def answer(self, version: int, requests: Sequence[Request], sampling: SamplingConfig) -> list[Group]:
        """One group a request, in order, by the weights of that policy version. Waits for them. EngineError."""
        ...


class PolicyModel:
    """Asks the policy that `judge.policy` names, in its own chat template. Serves one event loop.

    Whatever else is in a batch changes an answer by float rounding only, as it does with sampled responses.
    `executor` is where it waits for the generator. Raises ConfigError where the tokenizer has no chat template.
    """

    def __init__(self, config: Self, tokenizer: Any, policies: Policies, executor: Executor) -> None:
        check_template(tokenizer, config.kind)
        self._config, self._tokenizer, self._policies, self._executor = config, tokenizer, policies, executor
        self._sampling = SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)  # type: ignore[call-arg]
        self._waiting: dict[int, list[tuple[Request, asyncio.Future[Response]]]] = {}
        self._serving: asyncio.Task[None] | None = None

    def for_group(self, group: Group) -> PolicyChat:
        return PolicyChat(self, judging_version(self._config.policy, group.responses[0].policy_version))

    async def close(self) -> None:
        """See `judges.chat.ChatModel`: the generators are the run's."""

    async def ask(self, messages: list[Message], version: int, seed: int) -> Reply:
        """See `judges.chat.Chat`. Raises JudgeError: too_long for a question, unparsable for half an answer."""
        text = render(messages, self._tokenizer)
        token_ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(token_ids) + self._config.max_tokens > self._policies.context:
            raise JudgeError(
                "too_long",
                f"a question of {len(token_ids)} tokens and judge.max_tokens = {self._config.max_tokens} are more than "
                f"the engine's context of {self._policies.context}; raise generator.max_model_len as far as the model "
                "goes, or lower generator.max_tokens",
            )
        prompt = Prompt(id=stable_id(messages), messages=tuple(messages), text=text, token_ids=token_ids)
        response = await self._queue(version, Request(prompt=prompt, seeds=(seed,)))
        reply = Reply(
            text=response.text,
            is_json=False,
            prompt_tokens=len(token_ids),
            response_tokens=len(response.token_ids),
        )
        if response.finish_reason == "length":
            message = f"half an answer: it ran into judge.max_tokens = {self._config.max_tokens}; raise it"
            raise charged(JudgeError("unparsable", message, retry=self._config.temperature > 0), reply)
        return reply

    def shown(self, messages: list[Message]) -> str:
        """The question as the policy reads it."""
        return render(messages, self._tokenizer)

    async def _queue(self, version: int, request: Request) -> Response:
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(version, []).append((request, answered))
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        return await answered

    async def _serve(self) -> None:
        """Puts what waits to the generator, until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            version = next(iter(self._waiting))
            batch = self._waiting.pop(version)
            requests = [request for request, _ in batch]
            try:
                groups = await loop.run_in_executor(
                    self._executor, self._policies.answer, version, requests, self._sampling
                )
                outcomes: list[Response | Exception] = [group.responses[0] for group in groups]
            except Exception as error:  # whatever it is, who waits must hear of it
                outcomes = [error] * len(batch)
            for (_, answered), outcome in zip(batch, outcomes, strict=True):
                if answered.done():
                    continue  # nobody waits any more
                if isinstance(outcome, Exception):
                    answered.set_exception(outcome)
                else:
                    answered.set_result(outcome)
        self._serving = None


class PolicyChat:
    """A policy version, to ask about one group."""

    def __init__(self, model: PolicyModel, version: int) -> None:
        self._model, self._version = model, version
        self.about = model._policies.fingerprint(version)
        self.varies = model._config.temperature > 0

    def shown(self, wording: Wording) -> str:
        """See `judges.chat.Chat`: in the policy's own template."""
        return self._model.shown(wording.as_text)

    async def chat(self, wording: Wording, *, seed: int, logps: bool = False) -> Reply:
        assert not logps, "only endpoints give logps"
        return await self._model.ask(wording.as_text, self._version, seed)


def judging_version(policy: str | int, sampled: int) -> int:
    """The policy version that judges what version `sampled` wrote; a policy that is not there yet cannot."""
    match policy:
        case "current":
            return sampled
        case "start":
            return 0
        case _:
            return min(int(policy), sampled)


def check_template(tokenizer: Any, kind: str) -> None:
    """Raises ConfigError where the policy has no chat template to be asked in."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"judge.kind is {kind}, but the tokenizer of model.path has no chat template to ask the policy in; start "
            "from a chat model, or choose another judge"
        )


def render(messages: list[Message], tokenizer: Any) -> str:
    """The question as the policy reads it. Where its template knows no system message, that becomes part of the
    user's."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        system, user = messages
        merged = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}]
        return str(tokenizer.apply_chat_template(merged, tokenize=False, add_generation_prompt=True))
