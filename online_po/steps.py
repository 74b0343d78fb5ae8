"""One optimizer step: the gradient of the losses' mean over the step's examples, in passes that fit into memory.

Where the loss of an example depends on the others (`Objective.whole_batch`), two passes make a step: one without a
gradient gives every log-probability, from which follows the gradient of the step's loss in each of them; the second
goes backward from those. Otherwise the second pass alone does.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from online_po.batching import MISMATCHED, PAIR_SIDES, Examples
from online_po.errors import LearnerMemoryError, NonFiniteError, first_line, is_out_of_memory
from online_po.objective import METRICS, Objective
from online_po.optimizer import clip_gradients
from online_po.packing import MicroBatch, collate
from online_po.policy_model import lora_dropout
from online_po.scoring import Scoring, places, side_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What is fixed during a round's update."""

    tokens: Examples
    reference: dict[str, np.ndarray] | None
    """(N,) float32 logps by side, see `online_po.protocols.Learner.logps`."""
    start: dict[str, np.ndarray] | None
    betas: list[float | None]


@dataclass(kw_only=True, slots=True)
class _Step:
    """What is known of an optimizer step's batch before its gradients are."""

    rows: np.ndarray
    """(n,) rows of the step."""
    means: dict[str, float]
    kl: Tensor | None
    losses: Tensor | None = None
    """(n,) losses, where they depend on one another; then `gradients` (n,) of their mean in the policy's values."""
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Stepper:
    """Takes optimizer steps on the parameters `trained` of `model`; `scoring` calls the same model.

    Every rank makes the same calls with the same arguments, but for the dropout's seed, and decides the same: loss and
    gradient norm are sums over ranks.
    """

    def __init__(
        self,
        scoring: Scoring,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        skip_nonfinite: bool,
    ) -> None:
        self.scoring, self.objective, self.optimizer, self.model = scoring, objective, optimizer, model
        self.skip_nonfinite = skip_nonfinite

    def take(self, known: Known, rows: np.ndarray, dropout_seed: int, where: str) -> dict[str, float]:
        """One step on some rows; its metrics, see `online_po.learner.TorchLearner.update`. `where`: for the message of
        NonFiniteError."""
        began = time.perf_counter()
        tokens, scoring = known.tokens, self.scoring
        while (passed := self._pass(known, rows, dropout_seed, where)) is None:
            self.optimizer.zero_grad()
        step, sums = passed
        scoring.sum_over_ranks(sums)
        metrics = self.objective.metrics(sums[:-1])
        if step.kl is not None:
            metrics["kto_kl"] = step.kl.item()
        entropy, response_tokens = sums[-1].tolist()
        metrics["entropy"] = entropy / max(1.0, response_tokens)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        metrics["grad_norm"] = clip_gradients(trained, scoring.config.max_grad_norm)
        if all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
            self._apply(where)
            self.objective.means = step.means
        elif self.skip_nonfinite:
            # Nothing else of it: a round's means are over the steps that were made.
            metrics = {"skipped": 1.0}
        else:
            self.optimizer.zero_grad()
            raise NonFiniteError(_say_nonfinite(metrics, where))
        self.optimizer.zero_grad()
        metrics |= {**_counts(tokens, rows), "tokens": response_tokens}
        if scoring.micro_batch_tokens < scoring.config.micro_batch_tokens:
            metrics["micro_batch_tokens"] = float(scoring.micro_batch_tokens)
        return metrics | {"seconds": time.perf_counter() - began}

    def _apply(self, where: str) -> None:
        """The optimizer's step. Raises LearnerMemoryError: it may be half made then."""
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise LearnerMemoryError(
                f"{where}: the learner ran out of memory in the optimizer's step ({first_line(error)}), which holds "
                "two more numbers for each trained weight, whatever the micro-batches are; give it more memory, or "
                "start a new run with learner.lora or more learner.ranks. What was finished is kept"
            ) from error

    def _pass(self, known: Known, rows: np.ndarray, dropout_seed: int, where: str) -> tuple[_Step, Tensor] | None:
        """The step's gradients on this rank, and the sums of `_accumulate`. None where memory ran out: then
        micro-batches are smaller now, or activations recomputed, and nothing has changed but the gradients."""
        scoring, sides, training = self.scoring, known.tokens.sides, False
        try:
            step = self._prepare(known, rows, dropout_seed)
            training = True
            sums = torch.zeros(len(METRICS) + 1, 2, dtype=torch.float64, device=scoring.device)
            with lora_dropout(self.model, dropout_seed):
                shared = scoring.shares(known.tokens, rows, sides)
                for share in scoring.micro_batches(known.tokens, rows, sides)[scoring.rank]:
                    sums += self._accumulate(known, collate(known.tokens, share, sides, shared=shared), share, step)
                    scoring.tick()
            return step, sums
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fault = first_line(error)
        # Here, where the error is gone, and with it the activations that its traceback held.
        scoring.make_smaller(known.tokens, rows, where, fault, training)
        return None

    def _prepare(self, known: Known, rows: np.ndarray, dropout_seed: int) -> _Step:
        """What must be known of a whole step before its gradients: KTO's KL, running means, and, where the loss of an
        example depends on the others, the gradients of the step's loss in every log-probability."""
        objective, tokens = self.objective, known.tokens
        step = _Step(rows=rows, means=objective.means, kl=None)
        if objective.with_kl:
            assert known.reference is not None, "losses that read the KL have a reference"
            with_partner = rows[tokens.partners[rows] != rows]
            found = self.scoring.collect(tokens, with_partner, [MISMATCHED])
            reference = self.scoring.tensor(known.reference[MISMATCHED][with_partner])
            step.kl = objective.kl(found[MISMATCHED], reference)
        if objective.whole_batch:
            # The micro-batches of the second pass, and from the same seed: what dropout leaves out is the same.
            with lora_dropout(self.model, dropout_seed):
                found = self.scoring.collect(tokens, rows, tokens.sides, objective.with_weights)
            leaves = {_field(name): value.requires_grad_() for name, value in found.items()}
            values = leaves | self._fixed_values(known, rows)
            step.means = objective.moved_means(values)
            step.losses = objective(values, known.betas, step.means, step.kl)
            gradients = torch.autograd.grad(step.losses.sum() / len(rows), list(leaves.values()), allow_unused=True)
            step.gradients = {
                name: torch.zeros_like(leaf) if gradient is None else gradient
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
            }
        return step

    def _accumulate(self, known: Known, batch: MicroBatch, rows: np.ndarray, step: _Step) -> Tensor:
        """Forward and backward of the micro-batch of some rows; returns float64 (len(METRICS) + 1, 2) sums and counts:
        the objective's, then entropies over response tokens."""
        scoring, sides = self.scoring, known.tokens.sides
        scored = scoring.score(batch, True, self.objective.with_weights)
        if len(rows) == 0:
            scored.logps[0].sum().backward()
            return torch.zeros(len(METRICS) + 1, 2, dtype=torch.float64, device=scoring.device)
        policy = {_field(name): value for name, value in scoring.side_logps(batch, scored, sides).items()}
        fixed = self._fixed_values(known, rows)
        if self.objective.with_weights:
            weights = side_weights(batch, scored, sides)
            fixed |= {_field(name): value for name, value in weights.items()}
        values = policy | fixed
        if step.losses is None:
            losses = self.objective(values, known.betas, step.means, step.kl)
            (losses.sum() / len(step.rows)).backward()
        else:
            at = torch.from_numpy(places(step.rows, rows)).to(scoring.device)
            losses = step.losses[at]
            slopes = [(value * step.gradients[name][at]).sum() for name, value in policy.items()]
            torch.stack(slopes).sum().backward()
        start = {}
        if known.start is not None:
            start = {_field(side): scoring.tensor(known.start[side][rows]) for side in sides}
        entropies = torch.cat(scored.entropies).double()
        entropy = torch.stack([entropies.sum(), entropies.new_tensor(len(entropies))])
        return torch.cat([self.objective.sums(losses.detach(), values, start, known.betas), entropy[None]])

    def _fixed_values(self, known: Known, rows: np.ndarray) -> dict[str, Tensor]:
        """What losses read of some rows besides the policy's log-probabilities, by the fields of their inputs."""
        tokens, tensor = known.tokens, self.scoring.tensor
        found = {}
        for name, values in (known.reference or {}).items():
            if name != MISMATCHED:
                found[f"reference_{_field(name)}"] = tensor(values[rows])
        if self.objective.importance_cap is not None:
            for side in tokens.sides:
                found[f"sampler_{_field(side)}"] = tensor(tokens.values[f"{side}_sampler_logp"][rows])
        if not self.objective.paired:
            found["lengths"] = tensor(tokens.lengths("response")[rows])
            return found | {"desirable": tensor(tokens.values["label"][rows]).bool()}
        for side in tokens.sides:
            found[f"{side}_lengths"] = tensor(tokens.lengths(side)[rows])
            found[f"{side}_scores"] = tensor(tokens.values[f"{side}_score"][rows])
        if "preference_probabilities" in self.objective.names:
            found["preference_probabilities"] = tensor(tokens.values["preference_probability"][rows])
        return found


def _field(side: str) -> str:
    """The name that a side's summed logps (or its prefix's) have among a loss's inputs."""
    return "logps" if side == "response" else f"{side}_logps"


def _counts(tokens: Examples, rows: np.ndarray) -> dict[str, float]:
    """Examples of a step; of labels also how many there are of each kind."""
    if "label" not in tokens.values:
        return {"pairs": float(len(rows))}
    desirable = float(tokens.values["label"][rows].sum())
    return {"labels": float(len(rows)), "desirable": desirable, "undesirable": len(rows) - desirable}


def _say_nonfinite(metrics: dict[str, float], where: str) -> str:
    # kl_reference is there to tell the reference's log-probabilities from the policy's.
    values = {name: metrics[name] for name in ("loss", "grad_norm", "kl_reference", "kto_kl") if name in metrics}
    seen = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
    logps = ", ".join(f"{side} {metrics[key]:.4g}" for side in PAIR_SIDES if (key := f"{side}_logps") in metrics)
    return (
        f"{where}: {seen} (mean logps: {logps}); the step was not applied. Lower learner.learning_rate or "
        "learner.max_grad_norm, raise learner.warmup_ratio, or use learner.compute_dtype: float32"
    )
