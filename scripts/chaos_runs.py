"""The runs that `scripts/chaos.py` kills: tiny, deterministic, and each with what another lacks.

A run is made in this process (`fakes`, or `local`: a transformers engine and the real learner), or by the command line
with real Ray (`transformers`, `vllm`).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from online_po import launch
from online_po.config import Config
from online_po.errors import GuardError, NonFiniteError, SyncError
from online_po.fail_points import fail_point
from online_po.judge_trials import try_judge
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.observers import PhaseTimer, Silent
from online_po.parts import Parts
from online_po.plan import Plan
from online_po.protocols import Observer
from online_po.sections import SamplingConfig
from online_po.stopping import Stop
from online_po.types import Group, Policy, Probe, Request, SyncReport

EngineName = Literal["fakes", "local", "transformers", "vllm"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

SHAPES: dict[str, dict[str, Any]] = {
    # Means of policies, all weights trained, a judge that is tried, a guard that stops and one that goes back.
    "guarded": {
        "loop": {"rounds": 4},
        "checkpoint": {"keep": 2, "every_steps": 1},
        "reference": {"kind": "ema", "alpha": 0.5, "every": 2},
        "eval": {"every": 2},
        "guards": {"entropy": {"action": "stop"}, "nonfinite": {"action": "roll_back"}},
        "pairs": {"replay_share": 0.25},
    },
    # Sampled ahead, adapters, a reference that is refreshed.
    "ahead": {
        "loop": {"rounds": 5, "max_staleness": 1},
        "checkpoint": {"keep": 2, "every_steps": 1},
        "reference": {"kind": "refresh", "every": 2},
        "learner": {"lora": {"rank": 4}},
    },
}
STOPPING_ROUND, ILL_ROUND = 2, 3
"""Shape `guarded`: after the one a guard stops the run, in the other a step is not finite."""


def letters(prompt: str, response: str, metadata: dict[str, Any]) -> float:
    """The share of lower-case letters and spaces among a response's first 40 characters, 8 at least."""
    return sum(c.islower() or c == " " for c in response[:40]) / max(8, len(response[:40]))


def number(prompt: str, response: str, metadata: dict[str, Any]) -> float:
    """What the fakes' responses say."""
    return float(response)


