"""What losses take: log-probabilities in nats, summed over response tokens unless the field says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What a loss of pairs may take, for B pairs: each tensor is (B,) float32 unless it says otherwise.

    None: not given; a loss that needs it refuses. Gradients flow through the policy's log-probabilities only.
    """

    chosen_logps: Tensor
    """Policy's log-probability of the chosen response."""
    rejected_logps: Tensor
    """Policy's log-probability of the rejected response."""
    reference_chosen_logps: Tensor | None = None
    """Reference's log-probability of the chosen response."""
    reference_rejected_logps: Tensor | None = None
    """Reference's log-probability of the rejected response."""
    chosen_lengths: Tensor | None = None
    """Tokens of the chosen response, at least 1."""
    rejected_lengths: Tensor | None = None
    """Tokens of the rejected response, at least 1."""
    chosen_scores: Tensor | None = None
    """Judge's score of the chosen response."""
    rejected_scores: Tensor | None = None
    """Judge's score of the rejected response."""
    preference_probabilities: Tensor | None = None
    """Judge's probability that chosen beats rejected."""
    chosen_prefix_logps: Tensor | None = None
    """Policy's log-probability of the chosen response's first min(|chosen|, |rejected|) tokens."""
    rejected_prefix_logps: Tensor | None = None
    """Policy's log-probability of the rejected response's first min(|chosen|, |rejected|) tokens."""
    reference_chosen_prefix_logps: Tensor | None = None
    """Reference's log-probability of the same tokens as `chosen_prefix_logps`."""
    reference_rejected_prefix_logps: Tensor | None = None
    """Reference's log-probability of the same tokens as `rejected_prefix_logps`."""
    chosen_weight_logps: Tensor | None = None
    """Mean over the chosen response's tokens of log p - log sum_v p_v^2 under the policy, without a gradient."""
    rejected_weight_logps: Tensor | None = None
    """The same of the rejected response."""
    log_ratio_mean: Tensor | None = None
    """() running mean of log pi - log ref over chosen and rejected responses; without beta, whose schedule it outlives.
    None: the mean over the responses handed in."""
    margin_mean: Tensor | None = None
    """() running mean of the log-ratio margins (chosen - rejected), without beta. None: the mean over the pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpairedInputs:
    """What a loss of single responses may take, for B responses: each tensor is (B,) unless it says otherwise."""

    logps: Tensor
    """Policy's log-probability of the response; float32."""
    reference_logps: Tensor
    """Reference's log-probability of the response; float32."""
    desirable: Tensor
    """bool: whether the response is labelled good."""
    kl: Tensor | None = None
    """() estimate of KL(policy || reference), at least 0 (`kto_kl`)."""
    log_ratio_mean: Tensor | None = None
    """() running mean of log pi - log ref over all responses, without beta. None: the mean over these."""
