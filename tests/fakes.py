"""Hand-written stand-ins for the loop's parts, against our own protocols: a whole run in milliseconds.

The fake policy is one number, its `skill`. A response scores its own sampled value plus the skill of the
policy that sampled it, and an update raises the skill by the pairs' mean margin: deterministic, and
sensitive to everything that a wrong resume, sync or order would change.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from online_po.config import Config
from online_po.errors import LearnerLostError, NonFiniteError, PolicyGoneError, SyncError
from online_po.ledger import Ledger
from online_po.sections import SamplingConfig
from online_po.step_checkpoints import StepPlan, StepWriter
from online_po.types import (
    Group,
    JudgeFailure,
    Judgement,
    Policy,
    Probe,
    Prompt,
    Request,
    Response,
    SharedWeights,
    SyncReport,
)


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"prompt-{i}",
            messages=({"role": "user", "content": f"question {i}"},),
            text=f"question {i}",
            token_ids=(1, 2, 3 + i % 50),
            metadata={"number": i},
        )
        for i in range(count)
    ]


def make_config(tmp_path: Path, **overrides: object) -> Config:
    """A config of the fakes' size; overrides are `section__key=value`, or `section={...}` for all of it."""
    data: dict = {
        "run": {"name": "fake", "dir": str(tmp_path), "tensorboard": False},
        "model": {"path": str(tmp_path)},
        "prompts": {"path": "prompts.jsonl", "heldout_size": 4},
        "loop": {"rounds": 3, "prompts_per_round": 8, "responses_per_prompt": 3},
        "generator": {"chunk_prompts": 3, "max_tokens": 8},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            data.setdefault(section, {})[name] = value
        else:
            data[section] = value
    return Config.parse(data)


def read_skill(policy: Policy) -> float:
    if policy.shared is not None and policy.shared.handle is not None:
        if not policy.shared.handle:
            raise PolicyGoneError("the learner died")
        return policy.shared.handle[0]
    return 0.0 if policy.version == 0 else json.loads((policy.path / "skill.json").read_text())


class FakeGenerator:
    def __init__(self) -> None:
        self.skill: float | None = None
        self.version = -1
        self.log: list[tuple] = []
        self.start: Probe | None = None
        self.fail_after: int | None = None

    def generate(
        self, chunks: Iterable[tuple[int, Sequence[Request]]], sampling: SamplingConfig
    ) -> Iterator[tuple[int, dict[int, Group]]]:
        assert self.skill is not None, "asked to generate before any sync"
        for index, requests in chunks:
            if self.fail_after is not None:
                if self.fail_after == 0:
                    raise KeyboardInterrupt
                self.fail_after -= 1
            self.log.append(("generate", index, self.version))
            for place in reversed(range(len(requests))):  # no order is promised
                yield index, {place: self._group(requests[place], sampling)}

    def _group(self, request: Request, sampling: SamplingConfig) -> Group:
        responses = []
        for index, seed in enumerate(request.seeds):
            rng = random.Random(seed)
            length = rng.randint(1, sampling.max_tokens)
            value = rng.random() + (self.skill or 0.0)
            responses.append(
                Response(
                    index=index,
                    text=f"{value:.9f}",
                    token_ids=tuple(rng.choices(range(3, 60), k=length)),
                    token_logps=(-1.0,) * length,
                    finish_reason="length" if length == sampling.max_tokens else "stop",
                    policy_version=self.version,
                    seed=seed,
                )
            )
        return Group(prompt=request.prompt, responses=tuple(responses))

    def sync(self, policy: Policy, probe: Probe, start: Probe | None = None) -> list[SyncReport]:
        self.skill, self.version, self.start = read_skill(policy), policy.version, start
        self.log.append(("sync", policy.version))
        if abs(probe.token_logps[0] - self.skill) > 1e-9:
            raise SyncError(f"probe says {probe.token_logps[0]}, the generator holds {self.skill}")
        return [SyncReport(replica=0, policy_version=policy.version, mean_logp_error=0.0, unmoved=False, seconds=0.0)]


class FakeJudge:
    """Scores a response by the number it says; `fails` maps prompt ids to a failure."""

    def __init__(self) -> None:
        self.fails: dict[str, JudgeFailure] = {}
        self.judged: list[str] = []
        self.tie = False

    def submit(self, groups: Sequence[Group], round_: int = 0, occasion: str = "") -> Future[list[Judgement]]:
        future: Future[list[Judgement]] = Future()
        future.set_result([self._judge(group) for group in groups])
        return future

    def shown(self, group: Group) -> str | None:
        return None

    def _judge(self, group: Group) -> Judgement:
        self.judged.append(group.prompt.id)
        if failure := self.fails.get(group.prompt.id):
            return Judgement(prompt_id=group.prompt.id, failure=failure)
        scores = tuple(1.0 if self.tie else float(response.text) for response in group.responses)
        return Judgement(prompt_id=group.prompt.id, scores=scores)


def said(prompt: list[dict[str, str]], response: str, metadata: dict[str, Any]) -> float:
    """`FakeJudge`'s score, for the python judge."""
    return float(response)


def _write_skill(text: str, folder: Path) -> dict[str, str]:
    (folder / "skill.json").write_text(text)
    return {}


class FakeLearner:
    def __init__(self) -> None:
        self.skill, self.steps = 0.0, 2
        self.shares = True
        self.held: list[float] = []
        self.log: list[tuple] = []
        self.taken: list[tuple[int, int]] = []
        """(round, step) of each optimizer step."""
        self.also: dict[str, float] = {}
        """More metrics of each step."""
        self.betas: list[Sequence[float | None] | None] = []
        self.new_references: list[bool] = []

    def logps(self, examples: pa.Table, policy: Policy) -> Iterator[dict[str, np.ndarray]]:
        self.log.append(("logps", policy.version))
        rows = np.arange(examples.num_rows)
        for half in np.array_split(rows, 2):
            value = np.full(len(half), read_skill(policy), dtype=np.float32)
            if "label" in examples.column_names:
                yield {"row": half, "response": value}
            else:
                yield {"row": half, "chosen": value, "rejected": -value}

    def update(
        self,
        round_: int,
        examples: pa.Table,
        reference_logps: dict[str, np.ndarray] | None,
        start_logps: dict[str, np.ndarray] | None,
        betas: Sequence[float | None] | None = None,
        new_reference: bool = False,
        plan: StepPlan | None = None,
    ) -> Iterator[dict[str, float]]:
        kind, side, signal = ("pairs", "chosen", "margin")
        if "label" in examples.column_names:
            kind, side, signal = ("labels", "response", "response_score")
        anchor = 0.0 if reference_logps is None else float(reference_logps[side].mean())
        gain = np.nan_to_num(examples[signal].to_numpy().astype(float))  # no margin without scores
        plan = plan or StepPlan(folder=Path(), every=None)
        made = plan.metrics
        if plan.after is not None:
            self.skill = json.loads((plan.after.folder / "skill.json").read_text())
        with StepWriter(plan) as writer:
            for step in range(plan.done + 1, self.steps + 1):
                self.skill += (float(gain.mean()) + 0.1 * anchor) / step
                self.taken.append((round_, step))
                made.append({"loss": -self.skill, kind: examples.num_rows / 2, "learning_rate": 1.0} | self.also)
                if plan.is_due(step, self.steps):
                    writer.write(step, made, partial(_write_skill, json.dumps(self.skill)))
                yield made[-1]
        self.log.append(("update", round_, start_logps is not None))
        self.betas.append(betas)
        self.new_references.append(new_reference)

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        return [self.skill] * (len(token_ids) - 1)

    def share_policy(self) -> SharedWeights | None:
        self.held = [self.skill]
        return SharedWeights(handle=self.held) if self.shares else None

    def die(self) -> None:
        """What was its own is gone: weights, and those that it shared."""
        self.skill = -1000.0
        self.held.clear()

    def save_policy(self, round_: int, folder: Path) -> dict[str, str]:
        return _write_skill(json.dumps(self.skill), folder)

    def save_trainer(self, round_: int, folder: Path) -> dict[str, str]:
        (folder / "state.json").write_text(json.dumps({"round": round_}))
        return {}

    def blend(self, reference: Policy, alpha: float, folder: Path) -> None:
        blended = alpha * self.skill + (1 - alpha) * read_skill(reference)
        (folder / "skill.json").write_text(json.dumps(blended))
        self.log.append(("blend", reference.version))

    def restart(self, lost: LearnerLostError) -> None:
        self.skill = 0.0
        self.log.append(("restart", str(lost)))

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        if policy.version > 0:  # the start has no trainer folder
            assert json.loads((trainer_dir / "state.json").read_text()) == {"round": policy.version}
        self.skill = read_skill(policy)
        self.log.append(("load", policy.version))


class SickLearner(FakeLearner):
    """Falls ill in one round, until the run was rolled back often enough: with a step that is not finite (`nonfinite`),
    or with these metrics in place of the round's. What it does depends on the ledger alone, as a kill must not change
    it."""

    def __init__(self, config: Config, round_: int, times: int = 1, **metrics: float) -> None:
        super().__init__()
        self.ledger, self.action = Ledger(config.run_dir), config.guards.nonfinite.action
        self.round, self.times, self.metrics = round_, times, metrics

    def update(self, round_: int, *args: Any) -> Iterator[dict[str, float]]:
        ill = round_ == self.round and self.ledger.attempt(round_) < self.times
        for step, metrics in enumerate(super().update(round_, *args)):
            metrics |= {"tokens": 10.0, "entropy": 2.0, "accuracy": 0.7, "margin": 0.3}
            if ill and "nonfinite" not in self.metrics:
                metrics |= self.metrics
            elif ill and step == 1:
                if self.action != "warn":
                    raise NonFiniteError(f"round {round_}, step 2 of 2: loss is nan; the step was not applied")
                metrics = {"skipped": 1.0, "pairs": metrics["pairs"], "tokens": 10.0, "learning_rate": 1.0}
            yield metrics


class FakeObserver:
    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []
        self.messages: list[str] = []
        self.restarts: list[tuple[str, str]] = []

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        self.phases.append((name, round_))
        yield

    def progress(self, name: str, done: int, total: int | None, note: str = "") -> None:
        assert total is None or done <= total

    def step(self, round_: int, metrics: dict[str, float]) -> None: ...

    def round(self, summary: dict[str, object]) -> None: ...

    def evaluation(self, summary: dict[str, object]) -> None: ...

    def restart(self, who: str, why: str, seconds: float) -> None:
        self.restarts.append((who, why))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None: ...
