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
from dataclasses import dataclass
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
from online_po.batching import MicroBatch, PairTokens, collate, epoch_order, global_batches, rank_plans
from online_po.errors import ConfigError, OnlinePOError
from online_po.logps import LogpModel, require_known_head
from online_po.loss_configs import LossBase, reward_beta
from online_po.losses import LossInputs, pair_losses
from online_po.model_config import load_tokenizer
from online_po.optimizer import build_optimizer, clip_gradients, optimizer_tensors, read_optimizer, write_optimizer
from online_po.schedule import learning_rate, run_progress
from online_po.sections import LearnerConfig, ModelConfig
from online_po.seeds import stable_seed
from online_po.types import Policy

STATE_VERSION = 1
OPTIMIZER_FILE = "optimizer.safetensors"

# What is summed over pairs, in this order; entropies and the number of response tokens follow.
PAIR_SUMS = (
    "loss",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logps",
    "rejected_logps",
    "kl_reference",
    "kl_start",
    "accuracy",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundLogps:
    """Fixed logps of a round's pairs: {"chosen": (N,), "rejected": (N,)} float32, summed over response tokens."""

    reference: dict[str, np.ndarray] | None
    start: dict[str, np.ndarray] | None


class TorchLearner:
    """Implements `online_po.protocols.Learner` for one rank.

    Raises ConfigError where the model cannot be loaded or used, or `learner.ranks` is not the size of the
    process group. `rounds` is the length of the run, for the learning rate.
    """

    def __init__(
        self, model: ModelConfig, learner: LearnerConfig, losses: Sequence[LossBase], *, seed: int, rounds: int
    ) -> None:
        self.model_config, self.config, self.losses = model, learner, losses
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

    def _score(self, batch: MicroBatch, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """((2m,) summed response logps, (S,) token logps, (S,) entropies or (0,)), float32."""
        arrays = (batch.input_ids, batch.positions, batch.targets)
        ids, positions, targets = (torch.from_numpy(array).to(self.device) for array in arrays)
        with self._autocast():
            token_logps, entropies = self.scorer(ids, positions, targets, with_entropy)
        sums = [part.sum() for part in token_logps.split(batch.lengths)] if batch.lengths else []
        return torch.stack(sums) if sums else token_logps.new_zeros(0), token_logps, entropies

    def logps(self, pairs: pa.Table, policy: Policy) -> Iterator[dict[str, np.ndarray]]:
        """See `online_po.protocols.Learner.logps`. Batches come longest pairs first, the same on every rank."""
        tokens = PairTokens(pairs)
        plans = rank_plans(np.arange(len(tokens)), tokens.widths, self.ranks, self.config.micro_batch_tokens)
        with self._holding(policy):
            for shares in zip(*plans, strict=True):
                rows = np.concatenate(shares)
                mine = shares[self.rank]
                before = sum(len(share) for share in shares[: self.rank])
                with torch.no_grad():
                    sums, _, _ = self._score(collate(tokens, mine), with_entropy=False)
                    found = torch.zeros(2, len(rows), device=self.device)
                    found[:, before : before + len(mine)] = sums.view(2, -1)
                    self._sum_over_ranks(found)
                chosen, rejected = found.cpu().numpy()
                yield {"row": rows, "chosen": chosen, "rejected": rejected}

    @torch.no_grad()
    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """(T,) token ids -> (T - 1,) logps in nats of token_ids[1:] under the current weights."""
        ids = np.asarray(token_ids, dtype=np.int64)
        batch = MicroBatch(
            input_ids=ids[None], positions=np.arange(len(ids) - 1), targets=ids[1:], lengths=[len(ids) - 1]
        )
        _, token_logps, _ = self._score(batch, with_entropy=False)
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
        pairs: pa.Table,
        reference_logps: dict[str, np.ndarray] | None,
        start_logps: dict[str, np.ndarray] | None,
    ) -> Iterator[dict[str, float]]:
        """See `online_po.protocols.Learner.update`. Metrics of a step, over all ranks, padding never counted:

        loss; accuracy: share of pairs whose chosen response has the higher implicit reward; margin, chosen_reward,
        rejected_reward: implicit rewards beta * log(pi / reference), or beta * log(pi) without a reference (beta: the
        first loss's that has one, else 1); chosen_logps, rejected_logps: summed over tokens; all means over pairs.
        kl_reference, kl_start, where those logps are given: mean over both responses of every pair of the summed
        log(pi / other), nats a response. That is the k1 estimator of KL(pi, other) only where responses are samples
        of pi itself. Logps here are at temperature 1, while responses are drawn at generator.temperature and
        generator.top_p, from a policy that may be some steps old, and a pair keeps two of a group: where any of
        these matters, the figure is biased as an estimate of KL and may be negative; read it as drift on the pairs.
        entropy: mean over response tokens, nats. grad_norm: before clipping. learning_rate. pairs, tokens: pairs
        and response tokens of the step. seconds.

        Raises OnlinePOError, with the step not applied, where loss or gradients are not finite.
        """
        tokens = PairTokens(pairs)
        known = RoundLogps(reference=reference_logps, start=start_logps)
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

    def _step(self, tokens: PairTokens, rows: np.ndarray, known: RoundLogps, where: str) -> dict[str, float]:
        began = time.perf_counter()
        plan = rank_plans(rows, tokens.widths, self.ranks, self.config.micro_batch_tokens)[self.rank]
        sums = torch.zeros(len(PAIR_SUMS) + 2, dtype=torch.float64, device=self.device)
        for share in plan:
            sums += self._accumulate(tokens, share, known, pairs_in_step=len(rows))
        self._sum_over_ranks(sums)
        *pair_sums, entropy, response_tokens = sums.tolist()
        metrics = {name: value / len(rows) for name, value in zip(PAIR_SUMS, pair_sums, strict=True)}
        for name, logps in (("kl_reference", known.reference), ("kl_start", known.start)):
            if logps is None:
                del metrics[name]
        metrics["entropy"] = entropy / max(1.0, response_tokens)
        metrics["grad_norm"] = clip_gradients(list(self._trained().values()), self.config.max_grad_norm)
        self._require_finite(metrics, where)
        self.optimizer.step()
        self.optimizer.zero_grad()
        counts = {"pairs": float(len(rows)), "tokens": response_tokens}
        return metrics | counts | {"seconds": time.perf_counter() - began}

    def _accumulate(self, tokens: PairTokens, rows: np.ndarray, known: RoundLogps, pairs_in_step: int) -> Tensor:
        """Forward and backward of one micro-batch; returns float64 sums: PAIR_SUMS, entropies, response tokens."""
        batch = collate(tokens, rows)
        sums, token_logps, entropies = self._score(batch, with_entropy=True)
        if len(rows) == 0:
            (token_logps.sum() * 0.0).backward()
            return torch.zeros(len(PAIR_SUMS) + 2, dtype=torch.float64, device=self.device)
        chosen, rejected = sums.view(2, -1)  # (m,) each
        reference = None if known.reference is None else self._known(known.reference, rows)
        lengths = torch.tensor(batch.lengths, dtype=torch.float32, device=self.device).view(2, -1)
        scores = self._known(tokens.scores, rows)
        inputs = LossInputs(
            chosen_logps=chosen,
            rejected_logps=rejected,
            reference_chosen_logps=None if reference is None else reference[0],
            reference_rejected_logps=None if reference is None else reference[1],
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            chosen_scores=scores[0],
            rejected_scores=scores[1],
        )
        losses = pair_losses(self.losses, inputs)
        (losses.sum() / pairs_in_step).backward()
        with torch.no_grad():
            logps = torch.stack([chosen, rejected]).double()  # (2, m)
            start = torch.zeros_like(logps) if known.start is None else self._known(known.start, rows).double()
            anchor = torch.zeros_like(logps) if reference is None else reference.double()
            rewards = reward_beta(self.losses) * (logps - anchor)
            columns = {
                "loss": losses,
                "margin": rewards[0] - rewards[1],
                "chosen_reward": rewards[0],
                "rejected_reward": rewards[1],
                "chosen_logps": logps[0],
                "rejected_logps": logps[1],
                "kl_reference": (logps - anchor).mean(0),
                "kl_start": (logps - start).mean(0),
                "accuracy": rewards[0] > rewards[1],
            }
            totals = [columns[name].double().sum() for name in PAIR_SUMS]
            count = torch.tensor(float(len(batch.targets)), dtype=torch.float64, device=self.device)
            return torch.stack([*totals, entropies.double().sum(), count])

    def _known(self, values: dict[str, np.ndarray], rows: np.ndarray) -> Tensor:
        """(2, m) float32 of what is fixed for a pair, of chosen and rejected."""
        return torch.from_numpy(np.stack([values["chosen"][rows], values["rejected"][rows]])).float().to(self.device)

    def _require_finite(self, metrics: dict[str, float], where: str) -> None:
        bad = {name: metrics[name] for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])}
        if bad:
            self.optimizer.zero_grad()
            seen = ", ".join(f"{name} is {value}" for name, value in bad.items())
            raise OnlinePOError(
                f"{where}: {seen} (mean logps: chosen {metrics['chosen_logps']:.4g}, rejected "
                f"{metrics['rejected_logps']:.4g}); the step was not applied. Lower learner.learning_rate or "
                "learner.max_grad_norm, raise learner.warmup_ratio, or use learner.compute_dtype: float32"
            )

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
            state = {"format": STATE_VERSION, "version": round_, "torch": torch.__version__}
            (trainer_dir / "trainer.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        self._barrier()
        self.version = round_

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        """See `online_po.protocols.Learner.load`. Raises OnlinePOError if the two folders are not of one round."""
        state = json.loads((trainer_dir / "trainer.json").read_text(encoding="utf-8"))
        if state["format"] != STATE_VERSION or state["version"] != policy.version:
            raise OnlinePOError(
                f"{str(trainer_dir)!r} holds the trainer state of policy version {state['version']} (format "
                f"{state['format']}), not of {policy.version} (format {STATE_VERSION}); give the folders of one round"
            )
        self._take(policy)
        read_optimizer(trainer_dir / OPTIMIZER_FILE, self.optimizer, self._trained())
        self.version = policy.version

    def _barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()
