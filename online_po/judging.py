"""Judgements of a round as they come: groups go to the judge as they finish, parts to the ledger when judged whole."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from online_po.errors import JudgeFailureRateError, LedgerError
from online_po.levels import level
from online_po.parts import Parts
from online_po.types import Group, JudgeFailure, Judgement, Prompt

MAX_CHUNKS_IN_JUDGING = 64
"""So many chunks' groups may wait for the judge before generation waits too: bounds the driver's memory."""

UNANSWERED = JudgeFailure(kind="unanswered", message="the run stopped before the judge answered")

JUDGED_IS_KEPT = (
    "Responses and judgements made so far are kept: mend the judge and resume, only what failed is asked again"
)


@dataclass(kw_only=True)
class _OpenPart:
    """A part that is being judged."""

    size: int
    judgements: dict[int, Judgement] = field(default_factory=dict)
    """By place; `UNANSWERED` until the judge has answered."""
    unanswered: int

    def ordered(self) -> list[Judgement]:
        return [judgement for _, judgement in sorted(self.judgements.items())]


class Judging:
    """The judgements of a round.

    A context: left by an error or a stop, it writes what the judge has answered of parts whose responses are
    in the ledger, so that only the rest is asked again.
    """

    def __init__(self, parts: Parts, round_: int) -> None:
        self.parts, self.round = parts, round_
        self.groups = 0
        """How many the round has, as far as is known."""
        self.alike = 0
        """Those of whole parts whose responses all have the same score."""
        self.bound = MAX_CHUNKS_IN_JUDGING * parts.config.generator.chunk_prompts
        self.open: dict[int, _OpenPart] = {}
        self.asked: dict[Future[list[Judgement]], tuple[int, list[int]]] = {}
        """What the judge is at: part and places in it."""
        self.answered: queue.SimpleQueue[Future[list[Judgement]]] = queue.SimpleQueue()
        self.failures: list[JudgeFailure] = []
        """Of whole parts."""
        self.kinds: Counter[str] = Counter()
        """Failures answered so far, by kind."""
        self.judged = self.waiting = 0

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(LedgerError):  # a full disk, say: what led here is the news
                self._keep()

    def resume(self, part: int, prompts: Sequence[Prompt]) -> None:
        """A part whose responses are in the ledger: asks for the judgements that are not, or that failed."""
        ledger = self.parts.ledger
        stored = ledger.judgements(self.round, part) if ledger.has_judgements(self.round, part) else []
        known = {place: judgement for place, judgement in enumerate(stored) if not judgement.failure}
        self.judged += len(known)
        if len(known) == len(prompts):
            self.alike += sum(map(is_alike, stored))
        else:
            groups = enumerate(ledger.responses(self.round, part, prompts))
            self.open[part] = _OpenPart(size=len(prompts), judgements=known, unanswered=len(prompts) - len(known))
            self.submit(part, len(prompts), {place: group for place, group in groups if place not in known})

    def submit(self, part: int, size: int, groups: Mapping[int, Group]) -> None:
        """Groups of a part of `size` groups, by their places in it. The last ones come after the part's responses
        were written: no judgement is in the ledger without what was judged."""
        judging = self.open.setdefault(part, _OpenPart(size=size, unanswered=size))
        for place, group in groups.items():
            judging.judgements[place] = Judgement(prompt_id=group.prompt.id, failure=UNANSWERED)
        future = self.parts.judges.submit(list(groups.values()), self.round)
        self.asked[future] = part, list(groups)
        self.waiting += len(groups)
        future.add_done_callback(self.answered.put)
        while not self.answered.empty() or self.waiting >= self.bound:
            self._collect()

    def wait(self) -> None:
        """Waits for what is pending. Raises JudgeFailureRateError, and Interrupted where the run was asked to stop:
        parts may be missing then."""
        while self.asked:
            self._collect()
        self.parts.stop.check()

    def finish(self) -> None:
        """Marks the round as judged, after `wait`."""
        self.parts.ledger.write_judged(self.round, len(self.failures))

    def _collect(self) -> None:
        """Waits for one answer; a part that is whole with it goes to the ledger."""
        while True:
            self.parts.require_going_on()
            try:
                future = self.answered.get(timeout=0.5)
                break
            except queue.Empty:
                continue
        part = self._take(future)
        note = f"no label: {counted(self.kinds)}" if self.kinds else ""
        self.parts.observer.progress("judge", self.judged, self.groups, note)
        if self.open[part].unanswered == 0:
            judgements = self.open.pop(part).ordered()
            self.parts.ledger.write_judgements(self.round, part, judgements)
            self.alike += sum(map(is_alike, judgements))
            self.failures.extend(judgement.failure for judgement in judgements if judgement.failure)
            # As soon as it is certain: a judge that always fails must not cost a round's generation.
            check_failure_rate(self.failures, self.groups, self.parts.config.judge.max_failure_rate, JUDGED_IS_KEPT)

    def _take(self, future: Future[list[Judgement]]) -> int:
        """Notes an answer; returns its part."""
        part, places = self.asked.pop(future)
        self.waiting -= len(places)
        judging = self.open[part]
        judgements = future.result()
        judging.judgements |= zip(places, judgements, strict=True)
        self.kinds.update(judgement.failure.kind for judgement in judgements if judgement.failure)
        judging.unanswered -= len(places)
        self.judged += len(places)
        return part

    def _keep(self) -> None:
        """Writes what was answered of parts whose responses are in the ledger."""
        while not self.answered.empty():
            future = self.answered.get()
            if future.exception() is None:
                self._take(future)
        for part, judging in self.open.items():
            if len(judging.judgements) == judging.size and self.parts.ledger.has_responses(self.round, part):
                self.parts.ledger.write_judgements(self.round, part, judging.ordered())


def is_alike(judgement: Judgement) -> bool:
    """Whether all responses have the same score, so that none of them is better than another."""
    scores = judgement.scores
    return scores is not None and len(set(level(scores, max(map(abs, scores))))) == 1


def counted(kinds: Counter[str]) -> str:
    """Failures by kind, for people."""
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def check_failure_rate(failures: Sequence[JudgeFailure], groups: int, bound: float, remedy: str) -> None:
    """Raises JudgeFailureRateError where a larger share than `bound` of the groups has no judgement."""
    if groups and len(failures) / groups > bound:  # not `bound * groups`: 0.29 * 100 is below 29
        reasons = counted(Counter(failure.kind for failure in failures))
        raise JudgeFailureRateError(
            f"the judge failed on {len(failures)} of {groups} groups ({reasons}), more than judge.max_failure_rate = "
            f"{bound} allows; last message: {failures[-1].message!r}. {remedy}"
        )
