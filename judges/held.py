"""What the models that a judge holds take, found out from their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from online_po.judge_configs import Ensemble, Implicit, JudgeBase, RewardModel
from online_po.model_config import find_model, read_any_config
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
    """What one process of a judge that `judges.runtime.check_judge` let pass holds."""
    match config:
        case RewardModel():
            from judges.reward_files import SETTING, context_of

            folder = find_model(config.path, config.revision, SETTING)
            context = config.max_length or context_of(read_any_config(folder, config.path, setting=SETTING))
            return [_held(folder, config.dtype, context)]
        case Implicit():
            from judges.implicit import find_folders, shared_context

            folders, bases = find_folders(config)
            copies = dict.fromkeys((*bases, *folders))  # each folder once: an ordered set
            return [_held(copy, config.dtype, shared_context(config, bases)) for copy in copies]
        case Ensemble():
            return [model for member in config.members for model in held_models(member.judge)]
        case _:
            return []


def _held(folder: Path, dtype: str, context: int) -> HeldModel:
    return HeldModel(weights=count_weights(folder), dtype=dtype, context=context)
