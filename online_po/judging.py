"""Judgements of a round as they come: groups go to the judge as they finish, parts to the ledger when judged whole."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from online_po.errors import JudgeFailureRateError
from online_po.parts import Parts
from online_po.types import Group, JudgeFailure, Judgement, Prompt

MAX_CHUNKS_IN_JUDGING = 64
"""So many chunks' groups may wait for the judge before generation waits too: bounds the driver's memory."""

JUDGED_IS_KEPT = (
    "Responses and judgements made so far are kept: mend the judge and resume, only what failed is asked again"
)


class Judging:
    """The judgements of a round; `groups` is how many the round has."""

    def __init__(self, parts: Parts, round_: int, groups: int) -> None:
        self.parts, self.round, self.groups = parts, round_, groups
        self.bound = MAX_CHUNKS_IN_JUDGING * parts.config.generator.chunk_prompts
        self.open: dict[int, list[Judgement | None]] = {}
        """Judgements of the parts that are being judged; None for those that are not there yet."""
        self.asked: dict[Future[list[Judgement]], tuple[int, list[int]]] = {}
        """What the judge is at: part and places in it."""
        self.answered: queue.SimpleQueue[Future[list[Judgement]]] = queue.SimpleQueue()
        self.failures: list[JudgeFailure] = []
        self.judged = self.waiting = 0

    def resume(self, part: int, prompts: Sequence[Prompt]) -> None:
        """A part whose responses are in the ledger: asks for the judgements that are not, or that failed."""
        ledger = self.parts.ledger
        known = ledger.judgements(self.round, part) if ledger.has_judgements(self.round, part) else []
        kept = [None if judgement.failure else judgement for judgement in known] or [None] * len(prompts)
        self.judged += sum(judgement is not None for judgement in kept)
        if None in kept:
            groups = ledger.responses(self.round, part, prompts)
            self.open[part] = kept
            self.submit(part, len(kept), {i: group for i, group in enumerate(groups) if kept[i] is None})

    def submit(self, part: int, size: int, groups: Mapping[int, Group]) -> None:
        """Groups of a part of `size` groups, by their places in it. The last ones come after the part's responses
        were written: no judgement is in the ledger without what was judged."""
        self.open.setdefault(part, [None] * size)
        future = self.parts.judges.submit(list(groups.values()))
        self.asked[future] = part, list(groups)
        self.waiting += len(groups)
        future.add_done_callback(self.answered.put)
        while not self.answered.empty() or self.waiting >= self.bound:
            self._collect()

    def finish(self) -> None:
        """Waits for what is pending, and marks the round as judged. Raises JudgeFailureRateError."""
        while self.asked:
            self._collect()
        self.parts.ledger.write_judged(self.round, len(self.failures))

    def _collect(self) -> None:
        """Takes one answer; a part that is whole with it goes to the ledger."""
        while True:
            self.parts.require_going_on()
            try:
                future = self.answered.get(timeout=0.5)
                break
            except queue.Empty:
                continue
        part, places = self.asked.pop(future)
        judgements = self.open[part]
        for place, judgement in zip(places, future.result(), strict=True):
            judgements[place] = judgement
        self.judged += len(places)
        self.waiting -= len(places)
        self.parts.observer.progress("judge", self.judged, self.groups)
        whole = [judgement for judgement in judgements if judgement is not None]
        if len(whole) == len(judgements):
            del self.open[part]
            self.parts.ledger.write_judgements(self.round, part, whole)
            self.failures.extend(judgement.failure for judgement in whole if judgement.failure)
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
