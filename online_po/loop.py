"""Rounds one after the other: who holds which weights when, and what may overlap.

Round r is sampled by policy version max(0, r - 1 - loop.max_staleness): a fixed lag, so that what a
round contains never depends on timing. Sampling runs in one background thread, in order; with
staleness 0 it waits for the round before it, with more it runs while that one trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from online_po.config import Config
from online_po.errors import ConfigError, LedgerError
from online_po.evaluation import summarise
from online_po.judging import check_failure_rate
from online_po.ledger import Ledger
from online_po.parts import Parts
from online_po.round import probe_of, request, sample_round, train_round
from online_po.seeds import stable_seed
from online_po.tables import evaluation_to_table
from online_po.types import Group, Judgement, Reference, Request

PROBE_TOKENS = 128
PROBE_CANDIDATES = 256
"""The probe is the longest of so many first prompts, cut to its last `PROBE_TOKENS` tokens."""

START_TOLERANCE = 0.02
"""How far a probe token's log-probability may be off, in nats, on another machine but with the same weights."""


def run_rounds(parts: Parts) -> list[dict[str, Any]]:
    """Runs every round the ledger does not hold yet; returns the evaluation summaries, oldest first.

    The generators prove what they hold before they sample: at the start, after each commit, after a
    resume. Raises what the parts raise; the ledger then holds all that was finished.
    """
    config, ledger = parts.config, parts.ledger
    first = _restore(parts) + 1
    rounds, staleness = config.loop.rounds, config.loop.max_staleness
    holder = _WeightHolder(parts)

    def sample(round_: int) -> None:
        holder.take(max(0, round_ - 1 - staleness), round_)
        sample_round(parts, round_)

    sampling: dict[int, Future[None]] = {}
    try:
        for round_ in range(first, rounds + 1):
            for ahead in range(round_, min(round_ + staleness, rounds) + 1):
                if ahead not in sampling:
                    sampling[ahead] = parts.sampler.submit(sample, ahead)
            sampling[round_].result()
            train_round(parts, round_)
        for version in range(rounds + 1):
            parts.sampler.submit(holder.evaluate, version, rounds + 1).result()
    finally:
        parts.stopping.set()
        parts.sampler.shutdown(wait=False, cancel_futures=True)
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
        first = parts.train[: min(len(parts.train), PROBE_CANDIDATES)]
        token_ids = max((prompt.token_ids for prompt in first), key=len)[-PROBE_TOKENS:]
        if len(token_ids) < 2:
            raise ConfigError("prompts.path: no prompt has two tokens or more; weights cannot be proved on them")
        ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=probe_of(parts.learner, token_ids))
        return 0
    _require_same_start(parts)
    if last > 0:
        # A run killed between its last commit and the pruning after it prunes now.
        ledger.prune(last, parts.config.run.keep_checkpoints)
        ledger.verify(last, "trainer")
        parts.learner.load(ledger.policy(last, parts.start), ledger.round_dir(last) / "trainer")
        parts.observer.message(f"resumed after round {last}")
    return last


def _require_same_start(parts: Parts) -> None:
    """Raises LedgerError unless the model that the learner was started with is the one the run was started from."""
    probe = parts.ledger.committed(0).probe
    now = parts.learner.token_logps(probe.token_ids)
    error = max(abs(a - b) for a, b in zip(now, probe.token_logps, strict=True))
    if not error <= (START_TOLERANCE if parts.config.learner.compute_dtype == "float32" else 16 * START_TOLERANCE):
        raise LedgerError(
            f"model.path: the weights there are not those the run was started from (log-probabilities differ by up to "
            f"{error:.3g} nats); restore them, or start a new run"
        )


def is_finished(config: Config, ledger: Ledger, evaluates: bool) -> bool:
    """Whether the ledger holds all rounds and all evaluations that are due. `evaluates`: there are held-out prompts."""
    if ledger.last_committed() != config.loop.rounds:
        return False
    due = [v for v in range(config.loop.rounds + 1) if evaluates and _is_due(config, v)]
    return all(ledger.evaluation_summary(version) is not None for version in due)


def _is_due(config: Config, version: int) -> bool:
    every = config.eval.every
    return every > 0 and (version in (0, config.loop.rounds) or version % every == 0)


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
        error = max(report.mean_logp_error for report in reports)
        self.parts.observer.message(
            f"generators hold policy {version}, proved on {len(probe.token_logps)} probe tokens "
            f"(mean logp difference {error:.1e})"
        )

    def evaluate(self, version: int, round_: int) -> None:
        """Evaluates a version on the held-out prompts, if that is due and the ledger has it not."""
        config, ledger, heldout = self.parts.config, self.parts.ledger, self.parts.heldout
        if heldout is None or not _is_due(config, version) or ledger.evaluation_summary(version) is not None:
            return
        self._sync(version, round_)
        with self.parts.observer.phase("evaluate", round_):
            summary = _evaluate(self.parts, version)
        self.parts.observer.evaluation(summary)


def _evaluate(parts: Parts, version: int) -> dict[str, Any]:
    """Samples and judges the held-out prompts; the seeds are the same for every version."""
    config, ledger, heldout = parts.config, parts.ledger, parts.heldout
    assert heldout is not None
    # As many sequences at a time as when sampling, but some chunks for every replica (and the same ones for one).
    chunk, per_prompt = config.generator.chunk_prompts, config.eval.responses_per_prompt
    size = max(1, min(chunk * config.loop.responses_per_prompt // per_prompt, max(chunk, len(heldout) // 8)))

    def chunks() -> Iterator[tuple[int, list[Request]]]:
        for part, begin in enumerate(range(0, len(heldout), size)):
            parts.require_going_on()
            yield part, [request(config, prompt, "evaluate", 0) for prompt in heldout[begin : begin + size]]

    made: dict[int, Group] = {}
    asked: list[tuple[list[int], Future[list[Judgement]]]] = []
    for part, found in parts.generator.generate(chunks(), config.eval_sampling):
        rows = [part * size + place for place in found]
        made |= dict(zip(rows, found.values(), strict=True))
        asked.append((rows, parts.judges.submit(list(found.values()))))
        parts.observer.progress("evaluate", len(made), len(heldout))
    judged = {row: answer for rows, future in asked for row, answer in zip(rows, future.result(), strict=True)}
    groups = [made[row] for row in range(len(heldout))]
    judgements = [judged[row] for row in range(len(heldout))]
    failures = [judgement.failure for judgement in judgements if judgement.failure]
    remedy = f"Policy {version} has no evaluation yet: mend the judge and resume, the evaluation is made again"
    check_failure_rate(failures, len(groups), config.judge.max_failure_rate, remedy)
    table = evaluation_to_table(groups, judgements)
    earlier = next((v for v in reversed(range(version)) if ledger.evaluation_summary(v) is not None), None)
    summary = summarise(
        table,
        policy_version=version,
        start=ledger.evaluation(0) if version else None,
        previous=ledger.evaluation(earlier) if earlier is not None else None,
        samples=config.eval.bootstrap_samples,
        seed=stable_seed(config.run.seed, "bootstrap"),
    )
    ledger.write_evaluation(version, table, summary)
    return summary
