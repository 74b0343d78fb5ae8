"""The `rules` judge: constraints that a program can verify, from the prompt's metadata column `constraints`.

A constraint is {"type": name, ...parameters}. A prompt's score is the mean over its constraints. Each gives 1.0
if and only if it is met, else partial credit by how far off the response is, always at most 0.5 at the first
fault: groups then tie less often, and "all met" stays plain to see (1.0). An empty response gets 0 everywhere,
and so does one that is nothing but the phrase or the keywords it was asked to contain.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from judges.protocol import JudgeError, scored
from judges.rules.base import WORD
from judges.rules.reading import CONSTRAINTS, IN_THREADS, Constraint, read_constraints, validate_constraints
from judges.rules.verified import WALL_SECONDS
from online_po.errors import ConfigError
from online_po.judge_configs import Rules
from online_po.types import Group, Judgement, Response

__all__ = ["CONSTRAINTS", "RulesJudge", "read_constraints", "score_response", "validate_constraints"]


class RulesJudge:
    """Scores each response by its prompt's constraints; the rationale says which were met."""

    def __init__(self, config: Rules) -> None:
        self._timeout_s = config.timeout_s
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="rules")

    async def judge(self, group: Group) -> Judgement:
        try:
            constraints = read_constraints(group.prompt.metadata)
        except ConfigError as error:
            raise JudgeError("error", str(error)) from error
        if any(kind in IN_THREADS for kind, _ in constraints):
            verdicts = await asyncio.gather(*(self._in_thread(response, constraints) for response in group.responses))
        else:
            verdicts = [_verdict(response, constraints) for response in group.responses]
        return scored(group, [score for score, _ in verdicts], [rationale for _, rationale in verdicts])

    async def _in_thread(self, response: Response, constraints: list[Constraint]) -> tuple[float, str]:
        context = contextvars.copy_context()
        context.run(WALL_SECONDS.set, self._timeout_s)
        work = functools.partial(context.run, _verdict, response, constraints)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _verdict(response: Response, constraints: list[Constraint]) -> tuple[float, str]:
    try:
        return score_response(response.text, constraints, len(response.token_ids))
    except JudgeError as error:
        raise JudgeError(error.kind, f"response {response.index}: {error}") from error


def score_response(text: str, constraints: list[Constraint], tokens: int = 0) -> tuple[float, str]:
    """(mean score in [0, 1], rationale such as "lowercase ✓ · at most 30 words ✗ (41)").

    `tokens`: the response's, for `length`. Raises JudgeError where a check could not be made.
    """
    text = text.strip()
    if not WORD.search(text):
        return 0.0, "empty response"
    checks = [_check(kind, text, tokens, parameters) for kind, parameters in constraints]
    notes = [f"{asked} ✓" if score == 1.0 else f"{asked} ✗ ({found})" for score, asked, found in checks]
    return sum(score for score, _, _ in checks) / len(checks), " · ".join(notes)


def _check(kind: str, text: str, tokens: int, parameters: dict[str, Any]) -> tuple[float, str, object]:
    function = CONSTRAINTS[kind]
    return function(text, tokens, **parameters) if kind == "length" else function(text, **parameters)
