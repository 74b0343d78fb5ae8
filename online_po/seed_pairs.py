"""Preference pairs that the user has already: read from a file, checked and tokenised before a run starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from online_po.errors import ConfigError
from online_po.given import ResponseEncoder
from online_po.prompt_files import open_file
from online_po.prompts import require_text, to_messages, tokenize_prompts
from online_po.sections import PromptsConfig
from online_po.seeds import stable_id
from online_po.tables import PAIR_SCHEMA, assistant
from online_po.types import GivenResponse, Message

FIELDS = ("prompt", "chosen", "rejected")
SCORES = ("chosen_score", "rejected_score")
_CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class SeedPairs:
    """The usable pairs of `pairs.seed_path`."""

    table: pa.Table
    """In PAIR_SCHEMA, in file order; `source` is seed."""
    counts: dict[str, int]
    """Rows by what became of them: `loaded` = `identical` + `tie` + `held_out` + `too_long` + `used`."""

    def fingerprint(self) -> str:
        """Hex digest of all pairs in order: their tokens, texts and scores."""
        digest = hashlib.sha256()
        for batch in self.table.to_batches(_CHUNK_ROWS):
            digest.update(json.dumps(batch.to_pylist(), ensure_ascii=True).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One row of a preference file, checked."""

    where: str
    messages: list[Message]
    chosen: str
    rejected: str
    scores: tuple[float, float] | None
    metadata: dict[str, Any]
    """The row's other columns."""


def load_seed_pairs(
    path: str, prompts: PromptsConfig, tokenizer: Any, encoder: ResponseEncoder, held_out: set[str]
) -> SeedPairs:
    """Reads `pairs.seed_path`. Prompts become messages, and are tokenised, as those of the prompt file are.

    Left out and counted: pairs of two identical responses, pairs with equal scores, pairs whose prompt is one of
    `held_out` (`PromptSet.asked`: what evaluation asks is not trained on), and what is longer than prompts.max_tokens
    or the context. Raises ConfigError, with line or row and field, for anything that is no pair.
    """
    label = f"pairs.seed_path {path!r}"
    file = Path(path)
    if not file.is_file() or file.suffix.lower() not in (".jsonl", ".parquet"):
        what = "is no .jsonl or .parquet file" if file.is_file() else "is no file"
        raise ConfigError(f"{label} {what}; give one .jsonl or .parquet file with prompt, chosen and rejected")
    source = open_file("pairs.seed_path", path, None)
    counts = dict.fromkeys(("loaded", "identical", "tie", "held_out", "too_long", "used"), 0)
    tables = [PAIR_SCHEMA.empty_table()]
    column = prompts.model_copy(update={"column": "prompt"})
    while chunk := list(itertools.islice(source.rows, _CHUNK_ROWS)):
        counts["loaded"] += len(chunk)
        rows = []
        for place, cells in chunk:
            row = read_pair(cells, f"{label}, {place}", column)
            if reason := _unusable(row, held_out):
                counts[reason] += 1
            else:
                rows.append(row)
        table = _tokenize(rows, column, tokenizer, encoder)
        counts["too_long"] += len(rows) - table.num_rows
        counts["used"] += table.num_rows
        tables.append(table)
    if not counts["used"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count and reason != "loaded")
        raise ConfigError(f"{label}: none of its {counts['loaded']} pairs can be used ({reasons or 'it is empty'})")
    return SeedPairs(table=pa.concat_tables(tables).combine_chunks(), counts=counts)


def require_scores(pairs: SeedPairs, path: str, loss: str) -> None:
    """Raises ConfigError unless every seed pair has scores, which the loss of that name needs."""
    missing = pairs.table["chosen_score"].null_count
    if missing:
        raise ConfigError(
            f"loss.name: {loss} needs scores, but {missing} of {pairs.table.num_rows} pairs of pairs.seed_path "
            f"{path!r} have none; give every row chosen_score and rejected_score, or use another loss"
        )


PLAIN = PromptsConfig(path="-", column="prompt", system=None, apply_chat_template=True)  # type: ignore[call-arg]


