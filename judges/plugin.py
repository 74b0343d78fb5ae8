"""The `plugin` judge: a judge of another package, found by its entry point in the group `online_po.judges`.

    # the other package's pyproject.toml
    [project.entry-points."online_po.judges"]
    brevity = "my_package:Brevity"

The entry point is a callable that takes `judge.options` as keyword arguments and returns the judge: an object with
`async judge(group) -> Judgement` (`judges.protocol.Judge`), or a function (prompt, response, metadata) -> score as the
`python` judge has them. Or it is such a function itself, with the options as further keyword arguments.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from judges.asking import Answer, Asker, Question
from judges.calls import Calls
from judges.protocol import Judge, JudgeError, scored
from judges.python import PythonJudge, source_hash
from online_po.errors import ConfigError, first_line
from online_po.judge_configs import Plugin
from online_po.judge_configs.local import PLUGIN_GROUP
from online_po.types import Group, Judgement


class PluginJudge:
    """Another package's judge of whole groups, its answers checked: scores and rationales, no more is kept."""

    def __init__(self, judge: Any, config: Plugin, asker: Asker) -> None:
        self._judge = judge
        self._name = config.name
        self._asker = asker
        asker.identify(source=source_hash(judge))
        self._calls = Calls()

    async def judge(self, group: Group) -> Judgement:
        async def call() -> Answer:
            verdict = await self._calls.call(self._judge.judge, group)
            if not isinstance(verdict, Judgement):
                raise JudgeError("bad_value", f"{self._name} returned a {type(verdict).__name__}, not a Judgement")
            if verdict.prompt_id != group.prompt.id:
                raise JudgeError("bad_value", f"{self._name} answered for another prompt, {verdict.prompt_id!r}")
            if verdict.failure is not None:
                raise JudgeError(verdict.failure.kind, verdict.failure.message)
            checked = scored(group, verdict.scores or (), verdict.rationales)
            return Answer(value={"scores": checked.scores, "rationales": checked.rationales})

        value = (await self._asker.ask(Question(prompt=group.prompt, responses=group.responses), call)).value
        return scored(group, value["scores"], value["rationales"])


def load_plugin(config: Plugin) -> Callable[..., Any]:
    """What the entry point names; nothing is built yet.

    Raises ConfigError, with what is installed, where there is none of that name, it does not import, or the options do
    not fit.
    """
    installed = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    names = sorted(installed.names)
    if config.name not in names:
        near = difflib.get_close_matches(config.name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"judge.name is {config.name!r}, but no installed package has a judge of that name (entry points of group "
            f"{PLUGIN_GROUP!r}); {hint}installed: {', '.join(names) or 'none'}"
        )
    found = tuple(installed.select(name=config.name))
    packages = sorted({point.dist.name if point.dist else "?" for point in found})
    if len(packages) > 1:
        raise ConfigError(
            f"judge.name is {config.name!r}, which {' and '.join(packages)} both have; uninstall one of them"
        )
    try:
        loaded: Any = found[0].load()
    except Exception as error:  # a package may raise anything
        raise ConfigError(
            f"judge.name is {config.name!r} of {packages[0]}, but loading {found[0].value!r} fails with "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not callable(loaded):
        raise ConfigError(
            f"judge.name is {config.name!r} of {packages[0]}, but {found[0].value!r} is a {type(loaded).__name__}, "
            "not a callable"
        )
    _makes_judge(loaded, config)
    return loaded


def build_plugin(config: Plugin, asker: Asker) -> Judge:
    """The plugin's judge. Raises ConfigError as `load_plugin` does, or where it cannot be made or is none."""
    loaded = load_plugin(config)
    if not _makes_judge(loaded, config):
        return PythonJudge(config, asker, functools.partial(loaded, **config.options))
    try:
        made = loaded(**config.options)
    except Exception as error:  # a package may raise anything
        raise ConfigError(
            f"judge.name is {config.name!r}, which cannot be made with judge.options = {config.options!r}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if inspect.iscoroutinefunction(getattr(made, "judge", None)):
        return PluginJudge(made, config, asker)
    if callable(made) and _binds(made, [], "", {}) is None:
        return PythonJudge(config, asker, made)
    raise ConfigError(
        f"judge.name is {config.name!r}, which made a {type(made).__name__}: neither an object with "
        "`async judge(group)` nor a function (prompt, response, metadata)"
    )


def _makes_judge(loaded: Callable[..., Any], config: Plugin) -> bool:
    """Whether it takes the options and returns a judge; False: it is a scoring function. Raises ConfigError if neither
    can be."""
    fault = _binds(loaded, **config.options)
    if fault is None:
        return True
    if not isinstance(loaded, type) and _binds(loaded, [], "", {}, **config.options) is None:
        return False
    raise ConfigError(f"judge.options is {config.options!r}, which judge {config.name!r} does not take: {fault}")


def _binds(function: Callable[..., Any], *args: Any, **options: Any) -> str | None:
    """Why it cannot be called so; None if it can, or nobody can tell (no signature to read)."""
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        return str(error)
    except ValueError:
        return None
    return None
