"""docs/judges.md tells the truth: its configs are configs, its code judges, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from judges.runtime import LocalJudgePool
from online_po.cli import app
from online_po.config import Config
from online_po.judge_configs import JUDGE_BY_KIND
from online_po.yaml_text import load_yaml
from tests.judges.groups import make_group

PAGE = Path(__file__).parents[1] / "docs" / "judges.md"
TEXT = PAGE.read_text(encoding="utf-8")
BASE = {"run": {"name": "x"}, "model": {"path": "m"}, "prompts": {"path": "p"}, "eval": {"every": 0}}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubric.txt").write_text("short is good")


def test_there_is_a_config_for_every_kind_but_those_that_share_one(files):
    kinds = {Config.parse(BASE | load_yaml(text, "page")).judge.kind for text in blocks("yaml")}
    assert kinds == set(JUDGE_BY_KIND) - {"self_pairwise"}


def test_the_judge_of_ones_own_judges(tmp_path, monkeypatch):
    (code,) = [text for text in blocks("python") if text.startswith("# my_judge.py")]
    (tmp_path / "my_judge.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (section,) = [text for text in blocks("yaml") if "my_judge" in text]
    pool = LocalJudgePool(Config.parse(BASE | load_yaml(section, "page")).judge)
    (judgement,) = pool.submit([make_group("it is 4", "it is 5", metadata={"answer": 4})]).result(30)
    pool.close()
    assert judgement.scores == (1.0, 0.0)


def test_links_and_commands_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert "://" in link or (PAGE.parent / link).exists(), link
    anchors = {re.sub(r"[^a-z_ ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^## (.*)$", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
    commands = set(re.findall(r"^online-po (\w+)", TEXT, re.MULTILINE))
    assert commands == {"judge", "pairs"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_page_of_constraints_is_up_to_date():
    from make_rule_table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run scripts/make_rule_table.py"
