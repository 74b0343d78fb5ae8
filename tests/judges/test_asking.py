import asyncio
import re
import sqlite3
from bisect import bisect_left
from dataclasses import replace
from itertools import pairwise

import pytest

from judges.asking import ROUND, Answer, Asker, Question
from judges.limits import BREAK_AFTER
from judges.protocol import JudgeError
from judges.runtime import LocalJudgePool, judge_groups
from judges.store import JudgeStore, prepare
from online_po.errors import BudgetError, LedgerError
from online_po.judge_cache import judge_statistics
from online_po.judge_configs import Implicit, LlmPairwise, LlmScore, Plugin, Python, RewardModel, SelfScore

from .clock import run_fast
from .groups import make_group


def question(n: int = 0, text: str = "a", **more) -> Question:
    group = make_group(text, name=f"q{n}")
    return Question(prompt=group.prompt, responses=group.responses, **more)


def endpoint(**settings) -> LlmScore:
    return LlmScore(model="m", **settings)


class Endpoint:
    """Answers 1, 2, ... or fails as it is told; knows when it was asked."""

    def __init__(self, *errors: Exception | None, seconds: float = 0.0) -> None:
        self.errors, self.seconds = list(errors), seconds
        self.times: list[float] = []
        self.running = self.peak = 0

    async def __call__(self) -> Answer:
        number = len(self.times)
        self.times.append(asyncio.get_running_loop().time())
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        error = self.errors[number] if number < len(self.errors) else None
        if error is not None:
            raise error
        return Answer(value=number + 1, prompt_tokens=90, response_tokens=10, cost=0.001)


def away(message: str = "refused", retry_after: float | None = None) -> JudgeError:
    return JudgeError("transport", message, retry=True, retry_after=retry_after)


# -- tries ---------------------------------------------------------------------------------------------


def test_waits_grow_and_what_the_endpoint_wants_is_honoured():
    asked = Endpoint(away(), away(), away(retry_after=40.0), away())
    assert run_fast(Asker(endpoint()).ask(question(), asked)).value == 5
    gaps = [later - earlier for earlier, later in pairwise(asked.times)]
    assert 1 <= gaps[0] <= 2 and 2 <= gaps[1] <= 3 and 40 <= gaps[2] <= 41 and 8 <= gaps[3] <= 9


def test_an_answer_of_no_use_is_asked_for_again_at_once():
    asked = Endpoint(*[JudgeError("unparsable", "who knows", retry=True)] * 4)
    assert run_fast(Asker(endpoint()).ask(question(), asked)).value == 5
    assert asked.times[-1] - asked.times[0] < 0.5


def test_no_more_tries_than_set():
    asked = Endpoint(*[away(f"e{n}") for n in range(9)])
    with pytest.raises(JudgeError, match=r"e2 \(asked 3 times\)") as caught:
        run_fast(Asker(endpoint(attempts=3)).ask(question(), asked))
    assert caught.value.kind == "transport" and len(asked.times) == 3


@pytest.mark.parametrize(
    "error",
    [JudgeError("refusal", "no"), JudgeError("error", "401"), KeyError("bug"), away(retry_after=86400.0)],
    ids=str,
)
def test_what_does_not_help_is_not_tried_again(error):
    asked = Endpoint(error)
    with pytest.raises(type(error)) as caught:
        run_fast(Asker(endpoint()).ask(question(), asked))
    assert caught.value is error and len(asked.times) == 1


@pytest.mark.parametrize(("config", "tries"), [(endpoint(timeout_s=5), 2), (Python(function="a:b", timeout_s=5), 1)])
def test_slow_answers(config, tries):
    slow = Endpoint(seconds=6)

    async def hurry() -> Answer:
        slow.seconds = 6 if not slow.times else 1
        return await slow()

    asker = Asker(config)
    if tries == 1:
        with pytest.raises(JudgeError, match=r"no answer within judge\.timeout_s = 5 s") as caught:
            run_fast(asker.ask(question(), hurry))
        assert caught.value.kind == "timeout"
    else:
        assert run_fast(asker.ask(question(), hurry)).value == 2
    assert len(slow.times) == tries


