"""Who gets which GPUs, and what is said where there are too few."""

from __future__ import annotations

import os

import pytest
import ray

from actors import cluster
from online_po.errors import ConfigError
from tests.fakes import make_config


def place(tmp_path, monkeypatch, gpus: int, **overrides: object) -> tuple[float, float]:
    monkeypatch.setattr(cluster, "gpu_count", lambda: gpus)
    placement = cluster.placement(make_config(tmp_path, **overrides))
    assert placement.shared == (placement.generator == 0.5)
    return placement.generator, placement.learner


def test_without_gpus_nobody_asks_for_one(tmp_path, monkeypatch):
    assert place(tmp_path, monkeypatch, 0) == (0, 0)


def test_one_gpu_is_shared_and_two_are_not(tmp_path, monkeypatch):
    assert place(tmp_path, monkeypatch, 1) == (0.5, 0.5)
    assert place(tmp_path, monkeypatch, 2) == (1, 1)


def test_an_engine_and_a_rank_share_each_gpu(tmp_path, monkeypatch):
    """With Ray's own bookkeeping, on GPUs that need not exist."""
    ray.init(
        "local", num_cpus=2, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="error"
    )

    class Holder:
        def gpus(self):
            return ray.get_gpu_ids()

    try:
        place = cluster.placement(make_config(tmp_path, learner={"ranks": 2}, generator__replicas=2))
        assert place.shared
        actor = ray.remote(num_cpus=0)(Holder)
        kinds = ("generator", "learner")
        holders = [[actor.options(**place.options(kind, number)).remote() for number in range(2)] for kind in kinds]
        engines, ranks = ([ray.get(holder.gpus.remote()) for holder in some] for some in holders)
        assert engines == ranks and sorted(engines) == [[0], [1]]
    finally:
        cluster.stop()


REWARD = {"kind": "reward_model", "path": "r"}
BOTH = {"kind": "ensemble", "normalise": "none"}


@pytest.mark.parametrize(
    ("gpus", "overrides", "expected"),
    [
        (0, {"judge": REWARD}, (0, 0, 0, "")),
        (3, {"judge": REWARD}, (1, 1, 1, "")),
        (2, {"judge": REWARD}, (1, 0.5, 0.5, "judge learner")),
        (1, {"judge": REWARD}, (0.33, 0.33, 0.33, "generator judge learner")),
        (8, {"judge": {**REWARD, "workers": 4}, "generator__replicas": 4, "learner": {"ranks": 4}},
         (1, 0.5, 0.5, "judge learner")),
        (4, {"judge": {**REWARD, "workers": 2}, "generator__replicas": 4, "learner": {"ranks": 4}},
         (0.33, 0.33, 0.33, "generator judge learner")),
        (5, {"judge": REWARD, "generator__tensor_parallel": 4}, (4, 0.5, 0.5, "judge learner")),
        (2, {"judge": REWARD, "ray": {"judge_gpus": 0.0}}, (1, 1, 0, "")),
        (2, {"judge": REWARD, "ray": {"judge_gpus": 1.0}}, (0.5, 0.5, 1, "generator learner")),
        (1, {"judge": REWARD, "ray": {"judge_gpus": 0.2, "learner_gpus": 0.4, "generator_gpus": 0.4}},
         (0.4, 0.4, 0.2, "")),
        (3, {"judge": {"kind": "python", "function": "a:b"}}, (1, 1, 0, "")),
        (3, {"judge": {"kind": "python", "function": "a:b"}, "ray": {"judge_gpus": 1.0}}, (1, 1, 1, "")),
        (3, {"judge": {**BOTH, "members": [{"kind": "rules"}, REWARD]}}, (1, 1, 1, "")),
        (3, {"judge": {**BOTH, "members": [{"kind": "rules"}, {"kind": "python", "function": "a:b"}]}}, (1, 1, 0, "")),
    ],
)  # fmt: skip
def test_judges_that_hold_a_model_get_gpus(tmp_path, monkeypatch, gpus, overrides, expected):
    monkeypatch.setattr(cluster, "gpu_count", lambda: gpus)
    place = cluster.placement(make_config(tmp_path, **overrides))
    assert (place.generator, place.learner, place.judge, " ".join(sorted(place.together))) == expected
    if place.together:
        assert sum(getattr(place, kind) for kind in place.together) <= 1


