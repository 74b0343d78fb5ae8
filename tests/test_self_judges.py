"""Whole runs, by a policy that can judge, in which it is its own judge."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from judges.policy import render
from judges.prompting import Prompting
from judges.questions import Question
from make_tiny_model import make_tiny_model
from online_po.config import Config
from online_po.judge_configs import SelfScore
from online_po.launch import run
from tests.judges.groups import make_group

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def judging_model(tmp_path_factory) -> Path:
    """A tiny policy that has learned to end with a verdict, whatever it is asked: some number, drawn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "judge", max_length=4096)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    prompting, rng = Prompting(SelfScore(repeats_id=False)), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        rows = []
        for _ in range(4):
            group = make_group("".join(rng.choices("abc def7", k=rng.randint(1, 20))))
            about = prompting.about(group.prompt, group.responses, "")
            question = Question(prompt=group.prompt, responses=group.responses, about=about)
            asked = tokenizer(render(prompting.score(question).as_text, tokenizer))["input_ids"]
            rows.append((asked, tokenizer(f"Verdict: {rng.randint(1, 10)}<|im_end|>")["input_ids"]))
        width = max(len(asked) + len(said) for asked, said in rows)
        pads = [width - len(asked) - len(said) for asked, said in rows]
        ids = torch.tensor([[0] * pad + asked + said for pad, (asked, said) in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        labels = torch.tensor([[-100] * (width - len(said)) + said for _, said in rows])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("policy", ["current", "start"])
def test_two_rounds_that_the_policy_judges(tmp_path, judging_model, policy):
    rows = [{"prompt": f"say something about number {i}"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.parse(
        {
            "run": {"name": "run", "dir": str(tmp_path), "tensorboard": False, "keep_checkpoints": None},
            "model": {"path": str(judging_model)},
            "prompts": {"path": str(tmp_path / "prompts.jsonl"), "heldout_size": 4, "max_tokens": 96},
            "loop": {"rounds": 2, "prompts_per_round": 8, "responses_per_prompt": 3},
            "generator": {"engine": "transformers", "max_tokens": 12, "chunk_prompts": 4, "threads": 1},
            "judge": {
                "kind": "self_score", "policy": policy, "repeats_id": False, "temperature": 1.0, "max_tokens": 24,
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
