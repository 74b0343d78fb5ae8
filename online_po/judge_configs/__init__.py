"""Section `judge`: who says which response is better. Imports neither torch nor ray.

One class a kind; `judges.runtime.build_judge` makes the judge of each.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from online_po.judge_configs.base import JudgeBase
from online_po.judge_configs.ensemble import Ensemble, Member, SingleJudge
from online_po.judge_configs.local import Implicit, Plugin, Python, RewardModel, Rules
from online_po.judge_configs.prompted import Endpoint, LlmPairwise, LlmScore, Self, SelfPairwise, SelfScore

__all__ = [
    "JUDGE_BY_KIND", "Endpoint", "Ensemble", "Implicit", "JudgeBase", "JudgeConfig", "LlmPairwise", "LlmScore",
    "Member", "Plugin", "Python", "RewardModel", "Rules", "Self", "SelfPairwise", "SelfScore", "SingleJudge",
    "self_judges", "single_judges",
]  # fmt: skip


def _with_kind(value: Any) -> Any:
    """Without a kind it is the rules judge."""
    return {"kind": "rules", **value} if isinstance(value, dict) else value


AnyJudge = Annotated[
    Rules | Python | Plugin | RewardModel | Implicit | LlmScore | LlmPairwise | SelfScore | SelfPairwise | Ensemble,
    Field(discriminator="kind"),
]
JudgeConfig = Annotated[AnyJudge, BeforeValidator(_with_kind)]
"""Any judge, told apart by its kind."""

JUDGES: tuple[type[JudgeBase], ...] = get_args(get_args(AnyJudge)[0])
JUDGE_BY_KIND: dict[str, type[JudgeBase]] = {judge.model_fields["kind"].default: judge for judge in JUDGES}


def single_judges(judge: JudgeBase) -> list[JudgeBase]:
    """The members of an ensemble, or the judge itself."""
    return [member.judge for member in judge.members] if isinstance(judge, Ensemble) else [judge]


def self_judges(judge: JudgeBase) -> list[Self]:
    """The judges of a config, itself or an ensemble's members, that ask the run's own policy."""
    return [single for single in single_judges(judge) if isinstance(single, Self)]
