"""The judge processes, on a real Ray with two workers and no other resources."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

import psutil
import pytest

from online_po.config import Config
from online_po.errors import BudgetError, ConfigError, EngineError, LedgerError
from online_po.judge_cache import judge_statistics
from tests.judges.groups import make_group
from tests.judges.plugin_package import install

pytestmark = pytest.mark.distributed

USER_MODULE = """
import os, time

def length(prompt, response, metadata):
    return len(response)

def process(prompt, response, metadata):
    time.sleep(0.2)
    return os.getpid()

def die(prompt, response, metadata):
    if response == "die":
        os._exit(1)
    time.sleep(60)

def slow(prompt, response, metadata):
    with open(metadata["log"], "a") as log:
        log.write(f"{os.getpid()} {response}\\n")
    time.sleep(0.05)
    return float(response)

def only_on_the_driver(prompt, response, metadata):
    return 1.0

if os.environ.get("ONLINE_PO_TEST_DRIVER") != str(os.getpid()):
    del only_on_the_driver
"""


@pytest.fixture(scope="module")
def ray_here():
    import ray

    from actors import cluster

    cluster.start(Config.parse(DATA).ray)
    yield
    ray.shutdown()


DATA = {
    "run": {"name": "x"},
    "model": {"path": "x"},
    "prompts": {"path": "x.jsonl"},
    "eval": {"every": 0},
}


@pytest.fixture
def group(ray_here, tmp_path, monkeypatch):
    """Makes a ready JudgeGroup on a function of a module in the working folder."""
    from actors.judges import JudgeGroup

    (tmp_path / "user_judge_abc.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    made = []

    def make(function: str, **settings) -> JudgeGroup:
        judge = {"kind": "python", "function": f"user_judge_abc:{function}", **settings}
        pool = JudgeGroup(Config.parse({**DATA, "judge": judge}))
        made.append(pool)
        pool.ready(120)
        return pool

    yield make
    for pool in made:
        pool.close()


def test_judges_with_a_module_of_the_working_folder(group):
    pool = group("length")
    futures = [pool.submit([make_group("a" * n, "", name=f"{n}"), make_group("bb")]) for n in range(20)]
    for n, future in enumerate(futures):
        first, second = future.result(60)
        assert (first.prompt_id, first.scores, second.scores) == (f"{n}", (float(n), 0.0), (2.0,))


def test_work_is_shared(group):
    pool = group("process", workers=2, concurrency=1)
    futures = [pool.submit([make_group("a", name=f"{n}")]) for n in range(4)]
    pids = [future.result(60)[0].scores[0] for future in futures]
    assert pids.count(pids[0]) == 2 and os.getpid() not in pids


def test_a_process_that_dies_too_often_is_an_engine_error(group):
    pool = group("die", workers=2)
    pool.submit([make_group("wait")] * 4)  # it goes where less is under way: always to the other process
    doomed = pool.submit([make_group("die")])
    with pytest.raises(
        EngineError, match=r"judge process 1 was started again 3 times within \d+ s .* and died: its process was"
    ):
        doomed.result(120)


@pytest.fixture
def asked(tmp_path):
    """(40 groups of one response each, what gives the responses that the function `slow` was called with)."""
    log = tmp_path / "log"
    groups = [make_group(f"{n}", metadata={"log": str(log)}) for n in range(40)]
    return groups, lambda: [line.split()[1] for line in log.read_text().splitlines()]


def test_after_a_kill_no_answered_question_is_asked_again(group, asked, tmp_path):
    groups, calls = asked
    pool = group("slow", concurrency=2)
    futures = [pool.submit([each], 3) for each in groups]
    answered = {n for n in range(8) if futures[n].result(60)[0].scores == (float(n),)}
    assert len(answered) == 8
    os.kill(int((tmp_path / "log").read_text().split()[0]), signal.SIGKILL)
    verdicts = [future.result(120)[0] for future in futures]
    assert [verdict.scores for verdict in verdicts] == [(float(n),) for n in range(40)]
    processes = {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}
    assert len(processes) == 2
    asked_twice = {int(response) for response, times in Counter(calls()).items() if times > 1}
    # What the process died at has no answer: it may have to be asked again.
    assert not asked_twice & answered and len(asked_twice) <= 2
    pool.close()
    assert [path.name for path in Path("runs/x").iterdir()] == ["judge_cache.sqlite"]
    statistics = judge_statistics(Path("runs/x/judge_cache.sqlite"), 3)
    assert statistics["hits"] + statistics["calls"] >= 40


def test_a_spent_budget_pauses_all_processes_and_loses_nothing(group, asked):
    groups, calls = asked
    settings = {"workers": 2, "concurrency": 2}
    pool = group("slow", **settings, budget={"calls_per_round": 10})
    futures = [pool.submit([each], 1) for each in groups]
    done = next(future for future in as_completed(futures, 60) if future.exception() is not None)
    with pytest.raises(BudgetError, match=r"judge\.budget\.calls_per_round = 10 is spent in round 1: 10 calls"):
        done.result()
    pool.close()  # as the run does; every call that went out has its answer in the cache
    assert len(calls()) == 10
    more = group("slow", **settings, budget={"calls_per_round": 40})
    verdicts = [future.result(60)[0] for future in [more.submit([each], 1) for each in groups]]
    assert [verdict.scores for verdict in verdicts] == [(float(n),) for n in range(40)]
    assert len(calls()) == len(set(calls())) == 40


def test_a_judge_cache_that_cannot_be_used(ray_here, tmp_path, monkeypatch):
    from actors.judges import JudgeGroup

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/judge_cache.sqlite").write_text("no database " * 100)
    with pytest.raises(LedgerError, match=r"judge_cache\.sqlite' is damaged"):
        JudgeGroup(Config.parse({**DATA, "judge": {"kind": "python", "function": "a:b"}}))


def test_errors_of_the_judge_are_failures(group):
    (verdict,) = group("length").submit([make_group(None)]).result(60)  # type: ignore[arg-type]
    assert verdict.failure.kind == "error" and "TypeError" in verdict.failure.message


def test_a_judge_that_cannot_be_built_there(group, monkeypatch):
    monkeypatch.setenv("ONLINE_PO_TEST_DRIVER", str(os.getpid()))
    with pytest.raises(ConfigError, match=r"judge\.function is .* has no 'only_on_the_driver'"):
        group("only_on_the_driver")


def test_rules_and_closing(ray_here):
    from actors.judges import JudgeGroup

    pool = JudgeGroup(Config.parse(DATA))
    pool.ready(120)
    group = make_group("a, b", "a b", metadata={"constraints": [{"type": "no_commas"}]})
    assert pool.submit([group]).result(60)[0].scores == (0.5, 1.0)
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 10


def test_a_plugin_that_the_driver_finds_is_found_there_too(ray_here, tmp_path, monkeypatch):
    from actors.judges import JudgeGroup

    monkeypatch.chdir(tmp_path)  # its judge cache is in the run's folder
    monkeypatch.setattr(sys, "path", [*sys.path, str(install(tmp_path))])
    judge = {"kind": "plugin", "name": "brevity", "options": {"weight": 3}}
    pool = JudgeGroup(Config.parse({**DATA, "judge": judge}))
    pool.ready(120)
    assert pool.submit([make_group("a", "bb")]).result(60)[0].scores == (-3.0, -6.0)
    pool.close()


def test_code_runs_in_the_sandbox_there_and_ends_with_its_process(ray_here):
    from actors.judges import JudgeGroup

    pool = JudgeGroup(Config.parse(DATA))
    pool.ready(120)
    metadata = {"constraints": [{"type": "code", "tests": ["assert f(1) == 2", "assert f(2) == 3"]}]}
    texts = [
        f"```python\n{code}\n```" for code in ("def f(x): return x + 1", "def f(x): return 2", "import os; os.fork()")
    ]
    assert pool.submit([make_group(*texts, metadata=metadata)]).result(60)[0].scores == (1.0, 0.25, 0.0)
    (sandbox,) = [process for process in psutil.process_iter() if _is_sandbox_of_a_worker(process)]
    pool.close()
    sandbox.wait(30)


def _is_sandbox_of_a_worker(process):
    try:
        ours = psutil.Process() in process.parents()
        return ours and "judges.sandbox" in " ".join(process.cmdline()) and process.ppid() != os.getpid()
    except psutil.Error:  # it ended meanwhile, or is not ours to look at
        return False


def test_not_ready_in_time(ray_here):
    from actors.judges import JudgeGroup

    pool = JudgeGroup(Config.parse({**DATA, "ray": {"judge_cpus": 1000}}))
    with pytest.raises(EngineError, match=r"not ready after 1 s; .*ray\.judge_cpus"):
        pool.ready(1)
    pool.close()
