"""What people are shown of guards: screen, tables, status, report, export."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from online_po import files, guard_view
from online_po.cli import app
from online_po.console import ConsoleObserver, print_result, print_status
from online_po.errors import ConfigError
from online_po.export import default_round, export
from online_po.ledger import Ledger
from online_po.report import write_report
from online_po.run_view import load_run_view
from online_po.types import Reference
from tests.fakes import make_config
from tests.run_folder import make_run_folder
from tests.test_export import make_run
from tests.test_report import Page

SAW = "responses have 90 tokens on average, 2 times round 1's <b>; use a loss that counts length."
FINDING = {"name": "length", "action": "warn", "policy": 1, "message": SAW}
OVER = {"name": "over_optimisation", "action": "warn", "policy": 2, "message": "the held-out score fell; raise beta."}
BACK = {"from": 3, "to": 1, "guard": "kl", "message": "policy 2 has a KL of 80 nats; raise loss.beta.", "done": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in which guards saw something in round 2 and of policy 2, and that went back once."""
    folder = make_run_folder(tmp_path)
    change(folder / "rounds/000002/metrics.jsonl", lambda row: row | {"guards": [FINDING], "attempt": 1})
    change(folder / "rounds/000002/eval.json", lambda row: row | {"guards": [OVER], "attempt": 1})
    files.write_json(folder / "roll_backs.json", {"acts": [BACK]})
    return folder


def change(path: Path, how: Any) -> None:
    """Rewrites the last line of a JSON lines file, or a JSON file."""
    if path.suffix == ".json":
        files.write_json(path, how(files.read_json(path)))
    else:
        *rows, last = files.read_json_lines(path)
        files.write_json_lines(path, [*rows, how(last)])


def test_sentences_are_in_order_and_say_where(folder):
    view = load_run_view(folder)
    assert guard_view.findings(view) == [
        f"round 2, guard length: {SAW}",
        "policy 2, guard over_optimisation: the held-out score fell; raise beta.",
    ]
    assert guard_view.roll_backs(view) == [f"went back from round 3 to round 1, guard kl: {BACK['message']}"]
    plain = load_run_view(make_run_folder(folder / "plain"))
    assert guard_view.latest(plain) == []


def test_a_terminal_shows_the_latest_and_says_what_it_hides(folder):
    change(folder / "rounds/000002/metrics.jsonl", lambda row: row | {"guards": [FINDING] * 8})
    lines = guard_view.latest(load_run_view(folder))
    assert lines[0].startswith("went back") and lines[1] == "3 earlier findings of guards are in the report"
    assert len(lines) == 2 + guard_view.SHOWN and lines[-1].startswith("policy 2")


def test_console_status_and_result(folder):
    view = load_run_view(folder)
    out = io.StringIO()
    observer = ConsoleObserver(Console(file=out, width=60))
    observer.round(view.rounds[2].summary)
    observer.evaluation(view.rounds[2].evaluation)
    lines = out.getvalue().splitlines()
    assert lines[1] == f"guard length: {SAW}" and lines[3].startswith("guard over_optimisation: the held-out")
    for show in (lambda console: print_result(view, console), lambda console: print_status(Ledger(folder), console)):
        out = io.StringIO()
        show(Console(file=out, width=300))
        text = out.getvalue()
        assert all(line in text for line in guard_view.latest(view))
        assert re.search(r"Best on held-out prompts: policy [123], 0\.\d+ \[", text)


def test_a_step_and_a_round_that_were_left_out_are_shown(folder):
    view = load_run_view(folder)
    out = io.StringIO()
    observer = ConsoleObserver(Console(file=out, width=60))
    observer.step(1, {"skipped": 1.0, "pairs": 4.0})
    summary = {key: value for key, value in view.rounds[1].summary.items() if key not in ("loss", "accuracy")}
    observer.round(summary)
    assert "loss not finite" in out.getvalue()


def test_the_report_lists_what_guards_saw(folder):
    page = Page(write_report(folder).read_text())
    text = re.sub(r"\s+", " ", page.text)
    assert "What guards saw (3)" in text and SAW in text and "went back from round 3 to round 1" in text
    assert "Best on held-out prompts" in text
    assert "What guards saw" not in Page(write_report(make_run_folder(folder / "plain")).read_text()).text


def test_a_finding_that_stopped_the_run_says_so(folder):
    stop = {"policy": FINDING["policy"], "attempt": 1, "guard": "length", "round": 2, "message": SAW}
    stops = [stop, stop | {"guard": "over_optimisation", "attempt": 0}]
    files.write_json(folder / "guard_stops.json", {"acts": stops})
    view = load_run_view(folder)
    assert guard_view.findings(view) == [
        f"round 2, guard length (the run stopped): {SAW}",
        f"policy 2, guard over_optimisation: {OVER['message']}",
    ]


def stop_early(folder: Path, patience: int) -> None:
    text = files.read_yaml(folder / "config.yaml")
    rule = f"early_stop: {{patience: {patience}, min_gain: 0.0}}"
    files.write_yaml(folder / "config.yaml", text.replace("early_stop: null", rule))


def test_a_run_that_ended_early_is_finished_and_says_so(tmp_path):
    folder = make_run_folder(tmp_path, rounds=6, committed=2, gain=-0.1)
    assert not load_run_view(folder).finished
    stop_early(folder, 2)
    view = load_run_view(folder)
    assert view.finished and view.early_stopped == 2
    said = guard_view.best(view)
    assert said is not None and said.startswith("Best on held-out prompts: the starting policy, ")
    assert said.endswith("Ended early: no gain in 2 evaluations on end, up to policy 2.")
    stop_early(folder, 2)
    (folder / "rounds/000002/COMMIT.json").unlink()
    assert not load_run_view(folder).finished


def test_export_takes_the_best_round_where_the_run_may_end_early(tmp_path, tiny_model):
    ledger = make_run(tmp_path / "runs", tiny_model, is_adapter=False)
    with ledger.weights(2, "policy") as (policy, _):
        for path in (ledger.round_dir(1) / "policy").iterdir():
            (policy / path.name).write_bytes(path.read_bytes())
        (policy / "round").write_text("2")
    with ledger.weights(2, "trainer") as (trainer, _):
        (trainer / "trainer.json").write_text("{}")
    ledger.commit(2, is_adapter=False, reference=Reference(round=0), probe=ledger.committed(0).probe)
    scores = {0: 0.1, 1: 0.9, 2: 0.8}
    for version, score in scores.items():
        interval = {"mean": score, "low": None, "high": None}
        files.write_json(ledger.round_dir(version) / "eval.json", {"policy_version": version, "score": interval})
    assert default_round(ledger.root) == 2
    early = make_config(tmp_path / "runs", model={"path": str(tiny_model)}, eval={"early_stop": {}})
    files.write_yaml(ledger.root / "config.yaml", early.to_yaml())
    done = CliRunner().invoke(app, ["export", str(ledger.root), str(tmp_path / "out")])
    assert done.exit_code == 0 and "the policy of round 1:" in done.output and str(tmp_path / "out") in done.output
    assert not (tmp_path / "out" / "round").exists()
    assert (export(ledger.root, tmp_path / "last", round_=2) / "round").exists()
    files.write_json(ledger.round_dir(0) / "eval.json", {"policy_version": 0, "score": {"mean": 1.0}})
    with pytest.raises(ConfigError, match="no round scored higher .* than the starting model; give --round"):
        export(ledger.root, tmp_path / "start")
