"""Writes the config reference into README.md and docs/judges.md from the pydantic models; `--check` only compares.

python scripts/make_config_reference.py [--check]
"""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from online_po.config import Config
from online_po.judge_configs import JUDGES, JudgeBase, Rules
from online_po.loss_configs import Sigmoid
from online_po.sections import Section

README = Path(__file__).parents[1] / "README.md"
JUDGES_PAGE = README.with_name("docs") / "judges.md"
LOSS_NOTE = (
    "These are the options of the default loss. [docs/losses.md](docs/losses.md) has all losses with theirs. A list, "
    "such as `loss: [{name: sigmoid}, {name: sft, weight: 0.2}]`, is a mixture."
)
JUDGE_NOTE = "These are the keys of every judge. [docs/judges.md](docs/judges.md) has all kinds with theirs."
BEGIN, END = "<!-- config reference: begin (generated) -->", "<!-- config reference: end -->"
JUDGE_BEGIN = "<!-- judge reference: begin (generated) -->"
JUDGE_END = "<!-- judge reference: end -->"


def type_name(annotation: object) -> str:
    """A type as a person writes it in YAML."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(type_name(a) for a in args if a is not type(None)) + (
            " \\| null" if type(None) in args else ""
        )
    if origin is typing.Annotated:
        return "path" if "_local" in repr(args) else type_name(args[0])
    if origin is tuple:
        return f"list of {type_name(args[0])}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "section"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}[annotation.__name__]  # type: ignore[attr-defined]


def section(name: str, model: type[BaseModel], without: type[BaseModel] = Section) -> list[str]:
    """One section as Markdown, its sub-sections after it; `without`: a base whose fields are left out where they are
    the same."""
    lines = [f"#### `{name}`", "", (model.__doc__ or "").strip(), "", "| key | type | default | what it does |"]
    lines.append("|---|---|---|---|")
    nested: list[str] = []
    for key, field in model.model_fields.items():
        if key in without.model_fields and repr(field) == repr(without.model_fields[key]):
            continue
        sub = [field.annotation, *typing.get_args(field.annotation)]
        for candidate in sub:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                nested += ["", *section(f"{name}.{key}", candidate)]
        metadata = next((m for m in field.metadata if "_local" in repr(m)), None)
        shown = "path" if metadata else type_name(field.annotation)
        default = "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
        description = (field.description or model.__doc__ or "").replace("|", "\\|")
        nested_section = next((c for c in sub if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if nested_section is not None and not field.description:
            description = " ".join((nested_section.__doc__ or "").split())
        lines.append(f"| `{key}` | {shown} | {default} | {description} |")
    return lines + nested


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value) if value != "" else '""'


def reference() -> str:
    """The whole reference, between its markers."""
    lines = [BEGIN, "<details><summary>All sections and keys</summary>", ""]
    for name, field in Config.model_fields.items():
        if name == "loss":
            lines += [*section(name, Sigmoid), "", LOSS_NOTE, ""]
            continue
        if name == "judge":
            lines += [*section(name, JudgeBase), "", JUDGE_NOTE, ""]
            continue
        (model,) = (a for a in (field.annotation, *typing.get_args(field.annotation)) if isinstance(a, type(Config)))
        lines += [*section(name, model), ""]
    return "\n".join([*lines, "</details>", END])


def judge_reference() -> str:
    """The settings of each kind of judge that the others have not."""
    lines = [JUDGE_BEGIN, ""]
    for judge in JUDGES:
        if judge is not Rules:
            lines += [*section(f"judge.kind: {judge.model_fields['kind'].default}", judge, without=JudgeBase), ""]
    return "\n".join([*lines, JUDGE_END])


def main() -> None:
    for path, begin, end, new in (
        (README, BEGIN, END, reference()),
        (JUDGES_PAGE, JUDGE_BEGIN, JUDGE_END, judge_reference()),
    ):
        text = path.read_text(encoding="utf-8")
        head, rest = text.split(begin)
        whole = head + new + rest.split(end)[1]
        if "--check" not in sys.argv:
            path.write_text(whole, encoding="utf-8")
        elif whole != text:
            raise SystemExit(f"{path.name}: the reference is out of date; run scripts/make_config_reference.py")


if __name__ == "__main__":
    main()
