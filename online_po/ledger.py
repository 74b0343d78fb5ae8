"""The run folder. All reads and writes of a run go through here; the pieces of a round are in `online_po.pieces`.

Resume is one rule: read the ledger, do the first thing that is not there. A file appears whole or not
at all, and carries its own hash; pieces of uncommitted rounds that are not as they were written are
dropped when the run is opened, and made again. A round counts when its COMMIT.json is there, and what it
lists is checked by hash where it is loaded (`online_po.integrity` checks all of a run).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from online_po import files, seals
from online_po.config import Config
from online_po.errors import ConfigError, DamagedError, LedgerError
from online_po.fail_points import fail_point
from online_po.judge_cache import CACHE
from online_po.pieces import ExampleKind, Pieces
from online_po.step_checkpoints import STEPS
from online_po.types import Policy, Probe, Reference

SCHEMA_VERSION = 4
FIRST_SEALED = 4
"""Run folders of older schemas carry no hashes of their own."""
WEIGHT_FOLDERS = ("policy", "reference", "trainer")
"""What `prune` deletes of a round."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What makes a round durable."""

    round: int
    is_adapter: bool
    """True where the round's policy folder is a LoRA adapter."""
    reference: Reference
    """The reference of the NEXT round; decided before the commit."""
    beta_scale: float
    """What the controller multiplies the betas of the NEXT round with; 1 without one."""
    probe: Probe
    """The committed policy's own word on a fixed token sequence; generators are held to it."""
    files: dict[str, dict[str, Any]]
    """Path inside the round's folder -> {"sha256": hex, "bytes": int}."""


