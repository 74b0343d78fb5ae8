"""A run with a reward model as judge, on real parts."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from online_po.config import Config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_run_of_two_rounds_with_a_reward_model_learns_what_it_was_taught(tmp_path, tiny_model):
    """The reward model was trained on synthetic preferences; the held-out responses get better by the true reward."""
    from transformers import AutoTokenizer

    from make_reward_model import make_pairs, make_reward_model, true_reward
    from online_po.launch import run
    from online_po.ledger import Ledger

    assert make_reward_model(tmp_path / "reward") >= 0.8
    pairs = make_pairs(AutoTokenizer.from_pretrained(tmp_path / "reward"), 40, seed=99)
    known = [{"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in pairs]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    rows = [{"prompt": f"say something about number {i}"} for i in range(80)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.parse(
        {
            "run": {"name": "learns", "dir": str(tmp_path), "seed": 3, "tensorboard": False},
            "model": {"path": str(tiny_model)},
            "prompts": {"path": str(tmp_path / "prompts.jsonl"), "heldout_size": 24, "max_tokens": 96},
            "loop": {"rounds": 2, "prompts_per_round": 48, "responses_per_prompt": 4},
            "generator": {"engine": "transformers", "max_tokens": 24, "chunk_prompts": 24, "threads": 1},
            "judge": {
                "kind": "reward_model",
                "path": str(tmp_path / "reward"),
                "bradley_terry_scale": 1.0,
                "gold": str(tmp_path / "gold.jsonl"),
                "preflight": {"min_accuracy": 0.75},
                "calibration": {"every": 1},
            },
            "learner": {
                "learning_rate": 3e-3,
                "global_batch_size": 8,
                "epochs": 2,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "kl_to_start": False,
                "threads": 1,
            },
            "eval": {"every": 2, "responses_per_prompt": 4},
        }
    )
    result = run(config)
    ledger = Ledger.open(result.run_dir)
    assert ledger.last_committed() == 2
    trials = [ledger.judge_trial(round_) for round_ in range(3)]
    assert all(trial["pairs"] == 40 and trial["accuracy"] == trials[0]["accuracy"] >= 0.75 for trial in trials)
    assert not trials[1]["alarm"] and not trials[2]["alarm"], "the same model says the same"
    judged = [j for part in range(2) for j in ledger.judgements(1, part)]
    assert len(judged) == 48 and all(judgement.failure is None for judgement in judged)
    assert all(len(set(judgement.scores)) > 1 for judgement in judged)
    before, after = (evaluation["score"]["mean"] for evaluation in result.evaluations)
    assert after > before
    texts = [pq.read_table(result.run_dir / f"rounds/{r:06}/eval.parquet")["text"].to_pylist() for r in (0, 2)]
    start, end = (sum(map(true_reward, some)) / len(some) for some in texts)
    print(f"score {before:.2f} -> {after:.2f}, true reward {start:.3f} -> {end:.3f}")
    assert end > start + 0.05
