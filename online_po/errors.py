"""Errors a user can meet. Every message names the field, the value, and what to do."""

from __future__ import annotations


class OnlinePOError(Exception):
    """Base of all errors raised on purpose; the CLI prints it without a traceback.

    `exit_code` is what the command line returns: 2 for bad input, 3 for a run that stopped, 4 for one that pauses.
    """

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class ConfigError(OnlinePOError, ValueError):
    """Something the user wrote cannot be used: config, prompt file, model, judge function."""

    exit_code = 2


class LedgerError(OnlinePOError):
    """The run folder is missing, in use, damaged, or belongs to another config."""


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
    """A rank of the learner died or hung, and the group with it; it can be started again."""


class NonFiniteError(OnlinePOError):
    """A loss or gradient was NaN or infinite; the step was not applied."""


class LearnerMemoryError(OnlinePOError):
    """The learner has too little memory, also for the smallest micro-batch."""


class GuardError(OnlinePOError):
    """A guard ended the run (`guards`); what was finished is kept."""
