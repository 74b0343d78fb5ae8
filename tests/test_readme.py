"""The README tells the truth: its reference is the models', its files and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from online_po.cli import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_config_reference_is_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "make_config_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_linked_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_command_is_there():
    for script in re.findall(r"bash (scripts/\w+\.sh)", TEXT):
        assert (ROOT / script).exists(), script
    commands = set(re.findall(r"^online-po (\w+)", TEXT, re.MULTILINE))
    assert commands == {"check", "run", "status", "resume", "report", "export"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_python_example_names_what_exists():
    import online_po

    assert "from online_po import Config, run" in TEXT
    assert callable(online_po.run) and hasattr(online_po.Config, "from_yaml")
