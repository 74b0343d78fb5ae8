"""Every loss trains through the real loop: vLLM in a Ray actor, a real judge, the real learner, a tiny model."""

from __future__ import annotations

import re

import pytest

from run_losses import NAMES, PAGE, Score, run_losses

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Score]:
    return {score.name: score for score in run_losses(tmp_path_factory.mktemp("losses"), NAMES)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_the_held_out_score_rises(scores: dict[str, Score], name: str) -> None:
    """The whole 95% interval of the difference to the start lies above zero."""
    assert scores[name].low > 0, scores[name]


def test_the_page_shows_every_loss() -> None:
    rows = re.findall(r"^\| `(\w+)` \| 0\.\d+ \| 0\.\d+ \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == NAMES
