"""Generators that answer questions as another policy than they hold, and hold theirs again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from actors.generators import GeneratorGroup, GeneratorReplica
from make_tiny_model import make_tiny_model
from online_po.errors import SyncError
from online_po.sections import SamplingConfig
from online_po.types import Policy
from tests.actors.engines import by_chunk, make_config, make_probe, make_request

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SAMPLING = SamplingConfig(max_tokens=12, temperature=0.0)
REQUESTS = [make_request(i, samples=1) for i in range(5)]


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def policies(tiny_model, tmp_path_factory):
    """Three policies with their probes: the starting model, and two others."""
    folder = tmp_path_factory.mktemp("policies")
    found = [Policy(version=0, path=tiny_model)]
    found += [Policy(version=v, path=make_tiny_model(folder / str(v), seed=v)) for v in (1, 2)]
    return [(policy, make_probe(policy, tiny_model)) for policy in found]


@pytest.fixture
def group(cluster, tiny_model):
    made = GeneratorGroup(make_config(tiny_model, engine="transformers", replicas=2))
    made.ready(300)
    yield made
    made.close()


def texts(groups):
    return [group.responses[0].text for group in groups]


def test_other_weights_answer_and_the_held_ones_come_back(group, policies):
    said = {}
    for policy, probe in policies:
        group.sync(policy, probe)
        (found,) = by_chunk(group.generate([(0, REQUESTS)], SAMPLING)).values()
        said[policy.version] = texts(found)
    assert len({*map(tuple, said.values())}) == 3
    group.sync(*policies[1])
    for policy, probe in policies:
        answers = group.answer(REQUESTS, SAMPLING, policy, probe)
        assert texts(answers) == said[policy.version]
        assert {answer.responses[0].policy_version for answer in answers} == {policy.version}
        (found,) = by_chunk(group.generate([(0, REQUESTS)], SAMPLING)).values()
        assert texts(found) == said[1] and found[0].responses[0].policy_version == 1


def test_questions_come_between_the_chunks_of_another_thread(group, policies):
    group.sync(*policies[1])
    alone = by_chunk(group.generate([(i, REQUESTS) for i in range(4)], SAMPLING))
    with ThreadPoolExecutor(1) as executor:
        chunks = group.generate([(i, REQUESTS) for i in range(4)], SAMPLING)
        first = next(chunks)
        answers = executor.submit(group.answer, REQUESTS, SAMPLING, *policies[2])
        # The loop may wait for its judge before it takes the next chunk.
        assert {answer.responses[0].policy_version for answer in answers.result(120)} == {2}
        assert by_chunk([first, *chunks]) == alone


def test_weights_that_are_not_the_policys_do_not_judge(group, policies):
    group.sync(*policies[1])
    with pytest.raises(SyncError, match="should hold policy 2"):
        group.answer(REQUESTS, SAMPLING, policies[2][0], policies[1][1])


def test_a_replica_that_does_not_come_back_samples_nothing_more(tiny_model, policies, monkeypatch):
    replica = GeneratorReplica(0, make_config(tiny_model, engine="transformers"))
    replica.start()
    replica.sync(*policies[1])
    monkeypatch.setattr(replica, "_held", (Policy(version=1, path=policies[2][0].path), policies[1][1]))
    with pytest.raises(SyncError, match=r"is not policy 1 again.*judge\.policy: current"):
        replica.answer(REQUESTS, SAMPLING, *policies[2])
    with pytest.raises(SyncError, match="is not policy 1 again"):
        next(replica.generate(REQUESTS, SAMPLING))
