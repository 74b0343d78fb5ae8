"""Starting and leaving Ray, and who gets which GPUs. A private instance on loopback, or a cluster that is up."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A stopped run must not start a new Ray by a late call; read when ray is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from online_po.config import Config
from online_po.errors import ConfigError, first_line
from online_po.sections import RayConfig


def start(config: RayConfig) -> None:
    """Connects to `ray.address`, or starts a private Ray on this machine, bound to loopback.

    Raises ConfigError if the address answers nothing, or this process is connected to Ray already.
    """
    if ray.is_initialized():
        raise ConfigError("this process is connected to Ray already; call ray.shutdown() first, a run has its own")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    settings = local if config.address is None else {"address": config.address}
    try:
        ray.init(**settings, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if config.address is None:
            raise ConfigError(f"ray.address is null, but Ray does not start here: {first_line(error)}") from error
        raise ConfigError(
            f"ray.address is {config.address!r}, but no Ray cluster answers there ({first_line(error)}); start one "
            "with `ray start --head`, or leave ray.address out"
        ) from error


def stop() -> None:
    """Leaves the cluster; a private Ray ends with it."""
    _shared_gpus.clear()
    ray.shutdown()


def gpu_count() -> int:
    """GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """GPUs of one actor; 0 on the CPU, below 1 where actors share a GPU."""

    generator: float
    learner: float
    pairs: int = 0
    """So many GPUs hold one engine and one learner rank each: those of the same number."""

    @property
    def shared(self) -> bool:
        """Whether engines and learner ranks share GPUs."""
        return 0 < self.generator < 1

    def options(self, gpus: float, number: int) -> dict[str, Any]:
        """Ray's options for an actor, the `number`-th of its kind, that takes `gpus`."""
        if not self.pairs:
            return {"num_gpus": gpus}
        # Ray fills one GPU before it takes the next: two halves asked for one after the other could be two ranks.
        strategy = PlacementGroupSchedulingStrategy(_bundles(self.pairs), placement_group_bundle_index=number)
        return {"num_gpus": gpus, "scheduling_strategy": strategy}


_shared_gpus: dict[int, PlacementGroup] = {}


def _bundles(count: int) -> PlacementGroup:
    """One reservation of `count` GPUs, the same for engines and ranks; it ends with the connection to Ray."""
    if count not in _shared_gpus:
        _shared_gpus[count] = placement_group([{"GPU": 1}] * count, strategy="PACK")
    return _shared_gpus[count]


def cores() -> int:
    """Cores that this process may use: its affinity, or what its container is allowed (cgroup v2), if less."""
    usable = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return usable
    return usable if quota == "max" else max(1, min(usable, int(quota) // int(period)))


def log_of_this_process() -> str:
    """Where an actor's output is kept, for a message; nothing where it goes to a terminal."""
    path = os.path.realpath("/proc/self/fd/2")
    return f" (its log is {path})" if os.path.isfile(path) else ""


def placement(config: Config) -> Placement:
    """Who gets how many GPUs. Raises ConfigError where the cluster has too few."""
    have, replicas, ranks = gpu_count(), config.generator.replicas, config.learner.ranks
    generator, learner = config.ray.generator_gpus, config.ray.learner_gpus
    if not have and not generator and not learner:
        return Placement(generator=0, learner=0)
    free = generator is None and learner is None and config.generator.tensor_parallel == 1
    if free and max(replicas, ranks) <= have < replicas + ranks:
        # Too few for one each, but every GPU can hold an engine and a rank.
        return Placement(generator=0.5, learner=0.5, pairs=max(replicas, ranks))
    generator = float(config.generator.tensor_parallel) if generator is None else generator
    learner = 1.0 if learner is None else learner
    need = replicas * generator + ranks * learner
    if need > have:
        raise ConfigError(
            f"the cluster has {have} GPUs, but {need:g} are needed: generator.replicas = {replicas} with {generator:g} "
            f"each and learner.ranks = {ranks} with {learner:g} each; lower them, or set ray.generator_gpus and "
            "ray.learner_gpus"
        )
    return Placement(generator=generator, learner=learner)
