"""The records that travel through the loop. Frozen, keyword-only, free of torch, ray and vllm."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
FailureKind = Literal[
    "timeout",  # no answer in time
    "transport",  # the endpoint could not be reached, or would not serve, after all attempts
    "refusal",  # it declined to judge
    "unparsable",  # an answer, but no verdict in it
    "bad_value",  # a verdict that is no number, or out of range
    "bad_length",  # another number of verdicts than of responses
    "too_long",  # a response that does not fit into the judge's context
    "abstained",  # judges that disagree too much
    "error",  # anything else
    "unanswered",  # the run stopped before the judge answered
]

Message = dict[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt as the policy reads it."""

    id: str
    """Stable hash of `messages` and `metadata`: the same prompt has the same id in every run."""
    messages: tuple[Message, ...]
    """Chat messages; a plain text prompt is one user message."""
    text: str
    """The exact text whose tokens are `token_ids` (chat template applied)."""
    token_ids: tuple[int, ...]
    """Prompt token ids, ending where the response begins."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further columns of the prompt file; the judge reads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One response exactly as sampled: never stripped, never re-tokenised."""

    index: int
    """Sample index inside its group, 0-based."""
    text: str
    """The sampled tokens as text, special tokens left out."""
    token_ids: tuple[int, ...]
    """Sampled token ids; ends with an end-of-sequence id if and only if the policy sampled one."""
    token_logps: tuple[float, ...]
    """Log-probability in nats of each sampled token under the policy at temperature 1, before any
    truncation of the distribution (top_p, top_k, min_p) or penalty; same length as `token_ids`."""
    finish_reason: FinishReason
    """"stop": the policy ended it (EOS or a stop string); "length": cut at `generator.max_tokens`."""
    policy_version: int
    """The round whose weights sampled it; 0 is the starting model."""
    seed: int
    """Seed of its sampling stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt and its n responses, in order of `Response.index`."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a generator is asked for: one response per seed, `Response.index` = position in `seeds`."""

    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeFailure:
    """Why a judge gave no label. A failure is never turned into a score."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two responses of a group against each other, both orders combined."""

    first: int
    second: int
    """`Response.index` of the two; first < second."""
    preference: float
    """Probability that the first is the better one; 0.5 is a tie."""
    consistent: bool | None
    """Whether both orders say the same; None where only one was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberScores:
    """What one judge of an ensemble gave."""

    name: str
    scores: tuple[float, ...]
    """One per response, in order of `Response.index`, on the member's own scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A judge's verdict on one group: exactly one of `scores` and `failure` is set."""

    prompt_id: str
    scores: tuple[float, ...] | None = None
    """One finite score per response, higher is better, in order of `Response.index`."""
    rationales: tuple[str, ...] | None = None
    """One short explanation per response, where the judge gives them."""
    failure: JudgeFailure | None = None
    comparisons: tuple[Comparison, ...] | None = None
    """What the scores were made of, where the judge compares responses two by two."""
    members: tuple[MemberScores, ...] | None = None
    """What the scores were made of, where the judge is an ensemble; also where its members disagree too much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenResponse:
    """A response that somebody wrote: no policy of the run sampled it, no judge scored it."""

    text: str
    token_ids: tuple[int, ...]
    """The text's tokens and what ends an assistant turn (`online_po.given.ResponseEncoder`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two responses to one prompt, the first better than the second."""

    prompt: Prompt
    chosen: Response | GivenResponse
    rejected: Response
    chosen_score: float | None
    """None where nobody scored the two against each other (`pairs.strategy: spin`); then both are."""
    rejected_score: float | None
    preference_probability: float | None = None
    """The judge's probability that chosen beats rejected; None without `judge.bradley_terry_scale`."""
    flipped: bool = False
    """Whether `pairs.flip_rate` made the worse response the chosen one; the scores stand as an erring judge's would."""

    @property
    def margin(self) -> float | None:
        """Score gap, in units of the judge's score; always above zero. None without scores."""
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One response, found desirable or not."""

    prompt: Prompt
    response: Response
    desirable: bool | None
    """None: judged, not labelled (yet)."""
    score: float
    flipped: bool = False
    """Whether `pairs.flip_rate` turned the label around; the score stays the judge's."""


@dataclass(slots=True)
class SharedWeights:
    """A policy's weights where engines reach them without a disk. One object in the driver, copies in actors."""

    handle: Any
    """What the learner and the generators make of it; None once it was let go."""

    def let_go(self) -> None:
        """The weights' round is committed, so their folder is there: their memory may be used again."""
        self.handle = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Weights as one round left them: in their folder, or handed over before that is written (`shared`)."""

    version: int
    """The round that produced it; 0 is the starting model."""
    path: Path
    """Hugging Face folder (full weights) or PEFT adapter folder; the starting model at version 0."""
    is_adapter: bool = False
    """True where `path` holds a LoRA adapter on top of the starting model."""
    blended: bool = False
    """True for a mean of policies (`reference.kind: ema`): made in round `version`, but not the policy of any round."""
    shared: SharedWeights | None = field(default=None, compare=False, repr=False)
    """The same weights in memory, while `path` is still being written; engines read these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Which weights are the reference: the policy of a round, or the mean that a round left."""

    round: int
    """The policy version; of a mean the round that made it. 0 is the starting model."""
    blended: bool = False
    """True for the mean of `reference.kind: ema`."""

    @property
    def folder(self) -> str:
        """The folder of the round that holds its weights."""
        return "reference" if self.blended else "policy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What the learner says of a fixed token sequence; a generator must say the same after a sync."""

    token_ids: tuple[int, ...]
    """(T,) token ids."""
    token_logps: tuple[float, ...]
    """(T - 1,) log-probabilities in nats of token_ids[1:], each given all tokens before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """A generator replica's proof of what it holds."""

    replica: int
    policy_version: int
    mean_logp_error: float
    """Mean absolute difference to the probe's token_logps, in nats."""
    unmoved: bool
    """Whether it says of the probe, bit for bit, what it said under the policy version it held before."""
    seconds: float