def make_config(folder: Path, shape: str, engine: EngineName, model: Path) -> Config:
    """A run named `run` in `folder`. What it reads lies beside the model."""
    prompts, gold = model.parent / "prompts.jsonl", model.parent / f"gold-{engine}.jsonl"
    if not prompts.exists():
        rows = [{"prompt": f"say something about number {i}"} for i in range(28)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not gold.exists():
        better, worse = ("0.9", "0.1") if engine == "fakes" else ("so it is", "12345678")
        pairs = [{"prompt": f"number {i}", "chosen": better, "rejected": worse} for i in range(2)]
        gold.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    settings: dict[str, Any] = {
        "run": {"name": "run", "dir": str(folder), "seed": 7, "tensorboard": False},
        "model": {"path": str(model)},
        "prompts": {"path": str(prompts), "heldout_size": 4, "max_tokens": 64},
        "loop": {"prompts_per_round": 8, "responses_per_prompt": 3},
        "generator": {
            "engine": "vllm" if engine == "vllm" else "transformers",
            "max_tokens": 10,
            "chunk_prompts": 3,
            "threads": 1,
            **({"cpu_kv_cache_gib": 0.2} if engine == "vllm" else {}),
        },
        "judge": {
            "kind": "python",
            "function": f"chaos_runs:{'number' if engine == 'fakes' else 'letters'}",
            "gold": str(gold),
            "calibration": {"every": 2},
        },
        "learner": {"learning_rate": 3e-3, "global_batch_size": 4, "threads": 1},
        "eval": {"responses_per_prompt": 2, "bootstrap_samples": 100},
    }
    for section, values in SHAPES[shape].items():
        settings[section] = {**settings.get(section, {}), **values}
    if engine not in ("fakes", "local"):  # nothing there falls ill: a stop is asked for where there is none
        settings.pop("guards", None)
    return Config.parse(settings)


def run_here(config: Config, engine: EngineName) -> bool:
    """Runs a config, or the rest of it, in this process; False where a guard stopped it, and it is to be resumed."""

    def run_with_parts(plan: Plan, ledger: Ledger, observer: Observer, timer: PhaseTimer, stop: Stop) -> None:
        with ExitStack() as stack:
            run_rounds(replace(make_parts(plan, ledger, observer, timer, engine, stack), stop=stop))

    # What else `launch.run` does, from the plan to the report, is the real thing.
    setattr(launch, "_run_with_actors", run_with_parts)  # noqa: B010
    try:
        launch.run(config, [Saying()])
    except GuardError:
        return False
    return True


class Saying(Silent):
    """Prints what the run says."""

    def message(self, text: str) -> None:
        print(text, flush=True)


def make_parts(
    plan: Plan, ledger: Ledger, observer: Observer, timer: PhaseTimer, engine: EngineName, stack: ExitStack
) -> Parts:
    """The parts of a run, without Ray; what must be closed is pushed on `stack`."""
    from judges.runtime import LocalJudgePool

    config = plan.config
    fail_point("start.begin")
    with observer.phase("start", 0):
        sampler = ThreadPoolExecutor(1)
        stack.callback(sampler.shutdown)
        judges = LocalJudgePool(config.judge, ledger.judge_cache)
        stack.callback(judges.close)
        try_judge(judges, config.judge, plan.known, ledger, observer)
        generator: Any
        learner: Any
        if engine == "fakes":
            fakes = importlib.import_module("tests.fakes")
            generator, learner = fakes.FakeGenerator(), fakes.FakeLearner()
            learner.also = {"entropy": 1.0, "tokens": 1.0}
        else:
            from online_po.learner import TorchLearner

            generator = LocalGenerator(config)
            learner = TorchLearner(
                config.model, config.learner, config.loss, seed=config.run.seed, rounds=config.loop.rounds
            )
        if config.guards.rolling_back:
            learner.update = falls_ill(learner.update, ledger)
    fail_point("start.end")
    return Parts(
        config=config,
        ledger=ledger,
        generator=generator,
        judges=judges,
        learner=learner,
        observer=observer,
        timer=timer,
        train=plan.train,
        heldout=plan.heldout,
        start=plan.model_path,
        known=plan.known,
        encode=plan.encode,
        sampler=sampler,
    )


def falls_ill(update: Any, ledger: Ledger) -> Any:
    """A learner's `update` that gives guards something to see. What it does depends on the ledger alone."""

    def ill(round_: int, *args: Any) -> Iterator[dict[str, float]]:
        *others, plan = args
        if round_ == STOPPING_ROUND:  # a step checkpoint would hold the entropy that the learner measured
            plan = replace(plan, every=None)
        if round_ == ILL_ROUND and ledger.attempt(round_) == 0:
            raise NonFiniteError(f"round {round_}, step 1: loss is nan; the step was not applied")
        for metrics in update(round_, *others, plan):
            yield metrics | ({"entropy": 0.1} if round_ == STOPPING_ROUND else {})

    return ill


class LocalGenerator:
    """A `protocols.Generator` over one transformers engine in this process."""

    def __init__(self, config: Config) -> None:
        from actors.engines import max_model_len
        from actors.transformers_engine import TransformersEngine

        self._engine = TransformersEngine(config.model, config.generator, max_model_len=max_model_len(config))

    def generate(
        self, chunks: Iterable[tuple[int, Sequence[Request]]], sampling: SamplingConfig
    ) -> Iterator[tuple[int, dict[int, Group]]]:
        for index, requests in chunks:
            for groups in self._engine.generate(requests, sampling):
                yield index, groups

    def sync(self, policy: Policy, probe: Probe, start: Probe | None = None) -> list[SyncReport]:
        self._engine.load(policy)
        said = self._engine.token_logps(probe.token_ids)
        error = max(abs(a - b) for a, b in zip(said, probe.token_logps, strict=True))
        if error > 1e-3:
            raise SyncError(f"policy {policy.version}: the generator's probe is off by {error:.2g} nats")
        return [SyncReport(replica=0, policy_version=policy.version, mean_logp_error=error, unmoved=False, seconds=0.0)]
