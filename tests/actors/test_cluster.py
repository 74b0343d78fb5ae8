"""Who gets which GPUs, and what is said where there are too few."""

from __future__ import annotations

import pytest

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
