"""Reward models in judge processes, on a real Ray: both engines agree, each process has its copy."""

from __future__ import annotations

import asyncio

import pytest

from judges.runtime import build_judge, judge_groups
from online_po.config import Config
from online_po.errors import ConfigError
from tests.judges.groups import make_group

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TEXTS = ("yes", "no, not at all", "x", "the words of a long answer " * 8)
GROUPS = [make_group(*TEXTS, name=f"question {i}" * (1 + i % 3)) for i in range(4)]


def make_config(**judge) -> Config:
    return Config.parse(
        {
            "run": {"name": "x"},
            "model": {"path": "x"},
            "prompts": {"path": "x.jsonl"},
            "eval": {"every": 0},
            "judge": judge,
        }
    )


@pytest.fixture(scope="module")
def ray_here():
    from actors import cluster

    cluster.start(make_config(kind="rules").ray)
    yield
    cluster.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from make_tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "reward", kind="reward")


@pytest.fixture
def pools(ray_here):
    """Makes JudgeGroups, all starting at once."""
    from actors.judges import JudgeGroup

    made = []

    def make(*judges: dict) -> list[JudgeGroup]:
        made.extend(JudgeGroup(make_config(kind="reward_model", max_length=512, **judge)) for judge in judges)
        for pool in made:
            pool.ready(400)
        return made

    yield make
    for pool in made:
        pool.close()


@pytest.mark.vllm
def test_vllm_s_pooling_runner_says_what_transformers_says(pools, model, tiny_model):
    """A classifier; the same one comparing; and a language model that compares by its letters."""
    judges = [
        {"path": str(model)},
        {"path": str(model), "compares": True},
        {"path": str(tiny_model), "compares": True},
    ]
    for judge, pool in zip(judges, pools(*({**judge, "engine": "vllm"} for judge in judges)), strict=True):
        found = pool.submit(GROUPS).result(120)
        own = build_judge(make_config(kind="reward_model", max_length=512, **judge).judge)
        expected = asyncio.run(judge_groups(own, GROUPS))
        for one, other in zip(found, expected, strict=True):
            assert one.failure is None and one.scores == pytest.approx(other.scores, abs=1e-4)
            if other.comparisons is not None:
                assert [c.preference for c in one.comparisons] == pytest.approx(
                    [c.preference for c in other.comparisons], abs=1e-4
                )
        assert len({score for judgement in expected for score in judgement.scores}) > 8


def test_each_process_has_its_own_copy(pools, model):
    """And a model that does not load is the user's error, not a dead actor."""
    (pool,) = pools({"path": str(model), "workers": 2})
    futures = [pool.submit([group]) for group in GROUPS]
    own = asyncio.run(judge_groups(build_judge(make_config(kind="reward_model", path=str(model)).judge), GROUPS))
    found = [future.result(60)[0] for future in futures]
    # Matrix products may be another library's there (`online_po.cpu`).
    for one, other in zip(found, own, strict=True):
        assert one.failure is None and one.scores == pytest.approx(other.scores, abs=1e-4)


def test_a_model_that_does_not_load_is_the_user_s_error(pools, model, tmp_path):
    from tests.judges.reward_models import without_head

    with pytest.raises(ConfigError, match=r"judge\.path is .*score\.weight would be random"):
        pools({"path": str(without_head(model, tmp_path / "headless"))})
