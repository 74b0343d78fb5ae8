import asyncio
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from judges.questions import Answer
from judges.store import Call, JudgeStore, disown, prepare, release
from online_po.errors import DamagedError, LedgerError
from online_po.fail_points import VARIABLE
from online_po.judge_cache import SCHEMA_VERSION, connect, judge_statistics, require_whole
from online_po.judge_configs.base import BudgetConfig

NO_BUDGET = BudgetConfig()


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def ok(round_: int = 1, **more) -> Call:
    return Call(round=round_, judge="j", attempt=1, outcome="ok", seconds=0.5, **more)


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "run" / "judge_cache.sqlite"
    prepare(path)
    return path


@pytest.fixture
def store(cache):
    store = JudgeStore(cache)
    yield store
    store.close()


def test_an_answer_comes_back_as_it_was_given(store):
    answer = Answer(value=[0.1, -3.5], rationale="weil – ja", prompt_tokens=5, response_tokens=2, cost=0.1, cut=True)

    async def go():
        assert await store.find(key("a"), 1, "j") is None
        await store.finish(ok(cut=True), key("a"), answer)
        await store.finish(ok(), key("b"), None)
        return await store.find(key("a"), 2, "j"), await store.find(key("b"), 2, "j")

    assert asyncio.run(go()) == (answer, None)


