"""Judge processes that are replaced: on a pretended Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors import cluster, judges
from actors.judges import JudgeGroup, _JudgeWorker
from actors.supervision import Supervisor
from online_po.errors import ConfigError
from tests.fakes import make_config


class FakeActor:
    def __init__(self, *args: Any) -> None:
        self.owner, self.ended = args[-1], False
        self.ready = SimpleNamespace(remote=lambda: self)


def make_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, get: Any) -> tuple[JudgeGroup, list[FakeActor], list]:
    """A group of two, its actors, and who was disowned; `get` answers for an actor that is asked if it is ready."""
    made: list[FakeActor] = []
    disowned: list[str] = []

    def remote(*args: Any) -> FakeActor:
        made.append(FakeActor(*args))
        return made[-1]

    fake = SimpleNamespace(
        remote=lambda **options: lambda cls: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote)),
        nodes=lambda: [{"Alive": True}],
        get=get,
    )
    monkeypatch.setattr(judges, "ray", fake)
    monkeypatch.setattr(cluster, "gpu_count", lambda: 0)
    monkeypatch.setattr(judges, "disown", lambda path, owner: disowned.append(owner))
    monkeypatch.setattr("actors.supervision.end", lambda actor, pulse: setattr(actor, "ended", True))
    config = make_config(tmp_path, judge={"kind": "python", "function": "a:b", "workers": 2})
    supervisor = Supervisor(config)
    supervisor.watch = SimpleNamespace(  # type: ignore[assignment]
        add=lambda who, actor: None, why=lambda actor: None, remove=lambda actor: None
    )
    return JudgeGroup(config, supervisor), made, disowned


def test_what_a_dead_one_had_asked_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that died while it started."""
    deaths = [ActorDiedError()]

    def get(actor: FakeActor) -> None:
        if deaths:
            raise deaths.pop()

    group, made, disowned = make_group(tmp_path, monkeypatch, get)
    group._replace(group._processes[1], ActorDiedError())
    assert len(made) == 4 and len({actor.owner for actor in made}) == 4
    assert disowned == [made[1].owner, made[2].owner]
    assert group._processes[1].actor is made[3] and group._processes[1].owner == made[3].owner
    assert [actor.ended for actor in made] == [False, True, True, False]


def test_one_whose_judge_cannot_be_built_again_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(actor: FakeActor) -> None:
        raise RayTaskError("ready", "", ConfigError("judge.function is gone"))

    group, made, _ = make_group(tmp_path, monkeypatch, get)
    with pytest.raises(ConfigError, match=r"judge\.function is gone"):
        group._replace(group._processes[0], ActorDiedError())
    assert [actor.ended for actor in made] == [True, False, True]


def test_a_judge_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    monkeypatch.setattr(judges, "build_judge", lambda *args, **options: built.append(object()) or built[-1])
    worker = _JudgeWorker(make_config(tmp_path).judge, [], None, "me")

    async def twice() -> None:
        await asyncio.gather(worker.ready(), worker.ready())
        await worker.ready()

    asyncio.run(twice())
    assert len(built) == 1 and worker._judge is built[0]
