"""The `python` judge: the user's own function, named `module:function` in the config."""

from __future__ import annotations

import asyncio
import copy
import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from judges.calls import Calls, describe
from judges.protocol import JudgeError, scored, to_score
from online_po.errors import ConfigError
from online_po.sections import JudgeConfig
from online_po.types import Group, Judgement


class PythonJudge:
    """Scores responses with a function, sync or async.

    `judge.scope: response` calls `function(prompt, response, metadata) -> score` for each response;
    `judge.scope: group` calls `function(prompt, responses, metadata) -> scores` once, one score per response
    in order. `prompt` is the list of {role, content} messages, the system prompt included; a response is its
    text; `metadata` is the dict of the prompt file's other columns. They are copies: the function may change
    them. A score is any finite number, higher is better. One failing call leaves the whole group without a
    label.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._function = load_function(str(config.function))
        self._scope = config.scope
        self._calls = Calls(config.concurrency, config.timeout_s)

    async def judge(self, group: Group) -> Judgement:
        texts = [response.text for response in group.responses]
        if self._scope == "group":
            result = await self._call(group, texts)
            return scored(group, _to_list(result))
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._outcome(group, index, text)) for index, text in enumerate(texts)]
        outcomes = [task.result() for task in asked]
        for outcome in outcomes:
            if isinstance(outcome, JudgeError):
                raise outcome
        return scored(group, outcomes)

    async def _outcome(self, group: Group, index: int, text: str) -> float | JudgeError:
        try:
            return to_score(await self._call(group, text), "the score")
        except JudgeError as error:
            return JudgeError(error.kind, f"response {index}: {error}")

    async def _call(self, group: Group, what: str | list[str]) -> Any:
        prompt = group.prompt
        messages = [dict(message) for message in prompt.messages]
        return await self._calls.call(self._function, messages, what, copy.deepcopy(prompt.metadata))


def _to_list(result: Any) -> list[Any]:
    if not isinstance(result, str | bytes | dict | set | frozenset):
        try:
            return list(result)
        except TypeError:
            pass  # not iterable: refused below
    raise JudgeError("bad_value", f"the function returned a {type(result).__name__}, not one score per response")


def load_function(name: str) -> Callable[..., Any]:
    """The function `module:function`, looked for in the working folder first, then where Python looks.

    Raises ConfigError, naming judge.function and near names, if the module does not import, or if what it
    holds there cannot be called with (prompt, response, metadata).
    """
    module_name, _, path = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(_explain_import(name, module_name, error)) from error
    for part in path.split("."):
        if part not in dir(found):
            known = [key for key in dir(found) if not key.startswith("_") and inspect.isroutine(getattr(found, key))]
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"functions there: {', '.join(known) or 'none'}"
            raise ConfigError(f"judge.function is {name!r}, but {module_name} has no {path!r}; {hint}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, type):
        raise ConfigError(
            f"judge.function is {name!r}, which is a {type(found).__name__}, not a function; name a function of "
            "(prompt, response, metadata)"
        )
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


def _explain_import(name: str, module_name: str, error: Exception) -> str:
    missing = isinstance(error, ModuleNotFoundError) and error.name is not None
    if missing and (module_name + ".").startswith(f"{error.name}."):  # type: ignore[attr-defined]
        here = [module.name for module in pkgutil.iter_modules([os.getcwd()])]
        near = difflib.get_close_matches(module_name, here, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "run from the folder that holds it, or set PYTHONPATH"
        return f"judge.function is {name!r}, but there is no module {error.name!r}; {hint}"  # type: ignore[attr-defined]
    return (
        f"judge.function is {name!r}, but importing {module_name!r} fails with {describe(error)}; see that "
        f"`python -c 'import {module_name}'` works"
    )
