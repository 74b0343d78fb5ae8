"""The learner: one rank of it, with or without others. Pairs in, metrics and weights out; no Ray.

Ranks come from torch.distributed if the process is part of a group, else there is one. Every rank is given
the same calls with the same arguments; rank 0 reads and writes files.

Here: the model, a round's update step after step, what is saved and taken back. `online_po.held_policy` moves the
weights, `online_po.scoring` puts examples through the model, `online_po.steps` makes one optimizer step of them,
`online_po.objective` knows the losses.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from online_po import files, gpu, policy_model
from online_po.batching import MISMATCHED, ORDER_VERSION, Examples, epoch_order, global_batches
from online_po.errors import ConfigError, OnlinePOError, first_line, is_out_of_memory
from online_po.fail_points import fail_point
from online_po.held_policy import HeldPolicy, Put
from online_po.logps import LogpModel, require_known_head
from online_po.loss_configs import LossBase
from online_po.objective import Objective
from online_po.optimizer import build_optimizer, optimizer_tensors, read_optimizer
from online_po.packing import MicroBatch
from online_po.prefix_sharing import Sharing, share_prompts, with_kernels
from online_po.schedule import learning_rate, run_progress
from online_po.scoring import Scoring
from online_po.sections import LearnerConfig, ModelConfig
from online_po.seeds import stable_seed
from online_po.step_checkpoints import StepPlan, StepWriter
from online_po.steps import Known, Stepper
from online_po.tensor_file import write_tensors
from online_po.tree_attention import ATTENTION
from online_po.types import Policy, SharedWeights

STATE_VERSION = 3
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
POLICY_FILE = "policy.safetensors"
"""Weights in a step checkpoint, as `policy_tensors` names them: no folder that anything else loads."""


class TorchLearner:
    """Implements `online_po.protocols.Learner` for one rank.

    Raises ConfigError where the model cannot be loaded or used, or `learner.ranks` is not the size of the
    process group. `rounds` is the length of the run, for the learning rate. `skip_nonfinite`: a step whose loss or
    gradients are not finite is left out; else it raises NonFiniteError. Either way it is never applied.
    `micro_batch_tokens`: less than configured, where that is known to be too much. `recompute`: whether activations
    are recomputed from the start, where the config leaves that open. `tick` is called whenever something
    came of its work: a micro-batch, a tensor that was gathered from ranks or spread over them.
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
        micro_batch_tokens: int | None = None,
        recompute: bool = False,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.model_config, self.config, self.losses = model, learner, losses
        self.objective = Objective(losses, learner.importance_cap)
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
        self.model, self.scorer, sharing = self._build()
        self.sharing = with_kernels(sharing, self.device, self.compute_dtype)
        self._most_tokens = min(learner.micro_batch_tokens, micro_batch_tokens or learner.micro_batch_tokens)
        self._tick = tick
        self._recomputes, self._recomputed_first = False, bool(learner.gradient_checkpointing or recompute)
        self._set_recomputing(self._recomputed_first)
        self._scoring = Scoring(
            self.scorer,
            learner,
            self.device,
            with_prefix=self.objective.with_prefix,
            longest_shared=self.sharing.longest,
            recompute=self._begin_recomputing,
            tick=tick,
        )
        self._scoring.micro_batch_tokens = self._most_tokens
        self.optimizer = build_optimizer(self._trained(), learner)
        self._stepper = Stepper(
            self._scoring, self.objective, self.optimizer, self.model, skip_nonfinite=skip_nonfinite
        )
        self.held = HeldPolicy(self.model, model, learner, self.device, self._scoring.reshard, tick)

    # -- construction ------------------------------------------------------------------------------

    def _build(self) -> tuple[PreTrainedModel | PeftModel, LogpModel, Sharing]:
        """(the model as it is saved, the module that is called, which examples share their prompts)."""
        config = self.model_config
        causal_lm: PreTrainedModel
        sharing = Sharing()
        if self.rank == 0:
            causal_lm = policy_model.load_causal_lm(config, self.param_dtype)
            # Here on the CPU: no GPU need ever hold the whole model of several ranks.
            require_known_head(causal_lm, config.path)
            if self.config.prefix_sharing:
                sharing = share_prompts(causal_lm)
        else:
            causal_lm = policy_model.empty_causal_lm(config, self.param_dtype)
        if self.ranks > 1:
            agreed = [sharing]
            dist.broadcast_object_list(agreed, 0)
            (sharing,) = agreed
            if self.rank != 0 and sharing.longest > 0:
                causal_lm.set_attn_implementation(ATTENTION)
        layers = policy_model.decoder_layers(causal_lm)
        model: PreTrainedModel | PeftModel = causal_lm
        if self.config.lora is not None:
            model = policy_model.add_adapters(causal_lm, self.config.lora, config.path, self.seed)
        if self.config.gradient_checkpointing and not layers:
            raise ConfigError(
                f"learner.gradient_checkpointing is true, but {type(causal_lm).__name__} (model.path "
                f"{config.path!r}) has no list of layers to recompute one by one; set it to false"
            )
        self._layers = layers
        scorer = LogpModel(causal_lm)
        if self.ranks == 1:
            return model.to(self.device), scorer.to(self.device), sharing
        whole = None
        if self.rank == 0:
            whole = {name: t.detach() for name, t in [*scorer.named_parameters(), *scorer.named_buffers()]}
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        policy_model.shard(scorer, layers, mesh, self.compute_dtype, whole)
        return model, scorer, sharing

    def _set_recomputing(self, on: bool) -> None:
        """Whether activations are recomputed in backward, or kept."""
        if on != self._recomputes:
            (policy_model.checkpoint_activations if on else policy_model.keep_activations)(self._layers)
            self._recomputes = on

    def _begin_recomputing(self) -> bool:
        """Where memory ran out with a single example, and it is left open. False where it does not help."""
        if self._recomputes or self.config.gradient_checkpointing is not None or not self._layers:
            return False
        self._set_recomputing(True)
        return True

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # -- log-probabilities -------------------------------------------------------------------------

    def logps(self, examples: pa.Table, policy: Policy) -> Iterator[dict[str, np.ndarray]]:
        """See `online_po.protocols.Learner.logps`. Batches come longest examples first, the same on every rank."""
        tokens = Examples(examples)
        sides = [*tokens.sides, *([MISMATCHED] if self.objective.with_kl else [])]
        left = np.ones(len(tokens), dtype=bool)
        with self.held.replaced_by(policy):
            while left.any():
                rows = np.flatnonzero(left)
                try:
                    for batch in self._scoring.batches(tokens, rows, sides):
                        left[batch["row"]] = False
                        yield batch
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    fault = first_line(error)
                self._scoring.make_smaller(tokens, rows, "log-probabilities", fault)
        gpu.let_go(self.device)

    @torch.no_grad()
    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """(T,) token ids -> (T - 1,) logps in nats of token_ids[1:] under the current weights."""
        ids = np.asarray(token_ids, dtype=np.int64)
        batch = MicroBatch(
            input_ids=ids[None],
            positions=np.arange(len(ids) - 1),
            targets=ids[1:],
            lengths=np.array([len(ids) - 1]),
            which=np.zeros((1, 1), dtype=np.int64),
        )
        (token_logps,) = self._scoring.score(batch).logps
        self._scoring.reshard()
        return token_logps.tolist()

    # -- training ----------------------------------------------------------------------------------

    def update(
        self,
        round_: int,
        examples: pa.Table,
        reference_logps: dict[str, np.ndarray] | None,
        start_logps: dict[str, np.ndarray] | None,
        betas: Sequence[float | None] | None = None,
        new_reference: bool = False,
        plan: StepPlan | None = None,
    ) -> Iterator[dict[str, float]]:
        """See `online_po.protocols.Learner.update`. Metrics of a step, over all ranks, padding never counted:

        loss; accuracy: share of pairs whose chosen response has the higher implicit reward, ties half; margin,
        chosen_reward, rejected_reward: implicit rewards beta * log(pi / reference), or beta * log(pi) without a
        reference (beta: see `online_po.loss_configs.reward_beta`); chosen_logps, rejected_logps: summed over tokens;
        all means over pairs. Of labelled responses: the same over desirable (chosen) and undesirable (rejected) ones,
        margin the difference of the rewards, and accuracy the share whose reward is above zero exactly if desirable.
        kl_reference, kl_start, where those logps are given: mean over both responses of every pair of the summed
        log(pi / other), nats a response. That is the k1 estimator of KL(pi, other) only where responses are samples
        of pi itself. Logps here are at temperature 1, while responses are drawn at generator.temperature and
        generator.top_p, from a policy that may be some steps old, and a pair keeps two of a group: where any of
        these matters, the figure is biased as an estimate of KL and may be negative; read it as drift on the pairs.
        kto_kl: KTO's estimate, where a loss reads it. entropy: mean over response tokens, nats. grad_norm: before
        clipping. learning_rate. pairs, or labels with desirable and undesirable: examples of the step; tokens: their
        response tokens. micro_batch_tokens: where it is less than configured, as memory ran out in this step or
        before (the step was then made again from its beginning: the same but for rounding, and for what LoRA's
        dropout leaves out). recomputes: 1 where activations are recomputed though it was not asked for, for the same
        reason. importance_weight: mean, under importance_cap. seconds.

        Raises NonFiniteError, with the step not applied, where loss or gradients are not finite; with `skip_nonfinite`
        the step is left out instead, and its metrics are skipped: 1, the counts, learning_rate and seconds.
        """
        tokens = Examples(examples)
        known = Known(
            tokens=tokens,
            reference=reference_logps,
            start=start_logps,
            betas=list(betas) if betas is not None else [None] * len(self.losses),
        )
        if new_reference:
            self.objective.means = {}
        steps = self.config.epochs * math.ceil(len(tokens) / self.config.global_batch_size)
        plan = plan or StepPlan(folder=Path(), every=None)
        self.held.version = None
        if plan.after is not None:
            self._load_step(plan.after.folder)
        made = plan.metrics
        with StepWriter(plan) as writer:
            for step, rows in islice(enumerate(self._batches(tokens, round_)), plan.done, None):
                rate = learning_rate(self.config, run_progress(round_, step, steps, self.rounds))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                where = f"round {round_}, step {step + 1} of {steps}"
                dropout_seed = stable_seed(self.seed, "dropout", round_, step, self.rank)
                metrics = self._stepper.take(known, rows, dropout_seed, where) | {"learning_rate": rate}
                if self._recomputes and not self.config.gradient_checkpointing:
                    metrics["recomputes"] = 1.0
                made.append(metrics)
                if plan.is_due(step + 1, steps):
                    self._save_step(step + 1, made, writer)
                yield metrics
        gpu.let_go(self.device)

    def _batches(self, tokens: Examples, round_: int) -> Iterator[np.ndarray]:
        """The rows of each optimizer step of a round."""
        together = self.config.examples_together
        for epoch in range(self.config.epochs):
            order = epoch_order(tokens.prompt_groups, together, self.seed, round_, epoch)
            yield from global_batches(order, self.config.global_batch_size)

    # -- what is saved, and taken back -------------------------------------------------------------

    def blend(self, reference: Policy, alpha: float, folder: Path) -> None:
        """See `online_po.protocols.Learner.blend`."""
        self.held.blend(reference, alpha, folder)
        self._barrier()

    def share_policy(self, put: Put | None = None) -> SharedWeights | None:
        """See `online_po.protocols.Learner.share_policy`; by itself a learner has nowhere to `put` tensors, which get
        the names of `policy_tensors`. All ranks must call it."""
        return None if put is None else self.held.share(put)

    def save_policy(self, round_: int, folder: Path) -> dict[str, str]:
        """See `online_po.protocols.Learner.save_policy`. Raises LedgerError where the disk is full."""
        hashes = self.held.save(folder)
        fail_point("learner.policy_saved")
        self._barrier()
        self.held.version = round_
        return hashes

    def save_trainer(self, round_: int, folder: Path) -> dict[str, str]:
        """See `online_po.protocols.Learner.save_trainer`. The folder does not depend on the number of ranks.

        trainer.json is written last: where it is, all of the folder is.
        """
        hashes: dict[str, str] = {}
        moments = optimizer_tensors(self.optimizer, self._trained(), tick=self._tick)
        if self.rank == 0:
            with files.explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
                hashes[OPTIMIZER_FILE] = write_tensors(folder / OPTIMIZER_FILE, moments, self._tick)
                (folder / STATE_FILE).write_text(self._state(version=round_), encoding="utf-8")
        self._barrier()
        return hashes

    def _save_step(self, step: int, metrics: list[dict[str, float]], writer: StepWriter) -> None:
        """Copies the state after a step, and leaves it to `writer` to write it. All ranks must call it."""
        if self.rank == 0:
            writer.wait()
        policy = self.held.gathered(copy=True)
        moments = optimizer_tensors(self.optimizer, self._trained(), copy=True, tick=self._tick)
        state = self._state(step=step, order=ORDER_VERSION)

        def write(folder: Path) -> dict[str, str]:
            given = {POLICY_FILE: policy, OPTIMIZER_FILE: moments}
            hashes = {name: write_tensors(folder / name, tensors) for name, tensors in given.items()}
            (folder / STATE_FILE).write_text(state, encoding="utf-8")
            return hashes

        if self.rank == 0:
            writer.write(step, metrics, write)

    def _load_step(self, folder: Path) -> None:
        """Takes back what `_save_step` wrote. All ranks must call it."""
        self.held.take(load_file(folder / POLICY_FILE) if self.rank == 0 else None)
        self._load_trainer(folder, step=int(folder.name), order=ORDER_VERSION)

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        """See `online_po.protocols.Learner.load`. Raises OnlinePOError if the two folders are not of one round."""
        if policy.version == 0:
            self._start_again(policy)
            return
        self._load_trainer(trainer_dir, version=policy.version)
        self.held.load(policy)

    def _state(self, **of: int) -> str:
        """What a learner is beside weights and moments, as JSON. Learning rates, orders and dropout are functions of
        the round and the step; no random state is carried on. `of`: the policy version it belongs to, or the step and
        the order it was made in."""
        state = {"format": STATE_VERSION, **of, "torch": torch.__version__, "means": self.objective.means}
        if self._scoring.micro_batch_tokens < self.config.micro_batch_tokens:
            state["micro_batch_tokens"] = self._scoring.micro_batch_tokens
        if self._recomputes and not self.config.gradient_checkpointing:
            state["recomputes"] = True
        return json.dumps(state, indent=1) + "\n"

    def _load_trainer(self, folder: Path, **of: int) -> None:
        """Takes back `_state` and the optimizer's. Raises OnlinePOError if they are not of this version, or step."""
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        wanted = {**of, "format": STATE_VERSION}
        if any(state.get(name) != value for name, value in wanted.items()):
            holds, needs = (", ".join(f"{name} {which.get(name)}" for name in wanted) for which in (state, wanted))
            remedy = "give the folders of one round, written by this version"
            if "step" in of:
                remedy = f"delete {str(folder.parent)!r} and resume, the round's update then begins anew"
            raise OnlinePOError(f"{str(folder)!r} holds the state of {holds}, not of {needs}; {remedy}")
        read_optimizer(folder / OPTIMIZER_FILE, self.optimizer, self._trained(), self._tick)
        self.objective.means = state["means"]
        # What was lowered stays so; the setting may be another one now.
        self._scoring.micro_batch_tokens = min(self._most_tokens, state.get("micro_batch_tokens", self._most_tokens))
        if self.config.gradient_checkpointing is None:
            self._set_recomputing(self._recomputed_first or state.get("recomputes", False))

    def _start_again(self, start: Policy) -> None:
        """As a new learner: adapters as they were first drawn, or the starting model's weights; no optimizer state."""
        self.held.load(start)
        self.optimizer.state.clear()
        self.objective.means = {}
        self._scoring.micro_batch_tokens = self._most_tokens
        self._set_recomputing(self._recomputed_first)

    def _barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()