def test_judges_that_batch_have_no_time_out_and_no_places():
    config = SelfScore()
    asked = Endpoint(seconds=10 * config.timeout_s)

    async def crowd():
        asker = Asker(config)
        return await asyncio.gather(*(asker.ask(question(n), asked) for n in range(100)))

    assert len(run_fast(crowd())) == asked.peak == 100


def test_places():
    asked = Endpoint(seconds=1)

    async def crowd():
        asker = Asker(endpoint(concurrency=3))
        await asyncio.gather(*(asker.ask(question(n), asked) for n in range(10)))

    run_fast(crowd())
    assert asked.peak == 3


def test_a_value_that_is_not_json_is_no_answer():
    async def nonsense() -> Answer:
        return Answer(value=float("nan"))

    with pytest.raises(ValueError):
        run_fast(Asker(endpoint()).ask(question(), nonsense))


# -- the same question ---------------------------------------------------------------------------------


def test_the_same_question_in_flight_is_asked_once_even_if_who_asked_first_is_gone():
    asked = Endpoint(seconds=1)

    async def go():
        asker = Asker(endpoint())
        first = asyncio.create_task(asker.ask(question(), asked))
        second = asyncio.create_task(asker.ask(question(), asked))
        other = asyncio.create_task(asker.ask(question(1), asked))
        await asyncio.sleep(0.5)
        first.cancel()
        return (await second).value, (await other).value, first.cancelled()

    assert run_fast(go()) == (1, 2, True)
    assert len(asked.times) == 2


def test_what_makes_a_question_another_one():
    config = endpoint()
    asker = Asker(config)
    two = make_group("a", "b")
    turned = [Question(prompt=two.prompt, responses=order) for order in (two.responses, two.responses[::-1])]
    questions = [question(), question(1), question(text="b"), question(sample=1), question(about="x"), *turned]
    assert len({each.key(asker._judge) for each in questions}) == len(questions)


def test_token_ids_count_where_a_judge_reads_them():
    asked, again = question(), question()
    again = replace(again, responses=(replace(again.responses[0], token_ids=(7, 7, 7)),))
    assert asked.key("") == again.key("") and asked.key("", by_ids=True) != again.key("", by_ids=True)
    assert not any(kind.by_ids for kind in (LlmScore, RewardModel, Python, SelfScore))
    assert Implicit.by_ids and Plugin.by_ids


def test_what_makes_a_judge_another_one():
    same = [endpoint(), endpoint(timeout_s=1, attempts=2, base_url="http://x/v1", workers=3)]
    others = [endpoint(temperature=1), LlmScore(model="n"), endpoint(scale_max=5)]
    # How often and for which pairs it is asked changes no answer.
    assert Asker(endpoint(temperature=1, samples=3))._judge == Asker(others[0])._judge
    assert Asker(LlmPairwise(model="m", rank="tournament", orders="one"))._judge == Asker(LlmPairwise(model="m"))._judge
    judges = [Asker(config)._judge for config in [*same, *others]]
    assert judges[0] == judges[1] and len(set(judges)) == 1 + len(others)
    asker = Asker(endpoint())
    asker.identify(weights="w")
    assert asker._judge not in judges


# -- an endpoint that is away --------------------------------------------------------------------------


class Away:
    """Not there between two times."""

    def __init__(self, begin: float, end: float) -> None:
        self.begin, self.end = begin, end
        self.refused: list[float] = []
        self.answered = 0

    async def __call__(self) -> Answer:
        await asyncio.sleep(0.5)
        now = asyncio.get_running_loop().time() - 1000
        if self.begin <= now < self.end:
            self.refused.append(now)
            raise away()
        self.answered += 1
        return Answer(value=1)


async def _many(asker: Asker, asked: Away, count: int) -> list:
    return await asyncio.gather(*(asker.ask(question(n), asked) for n in range(count)), return_exceptions=True)


def test_all_wait_for_an_endpoint_that_is_away_and_one_at_a_time_tries():
    asked = Away(5, 305)
    outcomes = run_fast(_many(Asker(endpoint(concurrency=8)), asked, 400))
    assert [answer.value for answer in outcomes] == [1] * 400 and asked.answered == 400
    # So many failures were needed to see it, and some were under way; then one try every while.
    assert len([time for time in asked.refused if time > 20]) < 20
    probes = [time for time in asked.refused if time > 20]
    assert all(later - earlier >= 0.75 for earlier, later in pairwise(probes))