def read_pair(cells: dict[str, Any], where: str, config: PromptsConfig = PLAIN) -> PairRow:
    """A row of a preference file: prompt, chosen, rejected, each text or messages, and perhaps scores.

    `config`: how prompts become messages. Raises ConfigError, naming `where` and the field, for what is no pair.
    """
    for name in FIELDS:
        if cells.get(name) is None:
            there = ", ".join(key for key, value in cells.items() if value is not None) or "nothing"
            raise ConfigError(f"{where} has no {name!r}, only {there}; every row needs prompt, chosen and rejected")
    messages = to_messages(cells["prompt"], config, where)
    if not messages or not messages[-1]["content"].strip():
        raise ConfigError(f"{where}: 'prompt' is empty; mend or remove the row")
    asked = to_messages(cells["prompt"], config.model_copy(update={"system": None}), where)
    chosen, rejected = (_response(cells[name], name, asked, where) for name in ("chosen", "rejected"))
    require_text([messages, chosen, rejected], where)
    return PairRow(
        where=where,
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        scores=_scores(cells, where),
        metadata={key: value for key, value in cells.items() if key not in (*FIELDS, *SCORES)},
    )


def _response(value: Any, name: str, asked: Sequence[Message], where: str) -> str:
    """The text of a response: as it is, or the one assistant message behind the prompt's, which may be repeated."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        said = [{key: message.get(key) for key in ("role", "content")} for message in value]
        said = said[len(asked) :] if said[: len(asked)] == list(asked) else said
        if len(said) == 1 and said[0]["role"] == "assistant" and isinstance(said[0]["content"], str):
            return said[0]["content"]
    raise ConfigError(
        f"{where}: {name!r} is neither text nor one assistant message (behind the prompt's messages, where those are "
        "repeated); bring it into that form"
    )


def _scores(cells: dict[str, Any], where: str) -> tuple[float, float] | None:
    values = [cells.get(name) for name in SCORES]
    if values == [None, None]:
        return None
    for name, value in zip(SCORES, values, strict=True):
        if value is None:
            raise ConfigError(f"{where} has only one of chosen_score and rejected_score; give both or neither")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{where}: {name!r} is {value!r}, which is no finite number")
    chosen, rejected = map(float, values)  # type: ignore[arg-type]
    if chosen < rejected:
        raise ConfigError(
            f"{where}: 'chosen_score' is {chosen:g}, below 'rejected_score' {rejected:g}; swap the two responses or "
            "mend the scores"
        )
    return chosen, rejected


def _unusable(row: PairRow, held_out: set[str]) -> str | None:
    """Why a pair is left out, if it is."""
    if row.chosen == row.rejected:
        return "identical"
    if row.scores is not None and row.scores[0] == row.scores[1]:
        return "tie"
    return "held_out" if stable_id(row.messages) in held_out else None


def _tokenize(rows: Sequence[PairRow], config: PromptsConfig, tokenizer: Any, encoder: ResponseEncoder) -> pa.Table:
    """The rows that are within prompts.max_tokens and the context, in PAIR_SCHEMA."""
    prompts = tokenize_prompts([(row.where, str(i), row.messages, {}) for i, row in enumerate(rows)], config, tokenizer)
    prompt_tokens = {int(row["id"]): row["token_ids"] for row in prompts.select(["id", "token_ids"]).to_pylist()}
    sides = [encoder([getattr(row, side) for row in rows]) for side in ("chosen", "rejected")]
    kept: list[dict[str, Any]] = []
    for i, (row, chosen, rejected) in enumerate(zip(rows, *sides, strict=True)):
        longest = max(len(chosen.token_ids), len(rejected.token_ids))
        if i in prompt_tokens and len(prompt_tokens[i]) + longest <= encoder.max_length:
            kept.append(_pair_row(row, prompt_tokens[i], chosen, rejected))
    return pa.Table.from_pylist(kept, schema=PAIR_SCHEMA)


def _pair_row(row: PairRow, prompt: list[int], chosen: GivenResponse, rejected: GivenResponse) -> dict[str, Any]:
    """A row of PAIR_SCHEMA; what it leaves out (scores, logps, indices, rounds) is null."""
    scores: dict[str, float] = {}
    if row.scores is not None:
        scores = dict(zip(SCORES, row.scores, strict=True)) | {"margin": row.scores[0] - row.scores[1]}
    return scores | {
        "prompt_id": stable_id([row.messages, {}]),
        "prompt": row.messages,
        "chosen": assistant(chosen.text),
        "rejected": assistant(rejected.text),
        "prompt_token_ids": prompt,
        "chosen_token_ids": chosen.token_ids,
        "rejected_token_ids": rejected.token_ids,
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
        "source": "seed",
        "flipped": False,
    }
