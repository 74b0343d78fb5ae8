"""The learner: one rank of it, with or without others. Pairs in, metrics and weights out; no Ray.

Ranks come from torch.distributed if the process is part of a group, else there is one. Every rank is given
the same calls with the same arguments; rank 0 reads and writes files.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from online_po import policy_model
from online_po.adapters import adapter_replaced, blend_adapters
from online_po.batching import (
    MISMATCHED,
    PAIR_SIDES,
    Examples,
    MicroBatch,
    collate,
    epoch_order,
    global_batches,
    rank_plans,
)
from online_po.errors import ConfigError, NonFiniteError, OnlinePOError
from online_po.logps import LogpModel, require_known_head
from online_po.loss_configs import LossBase
from online_po.model_config import load_tokenizer
from online_po.objective import METRICS, Objective
from online_po.optimizer import build_optimizer, clip_gradients, optimizer_tensors, read_optimizer, write_optimizer
from online_po.schedule import learning_rate, run_progress
from online_po.sections import LearnerConfig, ModelConfig
from online_po.seeds import stable_seed
from online_po.types import Policy

STATE_VERSION = 2
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """What is fixed during a round's update."""

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


class TorchLearner:
    """Implements `online_po.protocols.Learner` for one rank.

    Raises ConfigError where the model cannot be loaded or used, or `learner.ranks` is not the size of the
    process group. `rounds` is the length of the run, for the learning rate. `skip_nonfinite`: a step whose loss or
    gradients are not finite is left out; else it raises NonFiniteError. Either way it is never applied.
    """

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        losses: Sequence[LossBase],
        *,
        seed: int,
        rounds: int,
        skip_nonfinite: bool = False,
    ) -> None:
        self.model_config, self.config, self.losses = model, learner, losses
        self.objective = Objective(losses)
        self.skip_nonfinite = skip_nonfinite
        self.seed, self.rounds = seed, rounds
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self.ranks != learner.ranks:
            raise ConfigError(
                f"learner.ranks is {learner.ranks}, but this process is one of {self.ranks}; make them equal"
            )
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self.param_dtype: torch.dtype = getattr(torch, learner.param_dtype)
        self.compute_dtype: torch.dtype = getattr(torch, learner.compute_dtype)
        self.model, self.scorer = self._build()
        self.optimizer = build_optimizer(self._trained(), learner)
        self._first_adapters: dict[str, Tensor] = {}
        if learner.lora is not None:
            tensors = policy_model.policy_tensors(self.model).items()
            self._first_adapters = {name: policy_model.local(t).detach().to("cpu", copy=True) for name, t in tensors}
        self.version: int | None = 0
        """The policy version whose weights are held; None between an optimizer step and the next save."""
        if self.rank == 0:
            self.tokenizer = load_tokenizer(model.path, model.path, model.revision)

    # -- construction ------------------------------------------------------------------------------

    def _build(self) -> tuple[PreTrainedModel | PeftModel, LogpModel]:
        """(the model as it is saved, the module that is called)."""
        config = self.model_config
        causal_lm: PreTrainedModel
        if self.rank == 0:
            causal_lm = policy_model.load_causal_lm(config, self.param_dtype)
            # Here on the CPU: no GPU need ever hold the whole model of several ranks.
            require_known_head(causal_lm, config.path)
        else:
            causal_lm = policy_model.empty_causal_lm(config, self.param_dtype)
        layers = policy_model.decoder_layers(causal_lm)
        model: PreTrainedModel | PeftModel = causal_lm
        if self.config.lora is not None:
            model = policy_model.add_adapters(causal_lm, self.config.lora, config.path, self.seed)
        if self.config.gradient_checkpointing:
            if not layers:
                raise ConfigError(
                    f"learner.gradient_checkpointing is true, but {type(causal_lm).__name__} (model.path "
                    f"{config.path!r}) has no list of layers to recompute one by one; set it to false"
                )
            policy_model.checkpoint_activations(layers)
        scorer = LogpModel(causal_lm)
        if self.ranks == 1:
            return model.to(self.device), scorer.to(self.device)
        whole = None
        if self.rank == 0:
            whole = {name: t.detach() for name, t in [*scorer.named_parameters(), *scorer.named_buffers()]}
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        policy_model.shard(scorer, layers, mesh, self.compute_dtype, whole)
        return model, scorer

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # -- forward -----------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[object]:
        # Several ranks: FSDP casts each layer's weights as it gathers them.
        if self.ranks > 1 or self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def _score(
        self, batch: MicroBatch, with_entropy: bool = False, with_collision: bool = False
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """([k * m] (R,) logps of each response's tokens, (S,) entropies, (S,) log collisions), float32; the latter two
        are empty (0,) unless asked for."""
        arrays = (batch.input_ids, batch.positions, batch.targets)
        ids, positions, targets = (torch.from_numpy(array).to(self.device) for array in arrays)
        with self._autocast():
            token_logps, entropies, collisions = self.scorer(ids, positions, targets, with_entropy, with_collision)
        if batch.lengths.size == 0:  # a stand-in: what it says counts nowhere
            return [token_logps * 0.0], entropies[:0], collisions[:0]
        return list(token_logps.split(batch.lengths.flatten().tolist())), entropies, collisions

    def _side_logps(self, batch: MicroBatch, token_logps: list[Tensor], sides: Sequence[str]) -> dict[str, Tensor]:
        """{side: (m,)} summed logps, and {side_prefix: (m,)} of the tokens up to the shorter response's length."""
        m = batch.lengths.shape[1]
        found = {}
        for i, side in enumerate(sides):
            mine = token_logps[i * m : (i + 1) * m]
            found[side] = torch.stack([part.sum() for part in mine])
            if self.objective.with_prefix and side in PAIR_SIDES:
                ends = batch.lengths.min(axis=0).tolist()
                found[f"{side}_prefix"] = torch.stack([p[:end].sum() for p, end in zip(mine, ends, strict=True)])
        return found

    def logps(self, examples: pa.Table, policy: Policy) -> Iterator[dict[str, np.ndarray]]:
        """See `online_po.protocols.Learner.logps`. Batches come longest examples first, the same on every rank."""
        tokens = Examples(examples)
        sides = list(tokens.sides)
        if self.objective.with_kl and not self.objective.paired:
            sides.append(MISMATCHED)
        with self._holding(policy):
            yield from self._fixed_logps(tokens, np.arange(len(tokens)), sides)

    @torch.no_grad()
    def _fixed_logps(
        self, tokens: Examples, rows: np.ndarray, sides: Sequence[str], with_weights: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """{"row": (m,), side: (m,) float32, ...} of some rows under the weights that the model has, without a
        gradient, the same on every rank. `with_weights`: also {side_weight: (m,)} as WPO weighs responses."""
        names = [*sides, *(f"{side}_prefix" for side in sides if self.objective.with_prefix and side in PAIR_SIDES)]
        names += [f"{side}_weight" for side in sides if with_weights]
        limit = self.config.micro_batch_tokens
        plans = rank_plans(rows, tokens.widths(sides), self.ranks, limit, len(sides))
        for shares in zip(*plans, strict=True):
            mine = shares[self.rank]
            before = sum(len(share) for share in shares[: self.rank])
            found = torch.zeros(len(names), sum(map(len, shares)), device=self.device)
            batch = collate(tokens, mine, sides)
            token_logps, _, collisions = self._score(batch, with_collision=with_weights)
            if len(mine):
                scored = self._side_logps(batch, token_logps, sides)
                if with_weights:
                    scored |= _weights(batch, token_logps, collisions, sides)
                found[:, before : before + len(mine)] = torch.stack([scored[name] for name in names])
            self._sum_over_ranks(found)
            yield {"row": np.concatenate(shares)} | dict(zip(names, found.cpu().numpy(), strict=True))

    @torch.no_grad()
    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """(T,) token ids -> (T - 1,) logps in nats of token_ids[1:] under the current weights."""
        ids = np.asarray(token_ids, dtype=np.int64)
        batch = MicroBatch(
            input_ids=ids[None],
            positions=np.arange(len(ids) - 1),
            targets=ids[1:],
            lengths=np.array([[len(ids) - 1]]),
        )
        (token_logps,), _, _ = self._score(batch)
        self._reshard()
        return token_logps.tolist()

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self.ranks > 1:
            dist.all_reduce(tensor)

    def _reshard(self) -> None:
        """After forwards without a backward FSDP still holds the root's gathered weights, and would go on using
        them whatever is written to the shards."""
        if isinstance(self.scorer, FSDPModule):
            self.scorer.reshard()

    # -- training ----------------------------------------------------------------------------------

    def update(
        self,
        round_: int,
        examples: pa.Table,
        reference_logps: dict[str, np.ndarray] | None,
        start_logps: dict[str, np.ndarray] | None,
        betas: Sequence[float | None] | None = None,
    ) -> Iterator[dict[str, float]]:
        """See `online_po.protocols.Learner.update`. Metrics of a step, over all ranks, padding never counted:

        loss; accuracy: share of pairs whose chosen response has the higher implicit reward, ties half; margin,
        chosen_reward, rejected_reward: implicit rewards beta * log(pi / reference), or beta * log(pi) without a
        reference (beta: the first loss's that has one, else 1); chosen_logps, rejected_logps: summed over tokens; all
        means over pairs. Of labelled responses: the same over desirable (chosen) and undesirable (rejected) ones, and
        accuracy is the share whose reward is above zero exactly if desirable.
        kl_reference, kl_start, where those logps are given: mean over both responses of every pair of the summed
        log(pi / other), nats a response. That is the k1 estimator of KL(pi, other) only where responses are samples
        of pi itself. Logps here are at temperature 1, while responses are drawn at generator.temperature and
        generator.top_p, from a policy that may be some steps old, and a pair keeps two of a group: where any of
        these matters, the figure is biased as an estimate of KL and may be negative; read it as drift on the pairs.
        kto_kl: KTO's estimate, where a loss reads it. entropy: mean over response tokens, nats. grad_norm: before
        clipping. learning_rate. pairs or labels: examples of the step; tokens: their response tokens. seconds.

        Raises NonFiniteError, with the step not applied, where loss or gradients are not finite; with `skip_nonfinite`
        the step is left out instead, and its metrics say skipped: 1.
        """
        tokens = Examples(examples)
        known = _Known(
            reference=reference_logps,
            start=start_logps,
            betas=list(betas) if betas is not None else [None] * len(self.losses),
        )
        steps = self.config.epochs * math.ceil(len(tokens) / self.config.global_batch_size)
        step = 0
        self.version = None
        for epoch in range(self.config.epochs):
            order = epoch_order(len(tokens), self.seed, round_, epoch)
            for rows in global_batches(order, self.config.global_batch_size):
                rate = learning_rate(self.config, run_progress(round_, step, steps, self.rounds))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                where = f"round {round_}, step {step + 1} of {steps}"
                dropout_seed = stable_seed(self.seed, "dropout", round_, step, self.rank)
                with policy_model.lora_dropout(self.model, dropout_seed):
                    metrics = self._step(tokens, rows, known, where)
                yield metrics | {"learning_rate": rate}
                step += 1

    def _step(self, tokens: Examples, rows: np.ndarray, known: _Known, where: str) -> dict[str, float]:
        began = time.perf_counter()
        step = self._prepare(tokens, rows, known)
        sums = torch.zeros(len(METRICS) + 1, 2, dtype=torch.float64, device=self.device)
        widths = tokens.widths(tokens.sides)
        limit = self.config.micro_batch_tokens
        for share in rank_plans(rows, widths, self.ranks, limit, len(tokens.sides))[self.rank]:
            sums += self._accumulate(tokens, share, known, step)
        self._sum_over_ranks(sums)
        metrics = self.objective.metrics(sums[:-1])
        if step.kl is not None:
            metrics["kto_kl"] = step.kl.item()
        entropy, response_tokens = sums[-1].tolist()
        metrics["entropy"] = entropy / max(1.0, response_tokens)
        metrics["grad_norm"] = clip_gradients(list(self._trained().values()), self.config.max_grad_norm)
        counts = {"pairs" if self.objective.paired else "labels": float(len(rows)), "tokens": response_tokens}
        if all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
            self.optimizer.step()
            self.objective.means = step.means
        elif self.skip_nonfinite:
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"skipped": 1.0}
        else:
            self.optimizer.zero_grad()
            raise NonFiniteError(_say_nonfinite(metrics, where))
        self.optimizer.zero_grad()
        return metrics | counts | {"seconds": time.perf_counter() - began}

    def _prepare(self, tokens: Examples, rows: np.ndarray, known: _Known) -> _Step:
        """What must be known of a whole step before its gradients: KTO's KL, running means, and, where the loss of an
        example depends on the others, the gradients of the step's loss in every log-probability."""
        objective = self.objective
        step = _Step(rows=rows, means=objective.means, kl=None)
        if objective.with_kl:
            assert known.reference is not None, "losses that read the KL have a reference"
            with_partner = rows[tokens.partners[rows] != rows]
            found = self._collect(tokens, with_partner, [MISMATCHED])
            reference = self._tensor(known.reference[MISMATCHED][with_partner])
            step.kl = objective.kl(found[MISMATCHED], reference)
        if objective.whole_batch:
            found = self._collect(tokens, rows, tokens.sides, objective.with_weights)
            leaves = {_field(name): value.requires_grad_() for name, value in found.items()}
            values = leaves | self._fixed_values(tokens, rows, known)
            step.means = objective.moved_means(values)
            step.losses = objective(values, known.betas, step.means, step.kl)
            gradients = torch.autograd.grad(step.losses.sum() / len(rows), list(leaves.values()), allow_unused=True)
            step.gradients = {
                name: torch.zeros_like(leaf) if gradient is None else gradient
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
            }
        return step

    def _collect(
        self, tokens: Examples, rows: np.ndarray, sides: Sequence[str], with_weights: bool = False
    ) -> dict[str, Tensor]:
        """What `_fixed_logps` gives of `rows`, whole and in their order: {side: (n,)}."""
        batches = list(self._fixed_logps(tokens, rows, sides, with_weights))
        self._reshard()
        if not batches:
            return {side: self._tensor(np.empty(0)) for side in sides}
        whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        order = _places(whole.pop("row"), rows)
        return {name: self._tensor(values[order]) for name, values in whole.items()}

    def _accumulate(self, tokens: Examples, rows: np.ndarray, known: _Known, step: _Step) -> Tensor:
        """Forward and backward of one micro-batch; returns float64 (len(METRICS) + 1, 2) sums and counts: the
        objective's, then entropies over response tokens."""
        batch = collate(tokens, rows, tokens.sides)
        token_logps, entropies, collisions = self._score(batch, True, self.objective.with_weights)
        if len(rows) == 0:
            token_logps[0].sum().backward()
            return torch.zeros(len(METRICS) + 1, 2, dtype=torch.float64, device=self.device)
        policy = {_field(name): value for name, value in self._side_logps(batch, token_logps, tokens.sides).items()}
        fixed = self._fixed_values(tokens, rows, known)
        if self.objective.with_weights:
            weights = _weights(batch, token_logps, collisions, tokens.sides)
            fixed |= {_field(name): value for name, value in weights.items()}
        values = policy | fixed
        if step.losses is None:
            losses = self.objective(values, known.betas, step.means, step.kl)
            (losses.sum() / len(step.rows)).backward()
        else:
            places = torch.from_numpy(_places(step.rows, rows)).to(self.device)
            losses = step.losses[places]
            slopes = [(value * step.gradients[name][places]).sum() for name, value in policy.items()]
            torch.stack(slopes).sum().backward()
        start = {}
        if known.start is not None:
            start = {_field(side): self._tensor(known.start[side][rows]) for side in tokens.sides}
        entropy = torch.stack([entropies.double().sum(), entropies.new_tensor(len(entropies)).double()])
        return torch.cat([self.objective.sums(losses.detach(), values, start, known.betas), entropy[None]])

    def _fixed_values(self, tokens: Examples, rows: np.ndarray, known: _Known) -> dict[str, Tensor]:
        """What losses read of some rows besides the policy's log-probabilities, by the fields of their inputs."""
        found = {}
        for name, values in (known.reference or {}).items():
            if name != MISMATCHED:
                found[f"reference_{_field(name)}"] = self._tensor(values[rows])
        if not self.objective.paired:
            return found | {"desirable": torch.from_numpy(tokens.values["label"][rows].astype(bool)).to(self.device)}
        for side in tokens.sides:
            found[f"{side}_lengths"] = self._tensor(tokens.lengths(side)[rows])
            found[f"{side}_scores"] = self._tensor(tokens.values[f"{side}_score"][rows])
        if "preference_probabilities" in self.objective.names:
            found["preference_probabilities"] = self._tensor(tokens.values["preference_probability"][rows])
        return found

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(self.device)

    # -- weights -----------------------------------------------------------------------------------

    @contextmanager
    def _holding(self, policy: Policy) -> Iterator[None]:
        """Inside the block the model computes with the policy's weights; afterwards it is as before, bit for bit."""
        if policy.version == self.version and not policy.blended:
            yield
            self._reshard()
        elif isinstance(self.model, PeftModel):
            adapter = None
            if policy.version != 0:
                # FSDP computes with weights that it casts as it gathers them; so is this adapter's.
                dtype = self.compute_dtype if self.ranks > 1 else torch.float32
                adapter = policy_model.replicate(self._read(policy), self.device, dtype)
            try:
                with adapter_replaced(self.model, adapter):
                    yield
            finally:
                self._reshard()
        else:
            tensors = policy_model.policy_tensors(self.model)
            kept = {name: policy_model.local(tensor).detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            try:
                self._take(policy)
                yield
            finally:
                self._reshard()
                with torch.no_grad():
                    for name, tensor in tensors.items():
                        policy_model.local(tensor).copy_(kept[name])

    def _take(self, policy: Policy) -> None:
        """Writes a committed policy's weights into the model."""
        self._reshard()
        whole = self._read(policy)
        for name, tensor in policy_model.policy_tensors(self.model).items():
            policy_model.spread(whole[name] if whole is not None else None, tensor)

    def _read(self, policy: Policy) -> dict[str, Tensor] | None:
        """On rank 0 the tensors of a policy folder, whole, on the CPU; None elsewhere."""
        if self.rank != 0:
            return None
        path = Path(self.model_config.path) if policy.version == 0 else policy.path
        whole = policy_model.read_policy(path, self.model_config, self.param_dtype, policy.is_adapter)
        if odd := sorted(whole.keys() ^ policy_model.policy_tensors(self.model).keys()):
            raise OnlinePOError(
                f"the policy in {str(policy.path)!r} is not one of this run: it differs in {', '.join(odd[:3])}; give "
                "the run its own folder, made with the same learner.lora"
            )
        return whole

    def blend(self, reference: Policy, alpha: float, folder: Path) -> None:
        """See `online_po.protocols.Learner.blend`. Means of all weights are taken in float32, those of adapters as
        adapters of higher rank (`online_po.adapters`)."""
        own = {name: policy_model.gather(t) for name, t in policy_model.policy_tensors(self.model).items()}
        if self.rank == 0:
            if isinstance(self.model, PeftModel):
                other = None if reference.version == 0 else self._read(reference)
                policy_model.write_policy(folder, self.model, blend_adapters(self.model, own, other, alpha))
            else:
                whole = self._read(reference)
                assert whole is not None
                policy_model.blend_weights(own, whole, alpha)
                policy_model.write_policy(folder, self.model, whole)
                self.tokenizer.save_pretrained(folder)
        self._barrier()

    def save(self, round_: int, policy_dir: Path, trainer_dir: Path) -> None:
        """See `online_po.protocols.Learner.save`. The trainer folder does not depend on the number of ranks.

        trainer.json is written last, after everything else in either folder: where it is, all of them is.
        """
        whole = {name: policy_model.gather(t) for name, t in policy_model.policy_tensors(self.model).items()}
        if self.rank == 0:
            policy_model.write_policy(policy_dir, self.model, whole)
            if self.config.lora is None:
                self.tokenizer.save_pretrained(policy_dir)
        del whole  # before the moments, which are twice as large
        moments = optimizer_tensors(self.optimizer, self._trained())
        if self.rank == 0:
            trainer_dir.mkdir(parents=True, exist_ok=True)
            write_optimizer(trainer_dir / OPTIMIZER_FILE, moments)
            state = {
                "format": STATE_VERSION,
                "version": round_,
                "torch": torch.__version__,
                "means": self.objective.means,
            }
            (trainer_dir / "trainer.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        self._barrier()
        self.version = round_

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        """See `online_po.protocols.Learner.load`. Raises OnlinePOError if the two folders are not of one round."""
        if policy.version == 0:
            self._start_again(policy)
            return
        state = json.loads((trainer_dir / "trainer.json").read_text(encoding="utf-8"))
        if state["format"] != STATE_VERSION or state["version"] != policy.version:
            raise OnlinePOError(
                f"{str(trainer_dir)!r} holds the trainer state of policy version {state['version']} (format "
                f"{state['format']}), not of {policy.version} (format {STATE_VERSION}); give the folders of one round"
            )
        self._take(policy)
        read_optimizer(trainer_dir / OPTIMIZER_FILE, self.optimizer, self._trained())
        self.objective.means = state["means"]
        self.version = policy.version

    def _start_again(self, start: Policy) -> None:
        """As a new learner: adapters as they were first drawn, or the starting model's weights; no optimizer state."""
        self._reshard()
        if isinstance(self.model, PeftModel):
            with torch.no_grad():
                for name, tensor in policy_model.policy_tensors(self.model).items():
                    policy_model.local(tensor).copy_(self._first_adapters[name])
        else:
            self._take(start)
        self.optimizer.state.clear()
        self.objective.means = {}
        self.version = 0

    def _barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()


def _field(side: str) -> str:
    """The name that a side's summed logps (or its prefix's) have among a loss's inputs."""
    return "logps" if side == "response" else f"{side}_logps"


def _places(rows: np.ndarray, some: np.ndarray) -> np.ndarray:
    """(m,) places of `some` rows among `rows`, each there once."""
    order = np.argsort(rows)
    return order[np.searchsorted(rows, some, sorter=order)]


@torch.no_grad()
def _weights(
    batch: MicroBatch, token_logps: list[Tensor], collisions: Tensor, sides: Sequence[str]
) -> dict[str, Tensor]:
    """{side_weight: (m,)} mean over a response's tokens of log p - log sum_v p_v^2, as WPO weighs it."""
    m = batch.lengths.shape[1]
    parts = collisions.split(batch.lengths.flatten().tolist())
    means = [(logps - collision).mean() for logps, collision in zip(token_logps, parts, strict=True)]
    return {f"{side}_weight": torch.stack(means[i * m : (i + 1) * m]) for i, side in enumerate(sides)}


def _say_nonfinite(metrics: dict[str, float], where: str) -> str:
    seen = ", ".join(f"{name} is {metrics[name]}" for name in ("loss", "grad_norm") if not math.isfinite(metrics[name]))
    logps = ", ".join(f"{side} {metrics[key]:.4g}" for side in PAIR_SIDES if (key := f"{side}_logps") in metrics)
    return (
        f"{where}: {seen} (mean logps: {logps}); the step was not applied. Lower learner.learning_rate or "
        "learner.max_grad_norm, raise learner.warmup_ratio, or use learner.compute_dtype: float32"
    )
