"""Constraints on a response that is data: JSON, with a schema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from judges.protocol import JudgeError
from judges.rules.base import Check, fenced_blocks, fewer
from judges.rules.content import PATTERN_SECONDS
from online_po.errors import ConfigError, first_line

_NOTHING = object()


def valid_json(text: str, *, schema: dict[str, Any] | None = None) -> Check:
    """The response is JSON (RFC 8259: no NaN), a code fence around it aside, that the schema allows. Else
    0.5 / (1 + faults against the schema); 0.25 if JSON stands in it beside other text.

    Raises JudgeError for a schema that asks for what is not in it ($ref), or with a pattern that takes too long.
    """
    asked = "JSON" if schema is None else "JSON of the schema"
    blocks = fenced_blocks(text)
    alone = text.startswith("```") and text.endswith("```") and len(blocks) == 1
    value = _read(blocks[0] if alone else text)
    if value is _NOTHING:
        beside = any(_read(block) is not _NOTHING for block in blocks) or _begins_somewhere(text)
        return 0.25 * beside, asked, "beside other text" if beside else "none"
    if schema is None:
        return 1.0, asked, ""
    from referencing.exceptions import Unresolvable

    try:
        faults = list(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value))
    except (Unresolvable, TimeoutError, RecursionError) as error:
        raise JudgeError("error", f"the JSON schema cannot be applied: {first_line(error)}") from error
    return (0.5 * fewer(len(faults)) if faults else 1.0), asked, faults and first_line(Exception(faults[0].message))


def check_valid_json(parameters: dict[str, Any]) -> None:
    """Raises ConfigError for a schema that is none, or whose patterns nobody can bound in time."""
    if "schema" not in parameters:
        return
    if "patternProperties" in _names(parameters["schema"]):
        raise ConfigError(
            "schema has patternProperties, and a pattern on names that a response chose may take for ever; write "
            "propertyNames with a pattern, and additionalProperties for their values"
        )
    from jsonschema.exceptions import SchemaError

    try:
        _validator(json.dumps(parameters["schema"], sort_keys=True))
    except SchemaError as error:
        raise ConfigError(f"schema is not a JSON schema: {error.message}") from error


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """By JSON text. Nothing is fetched, and patterns are bounded in time. Raises jsonschema's SchemaError."""
    import regex as engine
    from jsonschema import ValidationError, validators
    from referencing import Registry

    def pattern(validator: Any, wanted: str, instance: Any, schema_: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not engine.search(wanted, instance, timeout=PATTERN_SECONDS):
            yield ValidationError(f"{instance[:40]!r} does not match {wanted!r}")

    read = json.loads(schema)
    kind = validators.validator_for(read, default=validators.Draft202012Validator)
    kind.check_schema(read)
    return validators.extend(kind, {"pattern": pattern})(read, registry=Registry())


def _names(value: Any) -> Iterator[str]:
    """Names of all objects within."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _names(inner)


def _read(text: str) -> Any:
    """The value, or `_NOTHING`."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _begins_somewhere(text: str) -> bool:
    """Whether an object or a list of JSON stands in the text, told from its first bracket."""
    bracket = re.search(r"[{\[]", text)
    if bracket is None:
        return False
    try:
        json.JSONDecoder(parse_constant=_refuse).raw_decode(text, bracket.start())
    except (ValueError, RecursionError):
        return False
    return True
