"""Rounds one after the other: who holds which weights when, and what may overlap.

Round r is sampled by policy version max(0, r - 1 - loop.max_staleness): a fixed lag, so that what a
round contains never depends on timing. Sampling runs in one background thread, in order; with
staleness 0 it waits for the round before it, with more it runs while that one trains. Generators take
a new policy from memory, or once it is saved, and evaluate it while its round is written (`Handover`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from online_po.config import Config
from online_po.errors import ConfigError, Interrupted, LearnerLostError, LedgerError, NonFiniteError
from online_po.evaluation import early_stop
from online_po.fail_points import fail_point
from online_po.guards import Finding
from online_po.handover import Handover
from online_po.heldout import evaluate_heldout
from online_po.judge_trials import calibrate, try_judge
from online_po.ledger import Ledger
from online_po.parts import Parts
from online_po.probes import probe_gap, probe_of, require_probe
from online_po.retention import Retention, heldout_scores
from online_po.roll_back import RollBack, act, go_back, load_round, unsettled
from online_po.room import require_room
from online_po.round import sample_round, train_round
from online_po.types import Policy, Probe, Reference

T = TypeVar("T")

PROBE_TOKENS = 128
PROBE_CANDIDATES = 256
"""The probe is the longest of so many first prompts, cut to its last `PROBE_TOKENS` tokens."""


def run_rounds(parts: Parts) -> list[dict[str, Any]]:
    """Runs every round the ledger does not hold yet; returns the evaluation summaries, oldest first.

    The generators prove what they hold before they sample: at the start, after each commit, after a
    resume. Raises what the parts raise, GuardError where a guard ends the run, Interrupted where it was asked to stop;
    the ledger then holds all that was finished.
    """
    last = _restore(parts)
    # A judge that is the policy can be asked only now; others were tried before the engines started.
    if parts.known and parts.ledger.judge_trial(0) is None:
        try_judge(parts.judges, parts.config.judge, parts.known, parts.ledger, parts.observer)
    holder, retention = _WeightHolder(parts), Retention(parts.config, parts.ledger)
    parts.stop.working = True
    try:
        while True:
            sampling: dict[int, Future[None]] = {}
            try:
                _run_after(parts, last, holder, retention, sampling)
                break
            except Interrupted:
                _take_back(parts, sampling)
                wait(sampling.values())  # the parts that are sampled ahead are finished too
                raise
            except RollBack as wanted:
                _drop(parts, sampling)
                _take_back(parts, sampling)
                # What the generators hold may be gone now; what they are asked for next is older, so it is synced.
                last = go_back(parts, wanted)
                _load(parts, last)
                fail_point("roll_back.loaded")
                retention.forget()
    finally:
        parts.stop.working = False
        parts.stopping.set()
        parts.sampler.shutdown(wait=False, cancel_futures=True)
    return evaluations(parts.ledger)


def _run_after(
    parts: Parts, last: int, holder: _WeightHolder, retention: Retention, sampling: dict[int, Future[None]]
) -> None:
    """Runs the rounds after `last`, and what evaluation is left. What is being sampled is put into `sampling`.

    Raises RollBack where a guard wants to go back.
    """
    config, ledger = parts.config, parts.ledger
    rounds, staleness = config.loop.rounds, config.loop.max_staleness

    def settle(round_: int) -> None:
        act(ledger, ledger.round_row(round_), round_)
        calibrate(parts, round_)
        retention.prune(round_)

    def sample(round_: int) -> None:
        version = max(0, round_ - 1 - staleness)
        # Where sampling the round before failed, nobody knows yet which prompts come after it (`loop.top_up`).
        if round_ > last_round(config, ledger) or not (round_ == 1 or ledger.is_judged(round_ - 1)):
            return
        parts.stop.check()
        if parts.handover is None or parts.handover.policy.version != version:  # else who writes its round asks
            require_room(ledger, round_, parts.expected)
        holder.take(version, round_)
        # What is wrong with the policy is acted on when the round's turn comes, whenever it was sampled.
        if round_ <= last_round(config, ledger) and not unsettled(ledger, ledger.evaluation_summary(version)):
            sample_round(parts, round_)

    def evaluate(version: int) -> None:
        parts.stop.check()
        if (stopped := early_stop_version(config, ledger)) is None or version <= stopped:
            holder.evaluate(version, rounds + 1)

    def hand_over(policy: Policy, probe: Probe) -> None:
        parts.handover = Handover(policy, probe)
        if (ahead := policy.version + 1 + staleness) <= rounds:
            sampling[ahead] = parts.sampler.submit(sample, ahead)
        elif staleness == 0:  # else guards look at older policies first
            sampling[ahead] = parts.sampler.submit(evaluate, policy.version)

    if last > 0:
        settle(last)
    for round_ in range(last + 1, rounds + 1):
        for ahead in range(round_, min(round_ + staleness, rounds) + 1):
            if ahead not in sampling:
                sampling[ahead] = parts.sampler.submit(sample, ahead)
        sampling[round_].result()
        act(ledger, ledger.evaluation_summary(max(0, round_ - 1 - staleness)), round_ - 1)
        if round_ > last_round(config, ledger):
            break
        parts.stop.check()
        _train(parts, round_, hand_over, lambda: _take_back(parts, sampling))
        settle(round_)
        if (ahead := round_ + 1 + staleness) <= last_round(config, ledger):
            require_room(ledger, ahead, parts.expected)
        assert parts.handover is not None
        parts.handover.settle()
    for ahead, future in sampling.items():
        if ahead > rounds:
            future.result()
    for version in range(rounds + 1):
        parts.sampler.submit(evaluate, version).result()
        act(ledger, ledger.evaluation_summary(version), last_round(config, ledger))
    if (stopped := early_stop_version(config, ledger)) is not None:
        parts.observer.message(f"eval.early_stop: no gain up to policy {stopped}, the run ends")


def _train(
    parts: Parts, round_: int, hand_over: Callable[[Policy, Probe], None], take_back: Callable[[], None]
) -> None:
    """Trains a sampled round; a step that is not finite makes the run go back, if the guard says so."""
    try:
        _with_learner(parts, round_ - 1, lambda: train_round(parts, round_, hand_over), take_back)
    except NonFiniteError as error:
        if parts.config.guards.nonfinite.action != "roll_back":
            raise
        message = f"{str(error).removesuffix('.')}."
        raise RollBack(Finding(name="nonfinite", action="roll_back", policy=round_, message=message), round_) from error


def _with_learner(parts: Parts, held: int, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
    """Does work with a learner that holds the policy of round `held`. Where the learner is lost meanwhile, it is
    started again, takes that round's state and proves it, and the work begins anew, after `undo`: from what the ledger
    has, as after a resume."""
    lost: LearnerLostError | None = None
    while True:
        try:
            if lost is not None:
                parts.learner.restart(lost)
                load_round(parts, held)
                if (commit := parts.ledger.commit_of(held)) is not None:
                    require_probe(parts, commit.probe, f"the learner was started again to hold policy {held}")
            return work()
        except LearnerLostError as error:
            lost = error
            undo()


def _load(parts: Parts, round_: int) -> None:
    _with_learner(parts, round_, lambda: load_round(parts, round_))


def _drop(parts: Parts, sampling: dict[int, Future[None]]) -> None:
    """Ends sampling ahead, for a run that goes back."""
    parts.stopping.set()
    for future in sampling.values():
        future.cancel()
    wait(sampling.values())
    parts.stopping.clear()


def _take_back(parts: Parts, sampling: dict[int, Future[None]]) -> None:
    """Ends what is done with a policy that was handed over, and will not be settled as it is."""
    if (handover := parts.handover) is None or handover.is_settled:
        return
    handover.withdraw()
    if (future := sampling.pop(handover.policy.version + 1 + parts.config.loop.max_staleness, None)) is not None:
        future.cancel()
        wait([future])
    parts.handover = None


def evaluations(ledger: Ledger) -> list[dict[str, Any]]:
    """The evaluation summaries that the ledger holds, oldest policy first."""
    found = (ledger.evaluation_summary(version) for version in ledger.rounds())
    return [summary for summary in found if summary is not None]


def _restore(parts: Parts) -> int:
    """Brings the learner to the last committed round and returns it; a new run commits round 0 first."""
    ledger = parts.ledger
    ledger.finish_roll_back()
    last = ledger.last_committed()
    if last is None:
        # The probe: a prompt as the policy reads it. Its logps move with every update.
        first = parts.train[: min(len(parts.train), PROBE_CANDIDATES)]
        token_ids = max((prompt.token_ids for prompt in first), key=len)[-PROBE_TOKENS:]
        if len(token_ids) < 2:
            raise ConfigError("prompts.path: no prompt has two tokens or more; weights cannot be proved on them")
        probe = _with_learner(parts, 0, lambda: probe_of(parts.learner, token_ids))
        ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=probe)
        return 0
    _with_learner(parts, 0, lambda: _require_same_start(parts))
    if last > 0:
        _load(parts, last)
        fail_point("restore.loaded")
        parts.observer.message(f"resumed after round {last}")
    return last


def _require_same_start(parts: Parts) -> None:
    """Raises LedgerError unless the model that the learner was started with is the one the run was started from."""
    if (gap := probe_gap(parts, parts.ledger.committed(0).probe)) is not None:
        raise LedgerError(
            f"model.path: the weights there are not those the run was started from (log-probabilities differ by up to "
            f"{gap:.3g} nats); restore them, or start a new run"
        )


def is_finished(config: Config, ledger: Ledger, evaluates: bool) -> bool:
    """Whether the ledger holds all rounds and all evaluations that are due, and guards want nothing any more.
    `evaluates`: there are held-out prompts."""
    last = ledger.last_committed()
    if last is None or last < last_round(config, ledger) or not all(done["done"] for done in ledger.roll_backs()):
        return False
    stopped = early_stop_version(config, ledger)
    newest = config.loop.rounds if stopped is None else stopped
    due = [ledger.evaluation_summary(v) for v in range(newest + 1) if evaluates and _is_due(config, v)]
    if None in due:
        return False
    return not any(unsettled(ledger, record) for record in (ledger.round_row(last), *due))


def early_stop_version(config: Config, ledger: Ledger) -> int | None:
    """The policy version whose evaluation ended the run early; None if none did."""
    rule = config.eval.early_stop
    if rule is None:
        return None
    return early_stop(heldout_scores(ledger, config.loop.rounds), rule.patience, rule.min_gain)


def last_round(config: Config, ledger: Ledger) -> int:
    """The run's last round, as far as is known yet. Where it ends early, rounds that are trained before the policy's
    evaluation is waited for (`loop.max_staleness`) are still part of it."""
    stopped = early_stop_version(config, ledger)
    return config.loop.rounds if stopped is None else min(config.loop.rounds, stopped + config.loop.max_staleness)


def _is_due(config: Config, version: int) -> bool:
    every = config.eval.every
    return every > 0 and (version in (0, config.loop.rounds) or version % every == 0)


class _WeightHolder:
    """Knows which policy version the generators hold, and evaluates a version while they hold it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.held: tuple[int, Probe] | None = None

    def take(self, version: int, round_: int) -> None:
        """Syncs the generators to a version, committed or handed over, with proof, and evaluates it if that is due.

        `round_` is the round that the time is counted under."""
        self._sync(version, round_)
        self.evaluate(version, round_)

    def _sync(self, version: int, round_: int) -> None:
        ledger, handover = self.parts.ledger, self.parts.handover
        newest = handover if handover is not None and handover.policy.version == version else None
        probe = ledger.committed(version).probe if newest is None else newest.probe
        gone = self.parts.taken is not None and self.parts.taken.is_withdrawn
        self.parts.taken = newest
        if self.held == (version, probe) and not gone:
            return
        self.held = None
        with self.parts.phase("sync", round_):
            policy = ledger.policy(version, self.parts.start) if newest is None else newest.policy
            reports = self.parts.generator.sync(policy, probe, start=ledger.committed(0).probe)
        self.held = version, probe
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
        with self.parts.phase("evaluate", round_):
            summary = evaluate_heldout(self.parts, version, round_)
        self.parts.observer.evaluation(summary)
