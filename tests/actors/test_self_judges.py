"""Generators that answer questions as another policy than they hold, and hold theirs again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.generators import GeneratorGroup, GeneratorReplica
from make_tiny_model import make_tiny_model
from online_po.errors import EngineError, SyncError
from online_po.sections import SamplingConfig
from online_po.types import Policy, Probe
from tests.actors.engines import by_chunk, make_config, make_probe, make_request

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SAMPLING = SamplingConfig(max_tokens=12, temperature=0.0)
REQUESTS = [make_request(i, samples=1) for i in range(5)]


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
    replica.start(None)
    replica.sync(*policies[1])
    monkeypatch.setattr(replica, "_held", (Policy(version=1, path=policies[2][0].path), policies[1][1]))
    with pytest.raises(SyncError, match=r"is not policy 1 again.*judge\.policy: current"):
        replica.answer(REQUESTS, SAMPLING, *policies[2])
    with pytest.raises(SyncError, match="is not policy 1 again"):
        next(replica.generate(REQUESTS, SAMPLING))
    with pytest.raises(SyncError, match="is not policy 1 again"):
        replica.answer(REQUESTS, SAMPLING, *policies[1])


class FakeEngine:
    """Holds numbers for weights: a policy's version, unless its folder is missing."""

    version, weights = 0, 0

    def load(self, policy, tensors=None):
        self.weights = None  # the old ones go before the new ones come
        if policy.path.name == "missing":
            raise OSError("no such folder")
        self.version = self.weights = policy.version

    def token_logps(self, token_ids):
        return [-float(self.weights)] * 2

    def generate(self, requests, sampling):
        yield {place: f"by {self.weights}" for place in range(len(requests))}


def fake(version, name=""):
    return Policy(version=version, path=Path(name)), Probe(token_ids=(1, 2, 3), token_logps=(-float(version),) * 2)


def replica_of(engine, monkeypatch):
    replica = GeneratorReplica(0, None)
    monkeypatch.setattr(replica, "_engine", engine, raising=False)
    return replica


def test_weights_that_do_not_load_leave_the_sampling_ones_in_place(monkeypatch):
    replica = replica_of(FakeEngine(), monkeypatch)
    replica.sync(*fake(2))
    with pytest.raises(EngineError, match="could not load policy 1"):
        replica.answer(["q"], SAMPLING, *fake(1, "missing"))
    assert list(replica.generate(["q"], SAMPLING)) == [{0: "by 2"}]


def test_sampling_weights_that_do_not_load_again_end_it_all(monkeypatch):
    replica = replica_of(FakeEngine(), monkeypatch)
    replica.sync(*fake(2))
    monkeypatch.setattr(replica, "_held", fake(2, "missing"))
    with pytest.raises(EngineError, match="could not load policy 2"):
        replica.answer(["q"], SAMPLING, *fake(1))
    for ask in (lambda: next(replica.generate(["q"], SAMPLING)), lambda: replica.answer(["q"], SAMPLING, *fake(2))):
        with pytest.raises(EngineError, match="answered as policy 1, but is not policy 2 again"):
            ask()


def test_before_the_first_sync_there_is_nothing_to_put_back(monkeypatch):
    """A resumed run may try its judge before it samples."""
    replica = replica_of(FakeEngine(), monkeypatch)
    groups, report = replica.answer(["q"], SAMPLING, *fake(3))
    assert groups == ["by 3"] and report.policy_version == 3 and report.mean_logp_error == 0
