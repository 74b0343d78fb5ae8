"""Rounds one after the other: who holds which weights when, and what may overlap.

Round r is sampled by policy version max(0, r - 1 - loop.max_staleness): a fixed lag, so that what a
round contains never depends on timing. Sampling runs in one background thread, in order; with
staleness 0 it waits for the round before it, with more it runs while that one trains.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from online_po.evaluation import summarise
from online_po.judging import check_failure_rate
from online_po.ledger import Ledger
from online_po.parts import Parts
from online_po.round import probe_of, request, sample_round, train_round
from online_po.seeds import stable_seed
from online_po.tables import evaluation_to_table

PROBE_TOKENS = 128


def run_rounds(parts: Parts) -> list[dict[str, Any]]:
    """Runs every round the ledger does not hold yet; returns the evaluation summaries, oldest first.

    The generators prove what they hold before they sample: at the start, after each commit, after a
    resume. Raises what the parts raise; the ledger then holds all that was finished.
    """
    config, ledger = parts.config, parts.ledger
    first = _restore(parts) + 1
    rounds, staleness = config.loop.rounds, config.loop.max_staleness
    sampler = ThreadPoolExecutor(1, thread_name_prefix="sampler")
    holder = _WeightHolder(parts)

    def sample(round_: int) -> None:
        holder.take(max(0, round_ - 1 - staleness), round_)
        sample_round(parts, round_)

    sampling: dict[int, Future[None]] = {}
    try:
        for round_ in range(first, rounds + 1):
            for ahead in range(round_, min(round_ + staleness, rounds) + 1):
                if ahead not in sampling:
                    sampling[ahead] = sampler.submit(sample, ahead)
            sampling[round_].result()
            train_round(parts, round_)
        for version in range(rounds + 1):
            sampler.submit(holder.evaluate, version, rounds + 1).result()
    finally:
        parts.stopping.set()
        sampler.shutdown(wait=False, cancel_futures=True)
    return evaluations(ledger)


def evaluations(ledger: Ledger) -> list[dict[str, Any]]:
    """The evaluation summaries that the ledger holds, oldest policy first."""
    found = (ledger.evaluation_summary(version) for version in ledger.rounds())
    return [summary for summary in found if summary is not None]


def _restore(parts: Parts) -> int:
    """Brings the learner to the last committed round and returns it; a new run commits round 0 first."""
    ledger = parts.ledger
    last = ledger.last_committed()
    if last is None:
        # The probe: a prompt as the policy reads it. Its logps move with every update.
        token_ids = parts.train[0].token_ids[-PROBE_TOKENS:]
        ledger.commit(0, is_adapter=False, reference_round=0, probe=probe_of(parts.learner, token_ids))
        return 0
    if last > 0:
        ledger.verify(last, "trainer")
        parts.learner.load(ledger.policy(last, parts.start), ledger.round_dir(last) / "trainer")
        parts.observer.message(f"resumed after round {last}")
    return last


class _WeightHolder:
    """Knows which policy version the generators hold, and evaluates a version while they hold it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.held: int | None = None

    def take(self, version: int, round_: int) -> None:
        """Syncs the generators to a committed version, with proof, and evaluates it if that is due.

        `round_` is the round that the time is counted under."""
        self._sync(version, round_)
        self.evaluate(version, round_)

    def _sync(self, version: int, round_: int) -> None:
        if self.held == version:
            return
        ledger = self.parts.ledger
        self.held = None
        with self.parts.observer.phase("sync", round_):
            probe = ledger.committed(version).probe
            reports = self.parts.generator.sync(ledger.policy(version, self.parts.start), probe)
        self.held = version
        error = max(report.max_logp_error for report in reports)
        self.parts.observer.message(
            f"generators hold policy {version}, proved on {len(probe.token_logps)} probe tokens "
            f"(largest logp difference {error:.1e})"
        )

    def evaluate(self, version: int, round_: int) -> None:
        """Evaluates a version on the held-out prompts, if that is due and the ledger has it not."""
        config, ledger, heldout = self.parts.config, self.parts.ledger, self.parts.heldout
        last = version in (0, config.loop.rounds)
        due = heldout is not None and config.eval.every and (last or version % config.eval.every == 0)
        if not due or heldout is None or ledger.evaluation_summary(version) is not None:
            return
        self._sync(version, round_)
        with self.parts.observer.phase("evaluate", round_):
            summary = _evaluate(self.parts, version)
        self.parts.observer.evaluation(summary)


def _evaluate(parts: Parts, version: int) -> dict[str, Any]:
    """Samples and judges the held-out prompts; the seeds are the same for every version."""
    config, ledger, heldout = parts.config, parts.ledger, parts.heldout
    assert heldout is not None
    size = config.generator.chunk_prompts
    chunks = (
        (part, [request(config, prompt, "evaluate", 0) for prompt in heldout[begin : begin + size]])
        for part, begin in enumerate(range(0, len(heldout), size))
    )
    futures, done = {}, 0
    for part, groups in parts.generator.generate(chunks, config.eval_sampling):
        futures[part] = (groups, parts.judges.submit(groups))
        done += len(groups)
        parts.observer.progress("evaluate", done, len(heldout))
    groups = [group for part in sorted(futures) for group in futures[part][0]]
    judgements = [judgement for part in sorted(futures) for judgement in futures[part][1].result()]
    failures = [judgement.failure for judgement in judgements if judgement.failure]
    check_failure_rate(failures, len(groups), config.judge.max_failure_rate)
    table = evaluation_to_table(groups, judgements)
    earlier = [summary["policy_version"] for summary in evaluations(ledger) if summary["policy_version"] < version]
    summary = summarise(
        table,
        policy_version=version,
        start=ledger.evaluation(0) if version else None,
        previous=ledger.evaluation(earlier[-1]) if earlier else None,
        samples=config.eval.bootstrap_samples,
        seed=stable_seed(config.run.seed, "bootstrap"),
    )
    ledger.write_evaluation(version, table, summary)
    return summary
