"""Whole runs with a judge behind vLLM's own OpenAI server on loopback."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from judges.runtime import build_judge, judge_groups
from make_tiny_model import make_tiny_model
from online_po.config import Config
from online_po.judge_configs import LlmPairwise, LlmScore
from online_po.launch import run
from serve_vllm import NAME, serving_vllm
from tests.judges.groups import make_group

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

KEY = "sk-on-loopback-only"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its base URL. The judge is a random model: by JSON schema even that gives a verdict, some verdict."""
    folder = tmp_path_factory.mktemp("server")
    model = make_tiny_model(folder / "model", seed=5, max_length=4096)
    with serving_vllm(model, folder / "log", key=KEY) as url:
        yield url


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def judge(kind, server, *groups, **settings):
    config = kind(model=NAME, base_url=server, api_key_env="TEST_KEY", repeats_id=False, max_tokens=32, **settings)
    return asyncio.run(_judge(config, groups))


async def _judge(config, groups):
    return await judge_groups(build_judge(config), groups)


def test_scores_by_schema(server):
    (judgement,) = judge(LlmScore, server, make_group("a", "bb", "ccc"), scale_max=5)
    assert set(judgement.scores) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_soft_preferences_by_the_servers_logps(server):
    judgement, *again = judge(LlmPairwise, server, *[make_group("a", "bb", "ccc")] * 2, soft=True)
    assert [comparison.preference for comparison in judgement.comparisons] == pytest.approx(
        [comparison.preference for comparison in again[0].comparisons], abs=1e-4
    )
    assert all(0 < comparison.preference < 1 for comparison in judgement.comparisons)
    assert len({comparison.preference for comparison in judgement.comparisons}) == 3


def test_text_of_a_random_model_is_no_verdict(server):
    (judgement,) = judge(LlmScore, server, make_group("a"), answers="text", attempts=1)
    assert judgement.scores is None and judgement.failure.kind == "unparsable"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"model": "other"}, "has no judge.model = 'other'"), ({"api_key_env": "WRONG"}, r"refuses the key in $WRONG")],
)
def test_wrong_names_and_keys(server, monkeypatch, settings, message):
    monkeypatch.setenv("WRONG", "sk-wrong-key")
    config = LlmScore(**{"model": NAME, "base_url": server, "api_key_env": "TEST_KEY", **settings})
    (judgement,) = asyncio.run(_judge(config, [make_group("a")]))
    assert judgement.failure.kind == "transport" and message in judgement.failure.message
    assert "sk-wrong-key" not in judgement.failure.message


@pytest.mark.parametrize(
    "kind",
    [{"kind": "llm_score"}, {"kind": "llm_pairwise", "orders": "one", "rank": "tournament"}],
    ids=lambda k: k["kind"],
)
def test_two_rounds(tmp_path, tiny_model, server, kind):
    rows = [{"prompt": f"say something about number {i}"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.parse(
        {
            "run": {"name": "run", "dir": str(tmp_path), "tensorboard": False, "keep_checkpoints": None},
            "model": {"path": str(tiny_model)},
            "prompts": {"path": str(tmp_path / "prompts.jsonl"), "max_tokens": 96},
            "loop": {"rounds": 2, "prompts_per_round": 8, "responses_per_prompt": 3},
            "generator": {"engine": "transformers", "max_tokens": 12, "chunk_prompts": 4, "threads": 1},
            "judge": {
                "model": NAME, "base_url": server, "api_key_env": "TEST_KEY", "repeats_id": False, "max_tokens": 32,
                "temperature": 1.0, "preflight": {"min_accuracy": 0.0}, **kind,
            },
            "learner": {"learning_rate": 1e-4, "global_batch_size": 4, "threads": 1},
            "eval": {"every": 0},
        }
    )  # fmt: skip
    result = run(config)
    for round_ in (1, 2):
        folder = result.run_dir / f"rounds/{round_:06d}"
        judgements = [row for path in sorted(folder.glob("judgements/*")) for row in pq.read_table(path).to_pylist()]
        assert len(judgements) == 8 and all(row["failure_kind"] is None for row in judgements)
        assert (judgements[0]["comparisons"] is not None) == (config.judge.pairwise)
        assert pq.read_table(folder / "pairs.parquet").num_rows > 0
    written = (path for path in Path(result.run_dir).rglob("*") if path.is_file())
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
