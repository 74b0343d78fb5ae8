"""Judges that are asked in words: models behind an endpoint, and the policy itself."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from online_po.judge_configs.base import JudgeBase
from online_po.sections import LocalPath


class Prompted(JudgeBase):
    """What is asked, and how answers are read."""

    rubric: LocalPath | None = Field(
        None, description="Text file with what makes a response good. null: helpful, correct, harmless, to the point."
    )
    constitution: LocalPath | None = Field(
        None,
        description="Text file, one principle a line; `principles` of them are drawn, by seed, for each comparison "
        "(Bai et al. 2022, Constitutional AI).",
    )
    principles: int = Field(1, ge=1, description="For constitution: principles drawn for each question.")
    rationale: bool = Field(False, description="It gives its reasons before its verdict; they are kept.")
    fence: bool = Field(
        True, description="Responses stand between random delimiters, and what they say is not taken as instruction."
    )
    temperature: float = Field(0.0, ge=0, le=2, description="Sampling temperature of the judge.")
    max_tokens: int = Field(512, ge=1, description="Tokens of one answer of the judge.")

    def settings(self) -> dict[str, Any]:
        return super().settings() | {name: getattr(self, name) is not None for name in ("rubric", "constitution")}

    def identity(self) -> dict[str, Any]:
        texts = {name: getattr(self, name) for name in ("rubric", "constitution")}
        return super().identity() | {
            name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for name, path in texts.items()
            if path is not None
        }

    @model_validator(mode="after")
    def _check_prompted(self) -> Prompted:
        if self.constitution is None and self.principles != 1:
            raise ValueError("judge.principles has an effect only with judge.constitution; drop it")
        return self


class Endpoint(Prompted):
    """An OpenAI-compatible endpoint."""

    NO_VERDICT: ClassVar[frozenset[str]] = JudgeBase.NO_VERDICT | {
        "base_url", "api_key_env", "requests_per_minute", "tokens_per_minute", "attempts", "prompt_price",
        "response_price",
    }  # fmt: skip

    model: str = Field(min_length=1, description="The model's name at the endpoint.")
    base_url: str | None = Field(None, description="For example http://localhost:8000/v1. null: OpenAI's own.")
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key. null: the endpoint wants none."
    )
    answers: Literal["auto", "json_schema", "text"] = Field(
        "auto", description="How it answers. auto: by JSON schema where the endpoint takes one, else as text."
    )
    concurrency: int = Field(32, ge=1, description="Calls in flight in one judge process.")
    requests_per_minute: int | None = Field(None, ge=1, description="The endpoint's limit, kept by all processes.")
    tokens_per_minute: int | None = Field(None, ge=1, description="The same in tokens, asked and answered.")
    attempts: int = Field(6, ge=1, description="Tries of one call; between them it waits longer and longer.")
    prompt_price: float | None = Field(None, ge=0, description="Price of a million prompt tokens.")
    response_price: float | None = Field(None, ge=0, description="Price of a million tokens of its answers.")

    @model_validator(mode="after")
    def _check_endpoint(self) -> Endpoint:
        if (self.prompt_price is None) != (self.response_price is None):
            raise ValueError("judge.prompt_price and judge.response_price: give both, or neither")
        if self.budget.counts_money and self.prompt_price is None:
            raise ValueError(
                "judge.budget counts money, so judge.prompt_price and judge.response_price must be given (a million "
                "tokens each)"
            )
        return self


class Scoring(Prompted):
    """Asked for a number."""

    scale_min: int = Field(1, description="The lowest score it may give.")
    scale_max: int = Field(10, description="The highest.")
    samples: int = Field(1, ge=1, description="It is asked so many times, and the mean counts.")

    @model_validator(mode="after")
    def _check_scoring(self) -> Scoring:
        if self.scale_max <= self.scale_min:
            raise ValueError(f"judge.scale_max is {self.scale_max}, not above judge.scale_min = {self.scale_min}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("judge.samples is above 1, but judge.temperature is 0: all answers would be the same")
        return self


class Comparing(Prompted):
    """Asked which of two responses is better."""

    rank: Literal["round_robin", "best_worst", "tournament"] = Field(
        "round_robin",
        description="Which pairs of n responses are compared. round_robin: all. best_worst: those that find best "
        "and worst. tournament: those that sort them (merge sort).",
    )
    orders: Literal["both", "one"] = Field(
        "both", description="both: each pair is shown in both orders, and disagreement is a tie. one: in a drawn order."
    )
    soft: bool = Field(
        False, description="Preference is the probability of the answer's token, where the endpoint gives logps."
    )
    bradley_terry_scale: float | None = Field(
        1.0, gt=0, description="Scores are Bradley-Terry log-strengths, so 1: see the other judges."
    )

    @property
    def pairwise(self) -> bool:
        return True

    @model_validator(mode="after")
    def _check_comparing(self) -> Comparing:
        if self.soft and self.rationale:
            raise ValueError("judge.soft reads the first token's logps, so judge.rationale cannot be true; drop one")
        return self


class LlmScore(Endpoint, Scoring):
    """A model behind an OpenAI-compatible endpoint gives each response a score."""

    kind: Literal["llm_score"] = "llm_score"


class LlmPairwise(Endpoint, Comparing):
    """A model behind an OpenAI-compatible endpoint compares responses two by two."""

    kind: Literal["llm_pairwise"] = "llm_pairwise"


class SelfScore(Scoring):
    """The policy scores its own responses (Yuan et al. 2024, Self-Rewarding Language Models, 2401.10020)."""

    kind: Literal["self_score"] = "self_score"
    policy: Literal["current", "start"] | int = Field(
        "current", description="Which policy judges: the one that sampled, the starting model, or an earlier round's."
    )


class SelfPairwise(Comparing):
    """The policy compares its own responses two by two."""

    kind: Literal["self_pairwise"] = "self_pairwise"
    policy: Literal["current", "start"] | int = Field(
        "current", description="Which policy judges: the one that sampled, the starting model, or an earlier round's."
    )
