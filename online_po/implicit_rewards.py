"""Implicit rewards of a round's responses under the policy that sampled them, for `pairs.strategy: hardest_reward`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from online_po.config import Config
from online_po.ledger import Ledger
from online_po.parts import Parts
from online_po.tables import PromptRows, labels_to_table
from online_po.types import Group, Judgement, Label, Reference


def group_rewards(parts: Parts, round_: int, prompts: PromptRows, held: Reference) -> Iterator[list[float]]:
    """For each group that was judged, in order of parts and groups: the implicit reward of each of its responses.

    log pi - log ref in nats (DPO's reward without its beta, Rafailov et al. 2023, arXiv 2305.18290, eq. 5), summed
    over response tokens; pi is the policy that sampled, by its own logps. Without a reference: log pi alone. Where pi
    is the reference, all rewards are 0 and nothing is computed: what would be found is the noise between two engines.
    """
    if parts.config.reference.kind != "none" and held == Reference(round=_sampling_version(parts, round_, prompts)):
        for judged in judged_parts(parts.config, parts.ledger, round_, prompts):
            yield from ([0.0] * len(group.responses) for group, _ in judged)
        return
    reference: Iterator[float] = itertools.repeat(0.0)
    if parts.config.reference.kind != "none":
        reference = iter(_reference_logps(parts, round_, prompts, held).tolist())
    for judged in judged_parts(parts.config, parts.ledger, round_, prompts):
        for group, _ in judged:
            yield [sum(response.token_logps) - next(reference) for response in group.responses]


def judged_parts(
    config: Config, ledger: Ledger, round_: int, prompts: PromptRows
) -> Iterator[list[tuple[Group, Judgement]]]:
    """The round's groups that have scores, part by part."""
    for part, places in enumerate(prompts.chunks(config.generator.chunk_prompts)):
        groups = ledger.responses(round_, part, prompts[places.start : places.stop])
        judged = zip(groups, ledger.judgements(round_, part), strict=True)
        yield [(group, judgement) for group, judgement in judged if judgement.scores is not None]


def _sampling_version(parts: Parts, round_: int, prompts: PromptRows) -> int:
    places = prompts.chunks(parts.config.generator.chunk_prompts)[0]
    first = parts.ledger.responses(round_, 0, prompts[places.start : places.stop])[0]
    return first.responses[0].policy_version


def _reference_logps(parts: Parts, round_: int, prompts: PromptRows, held: Reference) -> np.ndarray:
    """(R,) float32 logps of all judged responses under the reference; what the ledger holds already is kept.

    One table for the whole round: a reference that is not in memory is loaded once a call."""
    stored = parts.ledger.response_logps(round_)
    if stored is not None:
        return stored
    judged = judged_parts(parts.config, parts.ledger, round_, prompts)
    responses = pa.concat_tables(labels_to_table(_unlabelled(part), round_) for part in judged).combine_chunks()
    logps = np.full(responses.num_rows, np.nan, dtype=np.float32)
    done = 0
    for batch in parts.learner.logps(responses, parts.ledger.reference(held, parts.start)):
        logps[batch["row"]] = batch["response"]
        done += len(batch["row"])
        parts.observer.progress("reference", done, responses.num_rows)
    assert not np.isnan(logps).any(), "the learner left responses out"
    parts.ledger.write_response_logps(round_, logps)
    return logps


def _unlabelled(judged: list[tuple[Group, Judgement]]) -> Iterator[tuple[Label, Judgement]]:
    for group, judgement in judged:
        assert judgement.scores is not None
        for response, score in zip(group.responses, judgement.scores, strict=True):
            yield Label(prompt=group.prompt, response=response, desirable=None, score=score), judgement