@pytest.mark.parametrize(("begin", "patience"), [(0, 30), (1, 600)])
def test_an_endpoint_that_stays_away_is_given_up(begin, patience):
    asked = Away(begin, 1e9)

    async def go():
        outcomes = await _many(Asker(endpoint(concurrency=8, attempts=50)), asked, 100)
        return outcomes, asyncio.get_running_loop().time() - 1000

    outcomes, seconds = run_fast(go())
    failures = [outcome for outcome in outcomes if isinstance(outcome, JudgeError)]
    assert {failure.kind for failure in failures} == {"transport"}
    assert len(failures) == 100 - asked.answered
    assert "has not answered for" in str(failures[-1]) and "last: refused" in str(failures[-1])
    assert patience <= seconds < patience + 120
    assert len(asked.refused) < BREAK_AFTER + 8 + 20


@pytest.mark.parametrize("after", [20.0, 50.0, 120.0])
def test_who_says_when_to_come_back_is_there_and_left_alone_until_then(after):
    times: list[float] = []

    async def busy() -> Answer:
        await asyncio.sleep(0.1)
        times.append(asyncio.get_running_loop().time() - 1000)
        if times[-1] < after - 1:
            raise away("status 429", retry_after=after)
        return Answer(value=1)

    outcomes = run_fast(_many(Asker(endpoint()), busy, 48))
    assert [outcome.value for outcome in outcomes] == [1] * 48
    assert not [time for time in times if 1 < time < after]


def test_nobody_gives_up_while_one_tries():
    begun: list[float] = []

    async def starting() -> Answer:
        begun.append(asyncio.get_running_loop().time() - 1000)
        if begun[-1] < 1:
            raise away()
        await asyncio.sleep(50)  # loads its weights
        return Answer(value=1)

    outcomes = run_fast(_many(Asker(endpoint(timeout_s=100)), starting, 48))
    assert [outcome.value for outcome in outcomes] == [1] * 48


def test_single_failures_stop_nobody():
    asked = Endpoint(*[away() if n % 3 else None for n in range(60)], seconds=0.1)

    async def go():
        asker = Asker(endpoint(concurrency=16))
        await asyncio.gather(*(asker.ask(question(n), asked) for n in range(40)))
        assert not asker._breaker._since

    run_fast(go())


# -- rate limits ---------------------------------------------------------------------------------------


def most_in_a_minute(times: list[float]) -> int:
    times = sorted(times)
    return max(bisect_left(times, begin + 60) - number for number, begin in enumerate(times))


@pytest.mark.parametrize(("limit", "workers"), [(7, 1), (60, 1), (1200, 1), (60, 4), (3, 4)])
def test_requests_a_minute(limit, workers):
    asked = Endpoint()
    count = 3 * limit // workers + 2

    async def go():
        asker = Asker(endpoint(requests_per_minute=limit, concurrency=1000), workers=workers)
        await asyncio.gather(*(asker.ask(question(n), asked) for n in range(count)))
        return asyncio.get_running_loop().time() - 1000

    seconds = run_fast(go())
    assert most_in_a_minute(asked.times) * workers <= max(limit, workers)
    assert seconds <= 60 * count * workers / limit * 1.05


def test_tokens_a_minute():
    asked = Endpoint(seconds=2)

    async def go():
        asker = Asker(endpoint(tokens_per_minute=1000, concurrency=4))
        await asyncio.gather(*(asker.ask(question(n), asked) for n in range(60)))
        return asyncio.get_running_loop().time() - 1000

    # 60 calls of 100 tokens are 6 minutes' worth; the first four are taken to need 800 each.
    assert 5 * 60 <= run_fast(go()) <= 9.5 * 60
    assert most_in_a_minute(asked.times) <= 10


def test_tokens_that_nobody_saw_coming():
    asked = Endpoint()

    async def long() -> Answer:
        return replace(await asked(), prompt_tokens=100 if len(asked.times) < 10 else 1990)

    async def go():
        asker = Asker(endpoint(tokens_per_minute=1000, concurrency=1))
        for n in range(12):
            await asker.ask(question(n), long)

    run_fast(go())
    assert asked.times[10] - asked.times[9] >= 110  # the 2000 tokens before have to leak away


