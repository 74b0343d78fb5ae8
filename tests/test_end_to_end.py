"""Whole runs on real parts: Ray, vLLM, a tiny random model and a reward it can learn, by the command line.

The reward is the share of a response's characters that are lower-case letters, spaces included. An
untrained tiny model writes random bytes, so there is much to learn.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

JUDGE = '''
import os, time

def letters(prompt, response, metadata):
    """Share of lower-case letters and spaces among the first 40 characters; an empty response scores 0."""
    while os.path.exists({hold!r}):
        time.sleep(0.1)
    return sum(c.islower() or c == " " for c in response[:40]) / max(8, len(response[:40]))
'''

RISE = 0.15
"""The mean held-out score must rise by at least this much (in units of the score, which lies in [0, 1])."""


def write_config(folder: Path, model: Path, **overrides: object) -> Path:
    """A run's config and everything it names, in a folder."""
    folder.mkdir(parents=True)
    (folder / "letters_judge.py").write_text(JUDGE.format(hold=str(folder / "hold")))
    rows = [{"prompt": f"say something about number {i}", "number": i} for i in range(80)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict = {
        "run": {"name": "run", "dir": str(folder), "seed": 7},
        "checkpoint": {"keep": None},
        "model": {"path": str(model)},
        "prompts": {"path": str(folder / "prompts.jsonl"), "heldout_size": 24, "max_tokens": 96},
        "loop": {"rounds": 3, "prompts_per_round": 32, "responses_per_prompt": 4},
        "generator": {"max_tokens": 24, "chunk_prompts": 8, "cpu_kv_cache_gib": 0.2, "threads": 1},
        "judge": {"kind": "python", "function": "letters_judge:letters", "timeout_s": 300.0},
        "learner": {
            "learning_rate": 3e-3,
            "global_batch_size": 8,
            "epochs": 2,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "threads": 1,
        },
        "reference": {"kind": "refresh", "every": 2},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def online_po(*args: object, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "online_po.cli", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def fingerprint(run: Path) -> dict[str, str]:
    """Hashes of all that must be the same in two runs of one config: responses, pairs, logps, weights, optimizer."""
    found = {}
    for path in sorted(run.glob("rounds/**/*.parquet")):
        rows = pq.read_table(path).to_pylist()
        found[str(path.relative_to(run))] = hashlib.sha256(repr(rows).encode()).hexdigest()
    for path in sorted(run.glob("rounds/*/*/*")):
        if path.parent.name in ("policy", "trainer"):
            found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model) -> Path:
    """The folder of a run of three rounds, one replica, finished."""
    folder = tmp_path_factory.mktemp("e2e") / "first"
    config = write_config(folder, tiny_model)
    online_po("run", config, cwd=folder)
    return folder / "run"


def test_the_policy_learns_the_reward(finished):
    first, last = (json.loads((finished / f"rounds/{r:06d}/eval.json").read_text()) for r in (0, 3))
    assert last["score"]["mean"] >= first["score"]["mean"] + RISE
    assert last["versus_start"]["better"]
    assert last["versus_start"]["win_rate"]["low"] > 0.5


def test_every_metric_is_there_and_finite(finished):
    rows = [json.loads(line) for line in (finished / "rounds/000003/metrics.jsonl").open()]
    steps, rounds = [r for r in rows if r["kind"] == "step"], [r for r in rows if r["kind"] == "round"]
    assert len(rounds) == 1 and len(steps) >= 2
    names = (
        "loss accuracy margin chosen_reward rejected_reward chosen_logps rejected_logps kl_reference kl_start entropy"
    )
    for row in [*steps, *rounds]:
        for name in [*names.split(), "grad_norm", "learning_rate", "tokens"]:
            assert abs(row[name]) < 1e9, name
    more = "score_mean score_best score_worst distinct_1 distinct_2 self_bleu truncated_share"
    more += " chosen_length rejected_length wall_seconds idle_seconds"
    assert all(rounds[0][name] is not None for name in more.split())
    # By round 3 the policy may never stop: responses of one length have no correlation.
    first = [json.loads(line) for line in (finished / "rounds/000001/metrics.jsonl").open()][-1]
    assert -1 <= first["length_score_correlation"] <= 1 and "length_score_correlation" in rounds[0]
    assert rounds[0]["reference_round"] == 2 and rounds[0]["policy_version_sampled"] == 2
    assert set(rounds[0]["phase_seconds"]) >= {"generate", "judge", "pair", "reference", "learn", "save"}


def test_pairs_load_as_a_preference_data_set(finished):
    from datasets import load_dataset

    rows = load_dataset(
        "parquet", data_files=str(finished / "rounds/000001/pairs.parquet"), split="train", cache_dir=finished / "hf"
    )
    assert rows[0]["prompt"][0]["role"] == "user" and rows[0]["chosen"][0]["role"] == "assistant"
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)


def test_the_same_seed_gives_the_same_run_whatever_the_replicas(finished, tmp_path, tiny_model):
    config = write_config(tmp_path / "again", tiny_model, generator__replicas=2)
    online_po("run", config, cwd=tmp_path / "again")
    assert fingerprint(tmp_path / "again" / "run") == fingerprint(finished)


def test_stopped_by_ctrl_c_and_resumed_it_ends_the_same(finished, tmp_path, tiny_model):
    folder = tmp_path / "stopped"
    config = write_config(folder, tiny_model, run__grace_s=3.0)
    run = folder / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "online_po.cli", "run", str(config)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (run / "rounds/000002/responses/part-00000.parquet").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (folder / "hold").touch()  # the judge waits: there is something to interrupt, however slow this machine is
    assert re.search(r"rounds +1 of 3 committed", online_po("status", run, cwd=folder).stdout)
    refused = online_po("resume", run, cwd=folder, ok=False)
    assert refused.returncode == 3 and "in use by process" in refused.stderr
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "online-po resume" in output
    (folder / "hold").unlink()
    online_po("report", run, cwd=folder)
    assert (run / "report.html").stat().st_size > 100_000
    assert re.search(r"rounds +1 of 3 committed", online_po("status", run, cwd=folder).stdout)
    online_po("resume", run, cwd=folder)
    assert re.search(r"rounds +3 of 3 committed", online_po("status", run, cwd=folder).stdout)
    assert fingerprint(run) == fingerprint(finished)
    other = online_po("run", config, "loop.rounds=4", cwd=folder, ok=False)
    assert other.returncode == 2 and "loop.rounds: 3 there, 4 now" in other.stderr


def test_an_exported_policy_loads_in_transformers_and_vllm(finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    online_po("export", finished, tmp_path / "out", cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
    assert model(**ids).logits.isfinite().all()
    code = (
        "from vllm import LLM, SamplingParams\n"
        f"llm = LLM({str(tmp_path / 'out')!r}, enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 26)\n"
        "(answer,) = llm.chat([{'role': 'user', 'content': 'hi'}], SamplingParams(max_tokens=4), use_tqdm=False)\n"
        "assert answer.outputs[0].token_ids\n"
    )
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    again = online_po("export", finished, tmp_path / "out", cwd=tmp_path, ok=False)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert online_po("export", finished, tmp_path / "x", "--round", 9, cwd=tmp_path, ok=False).returncode == 2