@pytest.mark.parametrize(
    ("gpus", "overrides", "memory", "one_after_the_other"),
    [
        (0, {}, 0.85, False),
        (2, {}, 0.85, False),
        (1, {}, 0.4, True),
        (1, {"judge": REWARD}, 0.3, True),
        (8, {"generator__tensor_parallel": 4}, 0.85, False),
        (2, {"judge": REWARD}, 0.85, True),
        (1, {"ray": {"learner_gpus": 0.5, "generator_gpus": 0.5}}, 0.425, True),
        (1, {"judge": REWARD, "ray": {"judge_gpus": 0.2, "learner_gpus": 0.4, "generator_gpus": 0.4}}, 0.34, True),
    ],
)
def test_engines_take_no_more_memory_than_their_share(
    tmp_path, monkeypatch, gpus, overrides, memory, one_after_the_other
):
    """vLLM takes what is free for its own: nobody else may load beside it where a GPU is shared."""
    monkeypatch.setattr(cluster, "gpu_count", lambda: gpus)
    place = cluster.placement(make_config(tmp_path, **overrides))
    assert place.engine_memory == pytest.approx(memory) and place.shared == one_after_the_other


def test_engines_that_share_with_nobody_are_told_what_can_be_lowered(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "gpu_count", lambda: 8)
    config = make_config(tmp_path, generator__replicas=4, generator__tensor_parallel=2, learner={"ranks": 4})
    with pytest.raises(ConfigError, match=r"has 8 GPUs, but 12 are needed: .* with 1 each; lower them$"):
        cluster.placement(config)


def test_a_ray_that_leaves_gpus_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(cluster.NOSET, "1")
    with pytest.raises(ConfigError, match="NOSET_CUDA_VISIBLE_DEVICES is set: .* unset it"):
        cluster.start(make_config(tmp_path).ray)


def test_too_few_gpus_for_the_judge_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "gpu_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"has 2 GPUs, but 4 are needed: .*judge\.workers = 2 with 1 each.*judge_gpus"
    ):
        cluster.placement(make_config(tmp_path, judge={**REWARD, "workers": 2}, ray={"judge_gpus": 1.0}))


def test_gpus_for_a_judge_that_computes_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="ray.judge_gpus is 1, but judge.kind: rules computes nothing on a GPU"):
        make_config(tmp_path, ray={"judge_gpus": 1.0})


def test_a_containers_share_of_the_cores_counts(monkeypatch):
    usable = len(os.sched_getaffinity(0))
    for text, cores in (
        ("max 100000\n", usable),
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("9900000 100000\n", usable),
    ):
        monkeypatch.setattr(cluster.Path, "read_text", lambda path, text=text: text)
        assert cluster.cores() == cores


def test_eight_gpus(tmp_path, monkeypatch):
    learner = {"ranks": 4}
    assert place(tmp_path, monkeypatch, 8, learner=learner, generator__replicas=4) == (1, 1)
    assert place(tmp_path, monkeypatch, 8, learner=learner, generator__tensor_parallel=4) == (4, 1)


@pytest.mark.parametrize(
    ("gpus", "overrides", "need"),
    [
        (2, {"generator__replicas": 3}, 4),
        (3, {"generator__tensor_parallel": 4}, 5),
        (1, {"ray": {"generator_gpus": 1.0}}, 2),
        (0, {"ray": {"learner_gpus": 1.0, "generator_gpus": 0.0}}, 1),
    ],
)
def test_too_few_gpus_are_refused_by_name(tmp_path, monkeypatch, gpus, overrides, need):
    with pytest.raises(ConfigError, match=rf"has {gpus} GPUs, but {need} are needed: generator.repl.*learner.ranks"):
        place(tmp_path, monkeypatch, gpus, **overrides)