# -- memory, accounts, budget --------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "judge_cache.sqlite"
    prepare(path)
    return path


def ask_all(cache, config, asked, numbers, *, round_=1, run=asyncio.run):
    """Outcomes of so many questions, by a process that is new to the cache."""

    async def go():
        ROUND.set(round_)
        store = JudgeStore(cache)
        asker = Asker(config, store)
        try:
            return await asyncio.gather(*(asker.ask(question(n), asked) for n in numbers), return_exceptions=True)
        finally:
            await asyncio.to_thread(store.close)

    return run(go())


def test_nothing_is_asked_twice(cache):
    asked = Endpoint()
    first = ask_all(cache, endpoint(), asked, [*range(10), *range(10)])
    again = ask_all(cache, endpoint(timeout_s=1), asked, range(12), round_=2)
    assert len(asked.times) == 12
    assert [answer.value for answer in first] == [*range(1, 11)] * 2
    assert again[:10] == first[:10]
    one, two = judge_statistics(cache, 1), judge_statistics(cache, 2)
    assert (one["calls"], one["hits"], two["calls"], two["hits"]) == (10, 10, 2, 10)
    assert (one["prompt_tokens"], one["response_tokens"]) == (900, 100) and one["cost"] == pytest.approx(0.01)
    assert 0 <= one["latency_p50"] <= one["latency_p90"] <= one["latency_p99"]
    assert judge_statistics(cache, 3)["latency_p50"] is None


def test_half_an_emoji_costs_nobody_an_answer(cache):
    async def says() -> Answer:
        return Answer(value=1, rationale="good \ud83d")

    (first,) = ask_all(cache, endpoint(), says, range(1))
    (again,) = ask_all(cache, endpoint(), says, range(1))
    assert first == again and first.rationale == "good ?"


def test_failures_are_counted_and_never_remembered(cache):
    bad = JudgeError("unparsable", "?", prompt_tokens=7, response_tokens=3, cost=0.5)
    asked = Endpoint(bad, away(retry_after=0.0))
    failed, good = ask_all(cache, endpoint(concurrency=1), asked, range(2))
    assert failed is bad and good.value == 3
    assert ask_all(cache, endpoint(), asked, range(2))[0].value == 4
    found = judge_statistics(cache, 1)
    assert found["failed_calls"] == {"transport": 1, "unparsable": 1} and found["retries"] == 1
    assert (found["calls"], found["hits"], found["cost"]) == (4, 1, pytest.approx(0.502))


@pytest.mark.parametrize("setting", ["calls", "calls_per_round"])
def test_calls_in_the_budget(cache, setting):
    asked = Endpoint(seconds=0.01)
    outcomes = ask_all(cache, endpoint(budget={setting: 5}, concurrency=4), asked, range(20))
    assert len(asked.times) == 5
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    errors = [outcome for outcome in outcomes if not isinstance(outcome, Answer)]
    assert len(answers) == 5 and all(isinstance(error, BudgetError) for error in errors)
    assert re.match(
        rf"judge\.budget\.{setting} = 5 is spent in round 1: 5 calls( \(\d under way\))? and 0\.00\d in money in "
        r"the round, 5 calls.* in the run\. Everything judged is kept",
        str(errors[0]),
    )
    assert f"online-po run CONFIG judge.budget.{setting}=" in str(errors[0])
    # More money: only what is not known is asked.
    more = ask_all(cache, endpoint(budget={setting: 20}), asked, range(20))
    assert all(isinstance(outcome, Answer) for outcome in more) and len(asked.times) == 20
    # And another round.
    other = ask_all(cache, endpoint(budget={setting: 20}), asked, range(20, 22), round_=2)
    assert all(isinstance(outcome, Answer if setting == "calls_per_round" else BudgetError) for outcome in other)


def test_tries_are_calls(cache):
    asked = Endpoint(away(), away())
    (outcome,) = ask_all(cache, endpoint(budget={"calls": 2}, attempts=3), asked, range(1), run=run_fast)
    assert isinstance(outcome, BudgetError) and len(asked.times) == 2


