"""Errors a user can meet. Every message names the field, the value, and what to do."""

from __future__ import annotations

from pathlib import Path


class OnlinePOError(Exception):
    """Base of all errors raised on purpose; the CLI prints it without a traceback.

    `exit_code` is what the command line returns: 2 for bad input, 3 for a run that stopped, 4 for one that pauses, 130
    for one that was asked to stop.
    """

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "status_alloc_failed",  # cuBLAS, cuDNN
    "kv cache",
    "running low on memory",  # Ray's monitor
)
"""What errors for want of memory say, in lower case."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that an accelerator's memory, the machine's, or an engine's KV cache is
    too small."""
    while error is not None:
        named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if named or any(words in str(error).lower() for words in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


class ConfigError(OnlinePOError, ValueError):
    """Something the user wrote cannot be used: config, prompt file, model, judge function."""

    exit_code = 2


class LedgerError(OnlinePOError):
    """The run folder is missing, in use, damaged, or belongs to another config."""


class DamagedError(LedgerError):
    """A file of the run folder is not as it was written."""

    def __init__(self, path: Path, what: str = "its hash is not the one it was written with") -> None:
        super().__init__(
            f"{str(path)!r} is damaged: {what}; restore it from a copy of the run folder, or let `online-po verify "
            "RUN` say from which round the run can go on"
        )
        self.path, self.what = path, what

    def __reduce__(self) -> tuple[type[DamagedError], tuple[Path, str]]:
        return DamagedError, (self.path, self.what)  # by its arguments, so that it passes between processes


class DiskError(LedgerError):
    """The disk is full, or cannot be written or read."""


class Interrupted(OnlinePOError):
    """The run was asked to stop, and did, between two pieces of work; what was finished is kept."""

    exit_code = 130


class NoPairsError(OnlinePOError):
    """A round produced not a single usable pair, or label."""


class JudgeFailureRateError(OnlinePOError):
    """More groups failed in the judge than `judge.max_failure_rate` allows."""


class BudgetError(OnlinePOError):
    """`judge.budget` is spent: the run pauses, and goes on with a higher one."""

    exit_code = 4


class SyncError(OnlinePOError):
    """A generator, or a learner that was started again, does not hold the weights it should hold."""


class EngineError(OnlinePOError):
    """An inference engine could not start, or died."""


class LearnerLostError(EngineError):
    """A rank of the learner died, hung, or had too little memory, and the group ended with it; it can be started again.

    memory: for want of memory: smaller micro-batches may help. smaller: how small to make them, where that is known;
    recompute: where they are as small as they can be, and activations may still be recomputed. With either of them it
    was no death.
    """

    def __init__(
        self, cause: str, *, memory: bool = False, smaller: int | None = None, recompute: bool = False
    ) -> None:
        super().__init__(cause)
        self.memory, self.smaller, self.recompute = memory, smaller, recompute


class PolicyGoneError(OnlinePOError):
    """Weights that the learner shared are gone with it, and were not saved yet."""


class NonFiniteError(OnlinePOError):
    """A loss or gradient was NaN or infinite; the step was not applied."""


class LearnerMemoryError(OnlinePOError):
    """The learner has too little memory for what it was asked.

    smaller: tokens of a micro-batch that all ranks may go on with from the beginning, where one of several has too
    little; None: smaller micro-batches do not help. recompute: they may go on so if they recompute activations.
    """

    def __init__(self, message: str, *, smaller: int | None = None, recompute: bool = False) -> None:
        super().__init__(message)
        self.smaller, self.recompute = smaller, recompute


class GuardError(OnlinePOError):
    """A guard ended the run (`guards`); what was finished is kept."""
