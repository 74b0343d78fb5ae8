"""Trying a judge on pairs of which the better response is known: before a run, and while it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from online_po.errors import ConfigError
from online_po.fail_points import fail_point
from online_po.judge_configs import JudgeBase
from online_po.ledger import Ledger
from online_po.parts import Parts
from online_po.prompt_files import open_file, plain_cells
from online_po.protocols import JudgePool, Observer
from online_po.seed_pairs import FIELDS, PairRow, read_pair
from online_po.seeds import stable_id
from online_po.types import Group, Judgement, Prompt, Response

KNOWN_PAIRS = Path(__file__).with_name("known_pairs.jsonl")
"""Pairs that come with the package; of half of them the better response is the longer one."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a judge did on known pairs."""

    pairs: int
    accuracy: float
    """Share of the pairs that it got right; a tie is half a right answer, a failure none."""
    ties: int
    failures: dict[str, int]
    """Pairs that it could not judge, by kind of failure."""
    message: str | None
    """What the last failure says."""
    consistency: float | None
    """Share of the judged pairs on which both orders say the same; None for judges that compare no pairs, or show one
    order only."""
    longer: float | None
    """Share of its decisions (no ties) for the longer response, of texts of unlike length; 0.5 in the pairs that come
    with the package. None without any."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def known_pairs(config: JudgeBase) -> list[PairRow]:
    """The pairs that a judge is tried on: `judge.gold`, or those that come with the package where the judge is one of
    responses in general; else none.

    Raises ConfigError, with line and field, for a file that is missing, empty, or holds what is no pair, or a pair of
    which neither response is the better one.
    """
    if config.gold is None and not config.general:
        return []
    path = str(KNOWN_PAIRS) if config.gold is None else config.gold
    label = f"judge.gold {path!r}"
    opened = open_file("judge.gold", path, None, texts=FIELDS)
    rows = [read_pair(plain_cells(cells, f"{label}, {place}"), f"{label}, {place}") for place, cells in opened.rows]
    if not rows:
        raise ConfigError(f"{label} holds no pairs; give rows with prompt, chosen and rejected")
    _require_one_better(rows)
    return rows


def _require_one_better(rows: Sequence[PairRow]) -> None:
    """Raises ConfigError for pairs that no judge can get right: neither response is better, or the file says of both
    that they are."""
    places: dict[tuple[str, str, str], str] = {}
    for row in rows:
        if row.chosen == row.rejected or (row.scores is not None and row.scores[0] == row.scores[1]):
            what = "the same text" if row.chosen == row.rejected else "of the same score"
            raise ConfigError(f"{row.where}: 'chosen' and 'rejected' are {what}, so neither is better; remove the row")
        asked = stable_id([row.messages, row.metadata])
        if (other := places.get((asked, row.rejected, row.chosen))) is not None:
            raise ConfigError(f"{row.where}: 'chosen' and 'rejected' stand the other way round in {other}; remove one")
        places[asked, row.chosen, row.rejected] = row.where


def trial_groups(pairs: Sequence[PairRow], version: int = 0) -> list[Group]:
    """One group a pair, of two responses; the better one is `responses[better(place)]`.

    Texts only: there are no token ids, for no policy sampled them. `version`: the policy version that they pass for,
    so that a judge that is the policy judges them as it judges that policy's own.
    """
    groups = []
    for place, pair in enumerate(pairs):
        texts = (pair.rejected, pair.chosen) if better(place) else (pair.chosen, pair.rejected)
        name = stable_id([pair.messages, pair.metadata])
        prompt = Prompt(id=name, messages=tuple(pair.messages), text="", token_ids=(), metadata=dict(pair.metadata))
        responses = tuple(replace(text_response(i, text), policy_version=version) for i, text in enumerate(texts))
        groups.append(Group(prompt=prompt, responses=responses))
    return groups


def better(place: int) -> int:
    """Where the better response of a pair stands in its group: first and second in turn."""
    return place % 2


def text_response(index: int, text: str) -> Response:
    """A response that is known as text only."""
    return Response(
        index=index, text=text, token_ids=(), token_logps=(), finish_reason="stop", policy_version=0, seed=0
    )


def assess(pairs: Sequence[PairRow], judgements: Sequence[Judgement]) -> Trial:
    """What the judgements of `trial_groups(pairs)` say of the judge."""
    points, ties, longer, decided = 0.0, 0, 0, 0
    failures: Counter[str] = Counter()
    consistent: list[bool] = []
    message = None
    for place, (pair, judgement) in enumerate(zip(pairs, judgements, strict=True)):
        if judgement.failure is not None:
            failures[judgement.failure.kind] += 1
            message = judgement.failure.message
            continue
        assert judgement.scores is not None
        good, bad = judgement.scores[better(place)], judgement.scores[1 - better(place)]
        consistent += [c.consistent for c in judgement.comparisons or () if c.consistent is not None]
        ties += good == bad
        points += 0.5 if good == bad else float(good > bad)
        if good != bad and len(pair.chosen) != len(pair.rejected):
            decided += 1
            longer += (good > bad) == (len(pair.chosen) > len(pair.rejected))
    return Trial(
        pairs=len(pairs),
        accuracy=points / len(pairs),
        ties=ties,
        failures=dict(failures),
        message=message,
        consistency=sum(consistent) / len(consistent) if consistent else None,
        longer=longer / decided if decided else None,
    )


def require_trial(config: JudgeBase, trial: Trial) -> None:
    """Raises ConfigError for a judge that is below the bounds of `judge.preflight`."""
    bounds, failed = config.preflight, sum(trial.failures.values())
    which = "the known pairs that come with the package" if config.gold is None else "judge.gold"
    too_many = trial.accuracy < bounds.min_accuracy and failed / trial.pairs > config.max_failure_rate
    if failed == trial.pairs or too_many:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in trial.failures.items())
        raise ConfigError(
            f"the judge failed on {failed} of {trial.pairs} pairs of {which} ({kinds}); last message: "
            f"{trial.message!r}. The run does not start: mend the judge"
        )
    if trial.accuracy < bounds.min_accuracy:
        raise ConfigError(
            f"the judge got {trial.accuracy:.0%} of {trial.pairs} pairs of {which} right ({trial.ties} ties count "
            f"half), below judge.preflight.min_accuracy = {bounds.min_accuracy:g}; use another judge, name pairs of "
            "your own task in judge.gold, or lower the bound"
        )
    if trial.consistency is not None and trial.consistency < bounds.min_consistency:
        raise ConfigError(
            f"the judge said the same in both orders of {trial.consistency:.0%} of the pairs of {which}, below "
            f"judge.preflight.min_consistency = {bounds.min_consistency:g}; use another judge, or lower the bound"
        )


def try_judge(
    judges: JudgePool, config: JudgeBase, pairs: Sequence[PairRow], ledger: Ledger, observer: Observer
) -> None:
    """Tries the judge before the run. Raises ConfigError below the bounds of `judge.preflight`."""
    groups = trial_groups(pairs)
    with observer.phase("preflight", 0):
        if (text := judges.shown(groups[0])) is not None:
            observer.message(f"what the judge is asked, to the letter:\n{text}")
        trial = assess(pairs, judges.submit(groups).result())
    observer.message(f"judge before the run: {describe(trial)}")
    require_trial(config, trial)
    fail_point("preflight.judged")
    # A resumed run's judge must pass too, but what is in the ledger, and hashed there, is the first word.
    if ledger.last_committed() is None or ledger.judge_trial(0) is None:
        ledger.write_judge_trial(0, trial.as_dict())


def calibrate(parts: Parts, round_: int) -> None:
    """Tries the judge again after a round, where that is due and not done; a fall of its accuracy is told of."""
    config, ledger = parts.config.judge, parts.ledger
    first = ledger.judge_trial(0)
    if first is None or not config.calibration.every or round_ % config.calibration.every:
        return
    if ledger.judge_trial(round_) is not None:
        return
    with parts.phase("calibrate", round_):
        # Asked anew: what is remembered is what it said before.
        groups = trial_groups(parts.known, round_)
        answers = parts.judges.submit(groups, round_, occasion=f"calibration {round_}").result()
        trial = assess(parts.known, answers)
        alarm = has_fallen(first["accuracy"], trial.accuracy, config.calibration.max_drop)
        ledger.write_judge_trial(round_, trial.as_dict() | {"alarm": alarm})
    parts.observer.message(f"judge after round {round_}: {describe(trial)}")
    if alarm:
        parts.observer.message(
            f"ALARM: the judge's accuracy on judge.gold fell by {first['accuracy'] - trial.accuracy:.0%} since the run "
            f"began, more than judge.calibration.max_drop = {config.calibration.max_drop:g}; see whether its model or "
            "endpoint has changed"
        )


def has_fallen(before: float, now: float, bound: float) -> bool:
    """Whether an accuracy fell by more than `bound`; 0.8 to 0.7 is 0.1, whatever floats make of it."""
    return before - now > bound + 1e-9


def describe(trial: Trial) -> str:
    """One line for people."""
    words = [f"{trial.accuracy:.0%} of {trial.pairs} known pairs right"]
    if trial.ties:
        words.append(f"{trial.ties} ties")
    if trial.consistency is not None:
        words.append(f"{trial.consistency:.0%} alike in both orders")
    if trial.longer is not None:
        words.append(f"the longer one in {trial.longer:.0%} of its decisions")
    words += [f"{count} x {kind}" for kind, count in trial.failures.items()]
    return ", ".join(words)
