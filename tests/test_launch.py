"""Putting a run together, as far as that needs no actors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from online_po import launch
from online_po.errors import BudgetError, EngineError, GuardError, JudgeFailureRateError, NonFiniteError, OnlinePOError
from tests.fakes import FakeObserver, make_config


@pytest.mark.parametrize("error", [BudgetError, GuardError, JudgeFailureRateError, NonFiniteError, EngineError])
def test_a_run_that_was_ended_for_cause_has_a_report(tmp_path, monkeypatch, error: type[OnlinePOError]):
    config, observer = make_config(tmp_path), FakeObserver()

    def ends(*_: object) -> None:
        raise error("guards.kl.action is stop")

    monkeypatch.setattr(launch, "checked_plan", lambda *_: SimpleNamespace(heldout=None))
    monkeypatch.setattr(launch, "_run_info", lambda _: {"versions": {}})
    monkeypatch.setattr(launch, "_run_watched", ends)
    with pytest.raises(error):
        launch.run(config, [observer])
    report = config.run_dir / "report.html"
    written = error is not EngineError
    assert report.exists() == written
    assert observer.messages == ([f"report: {report}"] if written else [])
