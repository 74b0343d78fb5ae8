"""Judging a file of responses with any configured judge, without a run: `online-po judge`."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from judges.rules import validate_constraints
from judges.runtime import LocalJudgePool, check_judge
from online_po import files
from online_po.errors import ConfigError, JudgeFailureRateError, LedgerError
from online_po.judge_configs import Ensemble, JudgeBase, Rules, single_judges
from online_po.judge_trials import text_response
from online_po.ledger import Ledger
from online_po.prompt_files import Source, open_file, plain_cells
from online_po.prompts import require_text, to_messages
from online_po.seed_pairs import PLAIN, read_pair
from online_po.seeds import stable_id
from online_po.types import Group, Judgement, Prompt

WAITING = 256
"""So many rows are with the judge at a time."""
RESPONSES = ("responses", "response", "chosen")
SAID = ("scores", "rationales", "comparisons", "failure")
"""Columns of what was said."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What became of the rows of a file."""

    rows: int
    failures: dict[str, int]
    """Rows without a label, by kind of failure."""
    message: str | None
    """What the last failure says."""
    accuracy: float | None
    """Share of rows with chosen and rejected on which the judge says the same; ties count half. None without such."""

    def require_few_failures(self, bound: float) -> None:
        """Raises JudgeFailureRateError if a larger share of the rows has no label."""
        failed = sum(self.failures.values())
        if failed / self.rows > bound:
            raise JudgeFailureRateError(
                f"the judge failed on {failed} of {self.rows} rows, more than judge.max_failure_rate = {bound:g} "
                f"allows; last message: {self.message!r}. Mend the judge and run this again: what was judged is kept"
            )


