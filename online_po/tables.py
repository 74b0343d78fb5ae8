"""Arrow schemas of everything a run keeps, and the way between them and the records of `types`.

Every column is plain Arrow, so any parquet reader opens these files. `pairs.parquet` reads as a
conversational preference data set (prompt, chosen, rejected) in TRL and others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa

from online_po.types import (
    Comparison,
    FinishReason,
    GivenResponse,
    Group,
    JudgeFailure,
    Judgement,
    Label,
    MemberScores,
    Message,
    Pair,
    Prompt,
    Response,
)

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PROMPT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("metadata", pa.string()),  # JSON: columns of any type keep their shape
    ]
)

RESPONSE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_logps", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int32()),
        ("seed", pa.int64()),
    ]
)

COMPARISON = (
    ("first", pa.int32()),
    ("second", pa.int32()),
    ("preference", pa.float64()),
    ("consistent", pa.bool_()),
)
MEMBER = (("name", pa.string()), ("scores", pa.list_(pa.float64())))
JUDGEMENT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("scores", pa.list_(pa.float64())),
        ("rationales", pa.list_(pa.string())),
        ("failure_kind", pa.string()),
        ("failure_message", pa.string()),
        ("comparisons", pa.list_(pa.struct(COMPARISON))),  # null: the judge scores each response by itself
        ("members", pa.list_(pa.struct(MEMBER))),  # null: the judge is no ensemble
    ]
)

Source = Literal["fresh", "spin", "replay", "seed"]
"""Where an example comes from: this round's responses; those against a text of the data set; an earlier round; a file
of seed pairs."""
OWN: tuple[Source, ...] = ("fresh", "spin")
"""Sources of what a round makes itself; these rows come first in its file, and only they are ever replayed."""

ORIGIN = (
    ("source", pa.string()),  # a `Source`
    ("source_round", pa.int32()),  # the round that made it; null for seed pairs
    ("flipped", pa.bool_()),  # turned around on purpose, by pairs.flip_rate
)

PAIR_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("margin", pa.float64()),
        ("preference_probability", pa.float64()),  # null without judge.bradley_terry_scale, in spin and seed pairs
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("chosen_token_ids", pa.list_(pa.int32())),
        ("rejected_token_ids", pa.list_(pa.int32())),
        ("chosen_sampler_logp", pa.float64()),
        ("rejected_sampler_logp", pa.float64()),
        ("chosen_index", pa.int32()),
        ("rejected_index", pa.int32()),
        ("chosen_finish_reason", pa.string()),
        ("rejected_finish_reason", pa.string()),
        ("chosen_rationale", pa.string()),
        ("rejected_rationale", pa.string()),
        ("policy_version", pa.int32()),  # of the sampled responses; null in seed pairs
        *ORIGIN,
    ]
)

LABEL_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("completion", MESSAGES),  # the response, under the name that TRL and others read
        ("label", pa.bool_()),  # desirable or not
        ("response_score", pa.float64()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("response_sampler_logp", pa.float64()),
        ("response_index", pa.int32()),
        ("response_finish_reason", pa.string()),
        ("response_rationale", pa.string()),
        ("policy_version", pa.int32()),
        *ORIGIN,
    ]
)

RESPONSE_LOGP_SCHEMA = pa.schema([("response", pa.float32())])

EVAL_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("index", pa.int32()),
        ("text", pa.string()),
        ("score", pa.float64()),
        ("tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("rationale", pa.string()),
        ("failure", pa.string()),
    ]
)


def _table(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def prompts_to_table(prompts: Iterable[Prompt]) -> pa.Table:
    return _table(
        ((p.id, list(p.messages), p.text, p.token_ids, json.dumps(p.metadata, ensure_ascii=False)) for p in prompts),
        PROMPT_SCHEMA,
    )


class PromptRows(Sequence[Prompt]):
    """The rows of a PROMPT_SCHEMA table as prompts, each made when asked for.

    `draws`: how many of them were drawn at a time, where that was not all at once (`loop.top_up`)."""

    def __init__(self, table: pa.Table, draws: Sequence[int] = ()) -> None:
        self.table = table.combine_chunks()
        self.draws = tuple(draws) or (table.num_rows,)

    def chunks(self, size: int) -> list[range]:
        """Places of the prompts of each part: at most `size`, of one draw."""
        found, begin = list[range](), 0
        for drawn in self.draws:
            found += [range(i, min(i + size, begin + drawn)) for i in range(begin, begin + drawn, size)]
            begin += drawn
        return found

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "prompts are read in order"
            return self._read(start, stop - start)
        return self._read(index, 1)[0]

    def _read(self, start: int, length: int) -> list[Prompt]:
        return [
            Prompt(
                id=row["prompt_id"],
                messages=tuple(row["prompt"]),
                text=row["text"],
                token_ids=tuple(row["token_ids"]),
                metadata=json.loads(row["metadata"]),
            )
            for row in self.table.slice(start, length).to_pylist()
        ]


def responses_to_table(groups: Iterable[Group]) -> pa.Table:
    return _table(
        (
            (g.prompt.id, r.index, r.text, r.token_ids, r.token_logps, r.finish_reason, r.policy_version, r.seed)
            for g in groups
            for r in g.responses
        ),
        RESPONSE_SCHEMA,
    )


def table_to_groups(table: pa.Table, prompts: Sequence[Prompt]) -> list[Group]:
    """Groups again, from the rows of one part and the prompts of that part, in the same order."""
    columns = [table.column(name).to_pylist() for name in RESPONSE_SCHEMA.names]
    responses: dict[str, list[Response]] = {p.id: [] for p in prompts}
    for prompt_id, index, text, token_ids, token_logps, finish_reason, version, seed in zip(*columns, strict=True):
        responses[prompt_id].append(
            Response(
                index=index,
                text=text,
                token_ids=tuple(token_ids),
                token_logps=tuple(token_logps),
                finish_reason=finish_reason,
                policy_version=version,
                seed=seed,
            )
        )
    return [Group(prompt=p, responses=tuple(responses[p.id])) for p in prompts]


def judgements_to_table(judgements: Iterable[Judgement]) -> pa.Table:
    return _table(
        (
            (
                j.prompt_id,
                j.scores,
                j.rationales,
                j.failure.kind if j.failure else None,
                j.failure.message if j.failure else None,
                None if j.comparisons is None else [dataclasses.asdict(c) for c in j.comparisons],
                None if j.members is None else [dataclasses.asdict(m) for m in j.members],
            )
            for j in judgements
        ),
        JUDGEMENT_SCHEMA,
    )


def table_to_judgements(table: pa.Table) -> list[Judgement]:
    columns = [table.column(name).to_pylist() for name in JUDGEMENT_SCHEMA.names]
    return [
        Judgement(
            prompt_id=prompt_id,
            scores=None if scores is None else tuple(scores),
            rationales=None if rationales is None else tuple(rationales),
            failure=None if kind is None else JudgeFailure(kind=kind, message=message),
            comparisons=None if comparisons is None else tuple(Comparison(**c) for c in comparisons),
            members=None
            if members is None
            else tuple(MemberScores(name=m["name"], scores=tuple(m["scores"])) for m in members),
        )
        for prompt_id, scores, rationales, kind, message, comparisons, members in zip(*columns, strict=True)
    ]


def pairs_to_table(pairs: Iterable[tuple[Pair, Judgement]], round_: int) -> pa.Table:
    """The pairs that a round made itself, each with the judgement of its group. A given chosen response has neither
    index nor sampler logp nor rationale, and its row is null there."""

    def rows() -> Iterator[tuple[Any, ...]]:
        for pair, judgement in pairs:
            chosen_logp, chosen_index, chosen_end, chosen_note = _side(pair.chosen, judgement)
            rejected_logp, rejected_index, rejected_end, rejected_note = _side(pair.rejected, judgement)
            yield (
                pair.prompt.id,
                list(pair.prompt.messages),
                assistant(pair.chosen.text),
                assistant(pair.rejected.text),
                pair.chosen_score,
                pair.rejected_score,
                pair.margin,
                pair.preference_probability,
                pair.prompt.token_ids,
                pair.chosen.token_ids,
                pair.rejected.token_ids,
                chosen_logp,
                rejected_logp,
                chosen_index,
                rejected_index,
                chosen_end,
                rejected_end,
                chosen_note,
                rejected_note,
                pair.rejected.policy_version,
                "spin" if isinstance(pair.chosen, GivenResponse) else "fresh",
                round_,
                pair.flipped,
            )

    return _table(rows(), PAIR_SCHEMA)


def _side(
    response: Response | GivenResponse, judgement: Judgement
) -> tuple[float | None, int | None, FinishReason, str | None]:
    """(sampler logp, index, finish reason, rationale) of one side of a pair."""
    if isinstance(response, GivenResponse):
        return None, None, "stop", None
    note = judgement.rationales[response.index] if judgement.rationales else None
    return sum(response.token_logps), response.index, response.finish_reason, note


def labels_to_table(labels: Iterable[tuple[Label, Judgement]], round_: int) -> pa.Table:
    """The labelled responses that a round made itself, each with the judgement of its group."""
    return _table(
        (
            (
                label.prompt.id,
                list(label.prompt.messages),
                assistant(label.response.text),
                label.desirable,
                label.score,
                label.prompt.token_ids,
                label.response.token_ids,
                sum(label.response.token_logps),
                label.response.index,
                label.response.finish_reason,
                judgement.rationales[label.response.index] if judgement.rationales else None,
                label.response.policy_version,
                "fresh",
                round_,
                label.flipped,
            )
            for label, judgement in labels
        ),
        LABEL_SCHEMA,
    )


def assistant(text: str) -> list[Message]:
    """A response as the conversation that data sets hold it as."""
    return [{"role": "assistant", "content": text}]


def evaluation_to_table(groups: Sequence[Group], judgements: Sequence[Judgement]) -> pa.Table:
    return _table(
        (
            (
                g.prompt.id,
                list(g.prompt.messages),
                r.index,
                r.text,
                j.scores[r.index] if j.scores else None,
                len(r.token_ids),
                r.token_ids,
                r.finish_reason,
                j.rationales[r.index] if j.rationales else None,
                f"{j.failure.kind}: {j.failure.message}" if j.failure else None,
            )
            for g, j in zip(groups, judgements, strict=True)
            for r in g.responses
        ),
        EVAL_SCHEMA,
    )
