"""Judges that are asked in words: models behind an endpoint, and the policy itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

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
    repeats_id: bool = Field(
        True,
        description="Its answer repeats a number that is drawn for each question, so that an answer to another one "
        "is found out. false: for models too small to do so.",
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

    costs_money: ClassVar[bool] = True

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

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        """The value is not repeated: it may hold a password."""
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"judge.base_url is no URL ({error}); write it like http://localhost:8000/v1") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not value.isprintable():
            raise ValueError("judge.base_url is no http or https URL; write it like http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(
                "judge.base_url holds more than a host and a path; keys and passwords belong into the environment, see "
                "judge.api_key_env"
            )
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError("judge.base_url ends in /completions, which is added by itself; end it before, as in /v1")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _check_variable(cls, value: str | None) -> str | None:
        """The value is not repeated: it may be the key itself."""
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "judge.api_key_env must be the name of an environment variable, in capitals, such as OPENAI_API_KEY; "
                "it is another thing, perhaps the key itself, which belongs into the environment alone"
            )
        return value

    @model_validator(mode="after")
    def _check_endpoint(self) -> Endpoint:
        if (self.prompt_price is None) != (self.response_price is None):
            raise ValueError("judge.prompt_price and judge.response_price: give both, or neither")
        if self.budget.counts_money and not (self.prompt_price or self.response_price):
            raise ValueError(
                "judge.budget counts money, so judge.prompt_price and judge.response_price must be given (of a million "
                "tokens each), and not both be 0; or count calls instead"
            )
        answer = self.max_tokens * (self.response_price or 0.0) / 1e6
        for name in ("money", "money_per_round"):
            money = getattr(self.budget, name)
            if money is not None and money < answer:
                raise ValueError(
                    f"judge.budget.{name} is {money:g}, less than the {answer:g} that one answer of judge.max_tokens = "
                    f"{self.max_tokens} may cost, so nothing could be asked; raise it"
                )
        return self


class Scoring(Prompted):
    """Asked for a number."""

    scale_min: int = Field(1, description="The lowest score it may give.")
    scale_max: int = Field(10, description="The highest.")
    samples: int = Field(1, ge=1, description="It is asked so many times, and the mean counts.")

    def identity(self) -> dict[str, Any]:
        """Without what says how often it is asked: an answer stays the answer."""
        return {name: value for name, value in super().identity().items() if name != "samples"}

    @model_validator(mode="after")
    def _check_scoring(self) -> Scoring:
        if not 0 < self.scale_max - self.scale_min <= 1000:
            raise ValueError(
                f"judge.scale_max is {self.scale_max}, not 1 to 1000 above judge.scale_min = {self.scale_min}; choose "
                "a scale such as 1 to 10"
            )
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
    bradley_terry_scale: float | None = Field(
        1.0, gt=0, description="Scores are Bradley-Terry log-strengths, so 1: see the other judges."
    )

    def identity(self) -> dict[str, Any]:
        """Without what says which pairs are asked for: an answer stays the answer."""
        return {name: value for name, value in super().identity().items() if name not in ("rank", "orders")}

    @property
    def pairwise(self) -> bool:
        return True

    @property
    def both_orders(self) -> bool:
        return self.orders == "both"


class LlmScore(Endpoint, Scoring):
    """A model behind an OpenAI-compatible endpoint gives each response a score."""

    kind: Literal["llm_score"] = "llm_score"


class LlmPairwise(Endpoint, Comparing):
    """A model behind an OpenAI-compatible endpoint compares responses two by two."""

    kind: Literal["llm_pairwise"] = "llm_pairwise"
    soft: bool = Field(
        False,
        description="Preference is the probability of A against B by the logps of the answer's token, the mean of "
        "both orders where they agree; the endpoint must give them.",
    )


class Self(Prompted):
    """The run's own generator is asked, between the chunks that it samples."""

    batches: ClassVar[bool] = True

    policy: Literal["current", "start"] | Annotated[int, Field(ge=1)] = Field(
        "current",
        description="Which policy judges. current: the one that sampled the responses. start: the starting model. A "
        "number: that round's; rounds sampled by earlier ones are judged by those. Other weights than those that "
        "sample are loaded for each batch of questions, and the sampling ones put back, with proof.",
    )

    @field_validator("policy", mode="before")
    @classmethod
    def _check_policy(cls, value: Any) -> Any:
        if value in ("current", "start") or (isinstance(value, int) and value is not True and value >= 1):
            return value
        raise ValueError(f"judge.policy is {value!r}; write current, start, or a round's number, 1 or more")


class SelfScore(Self, Scoring):
    """The policy scores its own responses (Yuan et al. 2024, Self-Rewarding Language Models, 2401.10020)."""

    kind: Literal["self_score"] = "self_score"


class SelfPairwise(Self, Comparing):
    """The policy compares its own responses two by two."""

    kind: Literal["self_pairwise"] = "self_pairwise"