def judge_file(
    config: JudgeBase, source: Path, out: Path, cache: Path, on_progress: Callable[[int, int], None] | None = None
) -> Judged:
    """Judges each row of a .jsonl, .parquet or .csv file, and writes the rows with what was said to a .jsonl file.

    A row has `prompt` and one of `responses` (a list of texts), `response`, or `chosen` and `rejected`; further columns
    are the metadata that the judge reads. It comes back with `scores` (one a response, in order; null where there is no
    label), `rationales` and `comparisons` where the judge gives them, or `failure`; columns of these names that it had,
    of an earlier call say, are left out before it is judged. Answers are kept in `cache`: what was judged is not asked
    again, in another call either.

    Raises ConfigError for a judge or a row that cannot be used, before anything is asked; BudgetError when
    `judge.budget` is spent.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"the file to write is {str(out)!r}; let its name end in .jsonl")
    if out.resolve() == source.resolve():
        raise ConfigError(f"the file to write is {str(out)!r}, the one to judge; choose another name")
    check_judge(config)
    opened, rows = _open(source), 0
    for place, cells in opened.rows:
        group = read_group(config, cells, f"{opened.label}, {place}")
        if any(isinstance(single, Rules) for single in single_judges(config)):
            _require_constraints(group, f"{opened.label}, {place}")
        rows += 1
    if not rows:
        raise ConfigError(f"{opened.label} holds no rows; give rows with prompt and responses")
    with _locked(cache):
        pool = LocalJudgePool(config, cache)
        try:
            return _judge_all(pool, config, source, out, on_progress)
        finally:
            pool.close()


def _open(source: Path) -> Source:
    opened = open_file("the file to judge", str(source), None, texts=("prompt", "rejected", *RESPONSES[1:]))
    rows = ((place, {key: value for key, value in cells.items() if key not in SAID}) for place, cells in opened.rows)
    return replace(opened, rows=((place, plain_cells(cells, f"{opened.label}, {place}")) for place, cells in rows))


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One process at a time starts the writers of a judge cache. Raises LedgerError where another has it."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    # A run holds the lock of its folder, see `Ledger.lock`.
    run = Ledger(cache.parent)
    with ExitStack() as held:
        if cache == run.judge_cache and run.exists():
            held.enter_context(run.lock())
        try:
            held.enter_context(FileLock(f"{cache}.lock", timeout=0))
        except Timeout as error:
            raise LedgerError(f"{str(cache)!r} is in use by another `online-po judge`; wait for it") from error
        yield


def read_group(config: JudgeBase, cells: dict[str, Any], where: str) -> Group:
    """A row as a group of texts. Raises ConfigError, naming `where` and the field."""
    named = [name for name in RESPONSES if cells.get(name) is not None]
    if len(named) > 1:
        raise ConfigError(f"{where} has {' and '.join(map(repr, named))}; keep the one that is to be judged")
    match next(iter(named), None):
        case "responses":
            texts = cells["responses"]
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ConfigError(f"{where}: 'responses' is {texts!r}, not a list of texts")
        case "response":
            texts = [cells["response"]]
            if not isinstance(texts[0], str):
                raise ConfigError(f"{where}: 'response' is a {type(texts[0]).__name__}, not text")
        case "chosen":
            pair = read_pair(cells, where)
            texts = [pair.chosen, pair.rejected]
        case _:
            raise ConfigError(f"{where} has none of 'responses', 'response' and 'chosen'; there is nothing to judge")
    if len(texts) < 2 and _compares(config):
        raise ConfigError(f"{where} has one response, but judge.kind: {config.kind} compares; give two or more")
    messages = to_messages(cells.get("prompt"), PLAIN, where)
    if not messages or not messages[-1]["content"].strip():
        raise ConfigError(f"{where} has no 'prompt', or an empty one; every row needs one")
    require_text(cells, where)
    metadata = {key: value for key, value in cells.items() if key not in ("prompt", "rejected", *RESPONSES)}
    prompt = Prompt(
        id=stable_id([messages, metadata]), messages=tuple(messages), text="", token_ids=(), metadata=metadata
    )
    return Group(prompt=prompt, responses=tuple(text_response(index, text) for index, text in enumerate(texts)))


def _require_constraints(group: Group, where: str) -> None:
    try:
        validate_constraints(group.prompt.metadata)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _compares(config: JudgeBase) -> bool:
    if isinstance(config, Ensemble):
        return any(_compares(member.judge) for member in config.members)
    return config.pairwise


def _judge_all(
    pool: LocalJudgePool,
    config: JudgeBase,
    source: Path,
    out: Path,
    on_progress: Callable[[int, int], None] | None,
) -> Judged:
    opened = _open(source)
    failures: Counter[str] = Counter()
    message, done, points, pairs = None, 0, 0.0, 0
    with files.atomic(out) as path, path.open("w", encoding="utf-8") as lines:
        for cells, judgement in _in_order(pool, config, opened.label, opened.rows):
            lines.write(json.dumps(cells | _said(judgement), ensure_ascii=False) + "\n")
            done += 1
            if judgement.failure is not None:
                failures[judgement.failure.kind] += 1
                message = judgement.failure.message
            elif judgement.scores is not None and cells.get("chosen") is not None:
                chosen, rejected = judgement.scores
                pairs += 1
                points += 0.5 if chosen == rejected else float(chosen > rejected)
            if on_progress is not None:
                on_progress(done, opened.total)
    return Judged(rows=done, failures=dict(failures), message=message, accuracy=points / pairs if pairs else None)


def _in_order(
    pool: LocalJudgePool, config: JudgeBase, label: str, rows: Iterator[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[dict[str, Any], Judgement]]:
    """Rows with their judgements; `WAITING` of them are with the judge at a time."""
    asked: list[tuple[dict[str, Any], Future[list[Judgement]]]] = []
    while True:
        for place, cells in itertools.islice(rows, WAITING - len(asked)):
            asked.append((cells, pool.submit([read_group(config, cells, f"{label}, {place}")])))
        if not asked:
            return
        cells, future = asked.pop(0)
        yield cells, future.result()[0]


def _said(judgement: Judgement) -> dict[str, Any]:
    said: dict[str, Any] = {"scores": judgement.scores}
    if judgement.rationales is not None:
        said["rationales"] = judgement.rationales
    if judgement.comparisons is not None:
        said["comparisons"] = [asdict(comparison) for comparison in judgement.comparisons]
    if judgement.failure is not None:
        said["failure"] = asdict(judgement.failure)
    return said
