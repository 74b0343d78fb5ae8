"""Every shipped config parses, says in its head what it needs, and, where a CPU can, runs for two rounds.

The runs keep everything of a config but its size: a tiny random model, fewer prompts, shorter responses. Configs that
ask for processes of another kind run by the command line; the others, one after the other, on one engine and judge.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from online_po.config import Config
from online_po.ledger import Ledger
from tests.test_end_to_end import online_po
from tiny_runs import Bench, serving

ITERATIVE = Path(__file__).parents[1] / "configs" / "iterative.yaml"
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
NEED_MORE = {"gpu_8b_one_node.yaml", "ray_cluster.yaml"}
"""Configs that no CPU machine can run."""
OWN_PROCESSES = {"quickstart.yaml", "lora.yaml", "two_ranks.yaml", "two_replicas.yaml", "transformers_engine.yaml"}
"""Configs that run by the command line: the first command of the README, and all whose actors are others."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_parses_and_says_what_it_needs(path):
    config = Config.from_yaml(path)
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head is not None and "Needs: " in head[0]
    assert config.run.name.replace("-", "") in path.stem.replace("_", "") or path.name in NEED_MORE


def test_there_is_one_for_every_regime_and_part():
    configs = {path.name: Config.from_yaml(path) for path in CONFIGS}
    names = "quickstart iterative semi_online online asynchronous lora full two_ranks two_replicas transformers_engine"
    recipes = "iterative_rpo kto tr_dpo"
    assert set(configs) == {f"{name}.yaml" for name in [*names.split(), *recipes.split()]} | NEED_MORE
    batch = configs["online.yaml"].learner.global_batch_size
    assert configs["online.yaml"].loop.prompts_per_round == batch
    assert configs["asynchronous.yaml"].loop.max_staleness == 1
    assert configs["two_ranks.yaml"].learner.ranks == 2
    assert configs["two_replicas.yaml"].generator.replicas == 2
    assert configs["lora.yaml"].learner.lora is not None and configs["full.yaml"].learner.lora is None


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """The quickstart's prompts, few, with constraints that a random model meets to varying degrees."""
    from make_prompts import make_prompts, split_topics

    folder = tmp_path_factory.mktemp("prompts")
    for name, among, count in zip(("train", "heldout"), split_topics(0), (48, 6), strict=True):
        rows = make_prompts(among, count, random.Random(0))
        for row in rows:
            row["constraints"] = [{"type": "lowercase"}, {"type": "min_words", "n": 12}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(path: Path, folder: Path, model: Path, prompts: Path) -> list[str]:
    """What makes a config small."""
    overrides = [
        f"model.path={model}",
        f"run.dir={folder}",
        f"prompts.path={prompts / 'train.jsonl'}",
        f"prompts.heldout_path={prompts / 'heldout.jsonl'}",
        "prompts.max_tokens=256",
        "loop.rounds=2",
        "loop.prompts_per_round=16",
        "generator.max_tokens=24",
        "generator.chunk_prompts=4",
        "generator.threads=1",
        "learner.threads=1",
        "learner.global_batch_size=8",
        "eval.every=1",
        "eval.bootstrap_samples=100",
    ]
    if Config.from_yaml(path).generator.engine == "vllm":
        overrides.append("generator.cpu_kv_cache_gib=0.2")
    return overrides


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_model, prompts) -> Iterator[Bench]:
    """The engine and the judge that all configs but `OWN_PROCESSES` ask for."""
    folder = tmp_path_factory.mktemp("shared")
    made = Bench(folder=folder, model=tiny_model)
    first = Config.from_yaml(ITERATIVE, small(ITERATIVE, folder, tiny_model, prompts))
    with serving(made, first):
        yield made


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", sorted(OWN_PROCESSES))
def test_it_runs_for_two_rounds_by_the_command_line(name, tmp_path, tiny_model, prompts):
    path = ITERATIVE.with_name(name)
    online_po("run", path, *small(path, tmp_path, tiny_model, prompts), cwd=tmp_path)
    assert_two_rounds(path, Ledger.open(tmp_path / Config.from_yaml(path).run.name))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", sorted({path.name for path in CONFIGS} - NEED_MORE - OWN_PROCESSES))
def test_it_runs_for_two_rounds(name, shared, tmp_path, tiny_model, prompts):
    path = ITERATIVE.with_name(name)
    config = Config.from_yaml(path, small(path, tmp_path, tiny_model, prompts))
    first = Config.from_yaml(ITERATIVE)
    same = ("engine", "replicas", "tensor_parallel", "dtype")
    assert all(getattr(config.generator, key) == getattr(first.generator, key) for key in same)
    assert config.judge == first.judge and config.learner.ranks == 1 and config.learner.lora is None
    assert_two_rounds(path, shared.run(config))


def assert_two_rounds(path: Path, ledger: Ledger) -> None:
    assert ledger.last_committed() == 2
    assert all(ledger.evaluation_summary(version) is not None for version in range(3))
    rows = [json.loads(line) for line in (ledger.round_dir(2) / "metrics.jsonl").open()]
    assert rows[-1]["labels" if path.name == "kto.yaml" else "pairs"] > 0
    assert rows[-1]["policy_version_sampled"] == 1 - Config.from_yaml(path).loop.max_staleness
