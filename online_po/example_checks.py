"""What the settings behind a round's examples (sections `pairs` and `labels`) ask of the rest: of other sections at
parse time, of the prompts once they are read. Imports neither torch nor ray."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from online_po.errors import ConfigError
from online_po.types import Prompt

if TYPE_CHECKING:
    from online_po.config import Config

FOR_LABELS_TOO = ("replay_share", "replay_rounds", "balance_column", "balance_ratio", "flip_rate")
"""Settings of section `pairs` that labelled responses take as well."""


def check_examples(config: Config) -> None:
    """Cross-checks of `pairs` and `labels` with other sections. Raises ValueError, as pydantic's validators do."""
    pairs, n = config.pairs, config.loop.responses_per_prompt
    if config.example_kind == "labels":
        _check_labels(config)
    else:
        _check_pairs(config)
    if config.generator.temperature == 0 and n > 1:
        raise ValueError(
            f"generator.temperature is 0: all {n} responses to a prompt would be the same; raise it"
            + (", or set loop.responses_per_prompt: 1" if _one_response_will_do(config) else "")
        )
    if pairs.replay_share and config.loop.rounds == 1:
        raise ValueError(
            f"pairs.replay_share is {pairs.replay_share:g}, but loop.rounds is 1: there is no earlier round; drop it"
        )


def _one_response_will_do(config: Config) -> bool:
    """Whether a prompt with a single response can give an example."""
    if config.example_kind == "labels":
        return config.labels.rule == "threshold"
    return config.pairs.strategy == "spin"


def _check_labels(config: Config) -> None:
    loss, n = config.loss[0].name, config.loop.responses_per_prompt
    for name, field in type(config.pairs).model_fields.items():
        value = getattr(config.pairs, name)
        if name not in FOR_LABELS_TOO and value != field.default:
            raise ValueError(
                f"pairs.{name} is {value!r}, but loss.name: {loss} trains on single labelled responses, not on pairs; "
                "drop it (section labels says how they are labelled)"
            )
    if config.loop.top_up and config.labels.rule == "threshold":
        raise ValueError(
            f"loop.top_up is {config.loop.top_up:g}, but under labels.rule: threshold responses that are scored alike "
            "are labelled too; drop it, or use another rule"
        )
    if n < 2 and not _one_response_will_do(config):
        raise ValueError(
            f"loop.responses_per_prompt is {n}, but labels.rule: {config.labels.rule} compares the responses to a "
            "prompt; use 2 or more, or labels.rule: threshold"
        )


def _check_pairs(config: Config) -> None:
    pairs, n = config.pairs, config.loop.responses_per_prompt
    for name, field in type(config.labels).model_fields.items():
        if getattr(config.labels, name) != field.default:
            raise ValueError(
                f"labels.{name} is {getattr(config.labels, name)!r}, but loss.name: {config.loss[0].name} trains on "
                "pairs; drop section labels"
            )
    if n < 2 and not _one_response_will_do(config):
        raise ValueError(
            f"loop.responses_per_prompt is {n}, but loss.name: {config.loss[0].name} trains on pairs; use 2 or more"
        )
    if pairs.strategy == "top_bottom_k" and 2 * pairs.k > n:
        raise ValueError(
            f"pairs.k is {pairs.k}: top_bottom_k needs 2 x k responses, but loop.responses_per_prompt is {n}"
        )
    scored = next((loss for loss in config.loss if loss.needs_scores), None)
    if pairs.strategy == "spin" and scored is not None:
        raise ValueError(
            f"loss.name: {scored.name} needs scores, which pairs of pairs.strategy: spin do not have; choose another "
            "loss or strategy"
        )
    if pairs.strategy == "spin" and config.loop.top_up:
        raise ValueError(
            f"loop.top_up is {config.loop.top_up:g}, but of pairs.strategy: spin no pair depends on scores; drop it"
        )
    if pairs.strategy == "spin" and config.judge.length.used:
        raise ValueError("judge.length has no effect with pairs.strategy: spin, whose pairs no score decides; drop it")
    if pairs.strategy == "hardest_reward" and _is_always_its_reference(config):
        raise ValueError(
            "pairs.strategy is hardest_reward, but in every round the policy that samples is its own reference "
            f"(reference.kind: {config.reference.kind}, loop.max_staleness: {config.loop.max_staleness}), so that all "
            "implicit rewards are 0; use pairs.strategy: hardest, another reference, or more rounds"
        )


def _is_always_its_reference(config: Config) -> bool:
    """Whether every round is sampled by the very policy that is its reference."""
    every = config.loop.rounds if config.reference.kind == "fixed" else config.reference.refreshes_every
    if every is None:
        return False
    before = range(config.loop.rounds)  # the round before each
    return all(max(0, done - config.loop.max_staleness) == done // every * every for done in before)


def check_prompt_columns(config: Config, prompts: Iterable[Prompt]) -> None:
    """Raises ConfigError unless every prompt has the columns that `pairs` names."""
    where = f"prompts.path {config.prompts.path!r}"
    if config.prompts.path is None:
        where = f"prompts.dataset {config.prompts.dataset!r}"
    wanted = {"balance_column": config.pairs.balance_column, "chosen_column": config.pairs.chosen_column}
    named = {setting: column for setting, column in wanted.items() if column is not None}
    for prompt in prompts if named else ():
        for setting, column in named.items():
            text = prompt.messages[-1]["content"][:60]
            if column not in prompt.metadata:
                near = difflib.get_close_matches(column, prompt.metadata, n=1, cutoff=0.5)
                there = ", ".join(map(repr, prompt.metadata)) or "none"
                raise ConfigError(
                    f"pairs.{setting} is {column!r}, but prompt {text!r} of {where} has no such column besides its "
                    f"prompt, only {there}" + (f"; did you mean {near[0]!r}?" if near else "; give every prompt one")
                )
            value = prompt.metadata[column]
            if setting == "chosen_column" and not (isinstance(value, str) and value.strip()):
                what = "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
                raise ConfigError(
                    f"pairs.chosen_column is {column!r}, which holds {what} for prompt {text!r} of {where}; every "
                    "prompt needs the text of a response there"
                )
