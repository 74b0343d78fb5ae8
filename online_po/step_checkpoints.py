"""Step checkpoints: the learner's state inside a round, so that a round that was stopped goes on after its last one.

rounds/R/steps/NNNNNN/ is the state after optimizer step N of round R: the learner's own files, metrics.json (of steps 1
to N), and CHECKPOINT.json with the hashes of the others. Each appears whole or not at all, written by a thread while
the learner goes on. The newest `KEPT` stay while the round trains. rounds/R/steps/trained.json says that the round's
last step was made and its weights were saved. None of it stays once the round is committed. Without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from online_po import files
from online_po.errors import LedgerError

STEPS = "steps"
"""The folder in a round's."""
MANIFEST = "CHECKPOINT.json"
METRICS = "metrics.json"
TRAINED = "trained.json"
"""A `Trained`, and {path in the round's folder: hash} of the saved weights."""
KEPT = 2
"""One more than is gone on from: the newest may turn out damaged."""


@dataclass(frozen=True, kw_only=True)
class StepCheckpoint:
    """One that is whole."""

    step: int
    """Optimizer steps of the round that it was written after."""
    folder: Path
    metrics: list[dict[str, float]]
    """Of those steps, as `online_po.protocols.Learner.update` yielded them."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A round that is trained and saved, but not committed."""

    steps: list[dict[str, float]]
    """Metrics of all its steps."""
    token_logps: list[float]
    """What the learner said of the probe then."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What an update writes on its way, and what it goes on from."""

    folder: Path
    """The round's `STEPS`."""
    every: int | None
    """Steps from one checkpoint to the next; None writes none."""
    after: StepCheckpoint | None = None
    """Goes on after this one; None: from the round's first step."""
    trained: Trained | None = None
    """Where the round's weights are saved already, nothing is left to train."""

    def is_written(self, step: int) -> bool:
        """Whether the state after a step, or after a later one, is there, whole."""
        return any(int(path.name) >= step for path in _folders(self.folder))

    @property
    def done(self) -> int:
        """Steps that are not made again."""
        return 0 if self.after is None else self.after.step

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Metrics of the steps that are not made again."""
        if self.trained is not None:
            return self.trained.steps
        return [] if self.after is None else list(self.after.metrics)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the state after a step is written. After the last of `steps` the round's own weights follow."""
        return self.every is not None and step % self.every == 0 and step < steps


@dataclass
class StepWriter:
    """Writes an update's step checkpoints in a thread of its own, one at a time; the block's end waits for the last.

    Raises what writing raised (LedgerError where the disk is full) at the next call, or at the block's end.
    """

    plan: StepPlan
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="steps"))
    _writing: Future[None] | None = None

    def wait(self) -> None:
        """Until nothing is under way: only then may a caller copy the next state, or memory held two copies."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def write(self, step: int, metrics: Sequence[dict[str, float]], write: Callable[[Path], dict[str, str]]) -> None:
        """Starts to write the state after `step`. `write` puts it into a folder, and returns the hashes that it has, by
        file; it runs in the thread."""
        self.wait()
        self._writing = self._pool.submit(_write, self.plan.folder, step, list(metrics), write)

    def __enter__(self) -> StepWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()


def _write(folder: Path, step: int, metrics: list[dict[str, float]], write: Callable[[Path], dict[str, str]]) -> None:
    with files.atomic_folder(folder / f"{step:06d}") as path:
        hashes = write(path)
        files.write_json(path / METRICS, {"steps": metrics})
        files.write_json(path / MANIFEST, _record(path, step, hashes))
    for old in _folders(folder)[:-KEPT]:
        files.remove_folder(old)


def newest_whole(folder: Path) -> tuple[StepCheckpoint | None, dict[Path, str]]:
    """(The newest checkpoint in a round's `STEPS` whose files are as they were written, what is wrong with newer
    ones)."""
    damaged: dict[Path, str] = {}
    for path in reversed(_folders(folder)):
        step = int(path.name)
        try:
            if files.read_json(path / MANIFEST) == _record(path, step):
                return StepCheckpoint(step=step, folder=path, metrics=files.read_json(path / METRICS)["steps"]), damaged
            damaged[path] = f"its files are not those that {MANIFEST} lists"
        except (LedgerError, OSError) as error:
            damaged[path] = str(error)
    return None, damaged


def _folders(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdigit()), key=lambda path: int(path.name))


def _record(path: Path, step: int, known: Mapping[str, str] | None = None) -> dict[str, Any]:
    names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    return {"step": step, "files": files.hashes({name: path / name for name in names if name != MANIFEST}, known)}