WRITER = """
import asyncio, hashlib, os, sys
from pathlib import Path
from judges.questions import Answer
from judges.store import Call, JudgeStore
from online_po.judge_configs.base import BudgetConfig

async def main(path, name, count, concurrency):
    store = JudgeStore(Path(path))
    async def one(number):
        key = hashlib.sha256(f"{name}-{number}".encode()).hexdigest()
        call = await store.begin(key, 1, "j", 1, bound=0.25, budget=BudgetConfig())
        answer = Answer(value=number, rationale="r" * 500)
        await store.finish(Call(round=1, judge="j", attempt=1, outcome="ok", seconds=0.1), key, answer, call)
        print(number, flush=True)  # handed on
    for begin in range(0, count, concurrency):
        await asyncio.gather(*(one(number) for number in range(begin, begin + concurrency)))
    store.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


def write(cache, name, count, concurrency):
    command = [sys.executable, "-c", WRITER, str(cache), name, str(count), str(concurrency)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )


def known(cache, names) -> list:
    async def go():
        store = JudgeStore(cache)
        found = [await store.find(key(name), 2, "j") for name in names]
        store.close()
        return [answer and answer.value for answer in found]

    return asyncio.run(go())


@pytest.mark.parametrize("nodes", [1, 2])
def test_many_processes_write(cache, nodes):
    prepare(cache, nodes=nodes)
    writers = [write(cache, f"w{n}", 128, 16) for n in range(3)]
    for writer in writers:
        out, _ = writer.communicate(timeout=120)
        assert writer.returncode == 0 and len(out.split()) == 128
    assert known(cache, [f"w{n}-{number}" for n in range(3) for number in range(128)]) == [*range(128)] * 3
    found = judge_statistics(cache, 1)
    assert (found["calls"], found["failed_calls"], found["latency_p99"]) == (384, {}, pytest.approx(0.1))


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_killed_writer_loses_nothing_that_it_handed_on(cache, nodes):
    prepare(cache, nodes=nodes)
    writer = write(cache, "w", 1_000_000, 16)
    handed_on = [int(writer.stdout.readline()) for _ in range(100)]
    os.kill(writer.pid, signal.SIGKILL)
    handed_on += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    writer.wait()
    assert judge_statistics(cache, 1)["calls"] >= len(handed_on)  # it can be read as it lies there
    prepare(cache, nodes=nodes)
    assert known(cache, [f"w-{number}" for number in handed_on]) == handed_on
    # What was under way has its place in the accounts, at the most it can have cost.
    with closing(sqlite3.connect(cache)) as connection:
        lost, cost = connection.execute(
            "SELECT count(*), sum(cost) FROM calls WHERE outcome IN ('lost', 'open')"
        ).fetchone()
        ((_, calls, money),) = connection.execute("SELECT * FROM spent").fetchall()
        (answers,) = connection.execute("SELECT count(*) FROM answers").fetchone()
    assert 0 <= lost <= 16 and calls == answers + lost and money == (cost or 0.0)


def test_one_of_two_processes_asks(cache, store):
    other = JudgeStore(cache)

    async def go():
        first = await store.begin(key("a"), 1, "j", 1, bound=0.0, budget=NO_BUDGET)
        assert await other.begin(key("a"), 1, "j", 1, bound=0.0, budget=NO_BUDGET) is None
        assert isinstance(await other.begin(key("b"), 1, "j", 1, bound=0.0, budget=NO_BUDGET), int)
        await store.finish(ok(), key("a"), Answer(value=3), first)
        return await other.begin(key("a"), 1, "j", 1, bound=0.0, budget=NO_BUDGET)

    try:
        assert asyncio.run(go()).value == 3
    finally:
        other.close()


def test_nobody_waits_for_a_process_that_died_while_others_go_on(cache, store):
    dead, alive = JudgeStore(cache, "dead"), JudgeStore(cache, "alive")

    async def begin(who, name):
        return await who.begin(key(name), 1, "j", 1, bound=0.5, budget=NO_BUDGET)

    async def go():
        number = await begin(dead, "a")
        await begin(alive, "b")
        assert await begin(store, "a") is None
        disown(cache, "dead")
        assert isinstance(await begin(store, "a"), int), "it is asked again"
        assert await begin(store, "b") is None, "others' calls are still theirs"
        return number

    try:
        number = asyncio.run(go())
        with closing(sqlite3.connect(cache)) as connection:
            assert connection.execute("SELECT outcome FROM calls").fetchall() == [("lost",), ("open",), ("open",)]
            assert connection.execute("SELECT calls, money FROM spent").fetchall() == [(3, 0.5)]
            # It was not dead after all, only not to be reached: what the call cost takes the place of the most.
            asyncio.run(dead.finish(ok(cost=0.4), key("a"), Answer(value=1), number))
            assert connection.execute("SELECT outcome FROM calls").fetchall() == [("ok",), ("open",), ("open",)]
            ((calls, money),) = connection.execute("SELECT calls, money FROM spent").fetchall()
            assert calls == 3 and money == pytest.approx(0.4)
    finally:
        dead.close()
        alive.close()


def test_hits_are_written_while_nothing_else_is(cache, store):
    async def go():
        await store.finish(ok(), key("a"), Answer(value=1))
        for _ in range(5):
            await store.find(key("a"), 4, "j")
        await store.hit(4, "j")

    asyncio.run(go())
    deadline = time.monotonic() + 20
    while judge_statistics(cache, 4)["hits"] < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert judge_statistics(cache, 4)["hits"] == 6


def test_nodes_that_share_a_folder_share_no_memory(cache):
    def mode():
        with closing(sqlite3.connect(cache)) as connection:
            return connection.execute("PRAGMA journal_mode").fetchone()[0]

    assert mode() == "wal"
    prepare(cache, nodes=2)
    assert mode() == "delete"
    prepare(cache, nodes=1)
    assert mode() == "wal"


def test_a_network_file_system_is_no_place_for_shared_memory(tmp_path, monkeypatch):
    from judges import store as module

    class Disk:
        mountpoint, fstype = str(tmp_path), "nfs4"

    monkeypatch.setattr(module.psutil, "disk_partitions", lambda all: [Disk])
    prepare(tmp_path / "run" / "c.sqlite")
    with closing(sqlite3.connect(tmp_path / "run" / "c.sqlite")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_one_plain_file_is_left(cache):
    store = JudgeStore(cache)
    asyncio.run(store.finish(ok(), key("a"), Answer(value=1)))
    store.close()
    release(cache)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    copy = cache.with_name("copy.sqlite")
    copy.write_bytes(cache.read_bytes())
    assert judge_statistics(copy, 1)["calls"] == 1
    release(cache.with_name("none.sqlite"))


# -- files that cannot be used -------------------------------------------------------------------------


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "c.sqlite"
    path.write_text("nothing of the kind " * 500)
    for use in (prepare, JudgeStore, lambda path: judge_statistics(path, 1)):
        with pytest.raises(LedgerError, match=r"c\.sqlite' is damaged \(.*; restore it from a copy, or move it away"):
            use(path)


def test_a_database_of_somebody_else(tmp_path):
    path = tmp_path / "c.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    for use in (prepare, JudgeStore):
        with pytest.raises(LedgerError, match=r"c\.sqlite' is not a judge cache; move it away"):
            use(path)


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_another_schema(cache, version):
    with sqlite3.connect(cache) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    for use in (prepare, JudgeStore, lambda path: judge_statistics(path, 1)):
        with pytest.raises(
            LedgerError, match=f"schema {version}, this version reads {SCHEMA_VERSION}; use the version"
        ):
            use(cache)


def test_a_damaged_page(cache):
    async def fill():
        store = JudgeStore(cache)
        await asyncio.gather(
            *(store.finish(ok(), key(f"{n}"), Answer(value=n, rationale="r" * 300)) for n in range(500))
        )
        store.close()

    asyncio.run(fill())
    release(cache)
    data = bytearray(cache.read_bytes())
    data[8192:40960] = b"\xff" * (40960 - 8192)
    cache.write_bytes(data)
    with pytest.raises(LedgerError, match="is damaged"):
        prepare(cache)


def test_an_answer_that_cannot_be_read_is_told(cache, store):
    async def go():
        await store.finish(ok(), key("a"), Answer(value=1))
        store._connection.execute("UPDATE answers SET value = 'not JSON'")
        with pytest.raises(LedgerError, match="an answer is not as it was written"):
            await store.find(key("a"), 1, "j")
        return await store.find(key("b"), 1, "j")  # and the next one is served

    assert asyncio.run(go()) is None


def test_one_that_cannot_be_written_takes_no_other_along(cache, store):
    async def go():
        busy = store._do(lambda _: time.sleep(0.3), writes=False)  # so that what follows is one transaction
        tokens = [10**30 if n == 3 else 1 for n in range(8)]
        finished = [store.finish(ok(prompt_tokens=n), key(str(i)), Answer(value=i)) for i, n in enumerate(tokens)]
        _, *outcomes = await asyncio.gather(busy, *finished, return_exceptions=True)
        return outcomes

    assert [type(outcome) for outcome in asyncio.run(go())] == [*[type(None)] * 3, OverflowError, *[type(None)] * 4]
    with closing(connect(cache)) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (7,)
        assert connection.execute("SELECT calls FROM spent").fetchone() == (7,)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LedgerError, match="cannot be opened.*a folder that every judge process can write to"):
        JudgeStore(tmp_path / "c.sqlite")
    assert not (tmp_path / "c.sqlite").exists()
    assert judge_statistics(tmp_path / "c.sqlite", 1) == {}


def test_a_full_disk_is_told_and_what_was_kept_is_kept(cache, store):
    async def go():
        await store.finish(ok(), key("a"), Answer(value=1))
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="cannot be used: .* is full; mend that and resume"):
            for n in range(1000):
                await store.finish(ok(), key(f"n{n}"), Answer(value=n, rationale="r" * 3000))
        return await store.find(key("a"), 1, "j")

    assert asyncio.run(go()).value == 1


def test_no_text_of_a_question_is_in_the_file(cache, store):
    with connect(cache) as connection:
        columns = {
            column
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall()
        }
    assert not columns & {"prompt", "response", "text", "identity", "api_key", "message"}


@pytest.mark.parametrize("point", ["judge_cache.opened", "judge_cache.prepared"])
def test_killed_while_it_is_opened_it_is_not_taken_for_damaged(tmp_path, point):
    path = tmp_path / "judge_cache.sqlite"
    prepare(path)
    release(path)
    require_whole(path)
    code = "import sys; from pathlib import Path; from judges.store import prepare; prepare(Path(sys.argv[1]))"
    ended = subprocess.run([sys.executable, "-c", code, str(path)], env={**os.environ, VARIABLE: point})
    assert ended.returncode == -signal.SIGKILL
    require_whole(path)
    prepare(path)
    release(path)
    require_whole(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        require_whole(path)


def test_an_answer_with_the_seals_own_words_harms_nothing(cache, store):
    answer = Answer(value=1.0, rationale="online-po seal of approval")
    asyncio.run(store.finish(ok(), key("q"), answer))
    store.close()
    release(cache)
    require_whole(cache)
