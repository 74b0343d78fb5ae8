"""Constraints that run what a response says: code, mathematics, reasoning-gym's verifiers. In the real sandbox."""

import asyncio
import json

import pytest

from judges.rules import read_constraints, score_response, validate_constraints, verified
from judges.runtime import build_judge, judge_groups
from judges.sandbox import client
from online_po.errors import ConfigError
from online_po.judge_configs import Rules

from .groups import make_group
from .test_rules import GYM_ENTRY

TESTS = ["assert double(2) == 4", "assert double(0) == 0", "assert double('a') == 'aa'", "assert double(-1) == -2"]


def verdict(text, **constraint):
    return score_response(text, read_constraints({"constraints": [constraint]}))


def block(code):
    return f"Here it is:\n```python\n{code}\n```\nThat is all."


# -- code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score", "found"),
    [
        (block("def double(x):\n    return x * 2"), 1.0, "passes 4 tests ✓"),
        (block("import numpy\ndef double(x):\n    return x + x"), 1.0, "✓"),
        (block("def double(x):\n    return 2 * abs(x)"), 0.25, "2 of 4: TypeError: bad operand"),
        (block("def double(x):\n    return x + 2"), 0.125, '1 of 4: AssertionError in "assert double(0) == 0"'),
        ("```\nraise\n```\nor rather\n```\ndef double(x):\n  return x * 2\n```", 1.0, "✓"),
        (block("def double(x)"), 0.0, "0 of 4: SyntaxError"),
        (block("1 / 0"), 0.0, "0 of 4: ZeroDivisionError: division by zero"),
        ("def double(x):\n    return x * 2", 0.0, "no code block"),
        ("```python\ndef double(x):\n    return x * 2", 0.0, "no code block"),
    ],
)
def test_code(text, score, found):
    value, rationale = verdict(text, type="code", tests=TESTS)
    assert value == score and found.replace('"', "'") in rationale.replace('"', "'")


@pytest.mark.parametrize("code", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit(0)"])
def test_ending_early_passes_nothing(code):
    assert verdict(block(code), type="code", tests=TESTS)[0] == 0.0


def test_what_passed_before_the_time_was_up_counts():
    code = "def double(x):\n    while x == 0: pass\n    return x * 2"
    value, rationale = verdict(block(code), type="code", tests=TESTS, seconds=1)
    assert (value, rationale) == (0.125, "passes 4 tests ✗ (1 of 4: over 1 s of CPU time)")


def test_the_judge_says_of_code_that_only_waits_that_it_does_not_know():
    metadata = {"constraints": [{"type": "code", "tests": ["assert True"]}]}
    waits = make_group(block("x = 1"), block("import time; time.sleep(60)"), metadata=metadata, name="waits")
    good = make_group(block("x = 1"), block("x = "), metadata=metadata)
    verdicts = asyncio.run(judge_groups(build_judge(Rules(timeout_s=1.5)), [waits, good]))
    assert verdicts[0].scores is None and verdicts[0].failure.kind == "timeout"
    assert "response 1: still running after judge.timeout_s = 1.5 s" in verdicts[0].failure.message
    assert verdicts[1].scores == (1.0, 0.0)


# -- mathematics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("1/2", "So it is $\\frac{2}{4}$.", 1.0),
        ("\\frac{1}{2}", "The answer is 0.5", 1.0),
        ("$x^2 + 2x + 1$", "\\boxed{(x+1)^2}", 1.0),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", 1.0),
        ("7", "First 3, then 4: the answer is 7.", 1.0),
        ("7", "The answer is 8.", 0.0),
        ("7", "I do not know.", 0.0),
        ("$x^2$", "\\boxed{x^3}", 0.0),
    ],
)
def test_math(answer, text, score):
    assert verdict(text, type="math", answer=answer)[0] == score


def test_mathematics_that_takes_for_ever_is_not_equal():
    value, rationale = verdict("The answer is $9^{9^{9^{9}}}$", type="math", answer="7")
    assert value == 0.0 and rationale.startswith("answer 7 ✗")


def test_what_math_verify_would_evaluate_changes_nothing(tmp_path):
    """sympy's parser evaluates text as Python: it is let loose on responses in the sandbox alone."""
    spoilt = tmp_path / "spoilt"
    for text in (f"__import__('pathlib').Path('{spoilt}').touch()", f"$open('{spoilt}', 'w')$"):
        assert verdict(f"The answer is {text}", type="math", answer="7")[0] == 0.0
    assert not spoilt.exists()


# -- reasoning-gym -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>7</answer> no: <answer> -4 </answer>", 1.0),
        ("-4", 1.0),
        ("<answer>4</answer>", 0.0),
        ("the answer is -4", 0.5 * 2 / 16),  # reasoning-gym: the share of the text that is the answer
    ],
)
@pytest.mark.parametrize("entry", [GYM_ENTRY, json.dumps(GYM_ENTRY)])
def test_reasoning_gym(text, score, entry):
    value, rationale = verdict(text, type="reasoning_gym", entry=entry)
    assert value == pytest.approx(score) and "basic_arithmetic" in rationale


def test_reasoning_gyms_own_entries():
    gym = pytest.importorskip("reasoning_gym")
    for name in ("leg_counting", "countdown", "sudoku", "knights_knaves"):
        made = gym.create_dataset(name, size=1, seed=3)[0]
        entry = json.loads(json.dumps(made, default=str))
        constraint = {"type": "reasoning_gym", "entry": entry}
        validate_constraints({"constraints": [constraint]})
        assert verdict(f"<answer>{entry['answer']}</answer>", **constraint)[0] == 1.0
        assert verdict("<answer>nothing of the kind</answer>", **constraint)[0] < 0.5


# -- found out before a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"type": "code", "tests": ["assert f("]}, "test 'assert f\\(' is not Python: "),
        ({"type": "code", "tests": []}, "tests must be a list"),
        ({"type": "code", "tests": ["assert f"], "seconds": 0}, "seconds must be a whole number of at least 1"),
        ({"type": "math", "answer": "\\frac{1}{"}, "nothing that math-verify can read"),
        ({"type": "reasoning_gym", "entry": {"question": "?"}}, "metadata.source_dataset"),
        ({"type": "reasoning_gym", "entry": GYM_ENTRY | {"metadata": {"source_dataset": "nope"}}}, "nope"),
        ({"type": "reasoning_gym", "entry": "{"}, "entry must be an object, or one as JSON text"),
    ],
)
def test_bad_parameters(constraint, message):
    with pytest.raises(ConfigError, match=message):
        validate_constraints({"constraints": [constraint]})


def test_good_parameters():
    constraints = [{"type": "code", "tests": TESTS}, {"type": "math", "answer": "\\sqrt{2}"}]
    validate_constraints({"constraints": [*constraints, {"type": "reasoning_gym", "entry": GYM_ENTRY}]})


def test_a_library_that_is_not_there_is_named_with_the_extra(monkeypatch):
    bare = client.Sandbox("math")
    hidden = "import sys; sys.modules['math_verify'] = None; "
    monkeypatch.setattr(client, "_START", hidden + client._START)
    monkeypatch.setattr(verified, "sandbox", lambda mode: bare)
    with pytest.raises(ConfigError, match=r"math_verify.*pip install online-po\[rules\]"):
        validate_constraints({"constraints": [{"type": "math", "answer": "7"}]})
