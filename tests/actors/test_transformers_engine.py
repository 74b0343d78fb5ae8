"""The transformers engine, in this process, on a tiny model."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from actors.transformers_engine import TransformersEngine, sample
from make_tiny_model import EOS, make_tiny_model
from online_po.sections import SamplingConfig
from online_po.types import Policy
from tests.actors.engines import (
    PROMPT_IDS,
    assert_logps_are_the_policys,
    in_order,
    make_adapter,
    make_config,
    make_request,
    plain_piece,
    teacher_forced,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(tiny_model):
    return make_engine(tiny_model)


def make_engine(path, **generator):
    config = make_config(path, engine="transformers", **generator)
    return TransformersEngine(config.model, config.generator, max_model_len=88)


def close(a, b):
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-3


def test_a_response_is_recorded_exactly_as_sampled(engine, tiny_model):
    requests = [make_request(n, samples=6) for n in range(4)]
    groups = in_order(engine.generate(requests, SamplingConfig(max_tokens=24)))
    responses = [r for g in groups for r in g.responses]
    assert [g.prompt for g in groups] == [r.prompt for r in requests]
    assert [r.seed for g in groups for r in g.responses] == [s for r in requests for s in r.seeds]
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for response in responses:
        assert response.token_ids.count(EOS) == (response.finish_reason == "stop")
        assert (response.token_ids[-1] == EOS) == (response.finish_reason == "stop")
        assert len(response.token_ids) == 24 or response.finish_reason == "stop"
        assert "<|im_end|>" not in response.text
    assert_logps_are_the_policys(groups, Policy(version=0, path=tiny_model), tiny_model)


def test_a_response_does_not_depend_on_its_batch(engine, tiny_model):
    requests = [make_request(n, samples=2) for n in range(3)]
    together = in_order(engine.generate(requests, SamplingConfig(max_tokens=24)))
    alone = [in_order(engine.generate([r], SamplingConfig(max_tokens=24)))[0] for r in requests]
    narrow = in_order(make_engine(tiny_model, max_num_seqs=2).generate(requests, SamplingConfig(max_tokens=24)))
    for groups in (alone, narrow):
        assert [[r.token_ids for r in g.responses] for g in groups] == [
            [r.token_ids for r in g.responses] for g in together
        ]


def test_groups_come_as_they_finish(tiny_model):
    """Those that end by EOS before those that run to max_tokens."""
    engine = make_engine(tiny_model, max_num_seqs=96)
    requests = [dataclasses.replace(make_request(n % 8), seeds=(n,)) for n in range(96)]
    steps = list(engine.generate(requests, SamplingConfig(max_tokens=20)))
    assert len(steps) == 20, "a sign of life after each"
    answers = [groups for groups in steps if groups]
    longest = [max(len(r.token_ids) for g in groups.values() for r in g.responses) for groups in answers]
    assert longest == sorted(longest) and longest[0] < longest[-1] == 20


def test_the_context_ends_a_response(tiny_model):
    config = make_config(tiny_model, engine="transformers")
    engine = TransformersEngine(config.model, config.generator, max_model_len=50)
    (group,) = in_order(engine.generate([make_request(0, samples=8)], SamplingConfig(max_tokens=24)))
    assert max(len(r.token_ids) for r in group.responses) == 50 - len(group.prompt.token_ids)


def test_a_stop_string_ends_a_response_and_stays_in_it(engine):
    free = in_order(engine.generate([make_request(1)], SamplingConfig(max_tokens=24)))[0].responses[0]
    stop = plain_piece(free.text)
    (group,) = in_order(engine.generate([make_request(1)], SamplingConfig(max_tokens=24, stop=("never said", stop))))
    response = group.responses[0]
    assert response.finish_reason == "stop" and stop in response.text and len(response.token_ids) < len(free.token_ids)
    assert response.token_ids == free.token_ids[: len(response.token_ids)]
    assert stop not in engine._tokenizer.decode(list(response.token_ids[:-1]))


def test_all_end_of_sequence_ids_of_the_generation_config_count(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 50, 51, 52, 53, 54]}')
    (group,) = in_order(make_engine(folder).generate([make_request(0, samples=16)], SamplingConfig(max_tokens=24)))
    ends = {r.token_ids[-1] for r in group.responses if r.finish_reason == "stop"}
    assert ends & {50, 51, 52, 53, 54}
    assert not any(set(r.token_ids[:-1]) & {2, 50, 51, 52, 53, 54} for r in group.responses)


def draws(logits, sampling, seen=None, n=4000):
    """Frequencies of n draws from one row of logits, each from a stream of its own."""
    rows = torch.tensor(logits).expand(n, -1)
    seen = torch.tensor(seen).expand(n, -1) if seen is not None else None
    tokens = sample(rows, seen, [torch.Generator().manual_seed(i) for i in range(n)], sampling)
    return torch.bincount(tokens, minlength=len(logits)) / n


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist()
    for temperature in (1.0, 0.5):
        wanted = (torch.tensor(logits) / temperature).softmax(-1)
        assert (draws(logits, SamplingConfig(temperature=temperature)) - wanted).abs().max() < 0.03


@pytest.mark.parametrize(
    ("setting", "kept"),
    [({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_p": 0.76}, 3), ({"min_p": 0.4}, 2), ({"temperature": 0}, 1)],
)
def test_each_setting_cuts_the_distribution(setting, kept):
    found = draws(torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist(), SamplingConfig(**setting))
    assert (found > 0).tolist() == [i < kept for i in range(4)]


def test_the_repetition_penalty_discourages_what_was_seen():
    setting = SamplingConfig(temperature=0, repetition_penalty=2)
    assert draws([1.0, 0.9, -1.0], setting, seen=[True, False, False]).argmax() == 1
    # A negative logit is multiplied, not divided.
    assert draws([-1.0, -1.5, -9.0], setting, seen=[True, False, False]).argmax() == 1


def test_the_repetition_penalty_sees_prompt_and_response(engine):
    greedy = {"max_tokens": 16, "temperature": 0.0}
    (group,) = in_order(engine.generate([make_request(0, samples=1)], SamplingConfig(**greedy, repetition_penalty=10)))
    ids = group.responses[0].token_ids
    assert len(set(ids)) == len(ids) and not set(ids) & set(group.prompt.token_ids)


def test_weights_change_and_come_back(tmp_path, tiny_model):
    engine = make_engine(tiny_model)
    other = make_tiny_model(tmp_path / "other", seed=1)
    start = Policy(version=0, path=tiny_model)
    for policy in (Policy(version=1, path=other), start, make_adapter(tiny_model, tmp_path / "lora", 2), start):
        engine.load(policy)
        assert engine.version == policy.version
        assert close(engine.token_logps(PROMPT_IDS), teacher_forced(policy, PROMPT_IDS, tiny_model))
    assert not close(
        teacher_forced(start, PROMPT_IDS, tiny_model),
        teacher_forced(Policy(version=1, path=other), PROMPT_IDS, tiny_model),
    )


def test_weights_that_were_written_again_in_the_same_place_are_taken(tmp_path, tiny_model):
    """As those of a round that is trained again."""
    engine = make_engine(tiny_model)
    place = tmp_path / "policy"
    found = []
    for seed in (1, 2):
        make_tiny_model(place, seed=seed)
        engine.load(Policy(version=1, path=place))
        found.append(engine.token_logps([5, 6, 7, 8]))
    assert found[0] != found[1]


def test_an_adapter_replaces_the_one_before(tmp_path, tiny_model):
    engine = make_engine(tiny_model)
    for seed in (1, 2):
        policy = make_adapter(tiny_model, tmp_path / str(seed), seed)
        engine.load(policy)
        assert close(engine.token_logps(PROMPT_IDS), teacher_forced(policy, PROMPT_IDS, tiny_model))
    groups = in_order(engine.generate([make_request(0)], SamplingConfig(max_tokens=12)))
    assert_logps_are_the_policys(groups, policy, tiny_model)
