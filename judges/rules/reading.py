"""From a prompt's metadata to constraints that can be checked: what is wrong with one is said before a run."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from typing import Any

from judges.rules import content, form, structure, verified
from judges.rules.base import WORD, Check
from online_po.errors import ConfigError

CONSTRAINTS: dict[str, Callable[..., Check]] = {
    function.__name__: function
    for function in (
        form.lowercase,
        form.uppercase,
        form.no_commas,
        form.bullet_points,
        content.ends_with,
        content.starts_with,
        form.max_words,
        form.min_words,
        form.words,
        form.length,
        form.sentences,
        form.paragraphs,
        form.repetition,
        content.includes,
        content.excludes,
        form.quoted,
        content.regex,
        content.language,
        structure.valid_json,
        verified.code,
        verified.math,
        verified.reasoning_gym,
    )
}
"""Type of a constraint -> what checks it; its keyword arguments are the constraint's parameters."""

IN_THREADS = frozenset({"regex", "language", "valid_json", "code", "math", "reasoning_gym"})
"""Types that take long, or may: the judge's event loop does not wait for them."""

_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "regex": content.check_regex,
    "language": content.check_language,
    "valid_json": structure.check_valid_json,
    "code": verified.check_code,
    "math": verified.check_math,
    "reasoning_gym": verified.check_reasoning_gym,
}
"""What the type of its parameters does not tell. Raises ConfigError."""

Constraint = tuple[str, dict[str, Any]]
"""Type and parameters."""


def validate_constraints(metadata: dict[str, Any]) -> None:
    """Raises ConfigError, naming the constraint and what is wrong with it, unless the judge can use them.

    Answers, entries and tests are tried in the sandbox, which takes some milliseconds each.
    """
    for kind, parameters in read_constraints(metadata):
        if kind in _CHECKS:
            try:
                _CHECKS[kind](parameters)
            except ImportError as error:
                raise ConfigError(
                    f"constraints of type {kind} need {error.name}, which is not installed; "
                    "`pip install online-po[rules]`"
                ) from error
            except ConfigError as error:
                raise ConfigError(f"constraint of type {kind!r}: {error}") from error


def read_constraints(metadata: dict[str, Any]) -> list[Constraint]:
    """(type, parameters) of each constraint in a prompt's metadata. Raises ConfigError.

    A CSV file gives the list as JSON text. Parameters that are None are left out: parquet gives every
    constraint of a column the parameters of all of them.
    """
    if "constraints" not in metadata:
        known = ", ".join(map(repr, metadata)) or "none"
        raise ConfigError(
            f"judge.kind: rules reads the prompt column 'constraints', but a prompt has only: {known}; add a list "
            'such as [{"type": "max_words", "n": 30}], or choose another judge'
        )
    value = metadata["constraints"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"constraints {value!r} is not valid JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise ConfigError(f'constraints is {value!r}; it must be a list such as [{{"type": "lowercase"}}], not empty')
    return [_read_constraint(item) for item in value]


def _read_constraint(item: Any) -> Constraint:
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        raise ConfigError(f'constraint {item!r} has no type; write it as {{"type": "max_words", "n": 30}}')
    parameters = {name: value for name, value in item.items() if name != "type" and value is not None}
    kind = item["type"]
    if kind not in CONSTRAINTS:
        near = difflib.get_close_matches(kind, CONSTRAINTS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"types are {', '.join(CONSTRAINTS)}"
        raise ConfigError(f"constraint {item!r}: there is no type {kind!r}; {hint}")
    signature = inspect.signature(CONSTRAINTS[kind]).parameters.values()
    takes = {parameter.name: parameter for parameter in signature if parameter.kind is parameter.KEYWORD_ONLY}
    required = {name for name, parameter in takes.items() if parameter.default is parameter.empty}
    if not required <= parameters.keys() <= takes.keys():
        names = ", ".join(name if name in required else f"{name} (optional)" for name in takes) or "none"
        raise ConfigError(
            f"constraint {item!r} has the parameters {', '.join(parameters) or 'none'}; {kind} takes {names}"
        )
    for name in parameters:
        annotation = takes[name].annotation.removesuffix(" | None")
        if annotation == "dict[str, Any]":
            parameters[name] = verified.read_entry(parameters[name])
        valid, wanted = _TYPES[annotation]
        if not valid(parameters[name]):
            raise ConfigError(f"constraint {item!r}: {name} must be {wanted}, not {parameters[name]!r}")
    if kind == "length" and not {"low", "high"} & parameters.keys():
        raise ConfigError(f"constraint {item!r} has no bound; give low, high or both")
    if parameters.get("low", 0) > parameters.get("high", float("inf")):
        raise ConfigError(f"constraint {item!r}: low is {parameters['low']}, above high = {parameters['high']}")
    return kind, parameters


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(WORD.search(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# By annotation, as the text that `from __future__ import annotations` makes of it.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_int, "a whole number of at least 1"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "float": (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
        "a number from 0 to below 1",
    ),
    "str": (_is_text, "text"),
    "Pattern": (lambda value: isinstance(value, str) and value != "", "a regular expression"),
    "list[str]": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
        "a list of words, not empty",
    ),
    "dict[str, Any]": (lambda value: isinstance(value, dict) and bool(value), "an object, or one as JSON text"),
    "Literal['words', 'characters', 'tokens']": (
        lambda value: value in ("words", "characters", "tokens"),
        "words, characters or tokens",
    ),
}
