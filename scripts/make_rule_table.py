"""Writes docs/rules.md, the table of all constraints of the rules judge, from their functions; `--check` only compares.

python scripts/make_rule_table.py [--check]
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from judges.rules import CONSTRAINTS

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"
HEAD = """# Constraints of the rules judge

<!-- Written by scripts/make_rule_table.py; edit judges/rules/ instead. -->

A prompt's row has a column `constraints`, a list of `{"type": ..., ...parameters}`:

```json
{"prompt": "Name three birds in a list.", "constraints": [{"type": "bullet_points", "count": 3}, {"type": "lowercase"}]}
```

A response's score is the mean over them. Each gives 1 if and only if it is met, else partial credit by how far off the
response is, at most 0.5 at the first fault: groups then tie less often, and "all met" stays plain to see. An empty
response gets 0. Parameters are checked before a run starts: patterns, schemas, tests and answers that cannot be used
are refused by name. `language`, `math` and `reasoning_gym` need `pip install online-po[rules]`.

| type | parameters | met if; else |
|---|---|---|
"""


def parameters(function: object) -> str:
    """The keyword arguments, as a person writes them."""
    shown = []
    for name, parameter in inspect.signature(function).parameters.items():  # type: ignore[arg-type]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
            shown.append(f"`{name}: {parameter.annotation}{default}`".replace("|", "\\|").replace("'", ""))
    return ", ".join(shown) or "-"


def page() -> str:
    """The whole page."""
    rows = []
    for kind, function in CONSTRAINTS.items():
        said = " ".join((inspect.getdoc(function) or "").split()).replace("|", "\\|")
        rows.append(f"| `{kind}` | {parameters(function)} | {said} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit("docs/rules.md is out of date; run scripts/make_rule_table.py")


if __name__ == "__main__":
    main()
