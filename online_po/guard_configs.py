"""Section `guards`: what a run watches itself for, and what it does then. Imports neither torch nor ray.

What each guard looks at is in `online_po.guards`; docs/guards.md is written from the classes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from online_po.sections import Section

Action = Literal["off", "warn", "stop", "roll_back"]

ACTION = "What it does when it fires, see docs/guards.md."


class Guard(Section):
    """A guard: what it does, and its bounds."""

    sees: ClassVar[str]
    """What it fires on, for docs; bounds by their names."""
    remedy: ClassVar[str]
    """What to try; ends the sentence that it says."""

    action: Action = Field("warn", description=ACTION)


class KlGuard(Guard):
    """KL of the policy to the reference, and to the start, above a bound."""

    sees = "`kl_reference` or `kl_start` of the sampling policy above `max_nats`"
    remedy = "raise loss.beta, or lower learner.learning_rate or learner.epochs"

    max_nats: float = Field(30.0, gt=0, description="Largest KL, in nats a response.")


class DisplacementGuard(Guard):
    """Chosen and rejected responses both grow unlikely: likelihood displacement (Razin et al. 2024, 2410.08847)."""

    sees = (
        "chosen and rejected both less likely, on the mean of the round, than when they were sampled, each by more "
        "than `max_fall`; only where a round trains on its own pairs alone"
    )
    remedy = "add an sft loss on the chosen, use loss.name: dpop, or lower learner.learning_rate"

    max_fall: float = Field(0.1, gt=0, description="Largest fall of log-probability, in nats a response token.")


class OverOptimisationGuard(Guard):
    """Preferences are fitted nearly perfectly while the held-out score falls."""

    sees = (
        "`accuracy` at or above `min_accuracy`, and a held-out score below the best earlier policy's, by a paired 95% "
        "bootstrap interval that excludes zero"
    )
    remedy = "raise loss.beta, lower learner.epochs or learner.learning_rate, or see what the judge rewards wrongly"

    min_accuracy: float = Field(0.95, gt=0.5, le=1, description="Preference accuracy that counts as near 1.")


class EntropyGuard(Guard):
    """The policy grows certain of every token: entropy collapse."""

    sees = "`entropy` below `min_share` of round 1's"
    remedy = "raise loss.beta or generator.temperature, or lower learner.learning_rate"

    min_share: float = Field(0.5, gt=0, lt=1, description="Smallest share of round 1's entropy.")


class DiversityGuard(Guard):
    """Responses to one prompt grow alike."""

    sees = "`distinct_2` of the responses below `min_share` of round 1's"
    remedy = "raise generator.temperature or loss.beta, or lower learner.learning_rate"

    min_share: float = Field(0.5, gt=0, lt=1, description="Smallest share of round 1's distinct_2.")


class LengthGuard(Guard):
    """Responses grow longer and longer."""

    sees = "`length_mean` above `max_ratio` times round 1's"
    remedy = "use a loss that counts length (loss.name: ln_dpo, r_dpo or simpo), or a judge that does not pay for it"

    max_ratio: float = Field(1.5, gt=1, description="Largest ratio to round 1's mean length.")


class LengthScoreGuard(Guard):
    """The judge scores long responses higher."""

    sees = "`length_score_correlation` (within prompts) above `max_correlation`"
    remedy = "see whether the judge rewards length itself, or use loss.name: ln_dpo or r_dpo"

    max_correlation: float = Field(0.5, gt=0, lt=1, description="Largest correlation of length and score.")


class FlatGuard(Guard):
    """Chosen and rejected are alike to the policy: nothing is learned."""

    sees = (
        "`accuracy` within `max_edge` of 1/2 (or within two standard errors of a coin's, in small rounds) and "
        "`margin` / `beta` within `max_margin` of 0, `rounds` rounds on end"
    )
    remedy = "raise learner.learning_rate or pairs.min_margin, or use a judge with finer scores"

    max_edge: float = Field(0.05, gt=0, lt=0.5, description="Largest distance of accuracy from 1/2.")
    max_margin: float = Field(
        0.1, gt=0, description="Largest mean margin of the log-ratios, in nats a response, either way."
    )
    rounds: int = Field(2, ge=1, description="So many rounds on end.")


class NonFiniteGuard(Guard):
    """Loss or gradient NaN or infinite. Such a step is never applied, whatever the action."""

    sees = "a loss or gradient that is NaN or infinite"
    remedy = "lower learner.learning_rate or learner.max_grad_norm, or use learner.compute_dtype: float32"

    action: Literal["warn", "stop", "roll_back"] = Field(
        "warn",
        description="warn: the step is left out, and said so. stop: the run ends before the round is committed.",
    )


class GuardsConfig(Section):
    """What the run watches itself for, and what it does then. docs/guards.md has all guards in one table."""

    kl: KlGuard = KlGuard()  # type: ignore[call-arg]
    displacement: DisplacementGuard = DisplacementGuard()  # type: ignore[call-arg]
    over_optimisation: OverOptimisationGuard = OverOptimisationGuard()  # type: ignore[call-arg]
    entropy: EntropyGuard = EntropyGuard()  # type: ignore[call-arg]
    diversity: DiversityGuard = DiversityGuard()  # type: ignore[call-arg]
    length: LengthGuard = LengthGuard()  # type: ignore[call-arg]
    length_score: LengthScoreGuard = LengthScoreGuard()  # type: ignore[call-arg]
    flat: FlatGuard = FlatGuard()  # type: ignore[call-arg]
    nonfinite: NonFiniteGuard = NonFiniteGuard()  # type: ignore[call-arg]
    max_roll_backs: int = Field(
        2, ge=0, description="So many roll-backs; after a further one the run stops, at the round it went back to."
    )

    def each(self) -> dict[str, Guard]:
        """The guards by name."""
        return {name: value for name, value in self if isinstance(value, Guard)}

    @property
    def rolling_back(self) -> list[str]:
        """Names of the guards that roll back."""
        return [name for name, guard in self.each().items() if guard.action == "roll_back"]


def check_guards(guards: GuardsConfig, *, keep: int | None, max_staleness: int, unmet: Mapping[str, str]) -> None:
    """Raises ValueError for guards that could not do what they say, or that would have no effect. `unmet`: by the names
    of guards that could never fire, what they would need."""
    for name, guard in guards.each().items():
        bounds = guard.model_dump(exclude={"action"})
        defaults = type(guard).model_validate({}).model_dump(exclude={"action"})
        changed = next((key for key in bounds if bounds[key] != defaults[key]), None)
        if guard.action == "off" and changed is not None:
            raise ValueError(
                f"guards.{name}.{changed} is {bounds[changed]!r}, but guards.{name}.action is off; drop one of the two"
            )
        if name in unmet and (changed is not None or guard.action not in ("off", "warn")):
            what = f"guards.{name} is {guard.model_dump()}"
            raise ValueError(f"{what}, but has an effect only with {unmet[name]}; drop it")
    rolling = guards.rolling_back
    default = type(guards).model_fields["max_roll_backs"].default
    if not rolling and guards.max_roll_backs != default:
        raise ValueError(
            f"guards.max_roll_backs is {guards.max_roll_backs}, but no guard has action: roll_back; drop it"
        )
    # What a round was sampled by shows its faults two rounds and the staleness later, and the rounds after the one
    # that is gone back to are sampled by policies that are older still.
    least = 2 + 2 * max_staleness
    if rolling and keep is not None and keep < least:
        raise ValueError(
            f"checkpoint.keep is {keep}, but guards.{rolling[0]}.action: roll_back goes back to "
            f"weights that are older; with loop.max_staleness = {max_staleness} keep at least {least}, or null for all"
        )
