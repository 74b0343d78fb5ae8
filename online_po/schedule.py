"""The learning rate as a pure function of how far the run is. Nothing to save, nothing to restore."""

from __future__ import annotations

import math

from online_po.sections import LearnerConfig


def run_progress(round_: int, step: int, steps_in_round: int, rounds: int) -> float:
    """Share of the run, in (0, 1), at the middle of a step. `round_` counts from 1, `step` from 0.

    The middle, so that neither the first step of a warm-up nor the last of a decay to zero is wasted,
    and rounds count the same however many pairs they hold.
    """
    return (round_ - 1 + (step + 0.5) / steps_in_round) / rounds


def learning_rate(config: LearnerConfig, progress: float) -> float:
    """Warm-up to `learning_rate` over the first `warmup_ratio` of the run, then cosine or linear decay to
    `min_lr_ratio` of it at the end, or constant."""
    if progress < config.warmup_ratio:
        return config.learning_rate * progress / config.warmup_ratio
    decayed = (progress - config.warmup_ratio) / (1 - config.warmup_ratio)
    match config.schedule:
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * decayed))
        case "linear":
            shape = 1 - decayed
        case "constant":
            return config.learning_rate
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
