import asyncio
import threading
import time

import pytest

from judges.runtime import LocalJudgePool, build_judge, check_judge, judge_groups
from online_po.errors import ConfigError
from online_po.judge_configs import Python

from . import groups as users
from .groups import make_group

HERE = users.__name__


def config(function, **settings):
    return Python(function=f"{HERE}:{function}", **settings)


def judge(function, *groups, **settings):
    made = config(function, **settings)
    return asyncio.run(_judge(made, groups))


async def _judge(made, groups):
    return await judge_groups(build_judge(made), groups)


@pytest.mark.parametrize("function", ["length", "length_async", "awaitable"])
def test_a_score_for_each_response(function):
    one, two = judge(function, make_group("a", "bbb", name="x"), make_group("", name="y"))
    assert (one.prompt_id, one.scores, one.failure) == ("x", (1.0, 3.0), None)
    assert (two.prompt_id, two.scores) == ("y", (0.0,))


@pytest.mark.parametrize("function", ["lengths", "lengths_array"])
def test_a_whole_group(function):
    (verdict,) = judge(function, make_group("a", "bbb"), scope="group")
    assert verdict.scores == (1.0, 3.0) and all(type(score) is float for score in verdict.scores)


def test_functions_get_copies():
    group = make_group("a", "b", metadata={"key": [1]})
    assert judge("greedy", group)[0].scores == (1.0, 1.0)
    assert group.prompt.metadata == {"key": [1]}


@pytest.mark.parametrize(("name", "score"), [("int", 2.0), ("bool", 1.0), ("numpy", 0.5), ("fraction", 0.25)])
def test_numbers(name, score):
    assert judge("value", make_group(name))[0].scores == (score,)


def test_torch_numbers():
    torch = pytest.importorskip("torch")
    users.VALUES |= {"torch": torch.tensor(0.25), "torch bf16": torch.tensor([2.0], dtype=torch.bfloat16)}
    users.VALUES |= {"torch many": torch.zeros(2)}
    assert judge("value", make_group("torch", "torch bf16"))[0].scores == (0.25, 2.0)
    assert judge("value", make_group("torch many"))[0].failure.kind == "bad_value"


@pytest.mark.parametrize("name", ["nan", "inf", "none", "text", "list", "array", "huge", "complex"])
def test_what_is_no_score(name):
    good, bad = judge("value", make_group("int", "int", name="good"), make_group("int", name, name="bad"))
    assert good.scores == (2.0, 2.0)
    assert bad.scores is None and bad.failure.kind == "bad_value"
    assert bad.failure.message.startswith("response 1: ")


@pytest.mark.parametrize(
    ("give", "kind"),
    [
        ("short", "bad_length"),
        ("long", "bad_length"),
        ("none", "bad_value"),
        ("text", "bad_value"),
        ("dict", "bad_value"),
        ("set", "bad_value"),
        ("number", "bad_value"),
        ("nan", "bad_value"),
        ("tuple", None),
        ("generator", None),
    ],
)
def test_what_a_group_function_may_return(give, kind):
    (verdict,) = judge("group_value", make_group("a", "b", metadata={"give": give}), scope="group")
    assert (verdict.failure.kind if verdict.failure else None) == kind
    assert (verdict.scores is None) == (kind is not None)


@pytest.mark.parametrize(
    ("function", "response", "message"),
    [
        ("trouble", "raise", "response 1: ValueError: no such thing"),
        ("trouble", "exit", "response 1: SystemExit: 3"),
        ("trouble", "stop", "response 1: StopIteration"),
        ("trouble", "timeout error", "response 1: TimeoutError: the socket's, not ours"),
        ("trouble_async", "raise", "response 1: KeyError: 'k'"),
        ("trouble_async", "exit", "response 1: SystemExit: 3"),
        ("trouble_async", "cancel", "response 1: CancelledError"),
    ],
)
def test_errors_are_failures_of_their_group_alone(function, response, message):
    bad, good = judge(function, make_group("fine", response), make_group("fine"), timeout_s=20)
    assert bad.scores is None and (bad.failure.kind, bad.failure.message) == ("error", message)
    assert good.scores == (1.0,)


def test_messages_are_short():
    assert len(judge("trouble", make_group("long"))[0].failure.message) == 300


@pytest.mark.parametrize("function", ["trouble", "trouble_async"])
def test_hanging_calls_time_out_and_the_rest_goes_on(function):
    start = time.monotonic()
    # More hanging calls than places: without a place of its own each, the last groups would never be called.
    hanging = [make_group("hang", "hang", name=f"h{i}") for i in range(2)]
    verdicts = judge(function, *hanging, *[make_group("fine") for _ in range(5)], timeout_s=0.3, concurrency=2)
    assert time.monotonic() - start < 10
    assert [v.failure.kind for v in verdicts[:2]] == ["timeout", "timeout"]
    assert "judge.timeout_s = 0.3 s" in verdicts[0].failure.message
    assert [v.scores for v in verdicts[2:]] == [(1.0,)] * 5


def test_waiting_for_a_place_is_not_counted_as_time():
    # 20 calls of 10 ms, one at a time, take 200 ms; none of them takes 100.
    assert all(v.failure is None for v in judge("crowd", *[make_group("a")] * 20, concurrency=1, timeout_s=0.1))


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency(limit):
    users.peak = users.running = 0
    judge("crowd", *[make_group("a", "b", "c") for _ in range(5)], concurrency=limit)
    assert users.peak == limit


def test_threads_are_used_again():
    before = threading.active_count()
    judge("length", *[make_group("a", "b") for _ in range(50)], concurrency=4)
    assert threading.active_count() - before <= 4


def test_pool_without_ray():
    pool = LocalJudgePool(config("length"))
    try:
        first, second = pool.submit([make_group("a"), make_group("bb")]), pool.submit([make_group("ccc")])
        assert [v.scores for v in first.result(10)] == [(1.0,), (2.0,)]
        assert second.result(10)[0].scores == (3.0,)
        assert pool.submit([]).result(10) == []
    finally:
        pool.close()


# -- found out before anything starts ------------------------------------------------------------------


@pytest.mark.parametrize("function", ["length", "length_async", "defaults", "Scorer.score", "awaitable"])
def test_good_functions(function):
    check_judge(config(function))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{HERE}:lenght", "did you mean 'length'"),
        (f"{HERE}:Scorer.scor", "did you mean 'score'"),
        (f"{HERE}:not_a_function", "is a int, not a function"),
        (f"{HERE}:Scorer", "is a type, not a function"),
        (f"{HERE}:two_arguments", "cannot be called as function.*three positional"),
        (f"{HERE}:keyword_only", "cannot be called as function"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'; run from the folder"),
        ("json.nothing:f", "there is no module 'json.nothing'"),
    ],
)
def test_bad_functions(name, message):
    with pytest.raises(ConfigError, match=rf"judge\.function is .*{message}"):
        check_judge(Python(function=name))


def test_modules_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_xyz.py").write_text("def f(p, r, m): return 1.0\n")
    (tmp_path / "broken_xyz.py").write_text("import no_such_thing_xyz\n")
    (tmp_path / "raising_xyz.py").write_text("raise OSError('no weights')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    check_judge(Python(function="my_rewards_xyz:f"))
    for module, message in (
        ("my_reward_xyz", "did you mean 'my_rewards_xyz'"),
        ("broken_xyz", "importing 'broken_xyz' fails with ModuleNotFoundError: No module named 'no_such_thing_xyz'"),
        ("raising_xyz", "importing 'raising_xyz' fails with OSError: no weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_judge(Python(function=f"{module}:f"))
