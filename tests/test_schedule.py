import math

import pytest

from online_po.schedule import learning_rate, run_progress
from online_po.sections import LearnerConfig


def config(**changes: object) -> LearnerConfig:
    base = {"learning_rate": 1.0, "warmup_ratio": 0.1, "min_lr_ratio": 0.2}
    return LearnerConfig(**(base | changes))  # type: ignore[arg-type]


def test_progress_is_of_the_run_at_the_middle_of_a_step() -> None:
    assert run_progress(1, 0, 4, 2) == 0.5 / 8
    assert run_progress(2, 3, 4, 2) == 7.5 / 8
    # the middle of a round is the middle whatever its number of steps
    assert run_progress(2, 0, 1, 3) == run_progress(2, 1, 3, 3) == 0.5


def test_warm_up_is_linear_and_never_zero() -> None:
    assert learning_rate(config(), 0.05) == pytest.approx(0.5)
    assert learning_rate(config(), run_progress(1, 0, 1000, 10)) > 0


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("cosine", 0.2 + 0.8 * 0.5), ("linear", 0.2 + 0.8 * 0.5), ("constant", 1.0)]
)
def test_shapes(schedule: str, halfway: float) -> None:
    assert learning_rate(config(schedule=schedule), 0.1) == pytest.approx(1.0)
    assert learning_rate(config(schedule=schedule), 0.55) == pytest.approx(halfway)
    assert learning_rate(config(schedule=schedule), 1.0) == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_cosine_and_linear_differ_off_the_middle() -> None:
    quarter = 0.1 + 0.9 / 4
    assert learning_rate(config(schedule="cosine"), quarter) == pytest.approx(
        0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    )
    assert learning_rate(config(schedule="linear"), quarter) == pytest.approx(0.2 + 0.8 * 0.75)


def test_no_warm_up() -> None:
    assert learning_rate(config(warmup_ratio=0.0), 0.0) == 1.0
