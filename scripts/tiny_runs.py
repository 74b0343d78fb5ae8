"""Whole runs of a tiny model on real parts, many on one engine: vLLM and the judge in Ray actors, the learner here.

The reward is the share of lower-case letters and spaces among a response's first characters; an untrained tiny model
writes random bytes, so there is much to learn, in seconds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from actors import cluster
from actors.generators import GeneratorGroup
from actors.judges import JudgeGroup
from actors.self_judges import SelfJudges
from make_tiny_model import make_tiny_model
from online_po.config import Config
from online_po.judge_configs import self_judges
from online_po.learner import TorchLearner
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.observers import CompositeObserver, PhaseTimer
from online_po.parts import Parts
from online_po.plan import make_plan
from online_po.protocols import Observer


def reward(prompt: str, response: str, metadata: dict[str, Any]) -> float:
    """The share of letters as above (short responses count as 8 characters); its negative, or the length in
    characters, where the prompt's column `reward` says so."""
    letters = sum(c.islower() or c == " " for c in response[:40]) / max(8, len(response[:40]))
    return {"letters": letters, "no letters": -letters, "length": float(len(response))}[metadata["reward"]]


SETTINGS: dict[str, Any] = {
    "run": {"seed": 7, "tensorboard": False},
    "checkpoint": {"keep": None},
    "prompts": {"heldout_size": 32, "max_tokens": 96},
    "loop": {"rounds": 3, "prompts_per_round": 32, "responses_per_prompt": 4},
    "generator": {"max_tokens": 24, "chunk_prompts": 32, "cpu_kv_cache_gib": 0.2, "threads": 1},
    "judge": {"kind": "python", "function": "tiny_runs:reward"},
    "learner": {
        "learning_rate": 3e-3,
        "global_batch_size": 8,
        "epochs": 2,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "kl_to_start": False,
    },
    "eval": {"every": 3, "responses_per_prompt": 2},
}
"""What all runs have in common, but for what one changes. Engine and judge are those of the first."""


@dataclass
class Bench:
    """A model, and the actors that serve run after run."""

    folder: Path
    model: Path
    generator: Any = None
    judges: Any = None

    def config(self, name: str, *, reward: str = "letters", **changes: Any) -> Config:
        """`SETTINGS` with changes, and prompts that ask for a reward. `section={...}` is merged into the section, or
        stands in its place where it has a `kind`."""
        data = copy.deepcopy(SETTINGS)
        for section, values in changes.items():
            merged = isinstance(values, dict) and isinstance(data.get(section), dict) and "kind" not in values
            data[section] = {**data[section], **values} if merged else values
        data["run"] |= {"name": name, "dir": str(self.folder)}
        data["model"] = {"path": str(self.model)}
        data["prompts"].setdefault("path", str(self.prompts(f"{name}.jsonl", reward)))
        return Config.parse(data)

    def prompts(self, name: str, reward: str, numbers: range = range(80)) -> Path:
        """A file of prompts, one a number, whose responses are to get this reward."""
        path = self.folder / name
        rows = [{"prompt": f"say something about number {i}", "reward": reward} for i in numbers]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def run(self, config: Config, observer: Observer | None = None) -> Ledger:
        """Runs a config to its end, or the rest of it. Raises what the loop raises."""
        plan = make_plan(config)
        ledger = Ledger(config.run_dir)
        with ledger.lock():
            ledger.begin(config, {})
            run_rounds(self.parts(config, ledger, plan, observer or CompositeObserver([])))
        return ledger

    @contextmanager
    def judged_by(self, config: Config) -> Iterator[None]:
        """For runs of this config inside the block: its own judge in place of the bench's."""
        with ExitStack() as stack:
            if self_judges(config.judge):
                questions = stack.enter_context(ThreadPoolExecutor(1))
                tokenizer = AutoTokenizer.from_pretrained(self.model)
                judges: Any = SelfJudges(config, self.generator, self.model, tokenizer, questions)
            else:
                judges = JudgeGroup(config)
            stack.callback(judges.close)
            judges.ready(300.0)
            stack.callback(setattr, self, "judges", self.judges)
            self.judges = judges
            yield

    def parts(self, config: Config, ledger: Ledger, plan: Any, observer: Observer) -> Parts:
        """The actors, and a new learner."""
        learner: Any = TorchLearner(  # here, not in processes of its own that could be lost
            config.model,
            config.learner,
            config.loss,
            seed=config.run.seed,
            rounds=config.loop.rounds,
            skip_nonfinite=config.guards.nonfinite.action == "warn",
        )
        return Parts(
            config=config,
            ledger=ledger,
            generator=self.generator,
            judges=self.judges,
            learner=learner,
            observer=observer,
            timer=PhaseTimer(ledger.root / "timeline.jsonl"),
            train=plan.train,
            heldout=plan.heldout,
            start=plan.model_path,
            known=plan.known,
            seed_pairs=plan.seed_pairs,
            encode=plan.encode,
        )


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """A bench in an empty folder."""
    made = Bench(folder=folder, model=make_tiny_model(folder / "model"))
    with serving(made, made.config("first")):
        yield made


@contextmanager
def serving(made: Bench, config: Config) -> Iterator[None]:
    """Starts Ray, and the engine and the judge of a config, for all runs inside the block; ends them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: two threads that wait for each other cost more than they do
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        cluster.start(config.ray)
        stack.callback(cluster.stop)
        made.generator = GeneratorGroup(config)
        stack.callback(made.generator.close)
        made.judges = JudgeGroup(config)
        stack.callback(made.judges.close)
        for group in (made.generator, made.judges):
            group.ready(300.0)
        yield
