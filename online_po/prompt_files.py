"""Rows of a prompt file or data set, one after the other: no file is held in memory as Python objects."""

from __future__ import annotations

import datetime
import decimal
import difflib
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from online_po.errors import ConfigError
from online_po.sections import PromptsConfig

_BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened prompt file or data set."""

    label: str
    """Which setting names it, and its value: "prompts.path 'x.jsonl'"."""
    total: int
    """Rows it has; for JSONL the number of lines, blank ones included."""
    rows: Iterator[tuple[str, dict[str, Any]]]
    """(place for error messages, the row), in file order. Raises ConfigError for a row that is no JSON."""


def open_file(field: str, path: str, column: str | None, texts: Sequence[str] = ()) -> Source:
    """Opens a .jsonl, .parquet or .csv file named by the setting `field`.

    `texts`: columns of a .csv file that are text whatever they look like, besides `column`. Raises ConfigError if it is
    missing, of another kind, unreadable, or has no column `column` (None: any will do).
    """
    label, file = f"{field} {path!r}", Path(path)
    if file.is_dir():
        hint = ", or name the folder in prompts.dataset" if field == "prompts.path" else ""
        raise ConfigError(f"{label} is a folder; give one .jsonl, .parquet or .csv file{hint}")
    if not file.exists():
        raise ConfigError(f"{label} does not exist; give a .jsonl, .parquet or .csv file")
    try:
        match file.suffix.lower():
            case ".jsonl":
                return Source(label=label, total=_count_lines(file), rows=_read_jsonl(file, label))
            case ".parquet":
                return _open_parquet(file, label, column)
            case ".csv":
                return _open_csv(file, label, column, texts)
    except OSError as error:
        raise ConfigError(f"{label} cannot be read: {error.strerror or error}") from error
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{label} is not a valid {file.suffix} file: {str(error).splitlines()[0]}") from error
    raise ConfigError(f"{label} ends in {file.suffix!r}; give a .jsonl, .parquet or .csv file")


def open_dataset(config: PromptsConfig) -> Source:
    """Opens `prompts.dataset` through `datasets`: a hub name, a folder of data files, or a saved data set.

    Raises ConfigError if it, its subset, its split or the prompt column cannot be had.
    """
    import datasets

    name = str(config.dataset)
    label = f"prompts.dataset {name!r}"
    try:
        if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                if config.split not in loaded:
                    raise ConfigError(
                        f"prompts.split is {config.split!r}, but {label} has {', '.join(loaded)}; choose one of those"
                    )
                loaded = loaded[config.split]
        else:
            loaded = datasets.load_dataset(name, config.subset, split=config.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{label} (subset {config.subset!r}, split {config.split!r}) does not load "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the name, prompts.subset, prompts.split, "
            "and, for a hub name, the network and HF_HUB_OFFLINE"
        ) from error
    require_column(label, column=config.column, columns=loaded.column_names)
    batches = loaded.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    return Source(label=label, total=len(loaded), rows=_number(batches, label))


def require_column(where: str, column: str, columns: Iterable[str]) -> None:
    """Raises ConfigError, with the nearest name, unless `column` is one of `columns`."""
    known = list(columns)
    if column in known:
        return
    near = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "name the one that holds the prompts"
    there = ", ".join(map(repr, known)) or "none"
    raise ConfigError(f"prompts.column is {column!r}, but {where} has no such column, only {there}; {hint}")


def plain_cells(cells: dict[str, Any], where: str) -> dict[str, Any]:
    """A row's cells, each as `plain` has it."""
    return {name: plain(value, f"{where}: column {name!r}") for name, value in cells.items()}


def plain(value: Any, where: str) -> Any:
    """A value as JSON can hold it: dates as ISO text, decimals as text, NaN and infinities as None.

    Raises ConfigError for what has no such form (bytes, images).
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): plain(item, where) for key, item in value.items()}
        case list() | tuple():
            return [plain(item, where) for item in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | datetime.timedelta() | uuid.UUID():
            return str(value)
    raise ConfigError(
        f"{where} holds a {type(value).__name__}, which cannot be handed to a judge as JSON; take the column out of "
        "the file"
    )


def _count_lines(file: Path) -> int:
    count, last = 0, b"\n"
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            count, last = count + block.count(b"\n"), block
    return count + (not last.endswith(b"\n"))


def _read_jsonl(file: Path, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise ConfigError(
                    f"{label}, line {number} is not valid JSON: {error}; mend or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{label}, line {number} is a JSON {type(row).__name__}; every line must be an object such as "
                    '{"prompt": "..."}'
                )
            yield f"line {number}", row


def _open_parquet(file: Path, label: str, column: str | None) -> Source:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    if column is not None:
        require_column(label, column, parquet.schema_arrow.names)
    rows = _number(parquet.iter_batches(_BATCH_ROWS), label)
    return Source(label=label, total=parquet.metadata.num_rows, rows=rows)


def _open_csv(file: Path, label: str, column: str | None, texts: Sequence[str]) -> Source:
    from pyarrow import csv

    if file.stat().st_size == 0:
        raise ConfigError(f"{label} is empty; the first line of a .csv file names its columns")
    table = csv.read_csv(
        file,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        # A prompt such as "007" or "true" is text, whatever the other rows look like.
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys([*filter(None, [column]), *texts], pa.string())),
    )
    if column is not None:
        require_column(label, column, table.column_names)
    return Source(label=label, total=table.num_rows, rows=_number(table.to_batches(_BATCH_ROWS), label))


def _number(batches: Iterable[Any], label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    before = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:  # readers take a column's word for being UTF-8
            raise ConfigError(
                f"{label}: one of rows {before + 1} to {before + batch.num_rows} holds bytes that are not UTF-8 "
                f"({error.reason}); mend the file"
            ) from error
        for number, row in enumerate(rows, before + 1):
            yield f"row {number}", row
        before += batch.num_rows
