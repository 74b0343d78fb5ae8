"""Response log-probabilities of a table of examples under the weights that the model has, by micro-batches and ranks.

Ranks come from torch.distributed if the process is part of a group, else there is one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from online_po import gpu
from online_po.batching import PAIR_SIDES, Examples
from online_po.errors import LearnerMemoryError
from online_po.gpu_attention import Shape
from online_po.logps import LogpModel
from online_po.packing import MicroBatch, batch_tokens, collate, rank_plans
from online_po.sections import LearnerConfig
from online_po.tree_attention import Trees


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What the model says of the responses of a micro-batch: of each side and example, side after side, (R,) float32
    for its R tokens. A response that several examples have is the same tensor in each."""

    logps: list[Tensor]
    entropies: list[Tensor]
    """Empty, unless they were asked for."""
    collisions: list[Tensor]
    """log sum_v p_v^2; empty, unless they were asked for."""


def score(
    model: LogpModel,
    batch: MicroBatch,
    device: torch.device,
    with_entropy: bool = False,
    with_collision: bool = False,
    *,
    shapes: set[Shape] | None = None,
) -> Scored:
    """One forward of a micro-batch, see `Scored`. A stand-in gives one tensor of logps, whose values are 0. `shapes`
    gets those that trees' attention is asked for in."""
    trees = None if batch.trees is None else Trees(batch.trees, device, shapes)
    arrays = (batch.input_ids, batch.positions, batch.targets)
    ids, positions, targets = (torch.from_numpy(array).to(device) for array in arrays)
    places = None if batch.position_ids is None else torch.from_numpy(batch.position_ids).to(device)
    asked_for = with_entropy, with_collision
    found = model(ids, positions, targets, *asked_for, position_ids=places, trees=trees)
    if batch.which.size == 0:
        return Scored(logps=[found[0] * 0.0], entropies=[], collisions=[])
    sizes, which = batch.lengths.tolist(), batch.which.flatten().tolist()
    parts = [values.split(sizes) if asked else () for values, asked in zip(found, (True, *asked_for), strict=True)]
    logps, entropies, collisions = ([one[i] for i in which] if one else [] for one in parts)
    return Scored(logps=logps, entropies=entropies, collisions=collisions)


