"""What the models that a judge holds take, found out from their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from online_po.judge_configs import Ensemble, Implicit, JudgeBase, RewardModel
from online_po.model_content import count_weights


@dataclass(frozen=True, kw_only=True)
class HeldModel:
    """One copy of weights in a judge process."""

    weights: int
    dtype: str
    """As configured: may be auto."""
    context: int
    """Tokens that it reads at most."""


def held_models(config: JudgeBase) -> list[HeldModel]:
    """What one process of a judge holds. Raises ConfigError as `judges.runtime.check_judge` does."""
    match config:
        case RewardModel():
            from judges.reward_files import read_reward_files

            reward = read_reward_files(config)
            return [_held(reward.folder, config.dtype, reward.limit)]
        case Implicit():
            from judges.implicit import read_checkpoints

            files = read_checkpoints(config)
            copies = dict.fromkeys((*files.bases, *files.folders))  # each folder once: an ordered set
            return [_held(folder, config.dtype, files.context) for folder in copies]
        case Ensemble():
            return [model for member in config.members for model in held_models(member.judge)]
        case _:
            return []


def _held(folder: Path, dtype: str, context: int) -> HeldModel:
    return HeldModel(weights=count_weights(folder), dtype=dtype, context=context)
