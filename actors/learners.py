"""The learner's ranks, each a Ray actor. What they compute is `online_po.learner`'s."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors import cluster
from online_po.batching import COLUMNS
from online_po.config import Config
from online_po.errors import NonFiniteError, OnlinePOError, first_line
from online_po.types import Policy

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""A rank may wait this long for another, which may be reading or writing weights."""

BLAME_SECONDS = 5.0
"""How long to wait, after a rank's unexplained error, for the one that caused it."""


class _Rank:
    """One rank in its own process."""

    def __init__(self, config: Config, rank: int, threads: int) -> None:
        self.config, self.rank, self.threads = config, rank, threads

    def rendezvous(self) -> tuple[str, int]:
        """Rank 0 only: (address, port) of the store where the ranks meet."""
        address = ray.util.get_node_ip_address()
        self.store = make_store(address, self.config.learner.ranks)
        return address, self.store.port

    def start(self, meeting: tuple[str, int] | None) -> None:
        """Joins the other ranks, if there are any, and loads the model."""
        import torch
        import torch.distributed as dist

        from online_po.learner import TorchLearner

        # This process does nothing else, so it may set what holds for the whole process.
        torch.set_num_threads(self.threads)
        if torch.cuda.is_available():
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if meeting is not None:
            address, port = meeting
            ranks = self.config.learner.ranks
            store = self.store if self.rank == 0 else dist.TCPStore(address, port, ranks, wait_for_workers=False)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)
        self.learner = TorchLearner(
            self.config.model,
            self.config.learner,
            self.config.loss,
            seed=self.config.run.seed,
            rounds=self.config.loop.rounds,
            skip_nonfinite=self.config.guards.nonfinite.action == "warn",
        )

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.learner, method)(*args)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """Rank 0's answers, one by one."""
        yield from getattr(self.learner, method)(*args)

    def follow(self, method: str, *args: Any) -> None:
        """The same work on another rank; its answers are rank 0's, and are dropped."""
        for _ in getattr(self.learner, method)(*args):
            pass


