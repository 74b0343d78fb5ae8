"""Runs that are killed by SIGKILL and resumed, compared file by file with one that was never stopped."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chaos
import chaos_kills
from chaos_kills import Kill, Trial, Whole
from online_po.fail_points import NAMES
from tests.kills import memory_folder

pytestmark = pytest.mark.timeout(1800)  # a machine may be busy; this one counts nothing by time
KILLER = [sys.executable, chaos.__file__]


def run_chaos(*arguments: object, command: list[str] = KILLER) -> tuple[int, str, dict]:
    """Exit status, output, and the table of `scripts/chaos.py`."""
    with memory_folder() as folder:
        words = [*command, *map(str, arguments), "--folder", str(folder), "--out", str(folder / "table.json")]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=1500)
        written = (folder / "table.json").exists()
        return (
            ended.returncode,
            ended.stdout + ended.stderr,
            written and json.loads((folder / "table.json").read_text()),
        )


@pytest.mark.slow
def test_killed_at_every_fail_point_a_run_ends_the_same():
    code, output, table = run_chaos("--engine", "fakes", "--every-point")
    assert code == 0, output
    died = {name.partition("@")[0] for name in table["points"]}
    assert died == set(NAMES) - {"learner.policy_saved"}  # the fakes' learner has none
    written = {name.partition("@")[2] for name in table["points"] if name.startswith("file.")}
    assert {"COMMIT.json", "responses", "judgements", "pairs.parquet", "reference_logps.parquet"} <= written
    assert {"roll_backs.json", "guard_stops.json", "eval.json", "metrics.jsonl", "run.json"} <= written
    assert sum(row["reused"] for row in table["points"].values()) > 1000


@pytest.mark.slow
def test_weights_and_optimizer_of_a_real_learner_end_the_same():
    """All weights and a mean of policies; adapters and rounds sampled ahead."""
    points = ("learner.policy_saved:2", "learn.step", "folder.cleared@trainer", "commit.hashed", "sync.begin")
    code, output, table = run_chaos("--engine", "local", *(word for point in points for word in ("--point", point)))
    assert code == 0, output
    assert table["runs"] == 2 and all(row["kills"] == 2 for row in table["points"].values())


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("shape", "points"), [("guarded", ("file.renamed@COMMIT.json:2",)), ("ahead", ("learn.step:3", "sync.begin:2"))]
)
def test_a_run_on_ray_and_vllm_ends_the_same(shape, points):
    words = [word for point in points for word in ("--point", point)]
    code, output, table = run_chaos("--engine", "vllm", "--shape", shape, *words)
    assert code == 0, output
    assert sum(row["kills"] for row in table["points"].values()) == len(points)
    assert "did not end within 30 s: 0" in output


BROKEN = "import chaos, online_po.loop as loop; loop.load_round = lambda *_: None; chaos.main()"


@pytest.mark.slow
def test_a_resume_that_forgets_the_weights_is_found():
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(Path(chaos.__file__).parent)]!r}; {BROKEN}"]
    code, output, table = run_chaos("--engine", "fakes", "--shape", "ahead", "--point", "commit.end:2", command=command)
    assert code == 1
    # Which old weights are kept hangs on the scores of later policies.
    wrong = sorted(set(re.findall(r"^  rounds/(\d+)/(?!policy|trainer)", output, re.MULTILINE)))
    assert wrong[0] == "000003" and "000003/metrics.jsonl: [0].loss: " in output, "round 2 was committed"
    assert table["points"]["commit.end"]["mismatches"] == 1


# -- the driver's own parts ------------------------------------------------------------------------

PASSED = ["start.begin", "file.synced@run.json", "learn.step", "learn.step", "commit.end", "file.synced@COMMIT.json"]


@pytest.fixture
def wholes() -> dict[str, Whole]:
    one = Whole(run=Path("one"), seconds=2.0, passed=PASSED)
    return {"guarded": one, "ahead": Whole(run=Path("two"), seconds=2.0, passed=[*PASSED, "prune.begin"])}


def test_every_point_is_killed_at_once_in_the_order_a_run_comes_to_them(wholes):
    planned = chaos_kills.every_point(random.Random(3), wholes)
    (first, one), (second, two), *after = [(shape, [str(kill.point) for kill in kills]) for shape, kills in planned]
    assert (first, second) == ("guarded", "ahead") and one and two
    assert sorted([*one, *two]) == sorted({*PASSED, "prune.begin"}) and "prune.begin" in two
    for points in (one, two):
        assert points == sorted(points, key=wholes["ahead"].passed.index)
    assert {kills[-1] for _, kills in after} == {"restore.loaded", "sweep.removed", "sweep.dropped"}


def test_what_a_run_did_not_come_to_is_tried_alone():
    trial = Trial(shape="ahead", kills=[Kill(point="move.durable@N", happened=True), Kill(point="roll_back.loaded")])
    assert chaos_kills.not_reached([trial]) == [("ahead", [Kill(point="roll_back.loaded")])]


def test_random_kills_are_the_seeds(wholes):
    drawn = [[chaos_kills.random_kills(random.Random(seed), wholes["ahead"]) for seed in range(200)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    kills = [kill for run in drawn[0] for kill in run]
    assert {len(run) for run in drawn[0]} == {1, 2, 3, 4}
    at_random = [kill.seconds for kill in kills if kill.point is None]
    assert 0.2 < len(at_random) / len(kills) < 0.4 and max(at_random) <= 2.0
    points = {kill.row for kill in kills} - {"random time"}
    assert points == {*PASSED, "prune.begin", *chaos_kills.ONLY_RESUMED}
    assert not any(run[0].row in chaos_kills.ONLY_RESUMED for run in drawn[0])


def test_points_without_a_kill_are_told():
    trial = Trial(shape="ahead", kills=[Kill(point=f"{name}:2", happened=True) for name in NAMES[2:]])
    trial.kills.append(Kill(point=NAMES[0]))
    assert chaos_kills.never_killed([trial], "local") == sorted(NAMES[:2])
    assert "learner.policy_saved" in chaos_kills.never_killed([], "local")
    assert "learner.policy_saved" not in chaos_kills.never_killed([], "fakes")


def test_pieces_are_reused_redone_or_pruned():
    kill = Kill(point="commit.end")
    then = {"rounds/000001/a": (1, 10), "rounds/000001/b": (2, 10), "rounds/000001/policy/c": (3, 10)}
    moved = {"rolled_back/001/000001/a": (1, 10), "rounds/000001/a": (7, 30), "rounds/000001/b": (2, 20)}
    chaos_kills.count_pieces(kill, then, moved)
    assert (kill.reused, kill.redone) == (1, ["rounds/000001/b"])


@pytest.mark.parametrize(
    ("name", "then", "may"),
    [
        ("rounds/000002/responses/part-00000.parquet", set(), False),
        ("rounds/000002/reference_logps.parquet", set(), False),
        ("rounds/000002/judged.json", set(), False),
        ("rounds/000002/pairs.parquet", set(), False),
        ("rounds/000002/metrics.jsonl", set(), True),
        ("rounds/000002/policy/model.safetensors", {"rounds/000001/COMMIT.json"}, True),
        ("rounds/000002/policy/model.safetensors", {"rounds/000002/COMMIT.json"}, False),
        ("rounds/000002/policy/model.safetensors", {"rounds/000002/steps/trained.json"}, False),
        ("rounds/000002/reference/model.safetensors", {"rounds/000002/steps/trained.json"}, True),
        ("rounds/000002/pairs.parquet", {"rounds/000002/COMMIT.json"}, False),
        ("rounds/000002/eval.parquet", {"rounds/000002/COMMIT.json"}, True),
        ("rounds/000002/eval.json", {"rounds/000002/COMMIT.json"}, False),
    ],
)
def test_what_may_be_made_again(name, then, may):
    assert chaos_kills.may_be_remade(name, then) == may


def test_steps_that_were_taken_over_are_counted_by_what_the_next_start_said():
    kills = [Kill(log=6), Kill(log=60)]
    first = b"begin\nround 2 trains on\nafter step 3\nand so on"
    log = (
        first.ljust(60) + b"round 2 was saved after its last step, 4; it is not\nround 3 trains on from its first step"
    )
    chaos_kills.count_steps(kills, log)
    assert [kill.steps for kill in kills] == [3, 4]


def test_the_table_counts_by_fail_point():
    first = Trial(shape="ahead", kills=[Kill(point="learn.step:2", happened=True, reused=5, redone=["x"]), Kill()])
    second = Trial(
        shape="ahead", kills=[Kill(point="learn.step", happened=True, reused=2, steps=4)], wrong=["y: 1 there"]
    )
    third = Trial(shape="ahead", kills=[Kill(seconds=0.5, happened=True)])
    assert chaos_kills.table_of([first, second, third]) == {
        "learn.step": {"kills": 2, "reused": 7, "redone": 1, "steps": 4, "mismatches": 1},
        "random time": {"kills": 1, "reused": 0, "redone": 0, "steps": 0, "mismatches": 0},
    }
