"""The judge processes, on a real Ray with two workers and no other resources."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from online_po.config import Config
from online_po.errors import ConfigError, EngineError
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
    futures = [pool.submit([make_group("a")]) for _ in range(4)]
    pids = [future.result(60)[0].scores[0] for future in futures]
    assert pids.count(pids[0]) == 2 and os.getpid() not in pids


def test_a_dead_process_is_an_engine_error(group):
    pool = group("die", workers=2)
    waiting, other = pool.submit([make_group("wait")] * 2), pool.submit([make_group("wait")])
    doomed = pool.submit([make_group("die")])  # goes where less is under way: with `other`
    for future in (doomed, other):
        with pytest.raises(EngineError, match="judge process 1 failed with 1 groups unanswered"):
            future.result(60)
    assert not waiting.done()


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
