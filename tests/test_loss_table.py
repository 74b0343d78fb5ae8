"""docs/losses.md, and what may import what about losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import make_loss_table
from online_po.loss_configs import LOSSES

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"


def test_the_table_of_losses_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == make_loss_table.page()


def test_check_tells_an_old_table(tmp_path, monkeypatch):
    old = tmp_path / "losses.md"
    monkeypatch.setattr(make_loss_table, "PAGE", old)
    monkeypatch.setattr(sys, "argv", ["make_loss_table.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        make_loss_table.main()
    monkeypatch.setattr(sys, "argv", ["make_loss_table.py"])
    make_loss_table.main()
    monkeypatch.setattr(sys, "argv", ["make_loss_table.py", "--check"])
    make_loss_table.main()


def test_every_loss_has_a_row_of_as_many_cells_as_the_head():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == len(LOSSES) + 2
    assert {row.replace("\\|", "").count("|") for row in rows} == {11}


def test_the_configs_of_losses_load_no_torch():
    code = (
        "import sys, online_po.loss_configs; print([m for m in ('torch', 'numpy', 'ray', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