class Scoring:
    """The model as a scorer of responses. Every rank makes the same calls with the same arguments.

    `with_prefix`: pairs are also scored up to the shorter response's length.
    `longest_shared`: examples share their prompts where none of those that are asked for together has a sequence of
    more tokens.
    `recompute`: makes the model recompute activations from here on, and returns True; False where it does, or must not.
    `tick` is called after each micro-batch.
    """

    def __init__(
        self,
        model: LogpModel,
        config: LearnerConfig,
        device: torch.device,
        *,
        with_prefix: bool,
        longest_shared: float = 0,
        recompute: Callable[[], bool] = lambda: False,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.config, self.device, self.with_prefix = model, config, device, with_prefix
        self.longest_shared, self.recompute = longest_shared, recompute
        self.compute_dtype: torch.dtype = getattr(torch, config.compute_dtype)
        self.micro_batch_tokens, self.tick = config.micro_batch_tokens, tick
        """Less than configured once memory ran out; part of the learner's state."""
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1

    # -- one micro-batch on this rank --------------------------------------------------------------

    def micro_batches(self, tokens: Examples, rows: np.ndarray, sides: Sequence[str]) -> list[list[np.ndarray]]:
        """`rank_plans` of some rows, of which these sides go through the model."""
        shared = self.shares(tokens, rows, sides)
        return rank_plans(tokens, rows, sides, self.ranks, self.micro_batch_tokens, shared=shared)

    def shares(self, tokens: Examples, rows: np.ndarray, sides: Sequence[str]) -> bool:
        """Whether the prompts of some rows are shared."""
        return bool((tokens.widths(sides)[rows] <= self.longest_shared).all())

    def make_smaller(self, tokens: Examples, rows: np.ndarray, where: str, fault: str, training: bool = False) -> None:
        """After passes over some rows ran out of memory (`fault`): halves the largest micro-batch, from here on; where
        each holds one example already, and it is `training`, activations are recomputed.

        Raises LearnerMemoryError if neither helps. Of several ranks too, with what all of them can begin again with:
        the others are in the midst of passes that this one cannot go through."""
        gc.collect()
        gpu.let_go(self.device)
        shared = self.shares(tokens, rows, tokens.sides)
        shares = [share for plan in self.micro_batches(tokens, rows, tokens.sides) for share in plan if len(share)]
        held = [batch_tokens(tokens, share, tokens.sides, shared=shared) for share in shares]
        several = [size for size, share in zip(held, shares, strict=True) if len(share) > 1]
        if not several:
            alone = f"{where}: the learner ran out of memory ({fault}) with one example of {max(held)} tokens in a "
            if training and self.recompute():
                if self.ranks == 1:
                    return
                raise LearnerMemoryError(f"{alone}micro-batch", recompute=True)
            remedy = "start a new run with learner.lora, or less of generator.max_tokens or prompts.max_tokens"
            if training and self.config.gradient_checkpointing is False:
                remedy = f"go on with `online-po run CONFIG learner.gradient_checkpointing=true`, or {remedy}"
            raise LearnerMemoryError(f"{alone}micro-batch; {remedy}")
        smaller = max(several) // 2
        if self.ranks > 1:
            raise LearnerMemoryError(
                f"{where}: rank {self.rank} ran out of memory ({fault}) with micro-batches of up to {max(held)} tokens",
                smaller=smaller,
            )
        self.micro_batch_tokens = smaller

    def score(self, batch: MicroBatch, with_entropy: bool = False, with_collision: bool = False) -> Scored:
        """One forward, see `score`."""
        with self._autocast():
            return score(self.model, batch, self.device, with_entropy, with_collision)

    def _autocast(self) -> AbstractContextManager[object]:
        # Several ranks: FSDP casts each layer's weights as it gathers them.
        if self.ranks > 1 or self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def side_logps(self, batch: MicroBatch, scored: Scored, sides: Sequence[str]) -> dict[str, Tensor]:
        """{side: (m,)} summed logps, and {side_prefix: (m,)} of the tokens up to the shorter response's length."""
        m = batch.which.shape[1]
        found = {}
        for i, side in enumerate(sides):
            mine = scored.logps[i * m : (i + 1) * m]
            found[side] = torch.stack([part.sum() for part in mine])
            if self.with_prefix and side in PAIR_SIDES:
                ends = batch.lengths[batch.which].min(axis=0).tolist()
                found[f"{side}_prefix"] = torch.stack([p[:end].sum() for p, end in zip(mine, ends, strict=True)])
        return found

    # -- rows of a table, over all ranks -----------------------------------------------------------

    @torch.no_grad()
    def batches(
        self, tokens: Examples, rows: np.ndarray, sides: Sequence[str], with_weights: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """{"row": (m,), side: (m,) float32, ...} of some rows, longest first, without a gradient, the same on every
        rank. `with_weights`: also {side_weight: (m,)}, see `side_weights`.

        After the last one the caller must `reshard`.
        """
        names = [*sides, *(f"{side}_prefix" for side in sides if self.with_prefix and side in PAIR_SIDES)]
        names += [f"{side}_weight" for side in sides if with_weights]
        shared = self.shares(tokens, rows, sides)
        for shares in zip(*self.micro_batches(tokens, rows, sides), strict=True):
            mine = shares[self.rank]
            before = sum(len(share) for share in shares[: self.rank])
            found = torch.zeros(len(names), sum(map(len, shares)), device=self.device)
            batch = collate(tokens, mine, sides, shared=shared)
            scored = self.score(batch, with_collision=with_weights)
            if len(mine):
                values = self.side_logps(batch, scored, sides)
                if with_weights:
                    values |= side_weights(batch, scored, sides)
                found[:, before : before + len(mine)] = torch.stack([values[name] for name in names])
            self.sum_over_ranks(found)
            self.tick()
            yield {"row": np.concatenate(shares)} | dict(zip(names, found.cpu().numpy(), strict=True))

    def collect(
        self, tokens: Examples, rows: np.ndarray, sides: Sequence[str], with_weights: bool = False
    ) -> dict[str, Tensor]:
        """What `batches` gives of `rows`, whole and in their order: {side: (n,)}."""
        batches = list(self.batches(tokens, rows, sides, with_weights))
        self.reshard()
        if not batches:
            return {side: self.tensor(np.empty(0)) for side in sides}
        whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        order = places(whole.pop("row"), rows)
        return {name: self.tensor(values[order]) for name, values in whole.items()}

    def sum_over_ranks(self, tensor: Tensor) -> None:
        """In place; afterwards every rank holds the same, bit for bit."""
        if self.ranks > 1:
            dist.all_reduce(tensor)

    def reshard(self) -> None:
        """After forwards without a backward FSDP still holds the root's gathered weights, and would go on using
        them whatever is written to the shards."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def tensor(self, values: np.ndarray) -> Tensor:
        """Numbers as float32 on the model's device."""
        return torch.from_numpy(values).float().to(self.device)


def places(rows: np.ndarray, some: np.ndarray) -> np.ndarray:
    """(m,) places of `some` rows among `rows`, each there once."""
    order = np.argsort(rows)
    return order[np.searchsorted(rows, some, sorter=order)]


@torch.no_grad()
def side_weights(batch: MicroBatch, scored: Scored, sides: Sequence[str]) -> dict[str, Tensor]:
    """{side_weight: (m,)} mean over a response's tokens of log p - log sum_v p_v^2, as WPO weighs it."""
    m = batch.which.shape[1]
    means = [(logps - other).mean() for logps, other in zip(scored.logps, scored.collisions, strict=True)]
    return {f"{side}_weight": torch.stack(means[i * m : (i + 1) * m]) for i, side in enumerate(sides)}
