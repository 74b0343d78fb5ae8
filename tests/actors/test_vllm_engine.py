"""Real vLLM on tiny models, each engine in its own Ray actor, as in a run."""

from __future__ import annotations

import shutil

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from actors.generators import GeneratorGroup
from actors.vllm_engine import _explain
from make_tiny_model import EOS, make_tiny_model
from online_po.errors import EngineError, SyncError
from online_po.sections import SamplingConfig
from online_po.types import Policy
from tests.actors.engines import (
    assert_logps_are_the_policys,
    by_chunk,
    check_shared_sync,
    make_adapter,
    make_config,
    make_probe,
    make_request,
    plain_piece,
    teacher_forced,
)

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("cluster")]
pytest.importorskip("vllm")

SAMPLING = SamplingConfig(max_tokens=24)


@pytest.fixture(scope="module")
def pair(tiny_model):
    """Two replicas, tied embeddings."""
    yield from started(make_config(tiny_model, replicas=2))


@pytest.fixture(scope="module")
def solo(tiny_model):
    """One replica of the same."""
    yield from started(make_config(tiny_model))


def started(config):
    group = GeneratorGroup(config)
    try:
        group.ready(600)
        yield group
    finally:
        group.close()


def chunks(n=4):
    return [(i, [make_request(3 * i + j) for j in range(3)]) for i in range(n)]


def one(group, sampling, samples=4):
    """The responses to one request."""
    return by_chunk(group.generate([(0, [make_request(1, samples)])], sampling))[0][0].responses


def test_one_replica_gives_what_two_give_bit_for_bit(pair, solo):
    expected = by_chunk(solo.generate(chunks(), SAMPLING))
    assert by_chunk(pair.generate(chunks(), SAMPLING)) == expected
    # Whatever ran before, in whatever order.
    assert by_chunk(pair.generate(reversed(chunks()), SAMPLING)) == expected


def test_groups_come_as_they_finish(solo):
    """Of one chunk, those that end by EOS come before those that run to max_tokens."""
    answers = [groups for _, groups in solo.generate([(0, [make_request(j, samples=1) for j in range(16)])], SAMPLING)]
    assert len(answers) > 1
    longest = [max(len(r.token_ids) for g in groups.values() for r in g.responses) for groups in answers]
    assert longest == sorted(longest) and longest[0] < longest[-1] == 24


def test_a_chunk_left_early_leaves_nothing_behind(solo):
    """Whoever stops listening to the engine: the next chunk runs alone."""
    requests = [make_request(j, samples=1) for j in range(16)]

    def leave_early(replica):
        answers = replica._engine.generate(requests, SAMPLING)
        first = next(filter(None, answers))
        answers.close()
        return first, replica._engine._llm.llm_engine.get_num_unfinished_requests()

    first, unfinished = ray.get(solo._replicas[0].actor.__ray_call__.remote(leave_early))
    assert len(first) < len(requests) and unfinished == 0
    whole = by_chunk(solo.generate([(0, requests)], SAMPLING))[0]
    assert all(whole[place] == group for place, group in first.items())


def test_a_response_is_recorded_exactly_as_sampled(solo, tiny_model):
    groups = [g for _, found in sorted(by_chunk(solo.generate(chunks(), SAMPLING)).items()) for g in found]
    requests = [r for _, chunk in chunks() for r in chunk]
    assert [g.prompt for g in groups] == [r.prompt for r in requests]
    assert [tuple(r.seed for r in g.responses) for g in groups] == [r.seeds for r in requests]
    responses = [r for g in groups for r in g.responses]
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for response in responses:
        assert response.token_ids.count(EOS) == (response.finish_reason == "stop")
        assert (response.token_ids[-1] == EOS) == (response.finish_reason == "stop")
        assert len(response.token_ids) == 24 or response.finish_reason == "stop"
        assert "<|im_end|>" not in response.text
    assert len({r.token_ids for r in responses}) == len(responses)
    assert_logps_are_the_policys(groups, Policy(version=0, path=tiny_model), tiny_model)


def test_logps_are_those_of_the_untouched_distribution(solo, tiny_model):
    hard = SamplingConfig(max_tokens=8, temperature=0.5, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.5)
    groups = by_chunk(solo.generate([(0, [make_request(0)])], hard))[0]
    assert_logps_are_the_policys(groups, Policy(version=0, path=tiny_model), tiny_model)


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}], ids=str)
def test_each_setting_can_make_sampling_greedy(solo, setting):
    greedy = one(solo, SamplingConfig(max_tokens=8, temperature=0))[0].token_ids
    assert {r.token_ids for r in one(solo, SamplingConfig(max_tokens=8, **setting))} == {greedy}
    assert len({r.token_ids for r in one(solo, SamplingConfig(max_tokens=8))}) > 1


