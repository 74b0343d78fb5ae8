"""One round, read top to bottom: prompts, generate, judge, pair, reference logps, update, refresh, commit.

It sees protocols only. Each piece is looked for in the ledger first and made only if it is not there,
so the same code runs a round and resumes one. `online_po.loop` puts rounds one after the other and
syncs the generators in between.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from online_po.config import Config
from online_po.cursor import PromptCursor
from online_po.errors import NoPairsError
from online_po.judging import Judging
from online_po.ledger import LogpKind
from online_po.metrics import SampleStats, round_means
from online_po.pairs import build_pairs
from online_po.parts import Parts
from online_po.protocols import Learner
from online_po.seeds import stable_seed
from online_po.tables import PAIR_SCHEMA, PromptRows, pairs_to_table, prompts_to_table
from online_po.types import Group, Judgement, Pair, Probe, Prompt, Request

# -- sampling: prompts, generate, judge ------------------------------------------------------------


def sample_round(parts: Parts, round_: int) -> None:
    """Fills the round's prompts, responses and judgements; what the ledger holds already is kept.

    Raises JudgeFailureRateError if too many groups could not be judged; every judgement that could be
    had is kept, and a resumed run asks again for those that failed.
    """
    ledger, observer = parts.ledger, parts.observer
    if ledger.is_judged(round_):
        return
    prompts = draw_prompts(parts, round_)
    size = parts.config.generator.chunk_prompts
    numbers = range(-(-len(prompts) // size))
    made = {part for part in numbers if ledger.has_responses(round_, part)}
    unfinished: dict[int, dict[int, Group]] = defaultdict(dict)

    def chunk(part: int) -> Sequence[Prompt]:
        return prompts[part * size : (part + 1) * size]

    def missing() -> Iterator[tuple[int, list[Request]]]:
        for part in numbers:
            parts.require_going_on()
            if part not in made:
                yield part, [request(parts.config, prompt, "sample", round_) for prompt in chunk(part)]

    with Judging(parts, round_, len(prompts)) as judging:
        with observer.phase("generate", round_):
            done = 0
            for part in sorted(made):
                judging.resume(part, chunk(part))
                done += len(chunk(part))
            for part, groups in parts.generator.generate(missing(), parts.config.generator):
                unfinished[part] |= groups
                of = min(size, len(prompts) - part * size)
                if len(unfinished[part]) == of:
                    ledger.write_responses(round_, part, [group for _, group in sorted(unfinished.pop(part).items())])
                judging.submit(part, of, groups)
                done += len(groups)
                observer.progress("generate", done, len(prompts))
        with observer.phase("judge", round_):
            judging.finish()


def draw_prompts(parts: Parts, round_: int) -> PromptRows:
    """The round's prompts, in sampling order: from the ledger, or drawn after the previous round's."""
    ledger = parts.ledger
    if not ledger.has_prompts(round_):
        cursor = PromptCursor(len(parts.train), parts.config.run.seed)
        if round_ > 1:
            cursor.load_state_dict(ledger.cursor(round_ - 1))
        indices = cursor.draw(parts.config.loop.prompts_per_round)
        batches = (indices[i : i + 4096] for i in range(0, len(indices), 4096))
        tables = (prompts_to_table(parts.train[i] for i in batch) for batch in batches)
        ledger.write_prompts(round_, tables, cursor.state_dict())
    return ledger.prompts(round_)


def request(config: Config, prompt: Prompt, purpose: str, round_: int) -> Request:
    """Seeds from (run seed, purpose, round, prompt id, sample index): no clock, no order of work."""
    n = config.loop.responses_per_prompt if purpose == "sample" else config.eval.responses_per_prompt
    seeds = tuple(stable_seed(config.run.seed, purpose, round_, prompt.id, index) for index in range(n))
    return Request(prompt=prompt, seeds=seeds)


# -- training: pair, reference logps, update, refresh, commit --------------------------------------


def train_round(parts: Parts, round_: int) -> None:
    """Pairs, reference logps, update, refresh and commit of a sampled round.

    Raises NoPairsError if the round holds nothing to train on.
    """
    config, ledger, observer = parts.config, parts.ledger, parts.observer
    reference_round = earlier_reference = ledger.committed(round_ - 1).reference_round
    with observer.phase("pair", round_):
        pairs, sampled = make_pairs(parts, round_)
    with observer.phase("reference", round_):
        reference = start = None
        if config.reference.kind != "none":
            reference = pair_logps(parts, round_, pairs, "reference", reference_round)
        if reference is not None and reference_round == 0:
            start = reference
        elif config.measures_kl_to_start:
            start = pair_logps(parts, round_, pairs, "start", 0)
    steps: list[dict[str, float]] = []
    with observer.phase("learn", round_):
        for metrics in parts.learner.update(round_, pairs, reference, start):
            steps.append(metrics)
            observer.step(round_, metrics)
    if config.reference.kind == "refresh" and round_ % config.reference.every == 0:
        reference_round = round_
    with observer.phase("save", round_), ledger.weights(round_) as (policy_dir, trainer_dir):
        parts.learner.save(round_, policy_dir, trainer_dir)
    with observer.phase("commit", round_):
        rows = [{"kind": "step", "round": round_, "step": i, **metrics} for i, metrics in enumerate(steps, 1)]
        summary = {
            "kind": "round",
            "round": round_,
            "reference_round": reference_round,
            **sampled,
            **round_means(steps),
            **sampling_kl(pairs, reference, start),
            "pairs": pairs.num_rows,
            "chosen_length": mean_length(pairs["chosen_token_ids"]),
            "rejected_length": mean_length(pairs["rejected_token_ids"]),
            **parts.timer.round_seconds(round_),
        }
        ledger.write_metrics(round_, [*rows, summary])
        ledger.commit(
            round_,
            is_adapter=config.learner.lora is not None,
            reference_round=reference_round,
            probe=probe_of(parts.learner, ledger.committed(0).probe.token_ids),
        )
        ledger.prune(round_, config.run.keep_checkpoints, reference_round, since=earlier_reference)
    observer.round(summary)


def make_pairs(parts: Parts, round_: int) -> tuple[pa.Table, dict[str, Any]]:
    """(the round's pairs, metrics of its sampling), read part by part so that memory stays flat."""
    config, ledger = parts.config, parts.ledger
    prompts = draw_prompts(parts, round_)
    size = config.generator.chunk_prompts
    stats = SampleStats(seed=stable_seed(config.run.seed, "metrics", round_))
    skips: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    version = 0
    with ledger.pairs_writer(round_, PAIR_SCHEMA) as writer:
        for part, begin in enumerate(range(0, len(prompts), size)):
            groups = ledger.responses(round_, part, prompts[begin : begin + size])
            judgements = ledger.judgements(round_, part)
            rows: list[tuple[Pair, Judgement]] = []
            for group, judgement in zip(groups, judgements, strict=True):
                stats.add(group, judgement)
                seed = stable_seed(config.run.seed, "pairs", round_, group.prompt.id)
                built, skip = build_pairs(group, judgement, config.pairs, seed)
                rows.extend((pair, judgement) for pair in built)
                if skip is not None:
                    skips[skip] += 1
                if judgement.failure is not None:
                    failures[judgement.failure.kind] += 1
                version = group.responses[0].policy_version
            writer.write_table(pairs_to_table(rows))
    pairs = ledger.pairs(round_)
    if pairs.num_rows == 0:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skips.most_common())
        raise NoPairsError(
            f"round {round_} gave no pair to train on from {len(prompts)} prompts ({reasons}). Start a new run "
            "(another run.name) with other settings: for identical and tie, raise generator.temperature or "
            "loop.responses_per_prompt, or use a judge with finer scores; for below_min_margin, lower "
            "pairs.min_margin; for judge_failed, see the round's judgements/"
        )
    metrics = {"pair_skips": dict(skips), "judge_failures": dict(failures), "policy_version_sampled": version}
    return pairs, metrics | stats.result()


