"""Judges that run here: rules, the user's code, models that give a score."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from online_po.judge_configs.base import JudgeBase
from online_po.model_config import adapter_base, find_checkpoint, find_model, is_adapter
from online_po.model_content import content_hash
from online_po.sections import LocalOrHub

PLUGIN_GROUP = "online_po.judges"
"""Group of entry points that other packages offer judges in."""


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
    function: str = Field(description="`module:function`, sync or async.")
    scope: Literal["response", "group"] = Field(
        "response",
        description="Called with (prompt, response, metadata) and giving one score, or called with (prompt, responses, "
        "metadata) and giving one score per response.",
    )

    @field_validator("function")
    @classmethod
    def _check_function(cls, value: str) -> str:
        if not re.fullmatch(r"[^:]*\S:\S[^:]*", value):
            raise ValueError(f"judge.function is {value!r}; write it as module:function, such as my_judge:score")
        return value


class Plugin(JudgeBase):
    """A judge of another package, found by its entry point (group `online_po.judges`)."""

    kind: Literal["plugin"] = "plugin"
    by_ids: ClassVar[bool] = True
    name: str = Field(min_length=1, description="Name of the entry point.")
    options: dict[str, Any] = Field({}, description="Handed to it as keyword arguments.")

    def identity(self) -> dict[str, Any]:
        """With the name and version of the package: another version may say something else."""
        points = importlib.metadata.entry_points(group=PLUGIN_GROUP, name=self.name)
        packages = sorted({f"{point.dist.name} {point.dist.version}" for point in points if point.dist})
        return super().identity() | {"packages": packages}


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class RewardModel(JudgeBase):
    """A reward model: a sequence classifier with one output, or one that compares two responses."""

    NO_VERDICT: ClassVar[frozenset[str]] = JudgeBase.NO_VERDICT | {"batch_tokens", "path", "revision"}

    kind: Literal["reward_model"] = "reward_model"
    batches: ClassVar[bool] = True
    path: LocalOrHub = Field(description="Folder or hub name of the reward model.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What runs it; vllm: its pooling runner."
    )
    compares: bool = Field(
        False,
        description="It is given two responses, in both orders: a causal language model that answers A or B, or a "
        "classifier whose one output is the log-odds that the first is better. false: it scores one response.",
    )
    dtype: Dtype = Field(
        "auto",
        description="What its layers compute in (the head is float32). auto: bfloat16 on GPUs that have it, else "
        "float32.",
    )
    max_length: int | None = Field(
        None,
        ge=16,
        description="Tokens of prompt and response together; more are cut off the prompt's left, and counted. null: "
        "the model's context.",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in one batch, padding included; a longer text goes alone. null: 16,384 on a GPU; on a CPU, "
        "which gains nothing from batches, every text goes alone, and its score is the same bit for bit whatever else "
        "is judged.",
    )

    @property
    def pairwise(self) -> bool:
        return self.compares

    @property
    def holds_model(self) -> bool:
        return True

    def identity(self) -> dict[str, Any]:
        """The model by what its files say. Raises ConfigError where it cannot be had."""
        return super().identity() | {"model": content_hash(find_model(self.path, self.revision, "judge.path"))}

    @model_validator(mode="after")
    def _check(self) -> RewardModel:
        if self.revision is not None and os.path.isdir(self.path):
            raise ValueError(
                f"judge.revision is {self.revision!r}, but judge.path is a local folder, which has none; drop it"
            )
        return self


class Implicit(JudgeBase):
    """A DPO model as its own reward model: beta x (logps of `path` - logps of `reference`) (Rafailov et al. 2023)."""

    NO_VERDICT: ClassVar[frozenset[str]] = JudgeBase.NO_VERDICT | {"batch_tokens", "path", "reference"}

    kind: Literal["implicit"] = "implicit"
    by_ids: ClassVar[bool] = True
    batches: ClassVar[bool] = True
    path: LocalOrHub = Field(
        description="The trained checkpoint: folder with full weights or an adapter, or a hub name."
    )
    reference: LocalOrHub = Field(description="What it was trained against: the same kinds of folder.")
    beta: float = Field(0.1, gt=0, description="The beta it was trained with: the unit of the scores.")
    average_logps: bool = Field(False, description="Per token instead of summed over the response.")
    dtype: Dtype = Field(
        "auto",
        description="What both compute in (the head is float32). auto: bfloat16 on GPUs that have it, else float32.",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in one batch, padding included; a longer text goes alone. null: 16,384 on a GPU; on a CPU "
        "every text goes alone, and its score is the same bit for bit whatever else is judged.",
    )

    @property
    def holds_model(self) -> bool:
        return True

    def identity(self) -> dict[str, Any]:
        """Both models by what their files say. Raises ConfigError where they cannot be had."""
        checkpoint = find_checkpoint(self.path, "judge.path")
        reference = find_checkpoint(self.reference, "judge.reference")
        hashes = {"checkpoint": content_hash(checkpoint), "against": content_hash(reference)}
        if is_adapter(reference):
            hashes["base"] = content_hash(adapter_base(reference, "judge.reference"))
        return super().identity() | hashes

    @model_validator(mode="after")
    def _check(self) -> Implicit:
        if self.path == self.reference:
            raise ValueError(f"judge.path and judge.reference are both {self.path!r}: every score would be 0")
        return self
