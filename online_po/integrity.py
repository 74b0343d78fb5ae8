"""Is every file of a run as it was written? Which are not, and from which round the run can go on without them.

Rounds that are committed are checked by the hashes in COMMIT.json, all else by the hash that it carries itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from online_po import files, judge_cache
from online_po.errors import ConfigError, DamagedError, LedgerError
from online_po.judge_configs import self_judges
from online_po.ledger import WEIGHT_FOLDERS, Ledger
from online_po.run_view import read_timeline

TIMELINE = "timeline.jsonl"
RUN_FILES = ("run.json", "config.yaml", "roll_backs.json", "guard_stops.json", TIMELINE)
READ_ONCE = (
    "responses", "judgements", "judged.json", "response_logps.parquet", "reference_logps.parquet", "start_logps.parquet"
)  # fmt: skip
"""Of a committed round: what the run never reads again. So it is with prompts.parquet, but for the last round's."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not as it was written."""

    path: Path
    what: str
    round: int | None = None
    """None: a file of the run itself."""
    kind: Literal["data", "weights", "history"] = "data"
    """history: the run goes on without it."""

    def __str__(self) -> str:
        return f"{str(self.path)!r} is damaged: {self.what}"


def find_damage(
    ledger: Ledger, all_weights: bool, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Damage]:
    """Every damaged file of a run but for the pieces of uncommitted rounds, which are made again.

    `all_weights`: those of all rounds are read; else only those that the run goes on from, others are checked when
    they are loaded. `on_progress`: called with (rounds done, rounds). Raises LedgerError for a folder of another
    schema version, and for a disk that cannot be read.
    """
    found = [damage for name in RUN_FILES for damage in _of_run(ledger, name)]
    try:
        judge_cache.require_whole(ledger.judge_cache)
    except DamagedError as error:
        found.append(Damage(path=error.path, what=error.what))
    last = ledger.last_committed()
    first = 0 if last is None else last + 1
    if any(ledger.is_committed(round_) for round_ in ledger.rounds() if round_ > first):
        path = ledger.round_dir(first) / "COMMIT.json"
        found.append(Damage(path=path, what="it is missing, though later rounds are committed", round=first))
    if last is None:
        return found
    for round_ in range(last + 1):
        found += _of_round(ledger, round_, last)
        on_progress(round_ + 1, last + 1)
    if any(damage.round == last and damage.path.name == "COMMIT.json" for damage in found):
        return found
    rounds = range(1, last + 1)
    every = {(r, name) for r in rounds for name in WEIGHT_FOLDERS if (ledger.round_dir(r) / name).exists()}
    needed = every if _run_is_damaged(found) else needed_weights(ledger, last)
    bad = {damage.round for damage in found if damage.path.name == "COMMIT.json"}
    for r, name in sorted(every | needed if all_weights else needed):
        if r not in bad and (damage := _of_weights(ledger, r, name)) is not None:
            found.append(damage if (r, name) in needed else replace(damage, kind="history"))
    return found


def needed_weights(ledger: Ledger, round_: int) -> set[tuple[int, str]]:
    """(round, folder) of all weights that it takes to go on from a round: its own, its reference's, and those of the
    policies that sample and judge the rounds after it."""
    config = ledger.config()
    reference = ledger.committed(round_).reference
    needed = {(reference.round, reference.folder), (round_, "trainer")}
    needed |= {(version, "policy") for version in range(round_ - config.loop.max_staleness, round_ + 1)}
    judges = [judge.policy for judge in self_judges(config.judge) if isinstance(judge.policy, int)]
    needed |= {(version, "policy") for version in judges if version <= round_}
    return {(version, name) for version, name in needed if version > 0}


def whole_round(ledger: Ledger, found: Sequence[Damage]) -> int | None:
    """The newest round that the run can go on from in spite of the damage: all up to it is whole, and what it takes
    to go on is kept. None where there is none."""
    if _run_is_damaged(found) or (last := ledger.last_committed()) is None:
        return None
    first = min((d.round for d in found if d.round is not None and d.kind == "data"), default=last + 1)
    return next((round_ for round_ in range(first - 1, -1, -1) if _weights_hold(ledger, round_)), None)


def say_damage(ledger: Ledger, found: Sequence[Damage]) -> str:
    """All damaged files, and what can be done, for people."""
    lines = [f"run folder {str(ledger.root)!r} is damaged:", *(f"  {damage}" for damage in found)]
    grave = [damage for damage in found if damage.kind != "history"]
    if not grave:
        lines.append(
            "the run goes on without; a copy of the run folder may have it, for those who export that round or go back"
        )
    elif all(damage.round is None for damage in grave):
        lines.append("restore it from a copy of the run folder")
    elif (round_ := whole_round(ledger, found)) is None:
        lines.append("no round before it can be gone on from: restore it from a copy of the run folder")
    else:
        lines.append(
            f"restore it from a copy of the run folder, or go back to round {round_}, which is whole: `online-po "
            f"resume {ledger.root} --from-round {round_}` (later rounds are moved into rolled_back, nothing is deleted)"
        )
    return "\n".join(lines)


