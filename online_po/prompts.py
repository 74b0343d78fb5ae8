"""Prompts from a file or a data set: read, checked, wrapped in the chat template, tokenised, split.

Everything is kept in Arrow buffers; a `Prompt` is made when it is asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from online_po.errors import ConfigError
from online_po.prompt_files import Source, open_dataset, open_file, plain_cells, require_column
from online_po.sections import PromptsConfig
from online_po.seeds import stable_id, stable_seed
from online_po.types import Message, Prompt

ROLES = ("system", "developer", "user", "assistant", "tool")
_CHUNK_PROMPTS = 1024

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages_id", pa.string()),  # of the messages alone: the same question with other metadata
        ("messages", pa.large_string()),  # JSON
        ("text", pa.large_string()),
        ("token_ids", pa.large_list(pa.int32())),
        ("metadata", pa.large_string()),  # JSON
    ]
)


class PromptSet(Sequence[Prompt]):
    """Prompts in file order, no two alike, in Arrow buffers: about twice the size of their text."""

    def __init__(self, table: pa.Table, counts: dict[str, int]) -> None:
        self._table = table.combine_chunks()
        columns = {name: self._table.column(name).chunk(0) for name in _SCHEMA.names}
        self._ids, self._messages, self._texts = columns["id"], columns["messages"], columns["text"]
        self._metadata = columns["metadata"]
        self._offsets = columns["token_ids"].offsets.to_numpy()
        self._tokens = columns["token_ids"].values.to_numpy()
        self.counts = counts
        """Rows by what became of them: `loaded` = `duplicates` + `empty` + `too_long` + `held_out` + `in_train` +
        `used`. `held_out` went to the held-out set; `in_train` were dropped there, being in the training set."""

    @property
    def token_counts(self) -> np.ndarray:
        """(N,) int64: tokens of each prompt, template included."""
        return np.diff(self._offsets)

    def asked(self) -> set[str]:
        """Ids of what the prompts ask, metadata aside: `stable_id` of their messages."""
        return set(self._table["messages_id"].to_pylist())

    def fingerprint(self) -> str:
        """Hex digest of all prompts in order: what they ask, their metadata and their tokens."""
        digest = hashlib.sha256("\n".join(self._ids.to_pylist()).encode())
        digest.update(self.token_counts.tobytes())
        digest.update(self._tokens.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative indices, and IndexError beyond the end
        return Prompt(
            id=self._ids[index].as_py(),
            messages=tuple(json.loads(self._messages[index].as_py())),
            text=self._texts[index].as_py(),
            token_ids=tuple(self._tokens[self._offsets[index] : self._offsets[index + 1]].tolist()),
            metadata=json.loads(self._metadata[index].as_py()),
        )


def load_prompts(
    config: PromptsConfig, tokenizer: Any, seed: int, on_progress: Callable[[int, int], None] | None = None
) -> tuple[PromptSet, PromptSet | None]:
    """The training prompts, and the held-out ones where the config asks for them.

    `seed` decides the held-out split (with `heldout_size`), by the prompts' content and not by their
    order in the file. `on_progress(rows read, rows in the file)` is called now and then.
    Raises ConfigError for anything in the files or the tokenizer that cannot be used.
    """
    _check_template(config, tokenizer)
    source = open_dataset(config) if config.path is None else open_file("prompts.path", config.path, config.column)
    table, counts = _read(source, config, tokenizer, config.limit, on_progress)
    if config.heldout_path is not None:
        train = PromptSet(table, counts | {"used": table.num_rows})
        source = open_file("prompts.heldout_path", config.heldout_path, config.column)
        held, counts = _read(source, config, tokenizer, None, on_progress)
        fresh = pc.invert(pc.is_in(held["messages_id"], value_set=table["messages_id"].combine_chunks()))
        held = held.filter(fresh)
        counts["in_train"] = len(fresh) - held.num_rows
        if held.num_rows == 0:
            raise ConfigError(_nothing_left(source.label, counts, config))
        return train, PromptSet(held, counts | {"used": held.num_rows})
    if config.heldout_size:
        chosen = _choose_heldout(table, config.heldout_size, seed, source.label)
        held, table = table.filter(chosen), table.filter(pc.invert(chosen))
        heldout = PromptSet(held, _no_counts() | {"loaded": held.num_rows, "used": held.num_rows})
        counts["held_out"] = held.num_rows
        return PromptSet(table, counts | {"used": table.num_rows}), heldout
    return PromptSet(table, counts | {"used": table.num_rows}), None


def _check_template(config: PromptsConfig, tokenizer: Any) -> None:
    if not config.apply_chat_template and config.system is not None:
        raise ConfigError(
            "prompts.system is set, but prompts.apply_chat_template is false: plain text has no place for a system "
            "prompt; take one of the two out"
        )
    if config.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(
            "prompts.apply_chat_template is true, but the tokenizer of model.path has no chat template; set "
            "prompts.apply_chat_template: false to feed plain text as it is, or use an instruct model"
        )


def _no_counts() -> dict[str, int]:
    return dict.fromkeys(("loaded", "duplicates", "empty", "too_long", "held_out", "in_train", "used"), 0)


def _read(
    source: Source,
    config: PromptsConfig,
    tokenizer: Any,
    limit: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[pa.Table, dict[str, int]]:
    """All usable prompts of a source, in _SCHEMA, and what became of its rows."""
    counts, seen, tables = _no_counts(), set[str](), []
    total = source.total if limit is None else min(limit, source.total)
    rows = itertools.islice(source.rows, limit)
    while chunk := list(itertools.islice(rows, _CHUNK_PROMPTS)):
        fresh = []
        for place, row in chunk:
            where = f"{source.label}, {place}"
            require_column(where, config.column, row)
            messages = to_messages(row.pop(config.column), config, where)
            if not messages or not messages[-1]["content"].strip():
                counts["empty"] += 1
                continue
            metadata = plain_cells(row, where)
            require_text([messages, metadata], where)
            prompt_id = stable_id([messages, metadata])
            if prompt_id in seen:
                counts["duplicates"] += 1
                continue
            seen.add(prompt_id)
            fresh.append((where, prompt_id, messages, metadata))
        table = tokenize_prompts(fresh, config, tokenizer)
        counts["loaded"] += len(chunk)
        counts["too_long"] += len(fresh) - table.num_rows
        tables.append(table)
        if on_progress is not None:
            on_progress(counts["loaded"], total)
    if not sum(table.num_rows for table in tables):
        raise ConfigError(_nothing_left(source.label, counts, config))
    return pa.concat_tables(tables).combine_chunks(), counts


def require_text(value: Any, where: str) -> None:
    """Raises ConfigError for half a surrogate pair, which JSON can escape but no file, tokenizer or judge can take."""
    try:
        _dump(value).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ConfigError(
            f"{where} holds {half}, one half of a surrogate pair without the other, which is no text; mend or remove "
            "the row"
        ) from error


def to_messages(value: Any, config: PromptsConfig, where: str) -> list[Message]:
    """A cell of the prompt column as chat messages, system prompt in front; an empty list for nothing."""
    match value:
        case None:
            return []
        case str():
            messages = [{"role": "user", "content": value}]
        case list():
            if not config.apply_chat_template:
                raise ConfigError(
                    f"{where}: column {config.column!r} holds chat messages, but prompts.apply_chat_template is false; "
                    "set it to true, or give plain text"
                )
            messages = [_to_message(item, config.column, where) for item in value]
        case _:
            raise ConfigError(
                f"{where}: column {config.column!r} holds a {type(value).__name__}; prompts are text, or a list of "
                "{role, content} messages"
            )
    if messages and messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"{where}: the last message is the assistant's, so there is nothing to respond to; end prompts with a "
            "user message (prompts.column may name a column that holds whole conversations)"
        )
    if config.system is not None and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
    return messages


def _to_message(item: Any, column: str, where: str) -> Message:
    if isinstance(item, dict):
        given = {key: value for key, value in item.items() if value is not None}
        if given.keys() == {"role", "content"} and all(isinstance(value, str) for value in given.values()):
            if given["role"] in ROLES:
                return {"role": given["role"], "content": given["content"]}
            raise ConfigError(f"{where}: a message has role {given['role']!r}; roles are {', '.join(ROLES)}")
    found = f"the keys {', '.join(item)}" if isinstance(item, dict) else f"a {type(item).__name__}"
    raise ConfigError(
        f"{where}: column {column!r} holds a message that is not {{role, content}} with text in both, but {found}; "
        "bring the messages into that form"
    )


def tokenize_prompts(
    prompts: Sequence[tuple[str, str, list[Message], dict[str, Any]]], config: PromptsConfig, tokenizer: Any
) -> pa.Table:
    """(where, id, messages, metadata) -> the rows of _SCHEMA that are within `max_tokens`."""
    if not prompts:
        return _SCHEMA.empty_table()
    if config.apply_chat_template:
        texts = [_render(messages, tokenizer, where) for where, _, messages, _ in prompts]
    else:
        texts = [messages[-1]["content"] for _, _, messages, _ in prompts]
    # A template writes its own special tokens, BOS too; plain text gets those that the tokenizer adds.
    encoded = tokenizer(
        texts, add_special_tokens=not config.apply_chat_template, return_attention_mask=False, verbose=False
    )["input_ids"]
    columns: list[list[Any]] = [[] for _ in _SCHEMA]
    for (where, prompt_id, messages, metadata), text, token_ids in zip(prompts, texts, encoded, strict=True):
        if token_ids[:2] == [tokenizer.bos_token_id] * 2:
            raise ConfigError(
                f"{where}: the prompt begins with two {tokenizer.bos_token!r} tokens; take one out of "
                + ("the chat template" if config.apply_chat_template else "the text: the tokenizer adds its own")
            )
        if len(token_ids) <= config.max_tokens:
            row = (prompt_id, stable_id(messages), _dump(messages), text, token_ids, _dump(metadata))
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def _render(messages: list[Message], tokenizer: Any, where: str) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"{where}: the model's chat template refuses these messages ({error}); their roles are: {roles} "
            "(a system message may come from prompts.system)"
        ) from error


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _choose_heldout(table: pa.Table, size: int, seed: int, label: str) -> pa.Array:
    """(N,) bool: the prompts held out. Prompts that ask the same stay on the same side."""
    if size >= table.num_rows:
        raise ConfigError(
            f"prompts.heldout_size is {size}, but {label} has only {table.num_rows} usable prompts; lower it or give "
            "more prompts"
        )
    same: dict[str, list[int]] = defaultdict(list)
    for row, messages_id in enumerate(table["messages_id"].to_pylist()):
        same[messages_id].append(row)
    chosen = np.zeros(table.num_rows, dtype=bool)
    left = size
    for _, rows in sorted(same.items(), key=lambda item: (stable_seed(seed, "heldout", item[0]), item[0])):
        if len(rows) <= left:
            chosen[rows] = True
            left -= len(rows)
        if left == 0:
            break
    return pa.array(chosen)


def _nothing_left(label: str, counts: dict[str, int], config: PromptsConfig) -> str:
    if counts["loaded"] == 0:
        return f"{label} holds no rows; give a file with prompts"
    reasons: Iterable[tuple[str, str]] = (
        ("empty", f"empty: does prompts.column {config.column!r} name the right column?"),
        ("too_long", f"longer than prompts.max_tokens = {config.max_tokens}: raise it"),
        ("duplicates", "duplicates"),
        ("in_train", "also in the training prompts: give other held-out prompts"),
    )
    why = "; ".join(f"{counts[key]} {text}" for key, text in reasons if counts[key])
    return f"{label}: none of its {counts['loaded']} prompts can be used ({why})"
