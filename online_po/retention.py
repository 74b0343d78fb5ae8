"""Which weights stay in the run folder although `checkpoint.keep` newer rounds have theirs."""

from __future__ import annotations

from collections import defaultdict

from online_po.config import Config
from online_po.evaluation import best_version
from online_po.fail_points import fail_point
from online_po.judge_configs import self_judges
from online_po.ledger import Ledger


class Retention:
    """Prunes a run round by round; looks at all rounds the first time, then only at those that may go."""

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.config, self.ledger = config, ledger
        self._spared: set[int] | None = None

    def prune(self, newest: int) -> None:
        """Deletes the weights that neither the run nor a guard that rolls back needs after round `newest`."""
        keep = self.config.checkpoint.keep
        if keep is None:
            return
        spared = self._needed(newest, keep)
        only = None if self._spared is None else {*self._spared, newest - keep}
        fail_point("prune.begin")
        self.ledger.prune(newest, keep, spared, only)
        fail_point("prune.end")
        self._spared = set(spared)

    def forget(self) -> None:
        """The run went back: the next call looks at all rounds again."""
        self._spared = None

    def _needed(self, newest: int, keep: int) -> dict[int, set[str]]:
        """Round -> which of its weights stay, whatever `keep` says."""
        ledger, guards, staleness = self.ledger, self.config.guards, self.config.loop.max_staleness
        needed: defaultdict[int, set[str]] = defaultdict(set)
        back = set(range(max(1, newest - keep + 1), newest + 1))
        for judge in self_judges(self.config.judge):
            if isinstance(judge.policy, int) and judge.policy <= newest:
                needed[judge.policy].add("policy")
        best = self._best(newest)
        if best:
            needed[best].add("policy")
            if "over_optimisation" in guards.rolling_back:
                needed[best].update(("policy", "trainer"))
                back.add(best)
        # Who goes on from a round needs its reference, and what samples the rounds after it.
        for round_ in back:
            reference = ledger.committed(round_).reference
            needed[reference.round].add(reference.folder)
        if best is not None and best in back:
            for version in range(best - staleness, best):
                needed[version].add("policy")
        return needed

    def _best(self, newest: int) -> int | None:
        """The best policy of those that were evaluated for certain when round `newest` was committed, so that what is
        kept does not depend on how far ahead sampling is."""
        scores = heldout_scores(self.ledger, newest - 1 - self.config.loop.max_staleness)
        return best_version(scores)


def heldout_scores(ledger: Ledger, upto: int) -> dict[int, float]:
    """Policy version -> mean held-out score, oldest first, of the policies up to `upto` that have one."""
    summaries = {version: ledger.evaluation_summary(version) for version in ledger.rounds() if version <= upto}
    return {version: s["score"]["mean"] for version, s in summaries.items() if s is not None and s["score"] is not None}
