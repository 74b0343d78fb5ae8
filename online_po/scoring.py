"""Response log-probabilities of a table of examples under the weights that the model has, by micro-batches and ranks.

Ranks come from torch.distributed if the process is part of a group, else there is one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from online_po.batching import PAIR_SIDES, Examples, MicroBatch, collate, rank_plans
from online_po.errors import LearnerMemoryError
from online_po.logps import LogpModel
from online_po.sections import LearnerConfig


class Scoring:
    """The model as a scorer of responses. Every rank makes the same calls with the same arguments.

    `with_prefix`: pairs are also scored up to the shorter response's length.
    `tick` is called after each micro-batch.
    """

    def __init__(
        self,
        model: LogpModel,
        config: LearnerConfig,
        device: torch.device,
        *,
        with_prefix: bool,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.config, self.device, self.with_prefix = model, config, device, with_prefix
        self.compute_dtype: torch.dtype = getattr(torch, config.compute_dtype)
        self.micro_batch_tokens, self.tick = config.micro_batch_tokens, tick
        """Less than configured once memory ran out; part of the learner's state."""
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1

    # -- one micro-batch on this rank --------------------------------------------------------------

    def micro_batches(self, tokens: Examples, rows: np.ndarray, sides: Sequence[str]) -> list[list[np.ndarray]]:
        """`rank_plans` of some rows, of which these sides go through the model."""
        return rank_plans(rows, tokens.widths(sides), self.ranks, self.micro_batch_tokens, len(sides))

    def make_smaller(self, tokens: Examples, rows: np.ndarray, where: str, fault: str) -> None:
        """After passes over some rows ran out of memory (`fault`): halves the largest micro-batch, from here on.

        Raises LearnerMemoryError if each holds one example already. Of several ranks too, with what all of them can
        begin again with: the others are in the midst of passes that this one cannot go through."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        widths = tokens.widths(tokens.sides)
        shares = [share for plan in self.micro_batches(tokens, rows, tokens.sides) for share in plan if len(share)]
        held = [len(tokens.sides) * len(share) * int(widths[share].max()) for share in shares]
        several = [size for size, share in zip(held, shares, strict=True) if len(share) > 1]
        if not several:
            raise LearnerMemoryError(
                f"{where}: the learner ran out of memory ({fault}) with one example of {max(held)} tokens in a "
                "micro-batch; go on with `online-po run CONFIG learner.gradient_checkpointing=true`, or start a new "
                "run with learner.lora, or less of generator.max_tokens or prompts.max_tokens"
            )
        smaller = max(several) // 2
        if self.ranks > 1:
            raise LearnerMemoryError(
                f"{where}: rank {self.rank} ran out of memory ({fault}) with micro-batches of up to {max(held)} tokens",
                smaller=smaller,
            )
        self.micro_batch_tokens = smaller

    def token_logps(
        self, batch: MicroBatch, with_entropy: bool = False, with_collision: bool = False
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """([k * m] (R,) logps of each response's tokens, (S,) entropies, (S,) log collisions), float32; the latter two
        are empty (0,) unless asked for."""
        arrays = (batch.input_ids, batch.positions, batch.targets)
        ids, positions, targets = (torch.from_numpy(array).to(self.device) for array in arrays)
        with self._autocast():
            token_logps, entropies, collisions = self.model(ids, positions, targets, with_entropy, with_collision)
        if batch.lengths.size == 0:  # a stand-in: what it says counts nowhere
            return [token_logps * 0.0], entropies[:0], collisions[:0]
        return list(token_logps.split(batch.lengths.flatten().tolist())), entropies, collisions

    def _autocast(self) -> AbstractContextManager[object]:
        # Several ranks: FSDP casts each layer's weights as it gathers them.
        if self.ranks > 1 or self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def side_logps(self, batch: MicroBatch, token_logps: list[Tensor], sides: Sequence[str]) -> dict[str, Tensor]:
        """{side: (m,)} summed logps, and {side_prefix: (m,)} of the tokens up to the shorter response's length."""
        m = batch.lengths.shape[1]
        found = {}
        for i, side in enumerate(sides):
            mine = token_logps[i * m : (i + 1) * m]
            found[side] = torch.stack([part.sum() for part in mine])
            if self.with_prefix and side in PAIR_SIDES:
                ends = batch.lengths.min(axis=0).tolist()
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
        for shares in zip(*self.micro_batches(tokens, rows, sides), strict=True):
            mine = shares[self.rank]
            before = sum(len(share) for share in shares[: self.rank])
            found = torch.zeros(len(names), sum(map(len, shares)), device=self.device)
            batch = collate(tokens, mine, sides)
            token_logps, _, collisions = self.token_logps(batch, with_collision=with_weights)
            if len(mine):
                scored = self.side_logps(batch, token_logps, sides)
                if with_weights:
                    scored |= side_weights(batch, token_logps, collisions, sides)
                found[:, before : before + len(mine)] = torch.stack([scored[name] for name in names])
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
def side_weights(
    batch: MicroBatch, token_logps: list[Tensor], collisions: Tensor, sides: Sequence[str]
) -> dict[str, Tensor]:
    """{side_weight: (m,)} mean over a response's tokens of log p - log sum_v p_v^2, as WPO weighs it."""
    m = batch.lengths.shape[1]
    parts = collisions.split(batch.lengths.flatten().tolist())
    means = [(logps - collision).mean() for logps, collision in zip(token_logps, parts, strict=True)]
    return {f"{side}_weight": torch.stack(means[i * m : (i + 1) * m]) for i, side in enumerate(sides)}
