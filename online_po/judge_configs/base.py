"""What all judges have: processes, budget, known pairs, length handling."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from online_po.sections import LocalPath, Section


class BudgetConfig(Section):
    """What judging may cost. Spent, the run pauses: everything judged is kept, and `online-po run` with a higher one
    goes on. Every call counts, repeated and failed ones too; answers from the cache do not."""

    calls_per_round: int | None = Field(None, ge=1, description="Calls in one round, its evaluation included.")
    calls: int | None = Field(None, ge=1, description="Calls in the whole run.")
    money_per_round: float | None = Field(
        None, gt=0, description="Money for one round, in the currency of judge.prompt_price and judge.response_price."
    )
    money: float | None = Field(None, gt=0, description="Money for the whole run.")

    @property
    def counts_money(self) -> bool:
        return self.money is not None or self.money_per_round is not None


class PreflightConfig(Section):
    """The judge is tried on pairs of which the better response is known before the run starts."""

    min_accuracy: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Share of the known pairs that it must get right, a tie counted as half. 0: it is only told of, "
        "unless the judge fails on all of them.",
    )
    min_consistency: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of them that a pairwise judge must judge alike in both orders.",
    )


class CalibrationConfig(Section):
    """The judge is tried on `judge.gold` again while the run goes on."""

    every: int = Field(0, ge=0, description="Rounds between two trials; 0: only before the run.")
    max_drop: float = Field(
        0.1, gt=0, le=1, description="A larger fall of its accuracy below the preflight's is an alarm."
    )


class LengthConfig(Section):
    """Takes length out of the scores of any judge before pairs and labels are made. Judgements, evaluation and the
    metrics of scores keep the judge's own."""

    penalty_per_token: float = Field(0.0, ge=0, description="Taken off a response's score for each of its tokens.")
    regress: bool = Field(
        False,
        description="The round's linear trend of score over length in tokens, within prompts, is taken out of its "
        "scores. Of responses with equal scores, shorter ones then come out ahead where the trend rises.",
    )

    @property
    def used(self) -> bool:
        return self.regress or self.penalty_per_token > 0


class JudgeBase(Section):
    """What every judge has. All but `kind`, `timeout_s` and `concurrency` are the run's: members of an ensemble cannot
    have them."""

    RUN_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"workers", "max_failure_rate", "bradley_terry_scale", "gold", "preflight", "calibration", "budget", "length"}
    )
    NO_VERDICT: ClassVar[frozenset[str]] = RUN_FIELDS | {"concurrency", "timeout_s"}
    """Fields that change no answer: not part of a judge's identity in the cache."""
    cached: ClassVar[bool] = True
    """Whether answers are kept in the run's judge cache."""
    by_ids: ClassVar[bool] = False
    """Whether an answer may depend on the responses' token ids, not only on their text."""
    batches: ClassVar[bool] = False
    """Whether it answers many questions at once: then `concurrency` and `timeout_s` of single calls mean nothing."""
    costs_money: ClassVar[bool] = False
    """Whether its config says what a call costs."""

    kind: str
    workers: int = Field(1, ge=1, description="Judge processes.")
    timeout_s: float = Field(60.0, gt=0, description="Seconds after which one call counts as failed.")
    concurrency: int = Field(8, ge=1, description="Calls in flight in one judge process.")
    max_failure_rate: float = Field(
        0.05, ge=0, le=1, description="The round stops if a larger share of its groups could not be judged."
    )
    bradley_terry_scale: float | None = Field(
        None,
        gt=0,
        description="The judge's scores are Bradley-Terry rewards (Bradley & Terry 1952): chosen beats rejected with "
        "probability sigmoid(score gap / scale). 1 for a reward model trained on pairs. Written to pairs.parquet as "
        "`preference_probability`, and read by loss sppo with probability: soft. null: the judge gives no "
        "probabilities.",
    )
    gold: LocalPath | None = Field(
        None,
        description="Pairs of which the better response is known (.jsonl, .parquet or .csv: prompt, chosen, rejected, "
        "and columns that the judge reads), to try the judge on. null: the pairs that come with the package, for "
        "judges of responses in general; rules, python and plugin are then not tried.",
    )
    preflight: PreflightConfig = PreflightConfig()  # type: ignore[call-arg]
    calibration: CalibrationConfig = CalibrationConfig()  # type: ignore[call-arg]
    budget: BudgetConfig = BudgetConfig()  # type: ignore[call-arg]
    length: LengthConfig = LengthConfig()  # type: ignore[call-arg]

    @property
    def general(self) -> bool:
        """Whether it judges responses in general; false: what a run's own prompts ask for."""
        return self.kind not in ("rules", "python", "plugin")

    @property
    def pairwise(self) -> bool:
        """Whether it is shown two responses at a time."""
        return False

    @property
    def relative(self) -> bool:
        """Whether scores say something only beside the others of the same prompt, made together with them."""
        return self.pairwise

    @property
    def both_orders(self) -> bool:
        """Whether it is shown each pair in both orders, and its judgements tell whether it said the same."""
        return self.pairwise

    @property
    def holds_model(self) -> bool:
        """Whether its processes hold a model, and so want a GPU."""
        return False

    def settings(self) -> dict[str, Any]:
        """The settings that an answer depends on. Not where files and models lie: what they say counts, see
        `identity`."""
        return self.model_dump(mode="json", exclude=set(self.NO_VERDICT))

    def identity(self) -> dict[str, Any]:
        """All that an answer depends on, but for what is asked: what the cache knows the judge by. Files and models
        count by what they say. Raises ConfigError where one cannot be had."""
        return self.settings()

    @model_validator(mode="after")
    def _check_base(self) -> JudgeBase:
        if self.budget.counts_money and not self.costs_money:
            raise ValueError(
                f"judge.budget counts money, but calls of judge.kind: {self.kind} have no price; count calls instead"
            )
        for name in ("calls", "money"):
            most, per_round = getattr(self.budget, name), getattr(self.budget, f"{name}_per_round")
            if most is not None and per_round is not None and per_round > most:
                raise ValueError(
                    f"judge.budget.{name}_per_round is {per_round:g}, above judge.budget.{name} = {most:g} for the "
                    "whole run, so it has no effect; lower it, or drop it"
                )
        for name in ("concurrency", "timeout_s"):
            if self.batches and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"judge.{name} has no effect with judge.kind: {self.kind}, which takes all that waits; drop it"
                )
        if self.preflight != PreflightConfig() and self.gold is None and not self.general:  # type: ignore[call-arg]
            raise ValueError(
                f"judge.preflight has no effect: judge.kind: {self.kind} judges what a run's own prompts ask for, and "
                "is tried on judge.gold only; give judge.gold, or drop it"
            )
        if self.preflight.min_consistency and not self.both_orders:
            raise ValueError(
                f"judge.preflight.min_consistency is {self.preflight.min_consistency:g}, but has an effect only with "
                "judges that are shown pairs in both orders (llm_pairwise, self_pairwise, and reward_model with "
                "compares: true); drop it"
            )
        if self.calibration.every and self.gold is None:
            raise ValueError("judge.calibration.every is set, so judge.gold must name pairs to try the judge on")
        if not self.calibration.every and self.calibration.max_drop != 0.1:
            raise ValueError("judge.calibration.max_drop has an effect only with judge.calibration.every; drop it")
        return self