class Ledger(Pieces):
    """One run folder, open for reading; for writing inside `lock()`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.dropped: list[Path] = []
        """Damaged pieces of uncommitted rounds that `lock` deleted, to be made again."""

    # -- the run ---------------------------------------------------------------------------------

    def begin(self, config: Config, info: dict[str, Any]) -> None:
        """Writes config.yaml and run.json of a new run, or sees that the existing one is the same.

        A run that has not committed even its start (the engine did not come up, say) takes the new config.
        Raises ConfigError with the differences if the folder holds another config's run.
        """
        if self.exists():
            Ledger.open(self.root)
            if self.last_committed() is not None:
                self.require_same(config, info)
                info = self.info()
        # Settings that do not shape results may differ from the last start's: the newest are kept.
        files.write_yaml(self.root / "config.yaml", config.to_yaml())
        files.write_json(self.root / "run.json", {"schema_version": SCHEMA_VERSION, **info})

    @classmethod
    def open(cls, root: Path) -> Ledger:
        """An existing run folder. Raises LedgerError if it is none, or of another schema version."""
        ledger = cls(root)
        if not ledger.exists():
            raise LedgerError(f"{str(root)!r} is not a run folder (it has no run.json); give the folder of a run")
        ledger.require_schema()
        return ledger

    def require_schema(self) -> None:
        """Raises LedgerError if the folder is of another schema version, DamagedError if run.json is not whole."""
        try:
            self.info()
        except DamagedError:
            # Older schemas had no hash in it: which one it is, is all that is read without.
            info = files.parse_json(self.root / "run.json")
            version = info.get("schema_version") if isinstance(info, dict) and seals.KEY not in info else None
            if not isinstance(version, int) or version >= FIRST_SEALED:
                raise
            wrote = info.get("versions", {}).get("online-po", "an older version")
            raise _other_schema(self.root, version, wrote) from None
        info = self.info()
        if info["schema_version"] != SCHEMA_VERSION:
            raise _other_schema(self.root, info["schema_version"], info.get("versions", {}).get("online-po"))

    def exists(self) -> bool:
        return (self.root / "run.json").exists()

    def info(self) -> dict[str, Any]:
        return files.read_json(self.root / "run.json")

    @property
    def judge_cache(self) -> Path:
        """What judges were asked and answered (`online_po.judge_cache`); there if the judge remembers."""
        return self.root / CACHE

    def config(self) -> Config:
        """Raises DamagedError where config.yaml is not as it was written."""
        path = self.root / "config.yaml"
        if not path.exists():
            raise DamagedError(path, "it is missing")
        if not files.is_whole(path):
            raise DamagedError(
                path,
                "its hash is not the one it was written with, or it was changed by hand (settings are changed with "
                "`online-po run CONFIG section.key=value`)",
            )
        return Config.from_yaml(path)

    def require_same(self, config: Config, info: dict[str, Any]) -> None:
        """Raises ConfigError unless config, prompts and starting model are the run's own, with the differences.

        Settings that cannot shape results may differ, see `Config.identity`."""
        mine, other = _flatten(self.config().identity()), _flatten(config.identity())
        changed = [key for key in sorted(mine | other) if mine.get(key) != other.get(key)]
        if changed:
            lines = [f"  {key}: {mine.get(key)!r} there, {other.get(key)!r} now" for key in changed]
            raise ConfigError(
                f"run folder {str(self.root)!r} was made with another config:\n"
                + "\n".join(lines)
                + "\ngive the run another run.name, or `online-po resume` the old one"
            )
        for key, what in (
            ("model", "model.path: the starting model"),
            ("prompt_hashes", "prompts: the prompts"),
            ("seed_pairs_hash", "pairs.seed_path: the seed pairs"),
            ("judge_hash", "judge: a model or file that it reads"),
        ):
            if self.info().get(key) != info.get(key):
                raise ConfigError(
                    f"{what} changed since run {str(self.root)!r} was started; restore it, or start a new run"
                )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run folder for this process; a dead process holds nothing. Raises LedgerError if taken."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.run_lock.acquire()
        except OSError as error:
            if self.exists() or error.errno in files.FULL:
                with files.explained(self.root):
                    raise
            raise ConfigError(
                f"run.dir: {str(self.root)!r} cannot be written ({error.strerror}); choose another run.dir"
            ) from error
        try:
            with files.explained(self.root):
                self._sweep()
            yield
        finally:
            self.run_lock.release()

    def holder(self) -> str | None:
        """Who holds the run folder now, for people; None if nobody does."""
        return self.run_lock.holder()

    def _sweep(self) -> None:
        """Deletes what a killed process left half-written, and pieces of uncommitted rounds that are not as they were
        written: they are made again."""
        self.dropped = []
        for path in [*self.root.glob(f"*{files.TMP}"), *self.root.glob(f"rounds/**/*{files.TMP}")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            fail_point("sweep.removed", path)
        last = self.last_committed()
        for round_ in self.rounds():
            if last is None or round_ > last:
                self.dropped += self._drop_damaged(self.round_dir(round_))
            else:  # killed between its commit and this
                files.remove_folder(self.round_dir(round_) / STEPS)

    def _drop_damaged(self, folder: Path) -> list[Path]:
        if (folder / "COMMIT.json").exists():
            return []
        pieces = [path for kind in ("*.parquet", "*/part-*.parquet", "*.json") for path in sorted(folder.glob(kind))]
        damaged = [path for path in pieces if not files.is_whole(path)]
        if damaged:
            # What was made from them goes too.
            made = [folder / f"{name}_logps.parquet" for name in ("reference", "start", "response")]
            made += [folder / f"{kind}.parquet" for kind in get_args(ExampleKind)]
            made += [folder / "judgements" / path.name for path in damaged if path.parent.name == "responses"]
            files.remove_folder(folder / STEPS)
            # The damaged ones last: as long as they are there, a start that was cut short is made again.
            for path in [folder / "judged.json", *made, *damaged]:
                path.unlink(missing_ok=True)
                fail_point("sweep.dropped", path)
        return damaged

    # -- rounds ----------------------------------------------------------------------------------

    def rounds(self) -> list[int]:
        """Rounds that have a folder, committed or not, in order."""
        return sorted(int(path.name) for path in (self.root / "rounds").glob("[0-9]*") if path.name.isdigit())

    def last_committed(self) -> int | None:
        """The newest round whose commit, and every commit before it, is there; None before round 0's."""
        last = None
        while self.is_committed(0 if last is None else last + 1):
            last = 0 if last is None else last + 1
        return last

    def is_committed(self, round_: int) -> bool:
        return (self.round_dir(round_) / "COMMIT.json").exists()

    def commit_of(self, round_: int) -> Commit | None:
        """A round's commit; None where it has none. Raises DamagedError."""
        path = self.round_dir(round_) / "COMMIT.json"
        if not path.exists():
            return None
        record = files.read_json(path)
        if (version := record.pop("schema_version")) != SCHEMA_VERSION:
            raise _other_schema(path, version, None)
        probe = Probe(token_ids=tuple(record["probe"]["token_ids"]), token_logps=tuple(record["probe"]["token_logps"]))
        return Commit(**(record | {"probe": probe, "reference": Reference(**record["reference"])}))

    def committed(self, round_: int) -> Commit:
        commit = self.commit_of(round_)
        if commit is None:
            last = self.last_committed()
            raise LedgerError(
                f"round {round_} of {str(self.root)!r} is not committed; "
                + ("no round is yet" if last is None else f"the last one that is, is {last}")
            )
        return commit

    def commit(
        self, round_: int, *, is_adapter: bool, reference: Reference, probe: Probe, beta_scale: float = 1.0
    ) -> Commit:
        """Makes the round durable: hashes its files and writes COMMIT.json last."""
        self.run_lock.require_held()
        folder = self.round_dir(round_)
        folder.mkdir(parents=True, exist_ok=True)
        # Evaluation of the new policy comes after the commit and verifies itself; step checkpoints go.
        every = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(("eval.", "COMMIT."))]
        paths = [p for p in every if p.relative_to(folder).parts[0] != STEPS]
        trained = self._trained(round_)
        known: dict[str, str] = {} if trained is None else trained["files"]  # hashed when they were saved
        with files.explained(folder):
            hashes = files.hashes({str(path.relative_to(folder)): path for path in paths}, known)
        listing = {name: {"sha256": digest, "bytes": (folder / name).stat().st_size} for name, digest in hashes.items()}
        commit = Commit(
            round=round_,
            is_adapter=is_adapter,
            reference=reference,
            beta_scale=beta_scale,
            probe=probe,
            files=listing,
        )
        record = {"schema_version": SCHEMA_VERSION, **asdict(commit)}
        fail_point("commit.hashed")
        self.run_lock.require_held()  # the weights may have taken long to hash
        files.write_json(folder / "COMMIT.json", record)
        files.remove_folder(folder / STEPS)
        return commit

    def policy(self, round_: int, start: Path) -> Policy:
        """The committed policy of a round (`start` is the folder of the starting model, version 0).

        Raises LedgerError if its weights are no longer kept or do not match their hashes.
        """
        if round_ == 0:
            return Policy(version=0, path=start)
        self.verify(round_, "policy")
        return Policy(
            version=round_, path=self.round_dir(round_) / "policy", is_adapter=self.committed(round_).is_adapter
        )

    def reference(self, reference: Reference, start: Path) -> Policy:
        """The weights of a reference that some round's commit names. Raises LedgerError as `policy` does."""
        if not reference.blended:
            return self.policy(reference.round, start)
        self.verify(reference.round, "reference")
        return Policy(
            version=reference.round,
            path=self.round_dir(reference.round) / "reference",
            is_adapter=self.committed(reference.round).is_adapter,
            blended=True,
        )

    def verify(self, round_: int, part: str) -> None:
        """Raises LedgerError unless the round's files under `part` are as they were committed."""
        folder = self.round_dir(round_)
        expected = {k: v for k, v in self.committed(round_).files.items() if k.split("/")[0] == part}
        if not (folder / part).exists():
            raise LedgerError(
                f"round {round_} of {str(self.root)!r} has no {part} any more: checkpoint.keep removed it; "
                "choose a newer round"
            )
        found = {str(path.relative_to(folder)) for path in (folder / part).rglob("*") if not path.is_dir()}
        for name in sorted(found ^ expected.keys()):
            # What was put there later could be read in place of what belongs there.
            raise DamagedError(folder / name, "it is missing" if name in expected else "it was not there at the commit")
        with files.explained(folder / part):
            digests = files.sha256([folder / name for name in expected])
        for name, digest in zip(expected, digests, strict=True):
            if digest != expected[name]["sha256"]:
                raise DamagedError(folder / name)

    def prune(self, newest: int, keep: int, spared: Mapping[int, Collection[str]], only: Iterable[int] | None) -> None:
        """Deletes weights and optimizer state of rounds older than the `keep` newest, but for those of
        `WEIGHT_FOLDERS` that `spared` names for a round. `only`: the rounds to look at; None: all."""
        self.run_lock.require_held()
        old = range(1, newest - keep + 1)
        for round_ in old if only is None else sorted(set(only)):
            for name in WEIGHT_FOLDERS:
                if round_ in old and name not in spared.get(round_, ()):
                    files.remove_folder(self.round_dir(round_) / name)

    def steps_committed(self) -> int:
        """Optimizer steps of all committed rounds."""
        files_ = (self.round_dir(r) / "metrics.jsonl" for r in range(1, (self.last_committed() or 0) + 1))
        return sum(row["kind"] == "step" for path in files_ for row in files.read_json_lines(path))

    @contextmanager
    def weights(self, round_: int, part: str) -> Iterator[tuple[Path, dict[str, str]]]:
        """Gives the folder to write a round's `policy` to, or what belongs to it as its `trainer`; it appears whole
        when the block ends. The dict takes the hashes that the writer has, by file."""
        self.run_lock.require_held()
        folder = self.round_dir(round_) / part
        hashes: dict[str, str] = {}
        with files.atomic_folder(folder) as written:
            yield written, hashes
            self._require_arrived(round_, written)
            with ThreadPoolExecutor(1) as pool:  # hashed while the disk writes
                hashing = pool.submit(self.weight_hashes, part, written, hashes)
                files.sync_folder(written)
                found = hashing.result()
            self.run_lock.require_held()  # all that may have taken long
        self._hashed[round_, part] = found

    @contextmanager
    def blended_weights(self, round_: int) -> Iterator[Path]:
        """Gives the folder that the round's mean of policies is written to; it appears whole when the block ends."""
        self.run_lock.require_held()
        with files.atomic_folder(self.round_dir(round_) / "reference") as folder:
            yield folder
            self._require_arrived(round_, folder)
            self.run_lock.require_held()

    def _require_arrived(self, round_: int, written: Path) -> None:
        if not any(written.iterdir()):
            raise LedgerError(
                f"the learner saved round {round_}, but nothing arrived in {str(written.parent)!r}: run.dir must be a "
                "folder that every node of the cluster sees; choose another run.dir"
            )

    # -- what guards did -------------------------------------------------------------------------

    def roll_backs(self) -> list[dict[str, Any]]:
        """Roll-backs so far, oldest first: {"from": round, "to": round, "guard", "message", "done"}; guard: None for
        those by hand."""
        return self._acts("roll_backs.json")

    def guard_roll_backs(self) -> int:
        """How often a guard took the run back."""
        return sum(record["guard"] is not None for record in self.roll_backs())

    def attempt(self, round_: int) -> int:
        """How often a guard took the run back to before a round; part of the seeds that the round is sampled by. What
        was gone back from by hand is made again as it was."""
        return sum(record["guard"] is not None and record["to"] < round_ for record in self.roll_backs())

    def roll_back(self, *, since: int, to: int, guard: str | None, message: str) -> None:
        """Takes all rounds after `to` out of the run, into rolled_back/NNN. `since`: the round that the guard fired in,
        or the newest one where it is done by hand (`guard`: None).

        The record is written first: a kill in between can neither lose what a guard saw, nor the number of the
        attempt. `finish_roll_back` then does the rest.
        """
        self.finish_roll_back()
        record = {"from": since, "to": to, "guard": guard, "message": message, "done": False}
        self._write_acts("roll_backs.json", [*self.roll_backs(), record])
        self.finish_roll_back()

    def finish_roll_back(self) -> None:
        """Moves what the last roll-back has not moved yet, newest first; nothing where it is done."""
        *earlier, last = self.roll_backs() or [{"done": True}]
        if last["done"]:
            return
        folder = self.root / "rolled_back" / f"{len(earlier) + 1:03d}"
        self.run_lock.require_held()
        for round_ in reversed(self.rounds()):
            if round_ > last["to"]:
                files.remove_folder(self.round_dir(round_) / STEPS)
                files.move_folder(self.round_dir(round_), folder / f"{round_:06d}")
        self._write_acts("roll_backs.json", [*earlier, last | {"done": True}])

    def guard_stops(self) -> list[dict[str, Any]]:
        """Where guards ended the run, oldest first: {"round" (or policy version), "attempt", "guard", "message"}."""
        return self._acts("guard_stops.json")

    def write_guard_stop(self, stop: dict[str, Any]) -> None:
        self._write_acts("guard_stops.json", [*self.guard_stops(), stop])

    def _acts(self, name: str) -> list[dict[str, Any]]:
        path = self.root / name
        acts: list[dict[str, Any]] = files.read_json(path)["acts"] if path.exists() else []
        return acts

    def _write_acts(self, name: str, acts: list[dict[str, Any]]) -> None:
        self.run_lock.require_held()
        files.write_json(self.root / name, {"acts": acts})


def _other_schema(path: Path, version: int, wrote: str | None) -> LedgerError:
    by = f" (online-po {wrote})" if wrote else ""
    return LedgerError(
        f"{str(path)!r} was written with ledger schema {version}{by}, this version reads {SCHEMA_VERSION}: go on with "
        "the version of online-po that wrote it, or start a new run under another run.name (its pairs can be read as "
        "pairs.seed_path)"
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
