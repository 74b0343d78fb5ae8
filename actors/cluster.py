"""Starting and leaving Ray, and who gets which GPUs. A private instance on loopback, or a cluster that is up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A stopped run must not start a new Ray by a late call; read when ray is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import ray
from ray._private import ray_constants
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from online_po.config import Config
from online_po.errors import ConfigError, first_line
from online_po.sections import RayConfig

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def start(config: RayConfig) -> None:
    """Connects to `ray.address`, or starts a private Ray on this machine, bound to loopback.

    Raises ConfigError if the address answers nothing, this process is connected to Ray already, or Ray is told to leave
    actors' GPUs alone.
    """
    if os.environ.get(NOSET, "0") not in ("", "0"):
        raise ConfigError(f"{NOSET} is set: actors would all use the first GPU; unset it")
    if ray.is_initialized():
        raise ConfigError("this process is connected to Ray already; call ray.shutdown() first, a run has its own")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = config.address is None
    settings = {"address": "local", "include_dashboard": False} if own else {"address": config.address}
    _stay_on_loopback(own)
    try:
        with _own_signals():
            ray.init(**settings, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if config.address is None:
            raise ConfigError(f"ray.address is null, but Ray does not start here: {first_line(error)}") from error
        raise ConfigError(
            f"ray.address is {config.address!r}, but no Ray cluster answers there ({first_line(error)}); start one "
            "with `ray start --head`, or leave ray.address out"
        ) from error


def _stay_on_loopback(wanted: bool) -> None:
    """Whether what Ray starts from now on listens on loopback alone. `_node_ip_address` does not do it: of a loopback
    address Ray makes the machine's own again. This is the switch that Ray itself sets on laptops; it is read here when
    ray is imported, and by what Ray starts from the environment."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0" if wanted else "1"
    ray_constants.ENABLE_RAY_CLUSTER = not wanted


@contextmanager
def _own_signals() -> Iterator[None]:
    """What Ray starts inside the block ignores SIGUSR1, which Slurm sends to all processes of a job, and Ray's own
    handler of SIGTERM, which would end this process on the spot, does not stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    judge: float = 0.0
    together: frozenset[str] = frozenset()
    """Kinds of actors (generator, learner, judge) of which each GPU of a reservation holds one each: those of the same
    number."""
    bundles: int = 0
    """GPUs of that reservation."""

    @property
    def shared(self) -> bool:
        """Whether actors share GPUs."""
        return bool(self.together) or any(0 < gpus < 1 for gpus in (self.generator, self.learner, self.judge))

    @property
    def engine_memory(self) -> float:
        """What an engine may take of its GPU's memory, where the config leaves that open."""
        if "generator" in self.together:
            return {2: 0.4, 3: 0.3}[len(self.together)]
        return 0.85 * min(1.0, self.generator or 1.0)

    def options(self, kind: str, number: int) -> dict[str, Any]:
        """Ray's options for an actor, the `number`-th of its kind."""
        gpus = getattr(self, kind)
        if kind not in self.together:
            return {"num_gpus": gpus}
        # Ray fills one GPU before it takes the next: two halves asked for one after the other could be two ranks.
        strategy = PlacementGroupSchedulingStrategy(_bundles(self.bundles), placement_group_bundle_index=number)
        return {"num_gpus": gpus, "scheduling_strategy": strategy}


_shared_gpus: dict[int, PlacementGroup] = {}


def _bundles(count: int) -> PlacementGroup:
    """One reservation of `count` GPUs, the same for all who share; it ends with the connection to Ray. Where a machine
    goes, Ray moves its part of the reservation to another one that has room, and actors wait for that."""
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
    """Who gets how many GPUs. Raises ConfigError where the cluster has too few.

    Without settings everybody gets GPUs of their own. Where there are too few, judges that hold a model share the
    ranks' GPUs, and where there are still too few, all share: each GPU holds one engine, one rank, one judge.
    """
    have, ray_ = gpu_count(), config.ray
    counts = {"generator": config.generator.replicas, "learner": config.learner.ranks, "judge": config.judge.workers}
    given = {"generator": ray_.generator_gpus, "learner": ray_.learner_gpus, "judge": ray_.judge_gpus}
    if not config.judge.holds_model and given["judge"] is None:
        given["judge"] = 0.0
    if not have and not any(given.values()):
        return Placement(generator=0, learner=0)
    # A kind of which the share is given does not share unasked.
    free = [kind for kind, gpus in given.items() if gpus is None]
    engine_whole = config.generator.tensor_parallel == 1
    for together in (("learner", "judge"), ("generator", "learner"), ("generator", "learner", "judge")):
        if not set(together) <= set(free) or ("generator" in together and not engine_whole):
            continue
        apart = {kind: gpus for kind, gpus in given.items() if kind not in together}
        if None in apart.values() and "generator" in together:
            continue  # a judge of its own beside engines and ranks that share would have the better half
        taken = sum(counts[kind] * _whole(config, kind, gpus) for kind, gpus in apart.items())
        bundles = max(counts[kind] for kind in together)
        if taken + bundles <= have < taken + sum(counts[kind] for kind in together):
            shares = {
                kind: {2: 0.5, 3: 0.33}[len(together)] if kind in together else _whole(config, kind, given[kind])
                for kind in given
            }
            return Placement(
                generator=shares["generator"],
                learner=shares["learner"],
                judge=shares["judge"],
                together=frozenset(together),
                bundles=bundles,
            )
    shares = {kind: _whole(config, kind, gpus) for kind, gpus in given.items()}
    need = sum(counts[kind] * gpus for kind, gpus in shares.items())
    if need > have:
        names = {"generator": "generator.replicas", "learner": "learner.ranks", "judge": "judge.workers"}
        asked = [f"{names[k]} = {counts[k]} with {gpus:g} each" for k, gpus in shares.items() if gpus or k != "judge"]
        remedy = "lower them"
        if engine_whole:
            kinds = [f"ray.{kind}_gpus" for kind, gpus in shares.items() if gpus or kind != "judge"]
            remedy += f", or set {' and '.join(kinds)}"
        raise ConfigError(f"the cluster has {have} GPUs, but {need:g} are needed: {' and '.join(asked)}; {remedy}")
    return Placement(generator=shares["generator"], learner=shares["learner"], judge=shares["judge"])


def _whole(config: Config, kind: str, given: float | None) -> float:
    """GPUs of one actor that shares none."""
    if given is not None:
        return given
    return float(config.generator.tensor_parallel) if kind == "generator" else 1.0
