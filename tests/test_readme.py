"""The README tells the truth: its reference is the models', its files and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from online_po.cli import app
from online_po.config import Config
from online_po.loss_configs import LOSS_BY_NAME
from online_po.yaml_text import load_yaml

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
    assert commands == {"check", "run", "status", "resume", "report", "verify", "export", "judge", "pairs"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_python_example_names_what_exists():
    import online_po

    assert "from online_po import Config, run" in TEXT
    assert callable(online_po.run) and hasattr(online_po.Config, "from_yaml")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_of_losses_and_judges_are_configs():
    base = {"run": {"name": "x"}, "model": {"path": "m"}, "prompts": {"path": "p", "heldout_size": 1}}
    configs = [Config.parse(base | load_yaml(text, "README")) for text in blocks("yaml")]
    assert [[loss.name for loss in config.loss] for config in configs] == [["sigmoid"], ["sigmoid", "sft"], ["custom"]]
    assert configs[1].beta_control is not None and configs[0].judge.function == "my_judge:score"


def test_the_example_of_a_loss_of_ones_own_trains(tmp_path, monkeypatch):
    import torch

    from online_po.losses import LossInputs, pair_losses, tensor_names

    (code,) = [text for text in blocks("python") if text.startswith("# my_loss.py")]
    (tmp_path / "my_loss.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (loss,) = load_yaml(blocks("yaml")[-1], "README").values()
    config = LOSS_BY_NAME["custom"](**loss)
    inputs = LossInputs(**{name: torch.full((3,), float(i)) for i, name in enumerate(sorted(tensor_names(config)))})
    assert pair_losses(config, inputs).shape == (3,)
