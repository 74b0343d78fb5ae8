"""YAML as a config is written in it: text in, plain values out."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from online_po.errors import ConfigError


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping with a key twice; YAML forbids it, PyYAML keeps the last one."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 hurts: `off`, `on`, `yes` and `no` are text, and `1e-6` is a number.

    Refuses a key that stands in a mapping twice. Merge keys (`<<`) may: they are no keys of the mapping's own.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: dict[Any, Node]) -> MappingNode:
        mapping = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in mapping.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise _RepeatedKeyError(
                    f"line {line}: the key {key.value!r} stands there already, in line {seen[key.value]}; make one of "
                    "the two"
                )
            seen[key.value] = line
        return mapping


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    [*"-+.0123456789"],
)


def load_yaml(text: str, where: str) -> Any:
    """`where`: what the text is, for messages. Raises ConfigError."""
    try:
        return yaml.load(text, _Loader)
    except _RepeatedKeyError as error:
        raise ConfigError(f"{where}, {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def apply_override(data: dict[str, Any], override: str) -> None:
    """Puts a `section.key=value` (the value is YAML) into `data`. Raises ConfigError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *parents, last = key.strip().split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[last] = load_yaml(value, f"override {override!r}: the value")
