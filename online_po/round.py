"""One round, read top to bottom: prompts, generate, judge, pair, reference logps, update, refresh, commit.

It sees protocols only. Each piece is looked for in the ledger first and made only if it is not there,
so the same code runs a round and resumes one. `online_po.loop` puts rounds one after the other and
syncs the generators in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from online_po.anchors import make_anchors, sampler_logps
from online_po.betas import drifted, next_scale, round_betas
from online_po.config import Config
from online_po.cursor import PromptCursor, further_prompts
from online_po.examples import count_examples, make_examples
from online_po.fail_points import fail_point
from online_po.guards import round_findings, rows_needed
from online_po.judge_cache import judge_statistics
from online_po.judging import Judging
from online_po.loss_configs import reward_beta
from online_po.metrics import likelihood_shift, round_means
from online_po.parts import Parts
from online_po.probes import probe_of, require_probe
from online_po.reference import renew_reference
from online_po.room import require_room
from online_po.seeds import stable_seed
from online_po.step_checkpoints import StepPlan, Trained
from online_po.tables import PromptRows, prompts_to_table
from online_po.types import Group, Policy, Probe, Prompt, Request

# -- sampling: prompts, generate, judge ------------------------------------------------------------


def sample_round(parts: Parts, round_: int) -> None:
    """Fills the round's prompts, responses and judgements; what the ledger holds already is kept.

    Raises JudgeFailureRateError if too many groups could not be judged; every judgement that could be
    had is kept, and a resumed run asks again for those that failed.
    """
    if parts.ledger.is_judged(round_):
        return
    prompts, first = draw_prompts(parts, round_), 0
    with Judging(parts, round_) as judging:
        while True:
            with parts.phase("generate", round_):
                sample_parts(parts, round_, prompts, first, judging)
            with parts.phase("judge", round_):
                judging.wait()
            further = further_prompts(parts.config.loop, len(prompts), judging.alike, len(parts.train))
            if further == 0:
                break
            parts.observer.message(
                f"round {round_}: the responses to {judging.alike} of {len(prompts)} prompts are scored alike; "
                f"{further} further prompts are sampled (loop.top_up)"
            )
            first = len(prompts.chunks(parts.config.generator.chunk_prompts))
            prompts = draw_prompts(parts, round_, further)
        judging.finish()


def sample_parts(parts: Parts, round_: int, prompts: PromptRows, first: int, judging: Judging) -> None:
    """Makes the responses of the parts from number `first` on, as far as the ledger has them not, and hands them to the
    judge as they come."""
    ledger, config, attempt = parts.ledger, parts.config, parts.ledger.attempt(round_)
    chunks = dict(enumerate(prompts.chunks(config.generator.chunk_prompts)[first:], first))
    made = {part for part in chunks if ledger.has_responses(round_, part)}
    unfinished: dict[int, dict[int, Group]] = defaultdict(dict)

    def chunk(part: int) -> Sequence[Prompt]:
        return prompts[chunks[part].start : chunks[part].stop]

    def missing() -> Iterator[tuple[int, list[Request]]]:
        for part in chunks:
            parts.require_going_on()
            if parts.stop.asked:  # what is under way is finished, and judged
                return
            if part not in made:
                yield part, [request(config, p, "sample", round_, attempt) for p in chunk(part)]

    done = len(prompts) - sum(map(len, chunks.values()))
    judging.groups = len(prompts)
    for part in sorted(made):
        parts.require_settled()
        judging.resume(part, chunk(part))
        done += len(chunks[part])
    for part, groups in parts.generator.generate(missing(), config.generator):
        parts.require_settled()
        unfinished[part] |= groups
        if len(unfinished[part]) == len(chunks[part]):
            ledger.write_responses(round_, part, [group for _, group in sorted(unfinished.pop(part).items())])
        judging.submit(part, len(chunks[part]), groups)
        done += len(groups)
        parts.observer.progress("generate", done, len(prompts))


def draw_prompts(parts: Parts, round_: int, further: int = 0) -> PromptRows:
    """The round's prompts, in sampling order: from the ledger, or drawn after the previous round's; and so many
    `further` ones behind them."""
    ledger = parts.ledger
    drawn = list(ledger.prompts(round_).draws) if ledger.has_prompts(round_) else []
    if further or not drawn:
        drawn.append(further or parts.config.loop.prompts_per_round)
        cursor = PromptCursor(len(parts.train), parts.config.run.seed)
        if round_ > 1:
            cursor.load_state_dict(ledger.cursor(round_ - 1))
        # A longer draw begins as a shorter one, and holds no prompt twice.
        indices = cursor.draw(sum(drawn))
        batches = (indices[i : i + 4096] for i in range(0, len(indices), 4096))
        tables = (prompts_to_table(parts.train[i] for i in batch) for batch in batches)
        ledger.write_prompts(round_, tables, cursor.state_dict(), drawn)
    return ledger.prompts(round_)


def request(config: Config, prompt: Prompt, purpose: str, round_: int, attempt: int = 0) -> Request:
    """Seeds from (run seed, purpose, round, prompt id, sample index): no clock, no order of work. After a roll-back
    `attempt` is in them too, so that the run does not do again what led to it."""
    n = config.loop.responses_per_prompt if purpose == "sample" else config.eval.responses_per_prompt
    again = ("attempt", attempt) if attempt else ()
    seeds = tuple(stable_seed(config.run.seed, purpose, round_, prompt.id, index, *again) for index in range(n))
    return Request(prompt=prompt, seeds=seeds)


# -- training: pair, reference logps, update, refresh, commit --------------------------------------


def train_round(parts: Parts, round_: int, hand_over: Callable[[Policy, Probe], None]) -> None:
    """Pairs, reference logps, update, refresh and commit of a sampled round. `hand_over` is told of the new policy as
    soon as generators can have it: from memory before it is saved, else once it is.

    Raises NoPairsError if the round holds nothing to train on.
    """
    config, ledger, observer = parts.config, parts.ledger, parts.observer
    before = ledger.committed(round_ - 1)
    held, betas = before.reference, round_betas(config.loss, round_, before.beta_scale)
    with parts.phase("pair", round_):
        examples, sampled = make_examples(parts, round_, draw_prompts(parts, round_), held)
    parts.stop.check()
    with parts.phase("reference", round_):
        anchors = make_anchors(parts, round_, examples, held)
    parts.stop.check()
    with parts.phase("learn", round_):
        moved = round_ > 1 and held != ledger.committed(round_ - 2).reference
        plan = ledger.step_plan(round_, config.checkpoint.every_steps, observer.message)
        made: Iterable[dict[str, float]] = ()
        if plan.trained is None:
            made = parts.learner.update(round_, examples, anchors.reference, anchors.start, betas, moved, plan)
        steps = list(told(parts, round_, plan, chain(plan.metrics, made)))
    kl = anchors.sampling_kl(examples)
    is_adapter = config.learner.lora is not None
    policy = Policy(version=round_, path=ledger.round_dir(round_) / "policy", is_adapter=is_adapter)
    shared = None
    with parts.phase("save", round_):
        if plan.trained is None:
            require_room(ledger, round_, parts.expected, weights_only=True)
            shared = parts.learner.share_policy()
            probe = probe_of(parts.learner, ledger.committed(0).probe.token_ids)
            if shared is not None:
                hand_over(replace(policy, shared=shared), probe)
            with ledger.weights(round_, "policy") as (folder, hashes):
                hashes |= parts.learner.save_policy(round_, folder)
            if shared is None:
                hand_over(policy, probe)
            with ledger.weights(round_, "trainer") as (folder, hashes):
                hashes |= parts.learner.save_trainer(round_, folder)
            ledger.write_trained(round_, Trained(steps=steps, token_logps=list(probe.token_logps)))
        else:
            parts.learner.load(policy, ledger.round_dir(round_) / "trainer")
            probe = replace(ledger.committed(0).probe, token_logps=tuple(plan.trained.token_logps))
            require_probe(parts, probe, f"the learner loaded policy {round_}, which was saved before it was stopped")
            hand_over(policy, probe)
        reference = renew_reference(parts, round_, held, kl.get("kl_reference"))
    with parts.phase("commit", round_):
        rows = [{"kind": "step", "round": round_, "step": i, **metrics} for i, metrics in enumerate(steps, 1)]
        means = round_means(steps)
        beta_scale = before.beta_scale
        if config.beta_control is not None and drifted(held, sampled["policy_version_sampled"]):
            beta_scale = next_scale(config.beta_control, beta_scale, kl.get("kl_reference"))
        summary = {
            "kind": "round",
            "round": round_,
            "attempt": ledger.attempt(round_),
            "steps": len(steps),
            **({} if anchors.reference is None else {"reference_round": held.round, "reference_blended": held.blended}),
            "beta": reward_beta(config.loss, betas),
            **sampled,
            **means,
            **likelihood_shift(means, sampler_logps(examples)),
            **kl,
            **({} if anchors.sampler_mismatch is None else {"sampler_mismatch": anchors.sampler_mismatch}),
            **count_examples(examples),
            **{f"judge_{name}": value for name, value in judge_statistics(ledger.judge_cache, round_).items()},
            **parts.timer.round_seconds(round_),
        }
        earlier = [ledger.round_row(r) for r in rows_needed(config.guards, round_)]
        summary["guards"] = round_findings(config.guards, summary, earlier)
        ledger.write_metrics(round_, [*rows, summary])
        ledger.commit(
            round_,
            is_adapter=is_adapter,
            reference=reference,
            probe=probe,
            beta_scale=beta_scale,
        )
        if shared is not None:
            shared.let_go()
    observer.round(summary)


def told(parts: Parts, round_: int, plan: StepPlan, steps: Iterable[dict[str, float]]) -> Iterator[dict[str, float]]:
    """The steps' metrics, each told as it comes. Where the run is asked to stop, it does once the next step checkpoint
    is whole; without one, after the commit."""
    held: tuple[float, float | None] = (configured := float(parts.config.learner.micro_batch_tokens)), None
    awaited: int | None = None
    for step, metrics in enumerate(steps, 1):
        parts.observer.step(round_, metrics)
        if (now := (metrics.get("micro_batch_tokens", configured), metrics.get("recomputes"))) != held:
            text = f"micro-batches hold {now[0]:.0f} tokens (learner.micro_batch_tokens: {configured:.0f})"
            text += ", and activations are recomputed" if now[1] else ""
            parts.observer.message(f"round {round_}, step {step}: {text}: memory ran out")
            held = now
        parts.ledger.run_lock.require_held()  # step checkpoints are written by the learner, which cannot ask
        fail_point("learn.step")
        yield metrics
        if plan.every is not None and parts.stop.asked:
            awaited = awaited or -(-step // plan.every) * plan.every
            if plan.is_written(awaited):
                parts.stop.check()