def test_the_repetition_penalty_sees_prompt_and_response(solo):
    for response in one(solo, SamplingConfig(max_tokens=16, temperature=0, repetition_penalty=10)):
        ids = response.token_ids
        assert len(set(ids)) == len(ids) and not set(ids) & set(make_request(1).prompt.token_ids)


def test_a_stop_string_ends_a_response_and_stays_in_it(solo):
    free = one(solo, SamplingConfig(max_tokens=24))[0]
    stop = plain_piece(free.text)
    response = one(solo, SamplingConfig(max_tokens=24, stop=("never said", stop)))[0]
    assert response.finish_reason == "stop" and stop in response.text
    assert len(response.token_ids) == len(response.token_logps) < len(free.token_ids)
    assert response.token_ids == free.token_ids[: len(response.token_ids)]


def test_tied_weights_change_and_come_back(pair, tiny_model, tmp_path):
    check_full_sync(pair, tiny_model, make_tiny_model(tmp_path / "new", seed=1))


def test_untied_weights_change_and_come_back(tmp_path):
    base = make_tiny_model(tmp_path / "base", tied=False)
    for group in started(make_config(base)):
        check_full_sync(group, base, make_tiny_model(tmp_path / "new", seed=1, tied=False))


def test_shared_weights_are_taken_before_they_are_in_a_folder(pair, tiny_model, tmp_path):
    check_shared_sync(pair, tiny_model, make_tiny_model(tmp_path / "new", seed=1), SAMPLING)


def test_untied_shared_weights_in_half_precision(tmp_path):
    base = make_tiny_model(tmp_path / "base", tied=False)
    new = make_tiny_model(tmp_path / "new", seed=1, tied=False)
    weights = load_file(new / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, new / "model.safetensors", {"format": "pt"})
    for group in started(make_config(base)):
        check_shared_sync(group, base, new, SAMPLING)


def check_full_sync(group, base, other):
    start, new = Policy(version=0, path=base), Policy(version=2, path=other)
    before = by_chunk(group.generate(chunks(2), SAMPLING))
    for policy in (new, start, new):
        reports = group.sync(policy, make_probe(policy, base))
        assert all(r.policy_version == policy.version and r.mean_logp_error < 1e-3 for r in reports)
    found = by_chunk(group.generate(chunks(2), SAMPLING))
    assert_logps_are_the_policys([g for groups in found.values() for g in groups], new, base)
    with pytest.raises(SyncError, match=r"replica 0 .* policy 2"):
        group.sync(new, make_probe(start, base))
    group.sync(start, make_probe(start, base))
    # The same weights, so the same tokens: nothing of the other policy is left.
    assert by_chunk(group.generate(chunks(2), SAMPLING)) == before


@pytest.mark.parametrize(("held", "dtype"), [("adapter", "float32"), ("merged", "float32"), ("merged", "bfloat16")])
def test_adapters_change_and_go(tiny_model, tmp_path, held, dtype):
    if dtype != "float32":  # of the files; the engine computes in float32
        tiny_model = shutil.copytree(tiny_model, tmp_path / "base")
        weights = load_file(tiny_model / "model.safetensors")
        halves = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
        save_file(halves, tiny_model / "model.safetensors", {"format": "pt"})
    start = Policy(version=0, path=tiny_model)
    first, second = (make_adapter(tiny_model, tmp_path / str(seed), seed) for seed in (1, 2))
    for group in started(make_config(tiny_model, adapters=held)):
        for policy in (start, first, second, start, second):
            (report,) = group.sync(policy, make_probe(policy, tiny_model))
            assert report.policy_version == policy.version and report.mean_logp_error < 1e-3
        groups = by_chunk(group.generate(chunks(1), SAMPLING))[0]
        assert_logps_are_the_policys(groups, second, tiny_model)
        with pytest.raises(SyncError, match="policy 2"):
            group.sync(second, make_probe(first, tiny_model))
    probe = make_request(0).prompt.token_ids
    assert teacher_forced(first, probe, tiny_model) != teacher_forced(second, probe, tiny_model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="generator.cpu_kv_cache_gib is for CPUs")
def test_a_cache_too_small_is_explained(tiny_model):
    group = GeneratorGroup(make_config(tiny_model, cpu_kv_cache_gib=1e-6))
    try:
        with pytest.raises(EngineError, match=r"could not start: .*generator\.cpu_kv_cache_gib is 1e-06") as caught:
            group.ready(600)
        assert "\n" not in str(caught.value)
    finally:
        group.close()


def test_other_reasons_are_one_line_too(tiny_model):
    message = _explain(ValueError("a\nb  c"), make_config(tiny_model).generator, True)
    assert message == "vLLM could not start: a b c"
