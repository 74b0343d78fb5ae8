"""Judges that run here: rules, the user's code, models that give a score."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from online_po.judge_configs.base import JudgeBase
from online_po.sections import LocalOrHub


class Rules(JudgeBase):
    """Verifiable constraints in the prompt's metadata."""

    cached: ClassVar[bool] = False

    kind: Literal["rules"] = "rules"

    @model_validator(mode="after")
    def _check(self) -> Rules:
        if self.budget.calls is not None or self.budget.calls_per_round is not None:
            raise ValueError("judge.budget has no effect with judge.kind: rules, which calls nobody; drop it")
        return self


class Python(JudgeBase):
    """Your function."""

    kind: Literal["python"] = "python"
    function: str = Field(pattern=r"^[^:]*\S:\S[^:]*$", description="`module:function`, sync or async.")
    scope: Literal["response", "group"] = Field(
        "response",
        description="Called with (prompt, response, metadata) and giving one score, or called with (prompt, responses, "
        "metadata) and giving one score per response.",
    )


class Plugin(JudgeBase):
    """A judge of another package, found by its entry point (group `online_po.judges`)."""

    kind: Literal["plugin"] = "plugin"
    name: str = Field(min_length=1, description="Name of the entry point.")
    options: dict[str, Any] = Field({}, description="Handed to it as keyword arguments.")


class RewardModel(JudgeBase):
    """A reward model: a sequence classifier with one output, or one that compares two responses."""

    NO_VERDICT: ClassVar[frozenset[str]] = JudgeBase.NO_VERDICT | {"batch_tokens"}

    kind: Literal["reward_model"] = "reward_model"
    batches: ClassVar[bool] = True
    path: LocalOrHub = Field(description="Folder or hub name of the reward model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What runs it; vllm: its pooling runner."
    )
    compares: bool = Field(
        False, description="It is given two responses and says which is better; false: it scores one response."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What its layers compute in (the head is float32). auto: bfloat16 on GPUs that have it."
    )
    max_length: int | None = Field(
        None,
        ge=16,
        description="Tokens of prompt and response together; more are cut off the prompt's left, and counted. null: "
        "the model's context.",
    )
    batch_tokens: int = Field(16384, ge=1, description="Tokens in one batch, padding included.")


class Implicit(JudgeBase):
    """A DPO model as its own reward model: beta x (logps of `path` - logps of `reference`) (Rafailov et al. 2023)."""

    NO_VERDICT: ClassVar[frozenset[str]] = JudgeBase.NO_VERDICT | {"batch_tokens"}

    kind: Literal["implicit"] = "implicit"
    batches: ClassVar[bool] = True
    path: LocalOrHub = Field(
        description="The trained checkpoint: folder with full weights or an adapter, or a hub name."
    )
    reference: LocalOrHub = Field(description="What it was trained against.")
    beta: float = Field(0.1, gt=0, description="The beta it was trained with: the unit of the scores.")
    average_logps: bool = Field(False, description="Per token instead of summed over the response.")
    batch_tokens: int = Field(16384, ge=1, description="Tokens in one batch, padding included.")

    @model_validator(mode="after")
    def _check(self) -> Implicit:
        if self.path == self.reference:
            raise ValueError(f"judge.path and judge.reference are both {self.path!r}: every score would be 0")
        return self
