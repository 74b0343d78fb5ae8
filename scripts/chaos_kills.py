"""Which kills `scripts/chaos.py` tries, and what became of the pieces that were whole when a run died."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compare_runs import LEFT_OUT
from online_po import fail_points

KILLS_A_RUN = 8
"""With --every-point."""
ONLY_RESUMED = ("restore.loaded", "sweep.removed")
"""Points that a run comes to only where it was killed before."""
REMADE = {"judge_trial.json", "metrics.jsonl", "reference", "policy", "trainer"}
"""Made again while their round is not committed, although they were whole; the last two until they are all saved."""


@dataclass(kw_only=True)
class Kill:
    """One kill: at a fail point (`name[@kind][:nth]`), or after some seconds."""

    point: str | None = None
    seconds: float = 0.0
    damage: bool = False
    """A byte of a response part is flipped afterwards, so that the next start has something to drop."""
    happened: bool = False
    log: int = 0
    """Bytes that the run had said by then."""
    steps: int = 0
    """Optimizer steps of unfinished rounds that the next start did not make again."""
    reused: int = 0
    """Pieces that were whole at the kill and are the same files in the finished run."""
    redone: list[str] = field(default_factory=list)
    """Pieces that were whole at the kill, but were made again."""

    @property
    def row(self) -> str:
        """Where it counts in the table."""
        return "random time" if self.point is None else self.point.partition(":")[0]


@dataclass(kw_only=True)
class Trial:
    """One run, its kills, and what is wrong with how it ended."""

    shape: str
    kills: list[Kill]
    wrong: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Whole:
    """A run that was never stopped."""

    run: Path
    seconds: float
    passed: list[str]
    """The fail points that it came to, in order, by `fail_points.label`."""


# -- which kills -----------------------------------------------------------------------------------


def random_kills(rng: random.Random, whole: Whole) -> list[Kill]:
    """One to four kills of one run: three of ten at a random time, else at a fail point."""
    kills: list[Kill] = []
    hits = Counter(whole.passed)
    for place in range(rng.choices([1, 2, 3, 4], [4, 3, 2, 1])[0]):
        if rng.random() < 0.3:
            kills.append(Kill(seconds=rng.uniform(0.0, whole.seconds)))
            continue
        point = rng.choice(sorted([*hits, *(ONLY_RESUMED if place else ())]))
        # What a resumed run has done already it does not come to again.
        nth = rng.randint(1, max(1, hits[point] // (1 + place)))
        kills.append(Kill(point=f"{point}:{nth}"))
    return kills


def every_point(rng: random.Random, wholes: dict[str, Whole]) -> list[tuple[str, list[Kill]]]:
    """(shape, kills) of runs that die at every fail point, on every kind of file, once; each run at many."""
    made: list[tuple[str, list[Kill]]] = []
    points = sorted({point for whole in wholes.values() for point in whole.passed})
    shape_of = {point: rng.choice([name for name in wholes if point in wholes[name].passed]) for point in points}
    for shape, whole in wholes.items():
        own = [point for point in points if shape_of[point] == shape]
        rng.shuffle(own)
        for begin in range(0, len(own), KILLS_A_RUN):
            # In the order of where a run may come to them: so what is left of it after a kill has the next point.
            some = own[begin : begin + KILLS_A_RUN]
            places = {p: rng.choice([i for i, q in enumerate(whole.passed) if p == q]) for p in some}
            made.append((shape, [Kill(point=point) for point in sorted(places, key=lambda p: places[p])]))
    shape = next(iter(wholes))
    after = {
        "restore.loaded": Kill(point="commit.end:2"),
        "sweep.removed": Kill(point="file.written@responses:2"),
        "sweep.dropped": Kill(point="judge.end", damage=True),
    }
    return [*made, *((shape, [first, Kill(point=point)]) for point, first in after.items())]


def not_reached(trials: Sequence[Trial]) -> list[tuple[str, list[Kill]]]:
    """Kills that did not happen, each for a run of its own: an earlier one may have kept the run from coming there. A
    roll-back that was killed in the middle ends when the run is opened, for one."""
    return [(trial.shape, [Kill(point=kill.point)]) for trial in trials for kill in trial.kills if not kill.happened]


def never_killed(trials: Sequence[Trial], engine: str) -> list[str]:
    """Fail points that no run died at."""
    died = {kill.row.partition("@")[0] for trial in trials for kill in trial.kills if kill.happened}
    elsewhere = {"learner.policy_saved"} if engine == "fakes" else set()
    return sorted(set(fail_points.NAMES) - died - elsewhere)


# -- pieces ----------------------------------------------------------------------------------------


def pieces(run: Path) -> dict[str, tuple[int, int]]:
    """The whole pieces in a run folder: path -> (inode, time written). Not what every start or roll-back rewrites."""
    rewritten = (*LEFT_OUT, "*.tmp", "*.sqlite*", "config.yaml", "run.json", "roll_backs.json", "guard_stops.json")
    found = {}
    for path in run.rglob("*"):
        name = path.relative_to(run)
        if path.is_file() and ".tmp" not in str(name) and not any(name.match(pattern) for pattern in rewritten):
            about = path.stat()
            found[str(name)] = (about.st_ino, about.st_mtime_ns)
    return found


def count_pieces(kill: Kill, then: dict[str, tuple[int, int]], at_end: dict[str, tuple[int, int]]) -> None:
    """What became of the pieces that were whole at a kill. Old weights that were pruned since are neither."""
    kept = set(at_end.values())
    kill.reused = sum(file in kept for file in then.values())
    kill.redone = sorted(name for name, file in then.items() if file not in kept and name in at_end)


def count_steps(kills: Sequence[Kill], log: bytes) -> None:
    """How many optimizer steps each kill's next start took over, by what it said."""
    ends = [*(kill.log for kill in kills[1:]), len(log)]
    for kill, end in zip(kills, ends, strict=False):  # without a kill there is one end too many
        said = log[kill.log : end]
        text = " ".join(said.decode(errors="replace").split())  # a terminal's lines may be broken
        kill.steps = sum(
            int(step)
            for step in re.findall(r"round \d+ (?:trains on after|was saved after its last) step,? (\d+)", text)
        )


def may_be_remade(name: str, then: Collection[str]) -> bool:
    """Whether a piece may be made again although it was whole. `then`: what was whole at the kill."""
    path = Path(name)
    if path.name == "eval.parquet":  # eval.json makes it count
        return True
    made, round_ = REMADE & {path.name, path.parent.name}, Path(*path.parts[:2])
    if str(round_ / "steps" / "trained.json") in then:
        made -= {"policy", "trainer"}
    return bool(made) and str(round_ / "COMMIT.json") not in then


def flip_a_byte(run: Path) -> None:
    """Damages the first response part of the newest round."""
    part = max(run.glob("rounds/*/responses/part-00000.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 0xFF
    part.write_bytes(data)


# -- the table -------------------------------------------------------------------------------------


def table_of(trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """Fail point -> kills, pieces reused, pieces redone, optimizer steps reused, runs killed there that came out
    wrong."""
    rows: dict[str, Counter[str]] = {}
    for trial in trials:
        for kill in trial.kills:
            if kill.happened:
                row = rows.setdefault(kill.row, Counter(kills=0, reused=0, redone=0, steps=0, mismatches=0))
                row.update(
                    kills=1,
                    reused=kill.reused,
                    redone=len(kill.redone),
                    steps=kill.steps,
                    mismatches=bool(trial.wrong),
                )
    return {name: dict(rows[name]) for name in sorted(rows)}
