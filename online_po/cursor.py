"""Which prompts come next: every prompt once an epoch, in a new seeded order each epoch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from online_po.errors import ConfigError
from online_po.sections import LoopConfig
from online_po.seeds import stable_seed


class PromptCursor:
    """A place in an endless, seeded walk over `size` prompts.

    Each epoch is one permutation (PCG64). Where a draw runs over an epoch's end, prompts that it already
    holds wait until the end of the new epoch, so that no prompt comes twice in one draw and each still
    comes exactly once an epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ConfigError(f"the prompt set has {size} prompts; a run needs at least one")
        self._size, self._seed = size, seed
        self._epoch, self._position = 0, 0
        self._deferred: list[int] = []
        self._order = self._make_order()

    @property
    def epoch(self) -> int:
        """Epochs finished before the next prompt."""
        return self._epoch + (self._position == self._size)

    def draw(self, k: int) -> list[int]:
        """The next k indices in [0, size), no two alike.

        Raises ConfigError where there are fewer than k prompts.
        """
        if k > self._size:
            raise ConfigError(
                f"loop.prompts_per_round is {k}, but there are only {self._size} prompts to train on; lower it or "
                "give more prompts"
            )
        drawn = self._take(k)
        if len(drawn) < k:
            self._epoch, self._position = self._epoch + 1, 0
            self._deferred = drawn
            self._order = self._make_order()
            drawn = drawn + self._take(k - len(drawn))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: a few numbers, and the prompts moved to this epoch's end."""
        return {
            "size": self._size,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "deferred": list(self._deferred),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken. Raises ConfigError if it belongs to other prompts."""
        for name, mine, remedy in (
            (
                "size",
                self._size,
                "the prompt file, prompts.limit, prompts.max_tokens or the held-out split changed",
            ),
            ("seed", self._seed, "run.seed changed"),
        ):
            if state[name] != mine:
                raise ConfigError(
                    f"the saved place in the prompts has {name} {state[name]}, but this run {mine}: {remedy} since; "
                    "restore what it was, or start a new run"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._deferred = [int(index) for index in state["deferred"]]
        self._order = self._make_order()

    def _take(self, k: int) -> list[int]:
        taken = self._order[self._position : self._position + k].tolist()
        self._position += len(taken)
        return taken

    def _make_order(self) -> np.ndarray:
        """(size,) int64: this epoch's order, the deferred prompts last."""
        # Sorting PCG64's raw stream: unlike `Generator.permutation`, numpy promises that it never changes.
        raw = np.random.PCG64(stable_seed(self._seed, "epoch", self._epoch)).random_raw(self._size)
        order = np.argsort(raw, kind="stable")
        if self._deferred:
            late = np.isin(order, self._deferred)
            order = np.concatenate([order[~late], order[late]])
        return order


def further_prompts(loop: LoopConfig, sampled: int, alike: int, available: int) -> int:
    """How many prompts to sample beside the `sampled` ones of a round, of which so many have responses that are all
    scored `alike`: as many as should give the missing groups, at the rate so far, within `loop.top_up` and what is
    `available`."""
    wanted, telling = loop.prompts_per_round, sampled - alike
    most = min(available, loop.most_prompts)
    if telling >= wanted or sampled >= most:
        return 0
    return min(most - sampled, math.ceil((wanted - telling) * sampled / max(1, telling)))
