"""The learner's ranks as Ray actors. What they compute is tested without Ray in test_learner*.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors import learners
from actors.learners import LearnerGroup
from actors.shared_weights import shared_tensors
from actors.supervision import Supervisor
from make_tiny_model import make_tiny_model
from online_po.config import Config
from online_po.errors import ConfigError, LearnerLostError, NonFiniteError, OnlinePOError
from online_po.prefix_sharing import Sharing
from online_po.types import Policy
from tests.fakes import FakeObserver
from tests.learner_setup import collect_logps, make_pairs, save

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("cluster")]
PAIRS = make_pairs(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), kv_heads=2)


def make_config(
    model: Path | str, ranks: int = 1, nonfinite: str = "stop", tensor_parallel: int = 1, **ray_section: Any
) -> Config:
    return Config.parse(
        {
            "run": {"name": "test"},
            "model": {"path": str(model)},
            "prompts": {"path": "prompts.jsonl", "heldout_size": 1},
            "generator": {"tensor_parallel": tensor_parallel},
            "learner": {
                "ranks": ranks, "threads": 1, "global_batch_size": 4, "learning_rate": 1e-3, "eps": 1e-4,
            },
            # Reads all that is known of a pair: logps, lengths and scores.
            "loss": [{"name": "odpo"}, {"name": "sft", "weight": 0.2}],
            "guards": {"nonfinite": {"action": nonfinite}},
            "ray": ray_section,
        }
    )  # fmt: skip


def work(group: LearnerGroup, model: Path, out: Path) -> dict[str, Any]:
    """A round, a save, and the same answers again after a load."""
    group.ready(120)
    reference = collect_logps(group.logps, PAIRS, Policy(version=0, path=model))
    steps = list(group.update(1, PAIRS, reference, reference))
    save(group, 1, out / "policy", out / "trainer")
    probe = group.token_logps([5, 6, 7, 8])
    list(group.update(2, PAIRS, reference, None))
    assert group.token_logps([5, 6, 7, 8]) != probe
    group.blend(Policy(version=1, path=out / "policy"), 0.6, out / "mean")
    mean = collect_logps(group.logps, PAIRS, Policy(version=2, path=out / "mean", blended=True))
    assert np.abs(mean["chosen"] - reference["chosen"]).max() > 1e-3
    group.load(Policy(version=1, path=out / "policy"), out / "trainer")
    assert group.token_logps([5, 6, 7, 8]) == probe
    return {"reference": reference, "steps": steps, "probe": probe, "mean": mean}


@pytest.mark.parametrize("ranks", [1, 2])
def test_shared_weights_are_those_that_are_saved(model: Path, tmp_path: Path, ranks: int) -> None:
    group = LearnerGroup(make_config(model, ranks))
    try:
        group.ready(120)
        list(group.update(1, PAIRS, collect_logps(group.logps, PAIRS, Policy(version=0, path=model)), None))
        shared = group.share_policy()
        assert shared is not None
        tensors = shared_tensors(Policy(version=1, path=tmp_path / "not yet", shared=shared))
        assert tensors is not None
        group.save_policy(1, tmp_path / "policy")
        saved = load_file(tmp_path / "policy" / "model.safetensors")
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[name], saved[name]) for name in saved)
        shared.let_go()
        assert shared_tensors(Policy(version=1, path=tmp_path / "policy", shared=shared)) is None
    finally:
        group.close()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({}, None),
        ({"tensor_parallel": 2}, "engines of several processes"),
        ({"as_named": False}, "name tensors otherwise"),
        ({"room": False}, "no room for another copy"),
    ],
    ids=str,
)
def test_what_is_told_of_policies_that_are_not_shared(
    model: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], told: str | None
) -> None:
    prepared: list[int] = []
    monkeypatch.setattr(learners, "prepare", lambda needed: prepared.append(needed) or setting.get("room", True))
    rank = learners._Rank(make_config(model, tensor_parallel=setting.get("tensor_parallel", 1)), 0, 1, 100, False)
    lm = AutoModelForCausalLM.from_pretrained(model)
    rank.learner = SimpleNamespace(
        sharing=Sharing(), model=lm, held=SimpleNamespace(as_named=setting.get("as_named", True))
    )
    texts, shares = rank._about()
    assert shares == (told is None) and len(texts) == (told is not None)
    assert all(told in text and "once it is saved" in text for text in texts if told)
    size = (model / "model.safetensors").stat().st_size
    assert all(0.9 * size < needed <= size for needed in prepared)
    assert bool(prepared) == (told in (None, "no room for another copy"))


def test_one_rank_and_two_do_the_same_work(model: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        group = LearnerGroup(make_config(model, ranks))
        found.append(work(group, model, tmp_path / str(ranks)))
        group.close()
    one, two = found
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(two["reference"][side], one["reference"][side], rtol=2e-6, atol=1e-5)
        np.testing.assert_allclose(two["mean"][side], one["mean"][side], rtol=2e-5, atol=1e-3)
    assert len(one["steps"]) == 3
    for step, other in zip(one["steps"], two["steps"], strict=True):
        for name in ("loss", "margin", "grad_norm", "entropy", "tokens", "pairs", "kl_start"):
            assert other[name] == pytest.approx(step[name], rel=1e-4, abs=2e-5), name
    assert two["probe"] == pytest.approx(one["probe"], abs=2e-5)


def test_it_is_told_where_prompts_are_not_shared(model: Path) -> None:
    config = make_config(model)
    for attention, told in (("sdpa", []), ("eager", ["model.attention is eager"])):
        source = config.model.model_copy(update={"attention": attention})
        asked, observer = config.model_copy(update={"model": source}), FakeObserver()
        group = LearnerGroup(asked, Supervisor(asked, observer))
        group.ready(120)
        group.close()
        found = [text for text in observer.messages if "learner.prefix_sharing" in text]
        assert len(found) == len(told) and all(why in text for why, text in zip(told, found, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_errors_keep_their_type_and_words(model: Path, ranks: int) -> None:
    lost, group = LearnerGroup(make_config("/no/such/model", ranks)), LearnerGroup(make_config(model, ranks))
    with pytest.raises(ConfigError, match=r"^model.path is '/no/such/model', but there is no such folder") as caught:
        lost.ready(120)
    assert type(caught.value) is ConfigError
    group.ready(120)
    broken = {side: np.full(12, np.nan, np.float32) for side in ("chosen", "rejected")}
    with pytest.raises(NonFiniteError, match=r"^round 1, step 1 of 3: loss is nan") as stopped:
        list(group.update(1, PAIRS, broken, None))
    assert type(stopped.value) is NonFiniteError
    # All ranks saw it in the same sums: they are still in step, for a run that goes back.
    assert len(group.token_logps([5, 6, 7])) == 2
    group.close()
    warned = LearnerGroup(make_config(model, ranks, nonfinite="warn"))
    warned.ready(120)
    assert [step["skipped"] for step in warned.update(1, PAIRS, broken, None)] == [1.0] * 3
    warned.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_call_and_the_group(model: Path, victim: int) -> None:
    group = LearnerGroup(make_config(model, ranks=2))
    group.ready(120)
    pid = ray.get(group._ranks[victim].__ray_call__.remote(lambda _self: os.getpid()))
    reference = collect_logps(group.logps, PAIRS, Policy(version=0, path=model))
    with pytest.raises(LearnerLostError, match=rf"^rank {victim} is dead: "):
        steps = group.update(1, PAIRS, reference, None)
        next(steps)
        os.kill(pid, signal.SIGKILL)
        list(steps)
        group.token_logps([5, 6])  # where the update was over before the rank was
    with pytest.raises(OnlinePOError, match="was closed, or one of its ranks failed"):
        group.token_logps([5, 6])


def test_waiting_for_gpus_that_are_not_there(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"the cluster has 0 GPUs, but 2 are needed: .*learner.ranks = 1 with 1 each"):
        LearnerGroup(make_config(model, learner_gpus=1))


def test_start_up_that_takes_too_long(model: Path) -> None:
    with pytest.raises(OnlinePOError, match=r"not ready within ray.startup_timeout_s"):
        LearnerGroup(make_config(model)).ready(0.01)
