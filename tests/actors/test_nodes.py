"""A machine of the cluster that goes: its actors start again elsewhere, and reservations of GPUs move with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors import cluster
from actors.generators import GeneratorGroup
from actors.supervision import Supervisor
from make_tiny_model import make_tiny_model
from online_po.sections import SamplingConfig
from online_po.types import Policy
from tests.actors.engines import by_chunk, make_config, make_probe, make_request
from tests.fakes import FakeObserver

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SAMPLING = SamplingConfig(max_tokens=12)
CHUNKS = [(i, [make_request(i)]) for i in range(4)]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head, for the driver, and two machines with a GPU each, which need not exist."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=made.address, logging_level="error")
    yield made
    cluster.stop()
    made.shutdown()


def test_a_replica_on_a_machine_that_goes_is_replaced_on_another(
    nodes: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model, engine="transformers", replicas=2)
    config = config.model_copy(
        update={"learner": config.learner.model_copy(update={"ranks": 2, "global_batch_size": 2})}
    )
    observer = FakeObserver()
    group = GeneratorGroup(config, Supervisor(config, observer))
    assert group._place.shared, "the engines' places are reserved, for ranks to share"
    policy = Policy(version=1, path=make_tiny_model(tmp_path / "new", seed=1))

    def node_of(replica: Any) -> str:
        return ray.get(replica.actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))

    try:
        group.ready(300)
        group.sync(policy, make_probe(policy, tiny_model))
        whole = by_chunk(group.generate(CHUNKS, SAMPLING))
        places = [node_of(replica) for replica in group._replicas]
        assert len(set(places)) == 2
        (gone,) = [node for node in nodes.worker_nodes if node.node_id == places[1]]
        answers = group.generate(CHUNKS, SAMPLING)
        first = next(answers)
        nodes.remove_node(gone, allow_graceful=False)
        nodes.add_node(num_cpus=1, num_gpus=1)
        assert by_chunk([first, *answers]) == whole
        assert by_chunk(group.generate(CHUNKS, SAMPLING)) == whole
        group.ready(300)  # where the other one did all of it, nobody has waited for the new one yet
        again = [node_of(replica) for replica in group._replicas]
        assert again[0] == places[0] and again[1] not in places
        assert "generator replica 1 is back after" in observer.messages[-1]
    finally:
        group.close()
