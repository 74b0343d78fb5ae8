"""The pieces of a round in the run folder: what is sampled, judged, paired, computed and measured, each a file.

Every piece appears whole (`online_po.files`), and what reads one raises LedgerError if it is missing or damaged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from online_po import files
from online_po.errors import LedgerError
from online_po.run_lock import RunLock
from online_po.step_checkpoints import STEPS, TRAINED, StepPlan, Trained, newest_whole
from online_po.tables import (
    PROMPT_SCHEMA,
    RESPONSE_LOGP_SCHEMA,
    PromptRows,
    judgements_to_table,
    responses_to_table,
    table_to_groups,
    table_to_judgements,
)
from online_po.types import Group, Judgement, Prompt

LogpKind = Literal["reference", "start"]
ExampleKind = Literal["pairs", "labels"]
EXAMPLE_NOTES = b"notes"


class ExamplesWriter:
    """Writes a round's examples table by table."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def note(self, notes: dict[str, Any]) -> None:
        """Keeps JSON-able facts with the file, for later rounds."""
        self._writer.add_key_value_metadata({EXAMPLE_NOTES: json.dumps(notes)})


class Pieces:
    """Reads and writes the pieces of the rounds of one run folder; `online_po.ledger.Ledger` is the folder itself. What
    writes raises LedgerError where another process has taken the run folder meanwhile."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashed: dict[tuple[int, str], dict[str, str]] = {}
        self.run_lock = RunLock(root)
        """Asked before each write: who was taken for dead and comes back must not write over the new owner's."""

    def round_dir(self, round_: int) -> Path:
        return self.root / "rounds" / f"{round_:06d}"

    def write_prompts(
        self, round_: int, tables: Iterable[pa.Table], cursor: dict[str, Any], draws: Sequence[int] = ()
    ) -> None:
        """The round's prompts in the order they are sampled, and the cursor's state after drawing them. Where more are
        drawn later, all are given again, with how many each time."""
        self.run_lock.require_held()
        schema = PROMPT_SCHEMA.with_metadata({"cursor": json.dumps(cursor), "draws": json.dumps(list(draws))})
        with files.parquet_writer(self.round_dir(round_) / "prompts.parquet", schema) as writer:
            for table in tables:
                writer.write_table(table.replace_schema_metadata(schema.metadata))

    def has_prompts(self, round_: int) -> bool:
        return (self.round_dir(round_) / "prompts.parquet").exists()

    def prompts(self, round_: int) -> PromptRows:
        path = self.round_dir(round_) / "prompts.parquet"
        # Runs of earlier versions drew all at once, and say nothing of it.
        return PromptRows(self._read(path), json.loads(self._metadata(path).get(b"draws", b"[]")))

    def cursor(self, round_: int) -> dict[str, Any]:
        """The prompt cursor's state after drawing the round's prompts."""
        return json.loads(self._metadata(self.round_dir(round_) / "prompts.parquet")[b"cursor"])

    def write_responses(self, round_: int, part: int, groups: Sequence[Group]) -> None:
        self.run_lock.require_held()
        files.write_parquet(self._part(round_, "responses", part), responses_to_table(groups))

    def has_responses(self, round_: int, part: int) -> bool:
        return self._part(round_, "responses", part).exists()

    def responses(self, round_: int, part: int, prompts: Sequence[Prompt]) -> list[Group]:
        """The groups of one part, given the part's prompts."""
        return table_to_groups(self._read(self._part(round_, "responses", part)), prompts)

    def write_judgements(self, round_: int, part: int, judgements: Sequence[Judgement]) -> None:
        self.run_lock.require_held()
        files.write_parquet(self._part(round_, "judgements", part), judgements_to_table(judgements))

    def has_judgements(self, round_: int, part: int) -> bool:
        return self._part(round_, "judgements", part).exists()

    def judgements(self, round_: int, part: int) -> list[Judgement]:
        return table_to_judgements(self._read(self._part(round_, "judgements", part)))

    def write_judged(self, round_: int, failures: int) -> None:
        """Marks that sampling and judging of a round are over; judgements that failed then stay failed."""
        self.run_lock.require_held()
        files.write_json(self.round_dir(round_) / "judged.json", {"failures": failures})

    def is_judged(self, round_: int) -> bool:
        return (self.round_dir(round_) / "judged.json").exists()

    @contextmanager
    def examples_writer(self, round_: int, kind: ExampleKind, schema: pa.Schema) -> Iterator[ExamplesWriter]:
        """A writer of pairs.parquet or labels.parquet; what it notes is read by `example_notes`."""
        self.run_lock.require_held()
        with files.parquet_writer(self.round_dir(round_) / f"{kind}.parquet", schema) as writer:
            yield ExamplesWriter(writer)

    def examples(self, round_: int, kind: ExampleKind) -> pa.Table:
        """What a round trains on. Never pruned: later rounds may replay it."""
        return self._read(self.round_dir(round_) / f"{kind}.parquet")

    def has_examples(self, round_: int, kind: ExampleKind) -> bool:
        return (self.round_dir(round_) / f"{kind}.parquet").exists()

    def example_notes(self, round_: int, kind: ExampleKind) -> dict[str, Any]:
        """What the round's builder noted in the file's footer."""
        return json.loads(self._metadata(self.round_dir(round_) / f"{kind}.parquet")[EXAMPLE_NOTES])

    def pairs(self, round_: int) -> pa.Table:
        return self.examples(round_, "pairs")

    def write_response_logps(self, round_: int, logps: Any) -> None:
        """(R,) float32: logps of the round's judged responses under its reference, in order of parts, groups, index."""
        self.run_lock.require_held()
        table = pa.table({"response": logps}, schema=RESPONSE_LOGP_SCHEMA)
        files.write_parquet(self.round_dir(round_) / "response_logps.parquet", table)

    def response_logps(self, round_: int) -> Any | None:
        """What `write_response_logps` wrote; None if not computed yet."""
        path = self.round_dir(round_) / "response_logps.parquet"
        return self._read(path)["response"].to_numpy() if path.exists() else None

    def write_logps(
        self, round_: int, kind: LogpKind, logps: dict[str, Any], notes: dict[str, Any] | None = None
    ) -> None:
        """{side: (N,) float32}, one row an example, and notes on how they were come by."""
        self.run_lock.require_held()
        table = pa.table(logps).replace_schema_metadata({"notes": json.dumps(notes or {})})
        files.write_parquet(self.round_dir(round_) / f"{kind}_logps.parquet", table)

    def logp_notes(self, round_: int, kind: LogpKind) -> dict[str, Any]:
        """What `write_logps` was told; empty where there are no such logps."""
        path = self.round_dir(round_) / f"{kind}_logps.parquet"
        return json.loads(self._metadata(path)[b"notes"]) if path.exists() else {}

    def logps(self, round_: int, kind: LogpKind) -> dict[str, Any] | None:
        """{side: (N,) float32}, one row an example; None if not computed yet."""
        path = self.round_dir(round_) / f"{kind}_logps.parquet"
        if not path.exists():
            return None
        table = self._read(path)
        return {name: table[name].to_numpy() for name in table.column_names}

    def step_plan(self, round_: int, every: int | None, tell: Callable[[str], None]) -> StepPlan:
        """What the round's update goes on from, and writes. Step checkpoints that are damaged are named to `tell` and
        deleted; the one before them is taken."""
        self.run_lock.require_held()
        folder = self.round_dir(round_).absolute() / STEPS
        if (record := self._trained(round_)) is not None:
            root = self.round_dir(round_)
            parts = [self.weight_hashes(part, root / part) for part in ("policy", "trainer")]
            if parts[0] | parts[1] == record["files"]:
                trained = Trained(**record["trained"])
                tell(f"round {round_} was saved after its last step, {len(trained.steps)}; it is not trained again")
                return StepPlan(folder=folder, every=every, trained=trained)
            tell(f"the weights that round {round_} saved are not as they were written: it is trained again")
            (folder / TRAINED).unlink()
        found, damaged = newest_whole(folder)
        for path, fault in damaged.items():
            tell(f"step checkpoint {str(path)!r} is damaged, and is left out: {fault}")
            files.remove_folder(path)
        if found or damaged:
            tell(f"round {round_} trains on " + (f"after step {found.step}" if found else "from its first step"))
        return StepPlan(folder=folder, every=every, after=found)

    def write_trained(self, round_: int, trained: Trained) -> None:
        """Once the round's weights are saved (`Ledger.weights`): a start after this trains it no more."""
        self.run_lock.require_held()
        hashed = self._hashed.pop((round_, "policy")) | self._hashed.pop((round_, "trainer"))
        record = {"trained": asdict(trained), "files": hashed}
        files.write_json(self.round_dir(round_) / STEPS / TRAINED, record)

    def _trained(self, round_: int) -> dict[str, Any] | None:
        path = self.round_dir(round_) / STEPS / TRAINED
        return files.read_json(path) if path.exists() and files.is_whole(path) else None

    def weight_hashes(self, part: str, folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """PART/FILE -> SHA-256, of all files in the folder of a round's policy or trainer. `known`: FILE -> that of
        files that need not be read."""
        found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        with files.explained(self.root):
            return {f"{part}/{file}": digest for file, digest in files.hashes(found, known).items()}

    def write_metrics(self, round_: int, rows: list[dict[str, Any]]) -> None:
        self.run_lock.require_held()
        files.write_json_lines(self.round_dir(round_) / "metrics.jsonl", rows)

    def round_row(self, round_: int) -> dict[str, Any]:
        """The round's own row of its metrics: the last one."""
        return files.read_json_lines(self.round_dir(round_) / "metrics.jsonl")[-1]

    def write_evaluation(self, round_: int, table: pa.Table, summary: dict[str, Any]) -> None:
        """eval.parquet, then eval.json, which makes the evaluation count."""
        self.run_lock.require_held()
        files.write_parquet(self.round_dir(round_) / "eval.parquet", table)
        files.write_json(self.round_dir(round_) / "eval.json", summary)

    def evaluation(self, round_: int) -> pa.Table | None:
        """The evaluation of a round's policy; None if it was not made."""
        if not (self.round_dir(round_) / "eval.json").exists():
            return None
        return self._read(self.round_dir(round_) / "eval.parquet")

    def evaluation_summary(self, round_: int) -> dict[str, Any] | None:
        path = self.round_dir(round_) / "eval.json"
        return files.read_json(path) if path.exists() else None

    def write_judge_trial(self, round_: int, trial: dict[str, Any]) -> None:
        """How the judge did on known pairs: before the run (round 0), and after a round."""
        self.run_lock.require_held()
        files.write_json(self.round_dir(round_) / "judge_trial.json", trial)

    def judge_trial(self, round_: int) -> dict[str, Any] | None:
        path = self.round_dir(round_) / "judge_trial.json"
        return files.read_json(path) if path.exists() else None

    def _part(self, round_: int, kind: str, part: int) -> Path:
        return self.round_dir(round_) / kind / f"part-{part:05d}.parquet"

    def _read(self, path: Path) -> pa.Table:
        with _there(path):
            return files.read_parquet(path)

    def _metadata(self, path: Path) -> dict[bytes, bytes]:
        """A parquet file's metadata, the schema's included."""
        with _there(path):
            files.require_whole(path)
            return pq.read_metadata(path).metadata


@contextmanager
def _there(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise LedgerError(f"{str(path)!r} is missing; restore it from a copy of the run folder") from error
