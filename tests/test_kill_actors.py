"""scripts/kill_actors.py: what it calls wrong, beside files that differ."""

from __future__ import annotations

import pytest

from kill_actors import KINDS, Kill, not_back

ACTORS = {"generator": 2, "judge": 1, "learner": 2}
RESTARTED = {"generator": "generator replica 0", "judge": "judge process 0", "learner": "the learner"}


def kills(call: str = "work", **less: int) -> list[Kill]:
    return [Kill(kind=kind, call=call, pid=1) for kind in KINDS for _ in range(10 - less.get(kind, 0))]


def restarts(**counts: int) -> list[dict[str, str]]:
    return [{"restart": RESTARTED[kind]} for kind, count in counts.items() for _ in range(count)]


def test_each_kind_is_killed_so_often_and_comes_back():
    assert not_back(kills(), restarts(generator=8, judge=9, learner=4), 10, ACTORS) == []
    assert not_back(kills("pulse"), [], 10, ACTORS) == [], "what was starting need not come back each time"


@pytest.mark.parametrize(
    ("made", "back", "wrong"),
    [
        (kills(judge=1), {"generator": 8, "judge": 9, "learner": 4}, ["judge: 9 kills instead of 10"]),
        (
            kills(),
            {"generator": 7, "judge": 9, "learner": 4},
            ["generator: 10 were killed at work, but only 7 came back"],
        ),
        (
            kills(),
            {"generator": 8, "judge": 9, "learner": 3},
            ["learner: 10 were killed at work, but only 3 came back"],
        ),
    ],
)
def test_what_was_not_killed_or_did_not_come_back_is_wrong(made, back, wrong):
    assert not_back(made, restarts(**back), 10, ACTORS) == wrong
