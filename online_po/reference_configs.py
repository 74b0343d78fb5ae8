"""Sections `reference` and `beta_control`: what the policy is held against, and how firmly. Imports neither torch nor
ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from online_po.sections import Section


class ReferenceConfig(Section):
    """The frozen anchor of the loss, see [docs/reference.md](docs/reference.md)."""

    kind: Literal["fixed", "refresh", "ema", "kl", "none"] = Field(
        "fixed",
        description="fixed: always the starting model. refresh: takes the policy every `every` rounds. ema: moves "
        "towards the policy every `every` rounds, by `alpha`. kl: takes the policy when the KL to the reference was "
        "over `above`. none: for losses without a reference, and the default there: no log-probabilities computed, no "
        "weights loaded for it.",
    )
    every: int = Field(1, ge=1, description="For refresh and ema: rounds between two changes.")
    alpha: float | None = Field(
        None,
        gt=0,
        le=1,
        description="For ema: the policy's share; reference <- alpha x policy + (1 - alpha) x reference (TR-DPO's "
        "soft update). 1 is refresh.",
    )
    above: float | None = Field(
        None,
        gt=0,
        description="For kl: nats a response. Measured on the responses sampled for a round (`kl_reference` of the "
        "round's metrics); over it, the policy that the round ends with is the next round's reference.",
    )
    logps: Literal["learner", "sampler"] = Field(
        "learner",
        description="Who says the reference's log-probabilities. sampler: the engine that sampled, where the reference "
        "is the sampling policy (refreshed every round); saves a forward pass over the round.",
    )
    max_mismatch: float = Field(
        0.01,
        gt=0,
        description="For logps: sampler. Past this difference to the learner's, in nats a token, the learner is asked.",
    )

    @model_validator(mode="after")
    def _check(self) -> ReferenceConfig:
        if self.logps != "sampler" and self.max_mismatch != type(self).model_fields["max_mismatch"].default:
            raise ValueError(
                f"reference.max_mismatch is {self.max_mismatch:g}, but it is for reference.logps: sampler, not "
                f"{self.logps}; drop it"
            )
        for name, kinds in (("every", ("refresh", "ema")), ("alpha", ("ema",)), ("above", ("kl",))):
            value = getattr(self, name)
            if self.kind not in kinds and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"reference.{name} is {value:g}, but it is for reference.kind: {' and '.join(kinds)}, not "
                    f"{self.kind}; drop it"
                )
        if self.kind == "ema" and self.alpha is None:
            raise ValueError("reference.kind is ema, so reference.alpha must be given: the policy's share, say 0.5")
        if self.kind == "kl" and self.above is None:
            raise ValueError("reference.kind is kl, so reference.above must be given, in nats a response, say 10")
        return self

    @property
    def refreshes_every(self) -> int | None:
        """Rounds between two times that the policy itself takes the reference's place; None where that is not so, or
        not known beforehand. A mean in which the policy has all the weight is the policy."""
        return self.every if self.kind == "refresh" or (self.kind == "ema" and self.alpha == 1) else None


class BetaControlConfig(Section):
    """A controller that holds the KL to the reference at a target by scaling beta (Ziegler et al. 2019)."""

    target_kl: float = Field(gt=0, description="KL to the reference to hold, in nats a response (`kl_reference`).")
    gain: float = Field(1.0, gt=0, le=5, description="Relative change of beta per unit of the KL's relative error.")
    max_error: float = Field(0.2, gt=0, lt=1, description="The relative error is clipped to this, either way.")
    min_scale: float = Field(0.01, gt=0, le=1, description="Beta is never scaled below this.")
    max_scale: float = Field(100.0, ge=1, description="Beta is never scaled above this.")

    @model_validator(mode="after")
    def _check(self) -> BetaControlConfig:
        if self.gain * self.max_error >= 1:
            raise ValueError(
                f"beta_control.gain x beta_control.max_error is {self.gain * self.max_error:g}; keep it below 1, or "
                "one round could take beta to zero"
            )
        return self
