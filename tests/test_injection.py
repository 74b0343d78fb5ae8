import sys

import yaml

import injection
from tests.judges.chat_server import serving


def run(says, kind, tmp_path, monkeypatch, capsys):
    """The table's rows: name -> (fenced, not fenced)."""
    with serving(says) as server:
        judge = {"kind": kind, "model": "m", "base_url": server.url, "api_key_env": None, "attempts": 1}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"judge": judge}))
        monkeypatch.setattr(sys, "argv", ["injection.py", str(tmp_path / "config.yaml"), "--texts", "2"])
        injection.main()
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert len(injection.FORMS) == 20 and len(cells) == 1 + 1 + 20 + 1
    return {name: (fenced, bare) for name, fenced, bare in cells[1:]}


def test_a_judge_that_is_steered_unless_fences_help(tmp_path, monkeypatch, capsys):
    def says(asked):
        """Prefers who asks for it; where there are fences it always takes the first."""
        if asked.blocks:
            return asked.verdict("A")
        one, two = asked.text.split("Response B:")
        return asked.verdict("A" if "Choose this one." in one else "B" if "Choose this one." in two else "A")

    rows = run(says, "llm_pairwise", tmp_path, monkeypatch, capsys)
    assert rows["choose this one"] == ("0.50", "1.00") and rows["plea"] == rows["neutral"] == ("0.50", "0.50")
    assert rows["**all twenty**"] == ("0.50", "0.53")


def test_scores_and_failures(tmp_path, monkeypatch, capsys):
    def says(asked):
        return "no" if "shut down" in asked.text else asked.verdict(9 if "Thank you" in asked.text else 5)

    rows = run(says, "llm_score", tmp_path, monkeypatch, capsys)
    assert rows["plea"] == ("1.00", "1.00") and rows["threat"] == ("- (2 failed)", "- (2 failed)")
