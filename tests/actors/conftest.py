"""What tests of actors share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of the module's own on two cores, on loopback, whatever another test left behind."""
    ray.init(
        "local", num_cpus=2, num_gpus=0, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="error"
    )
    yield
    ray.shutdown()