def make_store(address: str, ranks: int) -> Any:
    """A torch TCPStore that listens on this address alone; left to itself it listens on all of the machine's."""
    from torch.distributed import TCPStore

    listening = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listening.getsockname()[1]
    # The store closes it.
    return TCPStore(address, port, ranks, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


class LearnerGroup:
    """Implements `online_po.protocols.Learner` over Ray actors, one a rank. Ray must be running.

    Ranks start to load when the group is made; `ready` waits for them. An error on any rank is raised here as
    it was raised there; with several ranks the group is then closed, since the others may wait for it forever.
    """

    def __init__(self, config: Config) -> None:
        ranks = config.learner.ranks
        place = cluster.placement(config)
        threads = config.learner.threads or max(1, cluster.cores() // ranks)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            # Idle threads sleep instead of spinning: an engine may run on the same cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic matrix products on GPUs need
        }
        if place.learner == 0:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves the GPUs visible to an actor that asked for none
        actor = ray.remote(num_cpus=0, runtime_env={"env_vars": environment})(_Rank)
        self._ranks = [
            actor.options(**place.options("learner", rank)).remote(config, rank, threads) for rank in range(ranks)
        ]
        meeting = self._ranks[0].rendezvous.remote() if ranks > 1 else None
        self._starting = [rank.start.remote(meeting) for rank in self._ranks]

    def ready(self, timeout: float) -> None:
        """Waits until every rank holds the model. Raises ConfigError if it cannot be loaded, OnlinePOError if it
        takes longer than `timeout` seconds."""
        waiting, deadline = self._starting, time.monotonic() + timeout
        try:
            while waiting:
                done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not done:
                    raise GetTimeoutError
                ray.get(done)
        except GetTimeoutError as error:
            self.close()
            raise OnlinePOError(
                f"the learner was not ready within ray.startup_timeout_s ({timeout:.0f} s were left for it); raise "
                "it, or see that the cluster has the GPUs that learner.ranks and ray.learner_gpus ask for"
            ) from error
        except RayError as error:
            failure = self._failure(error, waiting)
            self.close()
            raise failure from error

    def logps(self, examples: pa.Table, policy: Policy) -> Iterator[dict[str, np.ndarray]]:
        """See `online_po.protocols.Learner.logps`."""
        return self._stream("logps", ray.put(_needed(examples)), policy)

    def update(
        self,
        round_: int,
        examples: pa.Table,
        reference_logps: dict[str, np.ndarray] | None,
        start_logps: dict[str, np.ndarray] | None,
        betas: Sequence[float | None] | None = None,
        new_reference: bool = False,
    ) -> Iterator[dict[str, float]]:
        """See `online_po.protocols.Learner.update` and `online_po.learner.TorchLearner.update`."""
        table, reference, start = (ray.put(value) for value in (_needed(examples), reference_logps, start_logps))
        return self._stream("update", round_, table, reference, start, betas, new_reference)

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """See `online_po.protocols.Learner.token_logps`."""
        return self._call("token_logps", list(token_ids))

    def save(self, round_: int, policy_dir: Path, trainer_dir: Path) -> None:
        """See `online_po.protocols.Learner.save`. With ranks on several machines the folders must be shared."""
        self._call("save", round_, policy_dir.absolute(), trainer_dir.absolute())

    def blend(self, reference: Policy, alpha: float, folder: Path) -> None:
        """See `online_po.protocols.Learner.blend`."""
        self._call("blend", reference, alpha, folder.absolute())

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        """See `online_po.protocols.Learner.load`."""
        self._call("load", policy, trainer_dir.absolute())

    def close(self) -> None:
        """Ends the ranks' processes."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _call(self, method: str, *args: Any) -> Any:
        """The same call on every rank; rank 0's answer."""
        first, others = self._leader(), self._ranks[1:]
        waiting = [first.call.remote(method, *args), *(rank.call.remote(method, *args) for rank in others)]
        answer = waiting[0]
        try:
            while waiting:  # whoever fails first is heard first: the others may be waiting for it
                done, waiting = ray.wait(waiting)
                ray.get(done)
            return ray.get(answer)
        except RayError as error:
            raise self._failure(error, waiting) from error

    def _stream(self, method: str, *args: Any) -> Iterator[Any]:
        """The same call on every rank; rank 0's answers as they come."""
        first, others = self._leader(), self._ranks[1:]
        answers = first.stream.options(num_returns="streaming").remote(method, *args)
        waiting = [answers, *(rank.follow.remote(method, *args) for rank in others)]
        try:
            while waiting:
                done, _ = ray.wait(waiting)
                if done[0] is not answers:
                    waiting.remove(done[0])
                    ray.get(done[0])
                    continue
                try:
                    answer = next(answers)
                except StopIteration:
                    waiting.remove(answers)
                    continue
                yield ray.get(answer)
        except RayError as error:
            raise self._failure(error, [ref for ref in waiting if ref is not answers]) from error

    def _leader(self) -> Any:
        if not self._ranks:
            raise OnlinePOError("the learner was closed, or one of its ranks failed; start the run again, it resumes")
        return self._ranks[0]

    def _failure(self, error: RayError, waiting: list[Any]) -> Exception:
        """What to raise for a rank's error. With several ranks the group ends, since it is no longer in step, and
        an error made on purpose, or a rank's death, goes before the broken connections it left with the others.
        A loss that is not finite is seen by all ranks at once, from the same sums: they stay in step."""
        failures = [_original(error)]
        if len(self._ranks) > 1 and not isinstance(failures[0], NonFiniteError):
            if not isinstance(failures[0], OnlinePOError) and waiting:
                done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=BLAME_SECONDS)
                for ref in done:
                    try:
                        ray.get(ref)
                    except RayError as other:
                        failures.append(_original(other))
            self.close()
        return next((failure for failure in failures if isinstance(failure, OnlinePOError)), failures[0])


def _needed(examples: pa.Table) -> pa.Table:
    """All that ranks read of examples; nothing else is sent."""
    return examples.select([name for name in examples.column_names if name in COLUMNS])


def _original(error: RayError) -> Exception:
    """What a rank raised, if it raised on purpose; what happened to the rank, if it died."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, OnlinePOError):
            return error.cause
        reason = f"{type(error.cause).__name__}: {first_line(error.cause)}"
        remedy = "start the run again, it resumes after the last committed round"
        if "out of memory" in reason.lower():
            remedy = "lower learner.micro_batch_tokens, or set learner.gradient_checkpointing or learner.lora"
        return OnlinePOError(f"the learner failed: {reason[:500]}; {remedy}")
    return OnlinePOError(
        f"a learner rank died: {first_line(error)} (out of memory? lower "
        "learner.micro_batch_tokens, set learner.gradient_checkpointing or learner.lora); start the run again, it "
        "resumes after the last committed round"
    )