def money(**budget):
    # A call costs 0.001 (`Endpoint`), and before it is made at most 8100-odd tokens at 0.0000002.
    return endpoint(budget=budget, prompt_price=0.2, response_price=0.2, max_tokens=100, concurrency=8)


@pytest.mark.parametrize("setting", ["money", "money_per_round"])
def test_money_in_the_budget(cache, setting):
    asked = Endpoint(seconds=0.01)
    outcomes = ask_all(cache, money(**{setting: 0.02}), asked, range(60))
    spent = judge_statistics(cache, 1)["cost"]
    assert spent == pytest.approx(0.019) and len(asked.times) == 19
    (error, *_) = (outcome for outcome in outcomes if isinstance(outcome, BudgetError))
    assert f"judge.budget.{setting} = 0.02 is spent" in str(error) and "the next call may cost up to" in str(error)


def test_money_is_held_for_calls_that_a_killed_process_left(cache):
    async def leave():
        store = JudgeStore(cache)
        asker = Asker(money(money=1.0), store)
        asyncio.get_running_loop().create_task(asker.ask(question(), Endpoint(seconds=1000)))
        while not store._connection.execute("SELECT count(*) FROM calls").fetchone()[0]:
            await asyncio.sleep(0.01)
        return store

    asyncio.run(leave())  # never closed: as a killed process leaves it
    prepare(cache)
    found = judge_statistics(cache, 0)
    assert found["failed_calls"] == {"lost": 1} and 0.0016 < found["cost"] < 0.002
    with sqlite3.connect(cache) as connection:
        assert connection.execute("SELECT * FROM spent").fetchall() == [(0, 1, found["cost"])]


def test_what_is_under_way_is_waited_for_before_the_run_pauses(cache):
    slow = Endpoint(seconds=0.3)

    async def go():
        store = JudgeStore(cache)
        asker = Asker(endpoint(budget={"calls": 3}), store)
        tasks = [asyncio.create_task(asker.ask(question(n), slow)) for n in range(4)]
        with pytest.raises(BudgetError):
            await asyncio.gather(*tasks)
        known = [await store.find(question(n).key(asker._judge), 1, "") for n in range(4)]
        await asyncio.to_thread(store.close)
        return known

    assert sum(answer is not None for answer in asyncio.run(go())) == 3


def test_what_was_begun_is_waited_for_too(cache):
    """The dear question ends the budget; cheap ones behind it are let out in the same breath."""
    asked = Endpoint(seconds=0.2)

    async def go():
        store = JudgeStore(cache)
        asker = Asker(money(money=0.01), store)
        dear = asyncio.create_task(asker.ask(question(0, text="x" * 200_000), asked))
        cheap = [asyncio.create_task(asker.ask(question(n), asked)) for n in range(1, 4)]
        with pytest.raises(BudgetError):
            await dear
        assert asked.running == 0
        outcomes = await asyncio.gather(*cheap, return_exceptions=True)
        await asyncio.to_thread(store.close)
        return outcomes

    outcomes = asyncio.run(go())
    assert sum(isinstance(outcome, Answer) for outcome in outcomes) == len(asked.times)


@pytest.mark.parametrize(
    ("settings", "failures", "asks"),
    [({"requests_per_minute": 120}, 0, 40), ({}, BREAK_AFTER, 40), ({}, 1, 1)],
    ids=["for its turn", "for the endpoint", "for another try"],
)
def test_who_waits_does_not_hold_up_a_pause(cache, settings, failures, asks):
    asked = Endpoint(*[away(retry_after=300.0)] * failures)

    async def go():
        store = JudgeStore(cache)
        asker = Asker(endpoint(budget={"calls": 100}, concurrency=BREAK_AFTER, **settings), store)
        waiting = [asyncio.create_task(asker.ask(question(n), asked)) for n in range(asks)]
        await asyncio.sleep(0.5)
        await asker.drain()
        done, late = await asyncio.wait(waiting, timeout=5)
        await asyncio.to_thread(store.close)
        return {type(error) for task in done if (error := task.exception())}, len(late)

    assert asyncio.run(go()) == ({BudgetError}, 0)


