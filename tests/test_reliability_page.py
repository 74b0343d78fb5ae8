"""docs/reliability.md names tests that are there, and the README links it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_holds_a_promise_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 12
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"
    for script in re.findall(r"scripts/\w+\.py", TEXT):
        assert (ROOT / script).exists(), script


def test_the_readme_links_it():
    assert "](docs/reliability.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