def require_whole(ledger: Ledger, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
    """Raises LedgerError, with what can be done, where the run cannot go on for damage; returns what it can go on in
    spite of."""
    found = find_damage(ledger, False, on_progress)
    if any(damage.kind != "history" for damage in found):
        raise LedgerError(say_damage(ledger, found))
    return found


def go_back_by_hand(ledger: Ledger, to: int) -> None:
    """Takes the run back to a committed round, in spite of damage in later ones. Raises ConfigError for a round that
    the run cannot go on from, LedgerError where it is damaged itself."""
    ledger.finish_roll_back()
    last = ledger.last_committed()
    if last is None or not 0 <= to <= last:
        raise ConfigError(f"--from-round is {to}, but the rounds that are committed are 0 to {last}; give one of them")
    found = [damage for name in RUN_FILES for damage in _of_run(ledger, name)]
    found += [damage for round_ in range(to + 1) for damage in _of_round(ledger, round_, to)]
    if any(damage.kind != "history" for damage in found):
        raise LedgerError(say_damage(ledger, found))
    gone = [(r, name) for r, name in sorted(needed_weights(ledger, to)) if not (ledger.round_dir(r) / name).exists()]
    if gone:
        raise ConfigError(
            f"--from-round is {to}, but round {gone[0][0]}'s {gone[0][1]} is no longer kept (checkpoint.keep); "
            "`online-po verify` names a round that the run can go on from"
        )
    for round_, name in sorted(needed_weights(ledger, to)):
        ledger.verify(round_, name)
    message = f"online-po resume --from-round {to}; what came after is made again as it was"
    ledger.roll_back(since=max(ledger.rounds()), to=to, guard=None, message=message)


def _run_is_damaged(found: Sequence[Damage]) -> bool:
    return any(damage.round is None and damage.path.name in RUN_FILES[:-1] for damage in found)


def _weights_hold(ledger: Ledger, round_: int) -> bool:
    needed = needed_weights(ledger, round_)
    if not all((ledger.round_dir(version) / name).exists() for version, name in needed):
        return False
    return all(_of_weights(ledger, version, name) is None for version, name in needed)


def _of_run(ledger: Ledger, name: str) -> Iterator[Damage]:
    path = ledger.root / name
    try:
        if name == "config.yaml":
            ledger.config()
        elif name == TIMELINE:
            if None in read_timeline(path):
                what = "lines of it are not as they were written (only times are lost)"
                yield Damage(path=path, what=what, kind="history")
        elif name == "run.json":
            ledger.require_schema()
        elif path.exists():
            files.require_whole(path)
    except DamagedError as error:
        yield Damage(path=error.path, what=error.what)


def _of_round(ledger: Ledger, round_: int, last: int) -> Iterator[Damage]:
    """Of a committed round, but for its weights."""
    folder = ledger.round_dir(round_)

    def damage(path: Path, what: str = "its hash is not the committed one") -> Damage:
        name = path.relative_to(folder).parts[0]
        read_once = name in READ_ONCE or (name == "prompts.parquet" and round_ < last)
        return Damage(path=path, what=what, round=round_, kind="history" if read_once else "data")

    try:
        commit = ledger.committed(round_)
    except DamagedError as error:
        yield damage(error.path, error.what)
        return
    listed = {folder / name: entry for name, entry in commit.files.items() if name.split("/")[0] not in WEIGHT_FOLDERS}
    for path in [path for path in listed if not path.exists()]:
        del listed[path]
        yield damage(path, "it is missing")
    with files.explained(folder):
        digests = files.sha256(list(listed))
    for (path, entry), digest in zip(listed.items(), digests, strict=True):
        if digest != entry["sha256"]:
            yield damage(path)
    # What came after the commit: evaluation and trials of the judge.
    later = [p for kind in ("*.json", "*.parquet") for p in sorted(folder.glob(kind)) if p.name != "COMMIT.json"]
    if (folder / "eval.json").exists() and not (folder / "eval.parquet").exists():
        yield damage(folder / "eval.parquet", "it is missing")
    for path in later:
        if path not in listed and path.relative_to(folder).as_posix() not in commit.files and not files.is_whole(path):
            yield damage(path, "its hash is not the one it was written with")


def _of_weights(ledger: Ledger, round_: int, name: str) -> Damage | None:
    try:
        ledger.verify(round_, name)
    except DamagedError as error:
        return Damage(path=error.path, what=error.what, round=round_, kind="weights")
    except LedgerError as error:
        return Damage(path=ledger.round_dir(round_) / name, what=str(error), round=round_, kind="weights")
    return None
