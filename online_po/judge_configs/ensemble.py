"""Several judges as one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from online_po.judge_configs.base import BudgetConfig, JudgeBase
from online_po.judge_configs.local import Implicit, Plugin, Python, RewardModel, Rules
from online_po.judge_configs.prompted import Endpoint, LlmPairwise, LlmScore, SelfPairwise, SelfScore
from online_po.sections import Section

SingleJudge = Annotated[
    Rules | Python | Plugin | RewardModel | Implicit | LlmScore | LlmPairwise | SelfScore | SelfPairwise,
    Field(discriminator="kind"),
]
"""Any judge but an ensemble, told apart by its kind."""


class Member(Section):
    """One judge of an ensemble."""

    judge: SingleJudge
    weight: float = Field(1.0, gt=0, description="For combine: weighted_mean and majority.")
    min_gap: float = Field(
        0.0,
        ge=0,
        description="For combine: in_order. Responses less than this below the best one count as equal to it, and the "
        "next judge chooses among them; then the same with those that are left.",
    )


def _read_member(value: Any) -> Any:
    """`{kind: ..., weight: ...}` as a person writes it."""
    if not isinstance(value, dict) or "judge" in value:
        return value
    own = {key: value[key] for key in ("weight", "min_gap") if key in value}
    return own | {"judge": {key: item for key, item in value.items() if key not in own}}


class Ensemble(JudgeBase):
    """Several judges of the same responses."""

    kind: Literal["ensemble"] = "ensemble"
    cached: ClassVar[bool] = False  # its members' answers are
    costs_money: ClassVar[bool] = True  # its members do
    members: tuple[Annotated[Member, BeforeValidator(_read_member)], ...] = Field(
        min_length=2, description="Judges, each as a section `judge` of its own, with `weight` or `min_gap`."
    )
    combine: Literal["weighted_mean", "rank_average", "majority", "minimum", "in_order"] = Field(
        "weighted_mean",
        description="weighted_mean: of normalised scores. rank_average: of ranks within a prompt. majority: votes on "
        "each pair of responses, turned into shares of pairs won (Copeland). minimum: the worst normalised score, of "
        "judges that see a difference. in_order: the first judge decides, the next "
        "where it sees no difference.",
    )
    normalise: Literal["none", "zscore", "minmax"] = Field(
        "zscore",
        description="Of each member's scores within a prompt, for weighted_mean and minimum. Equal scores say nothing.",
    )
    max_disagreement: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Where a larger share of member pairs has two responses in opposite order, averaged over the "
        "prompt's pairs of responses, the ensemble abstains: no label. 1: never.",
    )

    @property
    def general(self) -> bool:
        return all(member.judge.general for member in self.members)

    @property
    def relative(self) -> bool:
        own_scale = self.combine in ("weighted_mean", "minimum") and self.normalise == "none"
        return not own_scale or any(member.judge.relative for member in self.members)

    @property
    def holds_model(self) -> bool:
        return any(member.judge.holds_model for member in self.members)

    def settings(self) -> dict[str, Any]:
        members = [member.model_dump(exclude={"judge"}) | member.judge.settings() for member in self.members]
        return super().settings() | {"members": members}

    def identity(self) -> dict[str, Any]:
        members = [member.model_dump(exclude={"judge"}) | member.judge.identity() for member in self.members]
        return super().identity() | {"members": members}

    @model_validator(mode="after")
    def _check(self) -> Ensemble:
        for place, member in enumerate(self.members):
            for name in sorted(member.judge.RUN_FIELDS):
                if getattr(member.judge, name) != type(member.judge).model_fields[name].default:
                    raise ValueError(
                        f"judge.members.{place}.{name} is the run's, not a member's; write judge.{name} instead"
                    )
            if member.weight != 1 and self.combine not in ("weighted_mean", "majority"):
                raise ValueError(
                    f"judge.members.{place}.weight has no effect with judge.combine: {self.combine}; drop it"
                )
            if member.min_gap and self.combine != "in_order":
                raise ValueError(f"judge.members.{place}.min_gap is for judge.combine: in_order, not {self.combine}")
        if self.budget.counts_money:
            priced = [m.judge for m in self.members if isinstance(m.judge, Endpoint)]
            if not priced or not all(judge.prompt_price or judge.response_price for judge in priced):
                raise ValueError(
                    "judge.budget counts money, so members behind an endpoint need prices (prompt_price and "
                    "response_price, not both 0), and there must be such a member; or count calls instead"
                )
        if self.budget != BudgetConfig() and not any(member.judge.cached for member in self.members):  # type: ignore[call-arg]
            raise ValueError("judge.budget has no effect with members of kind rules alone, which call nobody; drop it")
        if self.combine not in ("weighted_mean", "minimum") and self.normalise != "zscore":
            raise ValueError(f"judge.normalise has no effect with judge.combine: {self.combine}; drop it")
        return self
