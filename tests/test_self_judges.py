"""A whole run in which the policy is its own judge, by `launch.run`; see test_judges_in_the_loop.py for the others."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from online_po.config import Config
from online_po.launch import run
from tests.judging_model import make_judging_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_rounds_that_the_policy_judges(tmp_path):
    rows = [{"prompt": f"say something about number {i}"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.parse(
        {
            "run": {"name": "run", "dir": str(tmp_path), "tensorboard": False}, "checkpoint": {"keep": None},
            "model": {"path": str(make_judging_model(tmp_path / "model"))},
            "prompts": {"path": str(tmp_path / "prompts.jsonl"), "heldout_size": 4, "max_tokens": 96},
            "loop": {"rounds": 2, "prompts_per_round": 8, "responses_per_prompt": 3},
            "generator": {"engine": "transformers", "max_tokens": 12, "chunk_prompts": 4, "threads": 1},
            "judge": {
                "kind": "self_score", "repeats_id": False, "temperature": 1.0, "max_tokens": 24,
                "max_failure_rate": 0.6, "preflight": {"min_accuracy": 0.0},
            },
            "learner": {"learning_rate": 1e-5, "global_batch_size": 4, "threads": 1},
        }
    )  # fmt: skip
    result = run(config)
    assert len(result.evaluations) == 3
    for round_ in (1, 2):
        folder = result.run_dir / f"rounds/{round_:06d}"
        judgements = [row for path in sorted(folder.glob("judgements/*")) for row in pq.read_table(path).to_pylist()]
        scores = {score for row in judgements for score in row["scores"] or ()}
        assert scores <= set(range(1, 11)) and len(scores) > 2
        responses = [row for path in sorted(folder.glob("responses/*")) for row in pq.read_table(path).to_pylist()]
        assert {row["policy_version"] for row in responses} == {round_ - 1}
        assert (folder / "COMMIT.json").exists()
