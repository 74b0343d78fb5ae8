"""What all constraints share: what a check gives, and how words are told apart."""

from __future__ import annotations

import re

Check = tuple[float, str, object]
"""Score in [0, 1], what was asked in a few words, what was found (shown when the constraint is not met)."""

OWN_WORDS = 3
"""Words a response needs besides the phrase or keywords it was given."""
WORD = re.compile(r"(?<!\S)[^\w\s]*+\w\S*")
"""What stands between white space and has a letter or digit. Like all patterns here it takes time linear in the text:
policies that collapse write pages of exclamation marks."""
_OPENS = re.compile(r" {0,3}```[^`]*")
_CLOSES = re.compile(r" {0,3}```[ \t]*")


def fewer(faults: int) -> float:
    """1, 1/2, 1/3, ... for 0, 1, 2, ... faults."""
    return 1.0 / (1.0 + faults)


def within(found: int, low: int | None, high: int | None) -> float:
    """1.0 for low <= found <= high. Else half the square of how far it got, at most 0.5."""
    if low is not None and found < low:
        return 0.5 * (found / low) ** 2
    if high is not None and found > high:
        return 0.5 * (high / found) ** 2
    return 1.0


def counted(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def fenced_blocks(text: str) -> list[str]:
    """What stands between lines of three backticks, the language aside; a block that never ends is none."""
    blocks, inside = list[str](), None
    for line in text.split("\n"):
        if inside is None:
            inside = list[str]() if _OPENS.fullmatch(line) else None
        elif _CLOSES.fullmatch(line):
            blocks.append("".join(inside))
            inside = None
        else:
            inside.append(f"{line}\n")
    return blocks
