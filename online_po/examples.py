"""What a round trains on, built from its judged groups: preference pairs, or responses with labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from online_po import labels, pairs
from online_po.agreement import Agreement
from online_po.config import Config
from online_po.errors import NoPairsError
from online_po.example_mix import balanced, count_sources, mixed_in
from online_po.given import ResponseEncoder
from online_po.implicit_rewards import group_rewards, judged_parts
from online_po.ledger import Ledger
from online_po.length import length_slope, without_length
from online_po.metrics import SampleStats
from online_po.parts import Parts
from online_po.seeds import SEEDS, stable_seed
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA, PromptRows, labels_to_table, pairs_to_table
from online_po.types import Group, Judgement, Label, Pair, Reference, Response

Judged = tuple[Group, Judgement]

REMEDIES: dict[pairs.Skip, str] = {
    "identical": "raise generator.temperature or loop.responses_per_prompt",
    "tie": "raise generator.temperature or loop.responses_per_prompt, or use a judge with finer scores",
    "below_min_margin": "lower pairs.min_margin",
    "length_ratio": "raise pairs.max_length_ratio",
    "same_as_chosen": "the policy says what pairs.chosen_column holds: train no further, or on other prompts",
    "chosen_too_long": "shorten what pairs.chosen_column holds, or raise generator.max_tokens",
    "no_contrast": "raise labels.share or loop.responses_per_prompt",
    "judge_failed": "see the round's judgements/",
}


def make_examples(parts: Parts, round_: int, prompts: PromptRows, held: Reference) -> tuple[pa.Table, dict[str, Any]]:
    """(the round's pairs or labels, metrics of its sampling); `held`: the round's reference, for hardest_reward.

    What the ledger holds already is kept. In the file the round's own examples come first. Raises NoPairsError if there
    are none.
    """
    ledger, kind = parts.ledger, parts.config.example_kind
    if not ledger.has_examples(round_, kind):
        _write_examples(parts, round_, prompts, held)
    notes = ledger.example_notes(round_, kind)
    if notes["own"] == 0:
        raise NoPairsError(_why_nothing(round_, kind, len(prompts), Counter(notes["metrics"]["pair_skips"])))
    examples = ledger.examples(round_, kind)
    return examples, {
        "sources": count_sources(examples),
        "flipped": int(pc.sum(examples["flipped"]).as_py()),
        **notes["metrics"],
    }


def _write_examples(parts: Parts, round_: int, prompts: PromptRows, held: Reference) -> None:
    """Writes the round's examples, with metrics of its sampling in their notes.

    Read and written part by part, so that memory stays flat; only pairs.balance_column holds a round's examples, and
    hardest_reward its responses.
    """
    config, ledger, kind = parts.config, parts.ledger, parts.config.example_kind
    rewards: Iterator[list[float]] | None = None
    if config.pairs.strategy == "hardest_reward":
        rewards = group_rewards(parts, round_, prompts, held)
    builder = ExampleBuilder(config, ledger, round_, prompts, encode=parts.encode, rewards=rewards)
    own, notes, dropped = 0, dict[str, Any](), Counter[str]()
    with ledger.examples_writer(round_, kind, PAIR_SCHEMA if kind == "pairs" else LABEL_SCHEMA) as writer:
        for table in builder.balanced(dropped):
            own += table.num_rows
            writer.write(table)
        for table in mixed_in(parts, round_, own, notes):
            writer.write(table)
        notes["metrics"] = {
            "pair_skips": dict(builder.skips),
            "pair_drops": dict(dropped),
            "judge_failures": dict(builder.failures),
            "policy_version_sampled": builder.version,
            **builder.length_metrics(),
            **builder.agreement.result(),
            **builder.stats.result(),
        }
        writer.note(notes)


def count_examples(examples: pa.Table) -> dict[str, Any]:
    """How many pairs, or desirable and undesirable responses, a round trains on, and their mean lengths in tokens."""
    if "label" not in examples.schema.names:
        return {
            "pairs": examples.num_rows,
            "chosen_length": mean_length(examples["chosen_token_ids"]),
            "rejected_length": mean_length(examples["rejected_token_ids"]),
        }
    desirable = examples.filter(examples["label"])
    undesirable = examples.filter(pc.invert(examples["label"]))
    return {
        "labels": examples.num_rows,
        "desirable": desirable.num_rows,
        "undesirable": undesirable.num_rows,
        "desirable_length": mean_length(desirable["response_token_ids"]),
        "undesirable_length": mean_length(undesirable["response_token_ids"]),
    }


def mean_length(token_ids: pa.ChunkedArray) -> float | None:
    """Mean number of tokens of a column of token ids; None of an empty one."""
    return pc.mean(pc.list_value_length(token_ids)).as_py()


class ExampleBuilder:
    """Makes a round's own examples from what the ledger holds of it, and counts what it sees meanwhile.

    `encode`: for pairs.strategy: spin. `rewards`: for hardest_reward, implicit rewards of each judged group in order.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        round_: int,
        prompts: PromptRows,
        *,
        encode: ResponseEncoder | None = None,
        rewards: Iterator[list[float]] | None = None,
    ) -> None:
        self.config, self.ledger, self.round, self.prompts = config, ledger, round_, prompts
        self.encode, self.rewards = encode, rewards
        self.stats = SampleStats(seed=self._seed("metrics"))
        self.skips: Counter[pairs.Skip] = Counter()
        """Prompts without an example, by reason."""
        self.failures: Counter[str] = Counter()
        """Groups without a judgement, by kind of failure."""
        self.domains: list[str] = []
        """Of each example made so far, what pairs.balance_column holds (JSON); empty without such a column."""
        self.version = 0
        """The policy version that sampled."""
        self.agreement = Agreement()
        self.slope: float | None = None
        """The round's trend of score over length, where judge.length.regress takes it out."""

    def balanced(self, dropped: Counter[str]) -> Iterable[pa.Table]:
        """As `tables`; with pairs.balance_column large domains keep only some, and the others are counted."""
        if self.config.pairs.balance_column is None:
            return self.tables()
        examples = pa.concat_tables(list(self.tables()))
        kept = balanced(self.domains, self.config.pairs.balance_ratio, self._seed("balance"))
        if lost := int((~kept).sum()):
            dropped["balance"] = lost
        return [examples.filter(pa.array(kept))]

    def tables(self) -> Iterator[pa.Table]:
        """The round's own examples, a table a part."""
        config, ledger, rewards = self.config, self.ledger, self.rewards
        length = config.judge.length
        if length.regress:
            parts = judged_parts(config, ledger, self.round, self.prompts)
            self.slope = length_slope(judged for part in parts for judged in part)
        for part, places in enumerate(self.prompts.chunks(config.generator.chunk_prompts)):
            groups = ledger.responses(self.round, part, self.prompts[places.start : places.stop])
            judged = list(zip(groups, ledger.judgements(self.round, part), strict=True))
            for group, judgement in judged:
                # The judge's own scores: what it likes is seen there.
                self.stats.add(group, judgement)
                self.agreement.add(judgement)
                if judgement.failure is not None:
                    self.failures[judgement.failure.kind] += 1
                self.version = group.responses[0].policy_version
            if length.used:
                judged = [(group, without_length(group, judgement, length, self.slope)) for group, judgement in judged]
            if config.example_kind == "labels":
                yield labels_to_table(self._labels(judged), self.round)
            elif config.pairs.strategy == "spin":
                yield pairs_to_table(self._spin_pairs(judged), self.round)
            else:
                yield pairs_to_table(self._pairs(judged, rewards), self.round)

    def length_metrics(self) -> dict[str, float | None]:
        """What judge.length took out of the round's scores; nothing where it is off."""
        length = self.config.judge.length
        return ({"length_slope": self.slope} if length.regress else {}) | (
            {"length_penalty": length.penalty_per_token} if length.penalty_per_token else {}
        )

    def _pairs(self, judged: list[Judged], rewards: Iterator[list[float]] | None) -> Iterator[tuple[Pair, Judgement]]:
        for group, judgement in judged:
            of_group = next(rewards) if rewards is not None and judgement.scores is not None else None
            seed = self._seed("pairs", group.prompt.id)
            scale = self.config.judge.bradley_terry_scale
            made, skip = pairs.build_pairs(group, judgement, self.config.pairs, seed, of_group, scale)
            self._count(group, len(made), skip)
            for pair in made:
                assert isinstance(pair.chosen, Response)
                flips = self._flips(group.prompt.id, pair.chosen.index, pair.rejected.index)
                yield pairs.flip(pair) if flips else pair, judgement

    def _spin_pairs(self, judged: list[Judged]) -> Iterator[tuple[Pair, Judgement]]:
        """Failed judgements are counted and leave no pair out: no score decides anything here."""
        encode, column = self.encode, self.config.pairs.chosen_column
        assert encode is not None and column is not None
        given = encode([group.prompt.metadata[column] for group, _ in judged])
        for (group, judgement), chosen in zip(judged, given, strict=True):
            seed = self._seed("pairs", group.prompt.id)
            made, skip = pairs.spin_pairs(group, chosen, self.config.pairs, seed, encode.max_length)
            self._count(group, len(made), skip)
            yield from ((pair, judgement) for pair in made)

    def _labels(self, judged: list[Judged]) -> Iterator[tuple[Label, Judgement]]:
        for group, judgement in judged:
            made, skip = labels.build_labels(group, judgement, self.config.labels)
            self._count(group, len(made), skip)
            for label in made:
                flips = self._flips(group.prompt.id, label.response.index)
                yield labels.flip(label) if flips else label, judgement

    def _count(self, group: Group, made: int, skip: pairs.Skip | None) -> None:
        if skip is not None:
            self.skips[skip] += 1
        if (column := self.config.pairs.balance_column) is not None:
            self.domains += [json.dumps(group.prompt.metadata[column], sort_keys=True)] * made

    def _flips(self, prompt_id: str, *indices: int) -> bool:
        """Whether chance, at pairs.flip_rate, turns this example around."""
        rate = self.config.pairs.flip_rate
        return rate > 0 and self._seed("flip", prompt_id, *indices) < rate * SEEDS

    def _seed(self, purpose: str, *what: int | str) -> int:
        return stable_seed(self.config.run.seed, purpose, self.round, *what)


def _why_nothing(round_: int, kind: str, prompts: int, skips: Counter[pairs.Skip]) -> str:
    reasons = ", ".join(f"{count} x {reason}" for reason, count in skips.most_common())
    what = "pair" if kind == "pairs" else "label"
    remedies = "; ".join(f"for {reason}: {REMEDIES[reason]}" for reason, _ in skips.most_common())
    return (
        f"round {round_} gave no {what} to train on from {prompts} prompts ({reasons}). Start a new run (another "
        f"run.name) with other settings. {remedies[0].upper()}{remedies[1:]}"
    )