def test_draining(cache):
    slow = Endpoint(seconds=0.2)

    async def go():
        store = JudgeStore(cache)
        asker = Asker(endpoint(), store, workers=2)
        member = asker.member(endpoint(temperature=1))
        first, second = (asyncio.create_task(each.ask(question(), slow)) for each in (asker, member))
        while slow.running < 2:
            await asyncio.sleep(0.01)
        await member.drain()
        assert len(slow.times) == 2 and not slow.running
        assert (await first).value and (await second).value
        with pytest.raises(BudgetError):
            await asker.ask(question(5), slow)
        await asyncio.to_thread(store.close)

    asyncio.run(go())


def test_processes_that_ask_the_same_at_once_ask_once(cache):
    asked = Endpoint(seconds=0.2)

    async def go():
        stores = [JudgeStore(cache) for _ in range(2)]
        askers = [Asker(endpoint(), store, workers=2) for store in stores]
        answers = await asyncio.gather(*(asker.ask(question(), asked) for asker in askers))
        for store in stores:
            await asyncio.to_thread(store.close)
        return answers

    assert [answer.value for answer in asyncio.run(go())] == [1, 1] and len(asked.times) == 1


def test_members_have_their_own_answers_and_one_budget(cache):
    asked = Endpoint()

    async def go():
        store = JudgeStore(cache)
        asker = Asker(endpoint(budget={"calls": 3}), store)
        members = [asker.member(endpoint()), asker.member(endpoint(temperature=1))]
        outcomes = [
            await asyncio.gather(member.ask(question(n), asked), return_exceptions=True)
            for n in range(2)
            for member in members
        ]
        await asyncio.to_thread(store.close)
        return [outcome for (outcome,) in outcomes]

    *answers, last = asyncio.run(go())
    assert [answer.value for answer in answers] == [1, 2, 3] and isinstance(last, BudgetError)


def test_members_that_are_the_same_judge_ask_once(cache):
    asked = Endpoint(seconds=0.05)

    async def go():
        store = JudgeStore(cache)
        asker = Asker(endpoint(), store)
        members = [asker.member(endpoint(temperature=1)) for _ in range(2)]
        answers = await asyncio.gather(*(member.ask(question(), asked) for member in members))
        await asyncio.to_thread(store.close)
        return [answer.value for answer in answers]

    assert asyncio.run(go()) == [1, 1] and len(asked.times) == 1


# -- through the runtime -------------------------------------------------------------------------------

USER_MODULE = """
from pathlib import Path

def score(prompt, response, metadata):
    with Path({log!r}).open("a") as log:
        log.write(response + "\\n")
    return {score}
"""


def test_a_changed_function_is_another_judge(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    log = tmp_path / "log"

    def scores(score: str, module: str = "user_judge_r") -> tuple:
        source = USER_MODULE.format(log=str(log), score=score)
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(__import__("sys").modules, module, raising=False)
        __import__("importlib").invalidate_caches()
        pool = LocalJudgePool(Python(function=f"{module}:score"), cache)
        try:
            (verdict,) = pool.submit([make_group("a", "bb", "a")], 1).result(20)
            return verdict.scores
        finally:
            pool.close()

    assert scores("len(response)") == (1.0, 2.0, 1.0)
    assert scores("len(response)") == (1.0, 2.0, 1.0)
    assert sorted(log.read_text().split()) == ["a", "bb"]  # threads: in no order
    assert scores("-len(response)") == (-1.0, -2.0, -1.0)
    assert sorted(log.read_text().split()) == ["a", "a", "bb", "bb"]


def test_a_spent_budget_and_a_broken_cache_are_no_failures_of_groups(cache):
    config = Python(function=f"{make_group.__module__}:length", budget={"calls": 1})
    pool = LocalJudgePool(config, cache)
    try:
        with pytest.raises(BudgetError, match="judge.budget.calls = 1 is spent in round 7"):
            pool.submit([make_group("a", "bb", "ccc")], 7).result(20)
    finally:
        pool.close()

    class Broken:
        async def judge(self, group):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.fail())

        async def fail(self):
            raise LedgerError("the disk is full")

    with pytest.raises(LedgerError, match="the disk is full"):
        asyncio.run(judge_groups(Broken(), [make_group("a")]))
