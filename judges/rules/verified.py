"""Constraints that take running something: code against tests, mathematics, reasoning-gym's verifiers.

What a response says is executed for all three (math-verify and reasoning-gym evaluate it on the way), so it happens in
a confined process each time, see `judges.sandbox`. CPU time decides, which hardly depends on what else the machine
does: past it a response is not verified. Past `judge.timeout_s` by the clock nothing is known, and the judge fails.
"""

from __future__ import annotations

import functools
import json
from contextvars import ContextVar
from typing import Any

from judges.protocol import JudgeError
from judges.rules.base import Check, fenced_blocks
from judges.sandbox.client import Mode, Reply, SandboxError, sandbox
from online_po.errors import ConfigError

CODE_SECONDS = 5
VERIFY_SECONDS = 5
"""CPU time for one answer."""
WALL_SECONDS: ContextVar[float] = ContextVar("wall", default=60.0)
"""By the clock: `judge.timeout_s`."""


def code(text: str, *, tests: list[str], seconds: int = CODE_SECONDS) -> Check:
    """The response's last fenced block is Python that passes all tests, statements that raise if they fail (such as
    `assert f(2) == 4`), within so many seconds of CPU time altogether. Else half the share that passes.

    The tests run in the same process as the code, one after the other: code written to deceive them (an `__eq__` that
    is always true, a search for the harness in memory) can. Ending early passes nothing.
    """
    asked = f"passes {len(tests)} tests" if len(tests) > 1 else "passes the test"
    blocks = fenced_blocks(text)
    if not blocks:
        return 0.0, asked, "no code block"
    reply = _ask("code", {"code": blocks[-1], "tests": tests}, seconds)
    verdicts = {item["test"]: item["error"] for item in reply.said if "test" in item}
    passed = sum(verdicts.get(index, "") is None for index in range(len(tests)))
    if passed == len(tests):
        return 1.0, asked, ""
    return 0.5 * passed / len(tests), asked, f"{passed} of {len(tests)}: {_reason(reply, verdicts, tests, seconds)}"


def _reason(reply: Reply, verdicts: dict[int, str | None], tests: list[str], seconds: int) -> str:
    """Why not all tests passed, as of the first that did not."""
    for item in reply.said:
        if item.get("error") is not None:
            return f"{item['error']}" + (f" in {tests[item['test']].strip()[:60]!r}" if "test" in item else "")
    if reply.end == "cpu":
        return f"over {seconds} s of CPU time"
    return reply.why if reply.end == "died" else "it ended before the tests did"


def math(text: str, *, answer: str) -> Check:
    """The response's answer equals this one by math-verify (github.com/huggingface/Math-Verify): LaTeX or plain, the
    last one, boxed before others. Else 0."""
    reply = _ask("math", {"answer": answer, "response": text}, VERIFY_SECONDS)
    said = {key: value for item in reply.said for key, value in item.items()}
    if "raised" in said:
        raise JudgeError("error", f"math-verify failed: {said['raised']}")
    late = "" if reply.end == "done" else f" ({reply.end})"
    return float(said.get("equal", False)), f"answer {answer}", f"{said.get('found') or 'none'}{late}"


def reasoning_gym(text: str, *, entry: dict[str, Any]) -> Check:
    """reasoning-gym's own verifier of the entry's data set gives 1 for what stands between <answer> tags, the last
    ones, or for the whole response where there are none. Else half of what it gives.

    `entry`: {"question", "answer", "metadata"} as the data set made it, as JSON text where the prompt file is parquet.
    """
    score = _gym_score(entry, text, extract=True)
    asked = f"solves {entry['metadata']['source_dataset']}"
    return 1.0 if score >= 1.0 else 0.5 * max(0.0, score), asked, f"{score:.2f}"


def _gym_score(entry: dict[str, Any], response: str, *, extract: bool) -> float:
    task = {"entry": entry, "response": response, "extract": extract}
    reply = _ask("reasoning_gym", task, VERIFY_SECONDS)
    for item in reply.said:
        if "score" in item:
            return float(item["score"])
    if reply.end == "cpu":
        raise JudgeError("timeout", f"reasoning-gym's verifier took over {VERIFY_SECONDS} s of CPU time")
    raised = [item["raised"] for item in reply.said if "raised" in item]
    raise JudgeError("error", f"reasoning-gym's verifier failed: {raised[0] if raised else reply.why}")


def _ask(mode: Mode, task: dict[str, Any], seconds: int) -> Reply:
    """Raises JudgeError where nothing is known of the response."""
    wall = WALL_SECONDS.get()
    try:
        reply = sandbox(mode).ask(task, seconds=seconds, wall=wall)
    except SandboxError as error:
        raise JudgeError("error", str(error)) from error
    if reply.end == "late":
        raise JudgeError("timeout", f"still running after judge.timeout_s = {wall:g} s, with CPU time left")
    return reply


# -- before a run ----------------------------------------------------------------------------------


def check_code(parameters: dict[str, Any]) -> None:
    """Raises ConfigError for tests that do not compile, or where nothing can be confined."""
    for test in parameters["tests"]:
        try:
            compile(test, "test", "exec")
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"test {test!r} is not Python: {error}") from error
    _check_sandbox()


@functools.cache
def _check_sandbox() -> None:
    """Once: raises ConfigError where nothing can be confined."""
    _check("code", {"code": "", "tests": []})


def check_math(parameters: dict[str, Any]) -> None:
    """Raises ConfigError for an answer that math-verify cannot read."""
    answer = parameters["answer"]
    said = _check("math", {"answer": answer}).said
    if not any(item.get("readable") for item in said):
        raise ConfigError(f"answer {answer!r} is nothing that math-verify can read; write LaTeX or a plain expression")


def check_reasoning_gym(parameters: dict[str, Any]) -> None:
    """Raises ConfigError for an entry of no data set, or whose own answer its verifier refuses."""
    entry = parameters["entry"]
    if not isinstance(entry.get("metadata"), dict) or "source_dataset" not in entry["metadata"]:
        raise ConfigError("entry must be as reasoning-gym makes it, with metadata.source_dataset")
    answer = entry.get("answer")
    task = {"entry": entry, "response": answer if isinstance(answer, str) else "", "extract": False}
    said = _check("reasoning_gym", task).said
    score = next((item["score"] for item in said if "score" in item), None)
    # Of puzzles with many solutions the entry holds none.
    if isinstance(answer, str) and score != 1.0:
        raise ConfigError(
            f"entry of {entry['metadata']['source_dataset']}: its own answer scores {score} (not every data set "
            "survives JSON); leave it out"
        )


def _check(mode: Mode, task: dict[str, Any]) -> Reply:
    try:
        return sandbox(mode).ask(task, seconds=VERIFY_SECONDS, wall=WALL_SECONDS.get())
    except SandboxError as error:
        hint = "" if mode == "code" else f"; `pip install online-po[rules]` for constraints of type {mode}"
        raise ConfigError(f"{error}{hint if 'ModuleNotFoundError' in str(error) else ''}") from error


def read_entry(value: Any) -> Any:
    """A dict, or one as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
