"""The generator group: who gets which chunk, what comes back, and what is said when something fails."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace

import pytest
import ray
import torch
from ray.exceptions import ObjectStoreFullError, OwnerDiedError

from actors import shared_weights
from actors.engines import check_engine, environment
from actors.generators import IN_FLIGHT, GeneratorGroup
from make_tiny_model import make_tiny_model
from online_po.errors import ConfigError, EngineError, PolicyGoneError, SyncError
from online_po.memory import Memory
from online_po.sections import SamplingConfig
from online_po.types import Policy, Probe
from tests.actors.engines import (
    PROMPT_IDS,
    assert_logps_are_the_policys,
    by_chunk,
    check_shared_sync,
    make_config,
    make_probe,
    make_request,
    shared_policy,
)

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("cluster")]

SAMPLING = SamplingConfig(max_tokens=12)


@pytest.fixture(scope="module")
def pair(tiny_model):
    """Two replicas of the transformers engine."""
    group = GeneratorGroup(make_config(tiny_model, engine="transformers", replicas=2))
    group.ready(300)
    yield group
    group.close()


def end(owner, policy):
    """Word of a death takes a moment."""
    ray.kill(owner)
    with pytest.raises(OwnerDiedError):
        for _ in range(300):
            ray.get(policy.shared.handle)
            time.sleep(0.1)


def chunks(n=5):
    return [(10 + i, [make_request(2 * i), make_request(2 * i + 1)]) for i in range(n)]


def test_chunks_come_back_whole_under_their_index(pair):
    found = by_chunk(pair.generate(chunks(), SAMPLING))
    assert sorted(found) == [index for index, _ in chunks()]
    for index, requests in chunks():
        assert [g.prompt.id for g in found[index]] == [r.prompt.id for r in requests]
        assert [[r.seed for r in g.responses] for g in found[index]] == [list(r.seeds) for r in requests]


def test_one_replica_gives_what_two_give(pair, tiny_model):
    solo = GeneratorGroup(make_config(tiny_model, engine="transformers"))
    try:
        solo.ready(300)
        assert by_chunk(solo.generate(chunks(), SAMPLING)) == by_chunk(pair.generate(chunks(), SAMPLING))
    finally:
        solo.close()


def test_chunks_are_read_only_as_far_ahead_as_replicas_need(pair):
    read = []

    def source():
        for chunk in chunks(9):
            read.append(chunk[0])
            yield chunk

    answers = pair.generate(source(), SAMPLING)
    next(answers)
    assert len(read) == 2 * IN_FLIGHT
    answers.close()
    # What was given out and not asked for any more is in nobody's way.
    assert len(by_chunk(pair.generate(chunks(2), SAMPLING))) == 2


def test_no_chunks_no_answers(pair):
    assert list(pair.generate([], SAMPLING)) == []


def test_sync_proves_the_weights(pair, tiny_model, tmp_path):
    start = Policy(version=0, path=tiny_model)
    new = Policy(version=3, path=make_tiny_model(tmp_path / "new", seed=1))
    reports = pair.sync(new, make_probe(new, tiny_model))
    assert [(r.replica, r.policy_version) for r in reports] == [(0, 3), (1, 3)]
    assert all(r.mean_logp_error < 1e-4 and r.seconds > 0 for r in reports)
    groups = by_chunk(pair.generate(chunks(1), SAMPLING))[10]
    assert_logps_are_the_policys(groups, new, tiny_model)
    with pytest.raises(SyncError, match=r"replica 0 .* policy 3 .* nats"):
        pair.sync(new, make_probe(start, tiny_model))
    nan = Probe(token_ids=PROMPT_IDS, token_logps=(float("nan"),) * (len(PROMPT_IDS) - 1))
    with pytest.raises(SyncError):
        pair.sync(new, nan)
    assert pair.sync(start, make_probe(start, tiny_model))[1].policy_version == 0


def test_weights_in_memory_are_taken_before_they_are_in_a_folder(pair, tiny_model, tmp_path):
    check_shared_sync(pair, tiny_model, make_tiny_model(tmp_path / "new", seed=1), SAMPLING)


def test_who_takes_the_place_of_a_replica_takes_shared_weights_too(tiny_model, tmp_path):
    group = GeneratorGroup(make_config(tiny_model, engine="transformers"))
    owner, policy, probe = shared_policy(tiny_model, make_tiny_model(tmp_path / "new", seed=1))
    try:
        group.ready(300)
        group.sync(policy, probe)
        ray.kill(group._replicas[0].actor)
        groups = by_chunk(group.generate(chunks(1), SAMPLING))[10]
        assert_logps_are_the_policys(groups, replace(policy, path=tmp_path / "new"), tiny_model)
    finally:
        group.close()
        ray.kill(owner)


def test_shared_weights_that_died_with_the_learner(tiny_model, tmp_path):
    """No replica is blamed for it; what the learner makes next is taken as ever."""
    group = GeneratorGroup(make_config(tiny_model, engine="transformers"))
    owner, policy, probe = shared_policy(tiny_model, make_tiny_model(tmp_path / "new", seed=1))
    try:
        group.ready(300)
        replica = group._replicas[0]
        end(owner, policy)
        with pytest.raises(PolicyGoneError, match="policy 1 is gone with the learner"):
            group.sync(policy, probe)
        ray.kill(replica.actor)  # and not even one that starts now looks for it
        (report,) = group.sync(replace(policy, path=tmp_path / "new", shared=None), probe)
        assert report.policy_version == 1 and report.mean_logp_error < 1e-4
    finally:
        group.close()


def test_shared_weights_that_died_while_a_replica_was_replaced(tiny_model, tmp_path):
    """What it was to begin with is gone; the next policy is not held up by that. Saved, it is read from its folder."""
    group = GeneratorGroup(make_config(tiny_model, engine="transformers"))
    folder = make_tiny_model(tmp_path / "new", seed=1)
    owner, policy, probe = shared_policy(tiny_model, folder)
    try:
        group.ready(300)
        group.sync(policy, probe)
        end(owner, policy)
        ray.kill(group._replicas[0].actor)
        with pytest.raises(PolicyGoneError):
            list(group.generate(chunks(1), SAMPLING))
        second = Policy(version=2, path=folder)
        (report,) = group.sync(second, probe)
        assert report.policy_version == 2 and report.mean_logp_error < 1e-4
        assert group.sync(replace(policy, path=folder), probe)[0].policy_version == 1
    finally:
        group.close()


def test_a_replica_that_starts_with_a_policy_is_not_believed_if_it_did_not_move(tiny_model, tmp_path):
    """A resumed run's first weights, or those of one that takes another's place."""
    group = GeneratorGroup(make_config(tiny_model, engine="transformers", sync_tolerance=100.0))
    new = Policy(version=1, path=make_tiny_model(tmp_path / "new", seed=1))

    def load_nothing(replica):
        replica._engine.load = lambda policy, tensors: setattr(replica._engine, "version", policy.version)

    try:
        group.ready(300)
        ray.get(group._replicas[0].actor.__ray_call__.remote(load_nothing))
        with pytest.raises(SyncError, match=r"policy 1, but says of the probe, bit for bit"):
            group.sync(new, make_probe(new, tiny_model))
    finally:
        group.close()


def test_too_little_memory_to_share(monkeypatch):
    def prepare() -> bool:
        return shared_weights.prepare(1000)

    def shared() -> bool:
        return shared_weights.share({"w": torch.zeros(250)}) is not None

    assert prepare() and shared()
    monkeypatch.setattr(ray, "nodes", lambda: [node(1e9), node(1500), node(0, alive=False)])
    assert not prepare()
    monkeypatch.setattr(ray, "nodes", lambda: [node(1e9)])
    assert prepare()
    monkeypatch.setattr(shared_weights, "memory", lambda: Memory(total=1 << 40, available=1500))
    assert not prepare() and shared()  # by then the store may have taken what was free
    monkeypatch.undo()
    monkeypatch.setattr(ray, "put", lambda _: (_ for _ in ()).throw(ObjectStoreFullError("full")))
    assert not prepare() and not shared()


def node(store, alive=True):
    return {"Alive": alive, "Resources": {"object_store_memory": store} if store else {}}


def test_old_weights_do_not_pass_for_new_ones_where_the_tolerance_is_wide(tiny_model, tmp_path):
    """As with bfloat16, whose rounding is larger than a small update."""
    group = GeneratorGroup(make_config(tiny_model, engine="transformers", sync_tolerance=100.0))
    start, new = Policy(version=0, path=tiny_model), Policy(version=1, path=make_tiny_model(tmp_path / "new", seed=1))

    def load_nothing(replica):
        replica._engine.load = lambda policy, tensors: setattr(replica._engine, "version", policy.version)

    try:
        group.ready(300)
        group.sync(start, make_probe(start, tiny_model))
        ray.get(group._replicas[0].actor.__ray_call__.remote(load_nothing))
        with pytest.raises(SyncError, match=r"policy 1, but says of the probe, bit for bit"):
            group.sync(new, make_probe(new, tiny_model))
        # An update that did not move the learner either moves no generator.
        group.sync(Policy(version=2, path=tiny_model), make_probe(start, tiny_model))
    finally:
        group.close()


def test_a_failing_sync_says_what_failed(tiny_model, tmp_path):
    config = make_config(tiny_model, engine="transformers")
    group = GeneratorGroup(config.model_copy(update={"ray": config.ray.model_copy(update={"max_restarts": 1})}))
    try:
        group.ready(300)
        with pytest.raises(EngineError, match=r"again 1 times .* replica 0 could not load policy 1 .*nowhere"):
            group.sync(
                Policy(version=1, path=tmp_path / "nowhere"), make_probe(Policy(version=0, path=tiny_model), tiny_model)
            )
    finally:
        group.close()


def test_an_unloadable_model_is_an_error_of_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    group = GeneratorGroup(make_config(tmp_path, engine="transformers"))
    try:
        with pytest.raises(ConfigError, match=r"model\.path"):
            group.ready(300)
    finally:
        group.close()


def test_a_late_engine_is_an_error(tiny_model):
    group = GeneratorGroup(make_config(tiny_model, engine="transformers"))
    try:
        with pytest.raises(EngineError, match=r"startup_timeout_s"):
            group.ready(0.01)
    finally:
        group.close()


def test_vllm_that_is_not_installed_is_a_config_error(tiny_model, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(ConfigError, match=r"vLLM is not installed.*generator\.engine: transformers"):
        check_engine(make_config(tiny_model))
    check_engine(make_config(tiny_model, engine="transformers"))


def wide_adapter(tiny_model, how):
    config = make_config(tiny_model, lora=True)
    wide = config.learner.model_copy(update={"lora": config.learner.lora.model_copy(update={"rank": 600})})
    generator = config.generator.model_copy(update={"lora": how})
    return config.model_copy(update={"learner": wide, "generator": generator})


def test_a_rank_that_vllm_does_not_take_is_a_config_error(tiny_model):
    with pytest.raises(ConfigError, match=r"learner\.lora\.rank is 600.*generator\.lora: merged"):
        check_engine(wide_adapter(tiny_model, "adapter"))
    check_engine(wide_adapter(tiny_model, "merged"))


def test_replicas_share_the_cores(tiny_model):
    assert environment(make_config(tiny_model, threads=None, replicas=3), 8)["OMP_NUM_THREADS"] == "2"
    assert environment(make_config(tiny_model, threads=None, replicas=9), 8)["OMP_NUM_THREADS"] == "1"
    assert environment(make_config(tiny_model, threads=7), 8)["OMP_NUM_THREADS"] == "7"


def test_nothing_is_compiled_where_engines_are_eager(tiny_model, monkeypatch):
    for on_cpu in (True, False):
        monkeypatch.setattr("actors.engines.on_cpu", lambda config, on_cpu=on_cpu: on_cpu)
        for eager in (None, True, False):
            config = make_config(tiny_model)
            generator = config.generator.model_copy(update={"enforce_eager": eager})
            found = environment(config.model_copy(update={"generator": generator}), 2)
            assert ("TORCH_COMPILE_DISABLE" in found) == (on_cpu and eager is not False)


def test_the_engine_takes_the_threads_it_is_given(pair):
    def threads(_):
        import torch

        return torch.get_num_threads()

    assert ray.get(pair._replicas[0].actor.__ray_call__.remote(threads)) == 1
