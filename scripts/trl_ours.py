"""Loss and gradient norm of our side for compare_trl.py, and the models and batches that both sides get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from make_tiny_model import make_tiny_model
from online_po.learner import TorchLearner
from online_po.logps import LogpModel
from online_po.losses import LossInputs, UnpairedInputs, kto_kl, pair_losses, tensor_names, unpaired_losses
from online_po.sections import LearnerConfig, ModelConfig
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA
from online_po.types import Policy
from trl_cases import RAGGED, BatchName, Case, Pair, even_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Two models in one folder, and the batches."""

    policy: Path
    reference: Path
    batches: dict[BatchName, list[Pair]]


# -- models and batches ------------------------------------------------------------------------------------------------


def make_bench(folder: Path) -> Bench:
    """A tiny random Llama, changed a little as policy and otherwise and more as reference."""
    policy = _perturbed(folder / "policy", seed=1, size=0.02)
    reference = _perturbed(folder / "reference", seed=5, size=0.06)
    greedy = [(prompt, _greedy(policy, prompt, 6), _greedy(policy, prompt, 3)) for prompt, _, _ in RAGGED]
    return Bench(policy=policy, reference=reference, batches={"ragged": RAGGED, "even": even_batch(), "greedy": greedy})


def _perturbed(folder: Path, seed: int, size: float) -> Path:
    make_tiny_model(folder, seed=0)
    model = load(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def _greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    model, ids = load(folder), list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# -- losses ------------------------------------------------------------------------------------------------------------


def by_learner(case: Case) -> bool:
    """Whether the case is what the learner makes of its losses: no input set by hand, the paper's mismatch."""
    return not case.inputs and (case.kl_offset == 1 or "kl" not in tensor_names(case.ours))


def loss_and_grad_norm(case: Case, bench: Bench) -> tuple[float, float]:
    """(loss, L2 norm of its gradient over all parameters): the learner's, but where the case sets inputs by hand."""
    return (through_learner if by_learner(case) else through_functions)(case, bench.batches[case.batch], bench)


def through_learner(case: Case, pairs: Sequence[Pair], bench: Bench) -> tuple[float, float]:
    """(loss, gradient norm) of the learner's first step on the pairs, in several micro-batches."""
    table = _labels(pairs) if case.ours[0].kind == "unpaired" else _pairs(pairs)
    config = LearnerConfig.model_validate({"global_batch_size": table.num_rows, "micro_batch_tokens": 100})
    model = ModelConfig.model_validate({"path": str(bench.policy)})
    learner = TorchLearner(model, config, case.ours, seed=0, rounds=1)
    reference: dict[str, np.ndarray] | None = None
    if any(loss.needs_reference for loss in case.ours):
        reference = {}
        for part in learner.logps(table, Policy(version=1, path=bench.reference)):
            rows = part.pop("row")
            for side, values in part.items():
                reference.setdefault(side, np.full(table.num_rows, np.nan, dtype=np.float32))[rows] = values
    (metrics,) = learner.update(1, table, reference, None)
    return metrics["loss"], metrics["grad_norm"]


def _pairs(pairs: Sequence[Pair]) -> pa.Table:
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    scores = {"chosen_score": 1.0, "rejected_score": 0.0}
    return pa.Table.from_pylist([dict(zip(names, pair, strict=True)) | scores for pair in pairs], schema=PAIR_SCHEMA)


def _labels(pairs: Sequence[Pair]) -> pa.Table:
    """The chosen responses as desirable, then the rejected ones as undesirable."""
    rows = [
        {
            "prompt_id": str(i),
            "prompt_token_ids": prompt,
            "response_token_ids": chosen if desirable else rejected,
            "label": desirable,
        }
        for desirable in (True, False)
        for i, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def through_functions(case: Case, pairs: Sequence[Pair], bench: Bench) -> tuple[float, float]:
    """(loss, gradient norm) of the loss functions over logps of `LogpModel`."""
    policy, reference = load(bench.policy), load(bench.reference)
    losses = (_unpaired if case.ours[0].kind == "unpaired" else _paired)(case, pairs, policy, reference)
    losses.mean().backward()
    squares = [p.grad.double().square().sum() for p in policy.parameters() if p.grad is not None]
    return losses.mean().item(), torch.stack(squares).sum().sqrt().item()


def _paired(case: Case, pairs: Sequence[Pair], policy: PreTrainedModel, reference: PreTrainedModel) -> Tensor:
    tensors: dict[str, Tensor] = {name: torch.tensor(value) for name, value in case.inputs.items()}
    shorter = [min(len(chosen), len(rejected)) for _, chosen, rejected in pairs]
    for side, column in (("chosen", 1), ("rejected", 2)):
        rows = [(pair[0], pair[column]) for pair in pairs]
        tensors[f"{side}_lengths"] = torch.tensor([float(len(response)) for _, response in rows])
        for who, model in (("", policy), ("reference_", reference)):
            tokens = token_logps(model, rows, with_gradient=model is policy)
            tensors[f"{who}{side}_logps"] = torch.stack([t.sum() for t in tokens])
            prefixes = [t[:length].sum() for t, length in zip(tokens, shorter, strict=True)]
            tensors[f"{who}{side}_prefix_logps"] = torch.stack(prefixes)
        tensors[f"{side}_weight_logps"] = torch.stack([weight_logps(policy, *row) for row in rows])
    return pair_losses(case.ours, LossInputs(**tensors))


def _unpaired(case: Case, pairs: Sequence[Pair], policy: PreTrainedModel, reference: PreTrainedModel) -> Tensor:
    rows = [(p, chosen) for p, chosen, _ in pairs] + [(p, rejected) for p, _, rejected in pairs]
    others = [(prompt, rows[(i + case.kl_offset) % len(rows)][1]) for i, (prompt, _) in enumerate(rows)]

    def sums(model: PreTrainedModel, of: list[tuple[list[int], list[int]]]) -> Tensor:
        return torch.stack([t.sum() for t in token_logps(model, of, with_gradient=model is policy and of is rows)])

    inputs = UnpairedInputs(
        logps=sums(policy, rows),
        reference_logps=sums(reference, rows),
        desirable=torch.tensor([True] * len(pairs) + [False] * len(pairs)),
        kl=kto_kl(sums(policy, others), sums(reference, others)),
    )
    return unpaired_losses(case.ours, inputs)


def token_logps(
    model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]], *, with_gradient: bool
) -> list[Tensor]:
    """(|response|,) logps of every row's response, given its prompt."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        start = i * longest + len(prompt) - 1
        positions += range(start, start + len(response))
        targets += response
    with torch.set_grad_enabled(with_gradient):
        logps, _, _ = LogpModel(model)(ids, torch.tensor(positions), torch.tensor(targets))
    return list(logps.split([len(response) for _, response in rows]))


@torch.no_grad()
def weight_logps(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """() mean over response tokens of log p - log sum_v p_v^2: WPO's weight."""
    logps = torch.log_softmax(model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1], -1)
    chosen = logps.gather(1, torch.tensor(response)[:, None]).squeeze(1)
    return (chosen - torch.logsumexp(2 * logps, -1)).mean()
