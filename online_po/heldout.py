"""A policy on the held-out prompts: sampled, judged, compared with the policies before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pyarrow as pa

from online_po.evaluation import best_version, compare, summarise
from online_po.fail_points import fail_point
from online_po.guards import Finding, evaluation_findings
from online_po.judging import check_failure_rate
from online_po.parts import Parts
from online_po.retention import heldout_scores
from online_po.round import request
from online_po.seeds import stable_seed
from online_po.tables import evaluation_to_table
from online_po.types import Group, Judgement, Request, Response

WON, TIED = 1.0, 0.5
"""What a response scores that is the better one, or as good."""


def evaluate_heldout(parts: Parts, version: int, round_: int) -> dict[str, Any]:
    """Samples the held-out prompts from the policy that the generators hold, and judges them; the seeds are the same
    for every version. Judging counts for `round_`, as time does. Returns the `EvalSummary` that is in the ledger then.

    Raises what the parts raise, JudgeFailureRateError where the judge fails too often."""
    config, ledger, heldout = parts.config, parts.ledger, parts.heldout
    assert heldout is not None
    duels = Duels(ledger.evaluation(0) if version else None) if config.judge.relative else None
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
        parts.require_settled()
        rows = {part * size + place: group for place, group in found.items()}
        made |= rows
        questions = [(row, group) for row, own in rows.items() for group in (duels.groups(own) if duels else [own])]
        if questions:
            future = parts.judges.submit([group for _, group in questions], round_)
            asked.append(([row for row, _ in questions], future))
        parts.observer.progress("evaluate", len(made), len(heldout))
    answers = defaultdict[int, list[Judgement]](list)
    for places, future in asked:
        for row, answer in zip(places, future.result(), strict=True):
            answers[row].append(answer)
    groups = [made[row] for row in range(len(heldout))]
    judgements = [duels.outcome(g, answers[row]) if duels else answers[row][0] for row, g in enumerate(groups)]
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
        against_start=duels is not None,
    )
    summary |= {"attempt": ledger.attempt(version), "guards": _findings(parts, version, table)}
    fail_point("evaluate.judged")
    ledger.write_evaluation(version, table, summary)
    return summary


class Duels:
    """For judges whose scores order the responses to one prompt and say nothing beyond it: each response is judged
    beside the starting policy's to the same prompt, drawn by the same seed. A response's score is 1 where it is the
    better one, 0.5 where neither is, 0 otherwise; the starting policy's own are 0.5, and nobody is asked.

    start: the starting policy's evaluation, in `tables.EVAL_SCHEMA`; None: it is what is evaluated.
    """

    def __init__(self, start: pa.Table | None) -> None:
        columns = ("prompt_id", "index", "text", "token_ids", "finish_reason")
        self._start: dict[tuple[str, int], Response] | None = None
        if start is not None:
            rows = zip(*(start[name].to_pylist() for name in columns), strict=True)
            self._start = {
                (prompt_id, index): Response(
                    index=1,
                    text=text,
                    token_ids=tuple(token_ids),
                    token_logps=(),
                    finish_reason=finish_reason,
                    policy_version=0,
                    seed=0,
                )
                for prompt_id, index, text, token_ids, finish_reason in rows
            }

    def groups(self, group: Group) -> list[Group]:
        """What is judged of a group, in the order of its responses: each as response 0, the start's as response 1."""
        if self._start is None:
            return []
        return [
            replace(group, responses=(replace(own, index=0), self._start[group.prompt.id, own.index]))
            for own in group.responses
        ]

    def outcome(self, group: Group, verdicts: Sequence[Judgement]) -> Judgement:
        """The group's judgement, of the verdicts on `groups`; a failure where one is."""
        if self._start is None:
            return Judgement(prompt_id=group.prompt.id, scores=(TIED,) * len(group.responses))
        scores, rationales = list[float](), list[str]()
        for verdict in verdicts:
            if verdict.scores is None:
                return replace(verdict, comparisons=None, members=None)
            own, other = verdict.scores
            scores.append(TIED if own == other else WON * (own > other))
            rationales += verdict.rationales[:1] if verdict.rationales else ()
        return Judgement(
            prompt_id=group.prompt.id, scores=tuple(scores), rationales=tuple(rationales) if rationales else None
        )


def _findings(parts: Parts, version: int, table: pa.Table) -> list[Finding]:
    """What guards see in a policy's evaluation and in the row of the round that made it."""
    config, ledger = parts.config, parts.ledger
    accuracy = ledger.round_row(version).get("accuracy") if version else None
    if accuracy is None or accuracy < config.guards.over_optimisation.min_accuracy:
        return []
    best = best_version(heldout_scores(ledger, version - 1))
    other = ledger.evaluation(best) if best is not None else None
    if best is None or other is None:
        return []
    comparison = compare(table, other, config.eval.bootstrap_samples, stable_seed(config.run.seed, "bootstrap"))
    return evaluation_findings(config.guards, version, accuracy, best, comparison)
