"""Judgements of a round as they come: each part is written to the ledger when the judge is done with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from online_po.errors import JudgeFailureRateError
from online_po.parts import Parts
from online_po.types import Group, JudgeFailure, Judgement

MAX_PARTS_IN_JUDGING = 64
"""Parts waiting for the judge before generation waits too: bounds the driver's memory."""

JUDGED_IS_KEPT = (
    "Responses and judgements made so far are kept: mend the judge and resume, only what failed is asked again"
)


class Judging:
    """The judgements of a round's parts, each written to the ledger as it comes."""

    def __init__(self, parts: Parts, round_: int, groups: int) -> None:
        self.parts, self.round, self.groups = parts, round_, groups
        self.pending: dict[Future[list[Judgement]], tuple[int, list[Judgement | None]]] = {}
        self.failures: list[JudgeFailure] = []
        self.judged = 0

    def known(self, groups: int) -> None:
        """Counts groups of a part whose judgements are all there."""
        self.judged += groups

    def submit(self, part: int, groups: Sequence[Group], known: Sequence[Judgement] | None) -> None:
        """Asks for what is not known; judgements that failed before the run was stopped are asked for again."""
        kept: list[Judgement | None] = [None] * len(groups)
        if known is not None:
            kept = [None if judgement.failure else judgement for judgement in known]
        asked = [group for group, judgement in zip(groups, kept, strict=True) if judgement is None]
        self.pending[self.parts.judges.submit(asked)] = (part, kept)
        self._collect(block=len(self.pending) >= MAX_PARTS_IN_JUDGING)

    def finish(self) -> None:
        """Waits for what is pending, and marks the round as judged. Raises JudgeFailureRateError."""
        while self.pending:
            self._collect(block=True)
        self.parts.ledger.write_judged(self.round, len(self.failures))

    def _collect(self, block: bool) -> None:
        done: set[Future[list[Judgement]]] = set()
        while not done:
            done = wait(self.pending, timeout=0.5 if block else 0, return_when=FIRST_COMPLETED).done
            if not block:
                break
            self.parts.require_going_on()
        for future in done:
            part, kept = self.pending.pop(future)
            answers = iter(future.result())
            judgements = [next(answers) if j is None else j for j in kept]
            self.parts.ledger.write_judgements(self.round, part, judgements)
            self.judged += len(judgements)
            self.failures.extend(j.failure for j in judgements if j.failure)
            self.parts.observer.progress("judge", self.judged, self.groups)
        # As soon as it is certain: a judge that always fails must not cost a round's generation.
        check_failure_rate(self.failures, self.groups, self.parts.config.judge.max_failure_rate, JUDGED_IS_KEPT)


def check_failure_rate(failures: Sequence[JudgeFailure], groups: int, bound: float, remedy: str) -> None:
    """Raises JudgeFailureRateError where a larger share than `bound` of the groups has no judgement."""
    if len(failures) > bound * groups:
        kinds = Counter(failure.kind for failure in failures)
        reasons = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        raise JudgeFailureRateError(
            f"the judge failed on {len(failures)} of {groups} groups ({reasons}), more than judge.max_failure_rate = "
            f"{bound} allows; last message: {failures[-1].message!r}. {remedy}"
        )
