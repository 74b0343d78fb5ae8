"""Sections `pairs` and `labels`: what a round trains on. Imports neither torch nor ray.

What they ask of other sections is in `online_po.example_checks`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from online_po.sections import LocalPath, Section

PairStrategy = Literal[
    "best_worst", "best_random", "random", "top_bottom_k", "all", "hardest", "hardest_reward", "spin"
]


class PairsConfig(Section):
    """How judged groups become preference pairs, and which others are mixed in. Ties and identical responses are
    never paired. Losses of single labelled responses take section `labels` instead; of this one they take `replay_*`,
    `balance_*` and `flip_rate`. See [docs/pairing.md](docs/pairing.md)."""

    strategy: PairStrategy = Field(
        "best_worst",
        description="best_worst: one pair. best_random: best against a random worse one. random: a random pair. "
        "top_bottom_k: the i-th best against the i-th worst, i < k. all: every pair. hardest: the smallest score gap. "
        "hardest_reward: the smallest gap of implicit rewards under the policy that sampled. spin: the text in "
        "`chosen_column` against an own response, no scores.",
    )
    k: int = Field(2, ge=1, description="For top_bottom_k.")
    max_per_prompt: int | None = Field(
        None,
        ge=1,
        description="For all and top_bottom_k: at most so many pairs of a prompt, largest margins first (null: all). "
        "For spin: so many own responses against the given one (null: one).",
    )
    min_margin: float = Field(0.0, ge=0, description="Score gap a pair must reach; a gap of 0 is a tie and never one.")
    max_length_ratio: float | None = Field(
        None,
        ge=1,
        description="The longer response has at most so many times the shorter one's tokens. null: no bound.",
    )
    chosen_column: str | None = Field(
        None, min_length=1, description="For spin: column of the prompt file with the response to be chosen, as text."
    )
    replay_share: float = Field(
        0.0, ge=0, lt=1, description="Share of a round's training pairs that earlier rounds made, drawn by seed."
    )
    replay_rounds: int | None = Field(
        None, ge=1, description="For replay_share: how many rounds back pairs are drawn from. null: all."
    )
    seed_path: LocalPath | None = Field(
        None,
        description="Preference file (.jsonl or .parquet) with prompt, chosen and rejected, each text or messages, "
        "and perhaps chosen_score and rejected_score.",
    )
    seed_share: float = Field(
        0.0, ge=0, lt=1, description="For seed_path: share of a round's training pairs that come from that file."
    )
    balance_column: str | None = Field(
        None, min_length=1, description="Column of the prompt file (a domain, say) over which a round is balanced."
    )
    balance_ratio: float = Field(
        1.0,
        ge=1,
        description="For balance_column: the largest domain keeps at most so many times the pairs of the smallest.",
    )
    flip_rate: float = Field(
        0.0, ge=0, lt=0.5, description="An experiment: share of fresh pairs that are turned around, by seed."
    )

    @model_validator(mode="after")
    def _check(self) -> PairsConfig:
        if self.max_per_prompt and self.strategy not in ("all", "top_bottom_k", "spin"):
            raise ValueError(
                f"pairs.max_per_prompt is for pairs.strategy: all, top_bottom_k and spin, not {self.strategy}"
            )
        if self.strategy == "spin" and self.chosen_column is None:
            raise ValueError("pairs.strategy is spin, so pairs.chosen_column must name the column with the responses")
        if self.strategy != "spin" and self.chosen_column is not None:
            raise ValueError(f"pairs.chosen_column is for pairs.strategy: spin, not {self.strategy}")
        for name in ("min_margin", "flip_rate"):
            if self.strategy == "spin" and getattr(self, name):
                raise ValueError(f"pairs.{name} has no effect with pairs.strategy: spin, which has no scores; drop it")
        if (self.seed_path is None) != (self.seed_share == 0):
            raise ValueError(
                f"pairs.seed_path is {self.seed_path!r} and pairs.seed_share is {self.seed_share:g}; give both "
                "pairs.seed_path and a pairs.seed_share above 0, or neither"
            )
        if self.replay_share + self.seed_share >= 1:
            raise ValueError(
                f"pairs.replay_share is {self.replay_share:g} and pairs.seed_share is {self.seed_share:g}: nothing is "
                "left for fresh pairs; their sum must be below 1"
            )
        for name, needs in (("replay_rounds", "replay_share"), ("balance_ratio", "balance_column")):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and not getattr(self, needs):
                raise ValueError(f"pairs.{name} is {value:g}, but has an effect only with pairs.{needs}; drop it")
        return self


class LabelsConfig(Section):
    """How judged responses become desirable or undesirable ones, for losses of single responses (kto, bco,
    apo_zero_unpaired)."""

    rule: Literal["threshold", "group_mean", "top_bottom"] = Field(
        "group_mean",
        description="threshold: desirable from `threshold` on, undesirable below. group_mean: above the mean of its "
        "prompt's responses, or below it. top_bottom: of the best `share` of them, or of the worst. What lies on the "
        "mean, or ties across the bound of a share, is left out.",
    )
    threshold: float | None = Field(None, description="For threshold: a score.")
    share: float = Field(
        0.25, gt=0, le=0.5, description="For top_bottom: share of a prompt's responses, rounded down, at least one."
    )

    @model_validator(mode="after")
    def _check(self) -> LabelsConfig:
        if self.rule == "threshold" and self.threshold is None:
            raise ValueError("labels.rule is threshold, so labels.threshold must be given")
        if self.rule != "threshold" and self.threshold is not None:
            raise ValueError(f"labels.threshold is for labels.rule: threshold, not {self.rule}")
        return self
