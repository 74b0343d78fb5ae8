"""The `python` judge: the user's own function, named `module:function` in the config."""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from judges.asking import Answer, Asker, Question
from judges.calls import Calls
from judges.protocol import JudgeError, scored, to_score
from online_po import user_code
from online_po.errors import ConfigError
from online_po.judge_configs import Plugin, Python
from online_po.types import Group, Judgement, Response


class PythonJudge:
    """Scores responses with a function, sync or async.

    `judge.scope: response` calls `function(prompt, response, metadata) -> score` for each response;
    `judge.scope: group` calls `function(prompt, responses, metadata) -> scores` once, one score per response
    in order. `prompt` is the list of {role, content} messages, the system prompt included; a response is its
    text; `metadata` is the dict of the prompt file's other columns. They are copies: the function may change
    them. A score is any finite number, higher is better. One failing call leaves the whole group without a
    label.
    """

    def __init__(self, config: Python | Plugin, asker: Asker, function: Callable[..., Any] | None = None) -> None:
        """`function`: a plugin's, which scores single responses."""
        if isinstance(config, Python):
            self._function, self._scope = load_function(config.function), config.scope
        else:
            assert function is not None
            self._function, self._scope = function, "response"
        self._asker = asker
        asker.identify(source=source_hash(self._function))
        self._calls = Calls()

    async def judge(self, group: Group) -> Judgement:
        if self._scope == "group":
            return scored(group, await self._ask(group, group.responses))
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._outcome(group, response)) for response in group.responses]
        outcomes = [task.result() for task in asked]
        for outcome in outcomes:
            if isinstance(outcome, JudgeError):
                raise outcome
        return scored(group, outcomes)

    async def _outcome(self, group: Group, response: Response) -> float | JudgeError:
        try:
            return float(await self._ask(group, (response,)))
        except JudgeError as error:
            return JudgeError(error.kind, f"response {response.index}: {error}")

    async def _ask(self, group: Group, responses: tuple[Response, ...]) -> Any:
        """A score, or for scope: group a list of as many scores as responses."""
        prompt, texts = group.prompt, [response.text for response in responses]

        async def call() -> Answer:
            what = texts if self._scope == "group" else texts[0]
            messages = [dict(message) for message in prompt.messages]
            result = await self._calls.call(self._function, messages, what, copy.deepcopy(prompt.metadata))
            if self._scope == "group":
                return Answer(value=list(scored(group, _to_list(result)).scores or ()))
            return Answer(value=to_score(result, "the score"))

        return (await self._asker.ask(Question(prompt=prompt, responses=responses), call)).value


def _to_list(result: Any) -> list[Any]:
    if not isinstance(result, str | bytes | dict | set | frozenset):
        try:
            return list(result)
        except TypeError:
            pass  # not iterable: refused below
    raise JudgeError("bad_value", f"the function returned a {type(result).__name__}, not one score per response")


def source_hash(function: Callable[..., Any]) -> str:
    """Hash of the file that a function is written in: a changed judge is another judge. What it imports does not
    count, nor does a function without a file to read (written in C)."""
    found: Any = inspect.unwrap(function)
    if not (inspect.isroutine(found) or isinstance(found, functools.partial)):
        found = type(found)  # an object that can be called
    try:
        path = inspect.getsourcefile(getattr(found, "func", found))
    except TypeError:
        path = None
    return "" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_function(name: str) -> Callable[..., Any]:
    """The judge's function `module:function`, see `online_po.user_code.load_function`.

    Raises ConfigError, naming judge.function, if it cannot be called with (prompt, response, metadata) either.
    """
    found = user_code.load_function(name, setting="judge.function")
    try:
        inspect.signature(found).bind([], "", {})
    except TypeError as error:
        raise ConfigError(
            f"judge.function is {name!r}, which cannot be called as function(prompt, response, metadata): {error}; "
            "let it take three positional arguments"
        ) from error
    except ValueError:
        pass  # written in C without a signature to read: the first call will tell
    return found
