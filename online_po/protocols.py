"""What the loop asks of its parts. The round sees these protocols and nothing behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from online_po.errors import LearnerLostError
from online_po.types import Group, Judgement, Policy, Probe, Request, SharedWeights, SyncReport

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from online_po.sections import SamplingConfig
    from online_po.step_checkpoints import StepPlan


class Generator(Protocol):
    """Samples responses from the policy it holds."""

    def generate(
        self, chunks: Iterable[tuple[int, Sequence[Request]]], sampling: SamplingConfig
    ) -> Iterator[tuple[int, dict[int, Group]]]:
        """Yields (chunk index, {place among the chunk's requests: group}) as groups finish, each once.

        Groups may come in any order; what is in them depends on their chunk's requests and on the
        weights alone, never on the replica that made them or on what else was running.
        `chunks` is read lazily: only as far ahead as replicas need.
        """
        ...

    def sync(self, policy: Policy, probe: Probe, start: Probe | None = None) -> list[SyncReport]:
        """Loads the policy's weights into every replica, drops what was cached under the old ones,
        and proves the new ones (version tag and probe logps). Where `policy.shared` is given, its folder need not be
        there yet. `start`: the probe under the starting model, which a replica holds before its first sync: only
        where its logps are the new ones may such a replica go on saying the same. Raises SyncError on a mismatch."""
        ...


class JudgePool(Protocol):
    """Judges groups somewhere else while the caller goes on."""

    def submit(self, groups: Sequence[Group], round_: int = 0, occasion: str = "") -> Future[list[Judgement]]:
        """One judgement per group, in order. A judge's error is a JudgeFailure, never an exception; BudgetError where
        `judge.budget` is spent. `round_`: what the calls count for. `occasion`: what was said on another one is
        not remembered."""
        ...

    def shown(self, group: Group) -> str | None:
        """The exact text of one question on a group; None for judges that read no text of ours."""
        ...


class Learner(Protocol):
    """Trains the policy; one or more ranks behind it."""

    def logps(self, examples: pa.Table, policy: Policy) -> Iterator[dict[str, np.ndarray]]:
        """Response logps under a committed policy, without touching the weights being trained.

        `examples` is in `online_po.tables.PAIR_SCHEMA` or `LABEL_SCHEMA`. Yields batches until every row was there
        once: {"row": (m,) int64 rows of `examples`, side: (m,) float32, ...}, the logps summed over response tokens,
        in nats. Sides are chosen and rejected, or response; further ones are what the losses read:
        chosen_prefix and rejected_prefix (the first min(|chosen|, |rejected|) tokens), mismatched (another prompt's
        response). Where `policy` is what the learner holds (no step since), its own weights answer; else the folder's
        are loaded for the time of the call.
        """
        ...

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
        """Trains on all examples `learner.epochs` times; yields the metrics of each optimizer step.

        `reference_logps`: {side: (N,) float32} of all sides that `logps` gives; None where no loss needs them.
        `start_logps`: the same under the starting policy, for KL metrics; None leaves them out.
        `betas`: the round's beta of each loss (None: as configured); None: all as configured.
        `new_reference`: the reference is another one than in the last update: running means begin anew.
        `plan`: the complete state is written on the way, by `online_po.step_checkpoints.StepWriter`; the learner goes
        on from the state that is given there, which was written in an update of the same arguments, and yields the
        later steps' metrics only. None: neither.

        A step whose loss or gradient is not finite is never applied. With guards.nonfinite.action: warn it is left
        out, and its metrics are `skipped`: 1.0 and counts; else NonFiniteError is raised.
        """
        ...

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """(T,) token ids -> (T - 1,) logps in nats of token_ids[1:] under the current weights."""
        ...

    def share_policy(self) -> SharedWeights | None:
        """Its weights for generators that are not to wait for `save_policy`; they must stay as they are until
        `SharedWeights.let_go`. None where generators are to read the folder."""
        ...

    def save_policy(self, round_: int, folder: Path) -> dict[str, str]:
        """Writes the weights, loadable by transformers, PEFT and vLLM as they are. They are policy version `round_`
        from here on. Returns the SHA-256, in hex, of the files that it hashed as it wrote them, by name; the others are
        hashed from the disk."""
        ...

    def save_trainer(self, round_: int, folder: Path) -> dict[str, str]:
        """After `save_policy`: writes everything else that a later `load` needs to go on exactly (optimizer state,
        RNG). Returns hashes, as `save_policy`."""
        ...

    def blend(self, reference: Policy, alpha: float, folder: Path) -> None:
        """Writes alpha * own weights + (1 - alpha) * the reference's into `folder`, in the format of `save_policy`'s.
        The learner itself stays as it is."""
        ...

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        """Takes back what `save_policy` and `save_trainer` wrote; may be called at any time, also after an update that
        raised NonFiniteError.

        Version 0 is the start, which has no trainer folder: weights, adapters and optimizer are as they were when
        the learner was made."""
        ...

    def restart(self, lost: LearnerLostError) -> None:
        """Starts its processes again after a call raised this; the learner is then as it was when it was made, but for
        smaller micro-batches where it had too little memory. Raises EngineError where that happens too often."""
        ...


class Observer(Protocol):
    """Telemetry: told what happens, asked for nothing. The loop gives the same result without it.

    Phases may overlap, and come from two threads.
    """

    def phase(self, name: str, round_: int) -> AbstractContextManager[None]:
        """Around one phase: start, generate, judge, pair, reference, learn, save, commit, sync, evaluate."""
        ...

    def progress(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """How far a phase is, and what to know of it."""
        ...

    def step(self, round_: int, metrics: dict[str, float]) -> None:
        """One optimizer step."""
        ...

    def round(self, summary: dict[str, Any]) -> None:
        """One committed round, with its row of metrics.jsonl; `guards` there are what guards saw."""
        ...

    def evaluation(self, summary: dict[str, Any]) -> None:
        """One evaluated policy version (`online_po.evaluation.EvalSummary`); `guards` there are what guards saw."""
        ...

    def restart(self, who: str, why: str, seconds: float) -> None:
        """An actor died, and another one does its work now; `seconds`: from its death, as far as is known."""
        ...

    def message(self, text: str) -> None:
        """Something a person may want to know."""
        ...

    def close(self) -> None:
        """The run is over, for good or ill."""
        ...