def pair_logps(parts: Parts, round_: int, pairs: pa.Table, kind: LogpKind, version: int) -> dict[str, np.ndarray]:
    """{"chosen": (N,), "rejected": (N,)} float32: response logps of all pairs under a committed policy, in nats."""
    stored = parts.ledger.logps(round_, kind)
    if stored is not None and len(stored["chosen"]) == pairs.num_rows:
        return stored
    policy = parts.ledger.policy(version, parts.start)
    logps = {name: np.full(pairs.num_rows, np.nan, dtype=np.float32) for name in ("chosen", "rejected")}
    done = 0
    for batch in parts.learner.logps(pairs, policy):
        for name, values in logps.items():
            values[batch["row"]] = batch[name]
        done += len(batch["row"])
        parts.observer.progress("reference", done, pairs.num_rows)
    assert not any(np.isnan(values).any() for values in logps.values()), "the learner left pairs out"
    parts.ledger.write_logps(round_, kind, logps)
    return logps


def mean_length(token_ids: pa.ChunkedArray) -> float:
    """Mean number of tokens of a column of token ids."""
    return float(pc.mean(pc.list_value_length(token_ids)).as_py())


def sampling_kl(
    pairs: pa.Table, reference: dict[str, np.ndarray] | None, start: dict[str, np.ndarray] | None
) -> dict[str, float]:
    """KL of the policy that sampled the round to the reference and to the start, where given, in nats a response.

    The k1 estimator (Schulman 2020, "Approximating KL divergence"): the mean of log(pi / other) over
    responses drawn from pi, here both responses of every pair. Unlike the metrics of a step, which see
    the same responses after pi has moved on, these are on-policy. Two biases remain: responses were picked
    by score, and they were drawn at `generator.temperature` (and top_p and so on), while pi is temperature 1.
    """
    sampler = {name: pairs[f"{name}_sampler_logp"].to_numpy() for name in ("chosen", "rejected")}
    return {
        key: float(np.mean([(sampler[name] - logps[name]).mean() for name in sampler]))
        for key, logps in (("kl_reference", reference), ("kl_start", start))
        if logps is not None
    }


def probe_of(learner: Learner, token_ids: Sequence[int]) -> Probe:
    """The learner's current word on the probe tokens."""
    return Probe(token_ids=tuple(token_ids), token_logps=tuple(learner.token_logps(token_ids)))
