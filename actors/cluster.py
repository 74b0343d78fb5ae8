"""Starting and leaving Ray. One private instance on loopback, or a cluster that is already up."""

from __future__ import annotations

import os

import ray

from online_po.config import RayConfig
from online_po.errors import ConfigError


def start(config: RayConfig) -> None:
    """Connects to `ray.address`, or starts a private Ray on this machine, bound to loopback.

    Raises ConfigError if the address answers nothing.
    """
    # Ray would otherwise hide GPUs from actors that ask for none, and rewrite OMP_NUM_THREADS to 1.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.address is None:
        ray.init(
            address="local",
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            logging_level="error",
            log_to_driver=False,
        )
        return
    try:
        ray.init(address=config.address, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"ray.address is {config.address!r}, but no Ray cluster answers there "
            f"({str(error).splitlines()[0]}); start one with `ray start --head`, or leave ray.address out"
        ) from error


def stop() -> None:
    """Leaves the cluster; a private Ray ends with it."""
    ray.shutdown()


def gpu_count() -> int:
    """GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))
