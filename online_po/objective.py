"""What a step of the learner minimises: the run's losses, fed with what they read, and the metrics beside them.

Knows log-probabilities only, neither the model nor how a batch was cut into passes and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from online_po.loss_configs import LossBase, reward_beta
from online_po.losses import LossInputs, UnpairedInputs, kto_kl, pair_losses, tensor_names, unpaired_losses

MEANS = frozenset(("log_ratio_mean", "margin_mean"))
"""Inputs of losses that are running means."""
MEAN_DECAY = 0.9
"""A running mean keeps so much of itself at each step and takes the rest from the step's batch."""

METRICS = (
    "loss",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logps",
    "rejected_logps",
    "kl_reference",
    "kl_start",
    "accuracy",
    "importance_weight",
)
"""Metrics of examples, in the order they are shown."""

LENGTHS = {"chosen_logps": "chosen_lengths", "rejected_logps": "rejected_lengths", "logps": "lengths"}
"""Of responses' log-probabilities, by name: what their tokens are called."""

Values = Mapping[str, Tensor]
"""Fields of `LossInputs` or `UnpairedInputs`, each (n,), for n examples. Under `importance_cap` also
sampler_chosen_logps and so on, NaN where nobody knows them, and lengths."""


class Objective:
    """The losses of a run over the examples of a step. Raises ConfigError if a custom loss does not fit.

    `importance_cap`: see `importance_weights`; None: every example counts the same."""

    def __init__(self, losses: Sequence[LossBase], importance_cap: float | None = None) -> None:
        self.losses, self.importance_cap = losses, importance_cap
        self.paired = losses[0].kind == "paired"
        self._sides = ("chosen_logps", "rejected_logps") if self.paired else ("logps",)
        self.names = tensor_names(losses)
        """Fields of the inputs that the losses read."""
        self.with_prefix = any("prefix_logps" in name for name in self.names)
        self.with_weights = any("weight_logps" in name for name in self.names)
        self.with_kl = "kl" in self.names
        self.whole_batch = any(loss.batchwise for loss in losses) or bool(self.names & MEANS)
        """Whether the loss of an example depends on the others of its optimizer step."""
        self.means: dict[str, float] = {}
        """Running means that losses read, by the input's name; part of the learner's state. They are of distances to
        one reference: with another one they begin anew."""

    def moved_means(self, values: Values) -> dict[str, float]:
        """`means` after a step's batch, given the policy's and the reference's log-probabilities of all of it.

        Exponential, with decay `MEAN_DECAY`; the first batch's mean is the first value.
        """
        moved: dict[str, float] = {}
        for name in sorted(self.names & MEANS):
            now = self._batch_mean(name, values)
            moved[name] = MEAN_DECAY * self.means.get(name, now) + (1 - MEAN_DECAY) * now
        return moved

    @torch.no_grad()
    def _batch_mean(self, name: str, values: Values) -> float:
        ratios = [_log_ratio(values, side) for side in self._sides]
        return float((ratios[0] - ratios[1] if name == "margin_mean" else torch.cat(ratios)).mean())

    def __call__(
        self, values: Values, betas: Sequence[float | None], means: Mapping[str, float], kl: Tensor | None
    ) -> Tensor:
        """(n,) losses of n examples. `betas`: one a loss (None: as configured); `kl`: () KTO's estimate."""
        some = next(iter(values.values()))
        kind = LossInputs if self.paired else UnpairedInputs
        needed = self.names | {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        given = {name: value for name, value in values.items() if name in needed}
        shared = {name: some.new_tensor(mean) for name, mean in means.items()}
        if self.paired:
            losses = pair_losses(self.losses, LossInputs(**given, **shared), betas)
        else:
            losses = unpaired_losses(self.losses, UnpairedInputs(**given, **shared, kl=kl), betas)
        return losses if self.importance_cap is None else losses * self.importance_weights(values)

    @torch.no_grad()
    def importance_weights(self, values: Values) -> Tensor:
        """(n,) truncated importance weights: min(cap, exp of the mean over an example's responses of
        log(pi / mu) / tokens), pi the policy and mu the one that sampled, by its own word.

        The ratio of a whole response, which spans orders of magnitude, is taken per token as in GSPO (Zheng et al.
        2025, arXiv 2507.18071, eq. 7), and truncated from above (Ionides 2008, "Truncated importance sampling").
        A response whose sampler is not known (a given one) counts as sampled by the policy, with a ratio of 1.
        """
        assert self.importance_cap is not None
        ratios = []
        for name in self._sides:
            sampler, tokens = values[f"sampler_{name}"], values[LENGTHS[name]]
            ratios.append(((values[name] - sampler) / tokens).masked_fill(sampler.isnan() | (tokens == 0), 0.0))
        return torch.stack(ratios).mean(0).exp().clamp(max=self.importance_cap)

    @staticmethod
    def kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
        """() KTO's estimate of KL(policy || reference) from (M,) mismatched responses; 0 where there are none."""
        return kto_kl(logps, reference_logps) if len(logps) else logps.new_zeros(())

    @torch.no_grad()
    def sums(self, losses: Tensor, values: Values, start: Values, betas: Sequence[float | None]) -> Tensor:
        """(len(METRICS), 2) float64: of each metric its sum over examples, and how many examples it counts.

        `start`: log-probabilities under the starting policy, by the names of the policy's; empty: not known. Of
        labelled responses the desirable ones count as chosen, the others as rejected.
        """
        n = len(losses)
        beta = reward_beta(self.losses, betas)
        counted: dict[str, tuple[Tensor, int | Tensor]] = {"loss": (losses.double().sum(), n)}
        names = self._sides
        ratios = [_log_ratio(values, name) for name in names]
        if self.paired:
            rewards = [beta * ratio for ratio in ratios]
            counted["margin"] = (rewards[0] - rewards[1]).sum(), n
            # A tie counts half: a policy that is still its reference tells nothing apart, and is at 1/2.
            counted["accuracy"] = ((rewards[0] - rewards[1]).sign() + 1).sum() / 2, n
            for side, name, reward in zip(("chosen", "rejected"), names, rewards, strict=True):
                counted[f"{side}_reward"] = reward.sum(), n
                counted[name] = values[name].double().sum(), n
        else:
            reward, desirable = beta * ratios[0], values["desirable"].bool()
            counted["accuracy"] = (reward > 0).eq(desirable).double().sum(), n
            for side, mask in (("chosen", desirable), ("rejected", ~desirable)):
                counted[f"{side}_reward"] = reward[mask].sum(), mask.sum()
                counted[f"{side}_logps"] = values["logps"][mask].double().sum(), mask.sum()
        if f"reference_{names[0]}" in values:
            counted["kl_reference"] = torch.stack(ratios).mean(0).sum(), n
        if start:
            drift = torch.stack([values[name].double() - start[name].double() for name in names])
            counted["kl_start"] = drift.mean(0).sum(), n
        if self.importance_cap is not None:
            counted["importance_weight"] = self.importance_weights(values).sum(), n
        table = torch.zeros(len(METRICS), 2, dtype=torch.float64, device=losses.device)
        for row, name in enumerate(METRICS):
            if name in counted:
                table[row, 0], table[row, 1] = counted[name]
        return table

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """The means of what `sums` gave, added up; metrics that count no example are left out."""
        found = {name: total / count for name, (total, count) in zip(METRICS, sums.tolist(), strict=True) if count > 0}
        if not self.paired and {"chosen_reward", "rejected_reward"} <= found.keys():
            found["margin"] = found["chosen_reward"] - found["rejected_reward"]
        return found


def _log_ratio(values: Values, name: str) -> Tensor:
    """(n,) float64 log(pi / reference), or log(pi) without a reference."""
    reference = values.get(f"reference_{name}")
    return values[name].double() - (0.0 if reference is None else reference.double())
