"""What the learner's tests share: random pairs, configs, and one call that collects logps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from online_po.loss_configs import LOSS_BY_NAME
from online_po.sections import LearnerConfig, ModelConfig
from online_po.tables import LABEL_SCHEMA, PAIR_SCHEMA
from online_po.types import Policy

VOCABULARY = 384


def make_pairs(count: int, seed: int = 0) -> pa.Table:
    """Random pairs of ragged lengths (prompt 1 to 9 tokens, responses 1 to 14), scored at random."""
    rng = np.random.default_rng(seed)

    def sequences(longest: int) -> list[list[int]]:
        return [rng.integers(4, VOCABULARY, rng.integers(1, longest)).tolist() for _ in range(count)]

    columns: dict[str, list[Any]] = {
        "prompt_token_ids": sequences(10),
        "chosen_token_ids": sequences(15),
        "rejected_token_ids": sequences(15),
    }
    columns["rejected_score"] = rng.uniform(0, 1, count).tolist()
    columns["chosen_score"] = (np.array(columns["rejected_score"]) + rng.uniform(0.1, 2, count)).tolist()
    return pa.Table.from_pylist(
        [{name: values[i] for name, values in columns.items()} for i in range(count)], schema=PAIR_SCHEMA
    )


def make_labels(count: int, seed: int = 0) -> pa.Table:
    """Random labelled responses of ragged lengths, up to three to a prompt, scored at random."""
    rng = np.random.default_rng(seed)
    rows = []
    while len(rows) < count:
        prompt = rng.integers(4, VOCABULARY, rng.integers(1, 10)).tolist()
        for _ in range(rng.integers(1, 4)):
            score = float(rng.uniform(-1, 1))
            rows.append(
                {
                    "prompt_id": f"prompt-{prompt}",
                    "prompt_token_ids": prompt,
                    "response_token_ids": rng.integers(4, VOCABULARY, rng.integers(1, 15)).tolist(),
                    "response_score": score,
                    "label": score > 0,
                }
            )
    return pa.Table.from_pylist(rows[:count], schema=LABEL_SCHEMA)


def learner_config(**changes: Any) -> LearnerConfig:
    """A learning rate that moves a tiny model visibly in a few steps, and micro-batches of a few pairs."""
    return LearnerConfig(**({"learning_rate": 1e-3, "global_batch_size": 8, "micro_batch_tokens": 160} | changes))


def make_learner(model: Path, config: LearnerConfig, name: str = "sigmoid", **options: Any) -> Any:
    from online_po.learner import TorchLearner

    losses = (LOSS_BY_NAME[name](**options),)
    return TorchLearner(ModelConfig(path=str(model)), config, losses, seed=7, rounds=3)


def collect_logps(logps: Callable[..., Any], pairs: pa.Table, policy: Policy) -> dict[str, np.ndarray]:
    """{"chosen": (N,), "rejected": (N,)}, or the sides that labels have; fails unless every row came exactly once."""
    found: dict[str, np.ndarray] = {}
    for batch in logps(pairs, policy):
        rows = batch.pop("row")
        for name, given in batch.items():
            values = found.setdefault(name, np.full(pairs.num_rows, np.nan, dtype=np.float32))
            assert np.isnan(values[rows]).all() and given.dtype == np.float32
            values[rows] = given
    assert not any(np.isnan(values).any() for values in found.values())
    return found


def start(model: Path) -> Policy:
    return Policy(version=0, path=model)


def train(learner: Any, round_: int, pairs: pa.Table, reference: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """One round's metrics, but for the clock's."""
    steps = list(learner.update(round_, pairs, reference, None))
    return [{name: value for name, value in step.items() if name != "seconds"} for step in steps]


def plain_logps(lm: Any, pairs: pa.Table, side: str) -> np.ndarray:
    """(N,) response logps of a transformers model, one sequence at a time from full logits."""
    import torch

    found = []
    for row in pairs.to_pylist():
        prompt, response = row["prompt_token_ids"], row[f"{side}_token_ids"]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logps = torch.log_softmax(lm(input_ids=ids).logits[0, :-1], dim=-1)
        found.append(logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
    return np.array(found, dtype=np.float32)


def save(learner: Any, round_: int, policy: Path, trainer: Path) -> dict[str, str]:
    """Both folders of a round; the hashes that the learner has of their files, by name."""
    return learner.save_policy(round_, policy) | learner.save_trainer(round_, trainer)
