"""The learner's ranks, each a Ray actor. What they compute is `online_po.learner`'s."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors import cluster
from actors.shared_weights import prepare, share
from actors.supervision import PULSE_GROUP, Progress, Pulse, Supervisor, death
from online_po import cpu, gpu
from online_po.batching import COLUMNS
from online_po.config import Config
from online_po.errors import (
    LearnerLostError,
    LearnerMemoryError,
    NonFiniteError,
    OnlinePOError,
    first_line,
    is_out_of_memory,
)
from online_po.plan import on_cpu
from online_po.step_checkpoints import StepPlan
from online_po.types import Policy, SharedWeights

COLLECTIVE_MARGIN_S = 600.0
"""A rank that waits for another gives up so long after the watch should have ended that one."""
BLAME_SECONDS = 5.0
"""How long to wait, after a rank's unexplained error, for the one that caused it."""


class _Rank:
    """One rank in its own process."""

    def __init__(self, config: Config, rank: int, threads: int, micro_batch_tokens: int, recompute: bool) -> None:
        self.config, self.rank, self.threads = config, rank, threads
        self.micro_batch_tokens, self.recompute = micro_batch_tokens, recompute
        self.progress = Progress()

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> Pulse:
        return self.progress.pulse()

    def rendezvous(self) -> tuple[str, int]:
        """Rank 0 only: (address, port) of the store where the ranks meet."""
        address = ray.util.get_node_ip_address()
        self.store = make_store(address, self.config.learner.ranks)
        return address, self.store.port

    def start(self, meeting: tuple[str, int] | None) -> tuple[list[str], bool]:
        """Joins the other ranks, if there are any, and loads the model. Returns, on rank 0, what users should know of
        it, and whether generators could take its weights from memory."""
        with self._at("start"):
            self._start(meeting)
            return self._about() if self.rank == 0 else ([], False)

    def _start(self, meeting: tuple[str, int] | None) -> None:
        import torch
        import torch.distributed as dist

        from online_po.learner import TorchLearner

        # This process does nothing else, so it may set what holds for the whole process.
        torch.set_num_threads(self.threads)
        cpu.use_onednn_products()
        gpu.prepare(self.config.learner.compute_dtype)
        if meeting is not None:
            address, port = meeting
            ranks = self.config.learner.ranks
            store = self.store if self.rank == 0 else dist.TCPStore(address, port, ranks, wait_for_workers=False)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            limits = self.config.limits
            timeout = timedelta(seconds=max(limits.step_s, limits.weights_s) + COLLECTIVE_MARGIN_S)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=ranks, timeout=timeout)
        self.learner = TorchLearner(
            self.config.model,
            self.config.learner,
            self.config.loss,
            seed=self.config.run.seed,
            rounds=self.config.loop.rounds,
            skip_nonfinite=self.config.guards.nonfinite.action == "warn",
            micro_batch_tokens=self.micro_batch_tokens,
            recompute=self.recompute,
            tick=self.progress.tick,
        )

    def _about(self) -> tuple[list[str], bool]:
        """See `start`. Raises ConfigError where engines could not take the adapters. The other ranks' machines need not
        have the model's files."""
        from peft import PeftModel

        from online_po.adapters import require_mergeable
        from online_po.policy_model import policy_tensors, stored_shapes

        generator, model = self.config.generator, self.learner.model
        told = self.learner.sharing.told
        if isinstance(model, PeftModel):
            if generator.engine == "vllm" and generator.merges(on_cpu(self.config)):
                require_mergeable(model, stored_shapes(self.config.model))
            return told, False
        why_not = None
        if generator.tensor_parallel > 1:
            why_not = "engines of several processes take no weights from memory"
        elif not self.learner.held.as_named:
            why_not = "its files name tensors otherwise than the model"
        elif not prepare(sum(tensor.nbytes for tensor in policy_tensors(model).values())):
            why_not = "the memory, or Ray's object store in it, has no room for another copy"
        if why_not is not None:
            told.append(f"generators read each policy from its folder, once it is saved: {why_not}")
        return told, why_not is None

    @contextmanager
    def _at(self, method: str) -> Iterator[None]:
        """Around a call. What the learner itself did not do with less memory, it cannot."""
        with self.progress.at(method):
            try:
                yield
            except Exception as error:  # libraries raise many types here
                if isinstance(error, OnlinePOError) or not is_out_of_memory(error):
                    raise
                raise LearnerMemoryError(
                    f"the learner ran out of memory in `{method}` ({type(error).__name__}: {first_line(error)}), where "
                    "smaller micro-batches do not help; give it more memory, or start a new run with learner.lora or "
                    "more learner.ranks. What was finished is kept"
                ) from error

    def call(self, method: str, *args: Any) -> Any:
        with self._at(method):
            return getattr(self.learner, method)(*args)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """Rank 0's answers, one by one."""
        with self._at(method):
            for answer in getattr(self.learner, method)(*args):
                self.progress.tick()
                yield answer

    def follow(self, method: str, *args: Any) -> None:
        """The same work on another rank; its answers are rank 0's, and are dropped."""
        with self._at(method):
            for _ in getattr(self.learner, method)(*args):
                self.progress.tick()


def make_store(address: str, ranks: int) -> Any:
    """A torch TCPStore that listens on this address alone; left to itself it listens on all of the machine's."""
    from torch.distributed import TCPStore

    listening = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listening.getsockname()[1]
    # The store closes it.
    return TCPStore(address, port, ranks, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


class LearnerGroup:
    """Implements `online_po.protocols.Learner` over Ray actors, one a rank. Ray must be running.

    Ranks start to load when the group is made; `ready` waits for them. An error that a rank raised on purpose is raised
    here as it was raised there. Where a rank dies or hangs, or fails otherwise, the group ends (others may wait for it
    forever) with LearnerLostError, and `restart` makes a new one: with smaller micro-batches, where one of several
    ranks ran out of memory, or the machine of any. `supervisor`: the run's; None: one of its own.
    """

    def __init__(self, config: Config, supervisor: Supervisor | None = None) -> None:
        self._config, self._supervisor = config, supervisor or Supervisor(config)
        self._place = cluster.placement(config)
        self._threads = config.learner.threads or max(1, cluster.cores() // config.learner.ranks)
        environment = {
            **cpu.variables(self._threads, keeps_memory=self._place.learner == 0),
            **gpu.VARIABLES,
            "LOCAL_RANK": "0",  # a rank sees one GPU, whatever started this process
        }
        if config.ray.address is None:
            # Left to themselves they listen where the host's name leads.
            environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        if self._place.learner == 0:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves the GPUs visible to an actor that asked for none
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "runtime_env": {"env_vars": environment}}
        self._actor = ray.remote(**options, concurrency_groups=PULSE_GROUP)(_Rank)
        self._micro_batch_tokens = config.learner.micro_batch_tokens
        """What ranks begin with."""
        self._held_tokens = self._micro_batch_tokens
        """What they were last heard to hold."""
        self._recompute = False
        """Whether they recompute activations from the start, where the config leaves that open."""
        self._shares = False
        """Whether generators could take their weights from memory; known once they are ready."""
        self._start()

    def _start(self) -> None:
        ranks = range(self._config.learner.ranks)
        self._ranks = [
            self._actor.options(**self._place.options("learner", rank)).remote(
                self._config, rank, self._threads, self._micro_batch_tokens, self._recompute
            )
            for rank in ranks
        ]
        for rank, actor in enumerate(self._ranks):
            self._supervisor.watch.add(f"learner rank {rank}", actor)
        meeting = self._ranks[0].rendezvous.remote() if len(self._ranks) > 1 else None
        self._starting = [rank.start.remote(meeting) for rank in self._ranks]

    def ready(self, timeout: float) -> None:
        """Waits until every rank holds the model. Raises ConfigError if it cannot be loaded, OnlinePOError if it
        takes longer than `timeout` seconds."""
        try:
            self._ready(timeout)
        except LearnerLostError as lost:
            self.restart(lost)
        told, self._shares = ray.get(self._starting[0])
        for text in told:
            self._supervisor.tell(text)

    def _ready(self, timeout: float) -> None:
        waiting, deadline = self._by_rank(self._starting), time.monotonic() + timeout
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not done:
                    raise GetTimeoutError
                self._hear(done[0], waiting)
        except GetTimeoutError as error:
            self.close()
            raise OnlinePOError(
                f"the learner was not ready within ray.startup_timeout_s ({timeout:.0f} s were left for it); raise "
                "it, or see that the cluster has the GPUs that learner.ranks and ray.learner_gpus ask for"
            ) from error
        except _RankError as error:
            failure = self._failure(error, waiting)
            self.close()
            raise failure from error

    def restart(self, lost: LearnerLostError) -> None:
        """See `online_po.protocols.Learner.restart`."""
        began = time.monotonic()
        while True:
            if lost.recompute:
                self._recompute = True
                self._supervisor.tell(f"{lost}; its ranks recompute activations from here on")
            elif lost.memory:
                self._halve(lost)
            if lost.smaller is None and not lost.recompute:  # a death
                self._supervisor.lost("the learner", str(lost))
            self.close()
            self._start()
            try:
                self._ready(self._config.ray.startup_timeout_s)
            except LearnerLostError as again:
                lost = again
                continue
            self._supervisor.back("the learner", str(lost), time.monotonic() - began)
            return

    def _halve(self, lost: LearnerLostError) -> None:
        """Smaller micro-batches from here on."""
        before = min(self._micro_batch_tokens, self._held_tokens)
        # Ranks that ran out of memory say what fits, where anything does; a process that was killed says nothing.
        self._micro_batch_tokens = self._held_tokens = max(1, min(lost.smaller or before, before // 2))
        self._supervisor.tell(
            f"the learner ran out of memory ({lost}); its micro-batches hold {self._micro_batch_tokens} tokens instead "
            f"of {before} (learner.micro_batch_tokens: {self._config.learner.micro_batch_tokens}) from here on. Where "
            "that does not help: `online-po run CONFIG learner.gradient_checkpointing=true`"
        )

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
        plan: StepPlan | None = None,
    ) -> Iterator[dict[str, float]]:
        """See `online_po.protocols.Learner.update` and `online_po.learner.TorchLearner.update`."""
        table, reference, start = (ray.put(value) for value in (_needed(examples), reference_logps, start_logps))
        for metrics in self._stream("update", round_, table, reference, start, betas, new_reference, plan):
            self._held_tokens = int(metrics.get("micro_batch_tokens", self._held_tokens))
            yield metrics

    def token_logps(self, token_ids: Sequence[int]) -> list[float]:
        """See `online_po.protocols.Learner.token_logps`."""
        return self._call("token_logps", list(token_ids))

    def share_policy(self) -> SharedWeights | None:
        """See `online_po.protocols.Learner.share_policy`. Adapters are small, and read from their folder; what else is,
        was told when the ranks were ready."""
        if not self._shares:
            return None
        shared: SharedWeights | None = self._call("share_policy", share)
        if shared is None:
            self._supervisor.tell("Ray's object store is full: generators read this policy from its folder")
        return shared

    def save_policy(self, round_: int, folder: Path) -> dict[str, str]:
        """See `online_po.protocols.Learner.save_policy`. With ranks on several machines the folder must be shared."""
        return self._call("save_policy", round_, folder.absolute())

    def save_trainer(self, round_: int, folder: Path) -> dict[str, str]:
        """See `online_po.protocols.Learner.save_trainer`; the same of its folder."""
        return self._call("save_trainer", round_, folder.absolute())

    def blend(self, reference: Policy, alpha: float, folder: Path) -> None:
        """See `online_po.protocols.Learner.blend`."""
        self._call("blend", reference, alpha, folder.absolute())

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        """See `online_po.protocols.Learner.load`."""
        self._call("load", policy, trainer_dir.absolute())

    def close(self) -> None:
        """Ends the ranks' processes."""
        for rank in self._ranks:
            self._supervisor.end(rank)
        self._ranks = []

    def _call(self, method: str, *args: Any) -> Any:
        """The same call on every rank; rank 0's answer."""
        self._require_open()
        refs = [rank.call.remote(method, *args) for rank in self._ranks]
        waiting = self._by_rank(refs)
        try:
            while waiting:  # whoever fails first is heard first: the others may be waiting for it
                done, _ = ray.wait(list(waiting))
                self._hear(done[0], waiting)
            return ray.get(refs[0])
        except _RankError as error:
            raise self._failure(error, waiting) from error

    def _stream(self, method: str, *args: Any) -> Iterator[Any]:
        """The same call on every rank; rank 0's answers as they come."""
        self._require_open()
        first, others = self._ranks[0], self._ranks[1:]
        answers = first.stream.options(num_returns="streaming").remote(method, *args)
        waiting = self._by_rank([answers, *(rank.follow.remote(method, *args) for rank in others)])
        try:
            while waiting:
                done, _ = ray.wait(list(waiting))
                if done[0] is not answers:
                    self._hear(done[0], waiting)
                    continue
                try:
                    answer = next(answers)
                except StopIteration:
                    del waiting[answers]
                    continue
                yield self._get(answer, 0)
        except _RankError as error:
            raise self._failure(error, waiting) from error

    def _require_open(self) -> None:
        if not self._ranks:
            raise OnlinePOError("the learner was closed, or one of its ranks failed; start the run again, it resumes")

    def _by_rank(self, refs: list[Any]) -> dict[Any, int]:
        return {ref: rank for rank, ref in enumerate(refs)}

    def _hear(self, ref: Any, waiting: dict[Any, int]) -> None:
        """Takes a rank's answer, which is there, out of those that are waited for. Raises _RankError."""
        rank = waiting.pop(ref)
        if isinstance(ref, ray.ObjectRefGenerator):
            ref = next(ref, None)
        if ref is not None:
            self._get(ref, rank)

    def _get(self, ref: Any, rank: int) -> Any:
        try:
            return ray.get(ref)
        except RayError as error:
            raise _RankError(self._blamed(error, rank)) from error

    def _blamed(self, error: RayError, rank: int) -> tuple[int, Exception]:
        """(how far from the cause it may be, what to raise) for a rank's error. Nearest is what it raised on purpose;
        then its death; last what may be a connection that broke because another rank died."""
        if not isinstance(error, RayTaskError):
            cause = self._supervisor.why(self._ranks[rank], death(error))
            return 1, LearnerLostError(f"rank {rank} is dead: {cause}", memory=is_out_of_memory(error))
        if isinstance(error.cause, LearnerMemoryError) and (error.cause.smaller is not None or error.cause.recompute):
            found = error.cause
            return 0, LearnerLostError(str(found), memory=True, smaller=found.smaller, recompute=found.recompute)
        if isinstance(error.cause, OnlinePOError):
            return 0, error.cause
        reason = f"{type(error.cause).__name__}: {first_line(error.cause)}"[:500]
        return 2, LearnerLostError(f"rank {rank} failed: {reason}")

    def _failure(self, error: _RankError, waiting: dict[Any, int]) -> Exception:
        """What to raise where a rank failed. Unless it is alone and meant it, the group ends, since it is no longer in
        step. A loss that is not finite is seen by all ranks at once, from the same sums: they stay in step."""
        failures = [error.blamed]
        if error.blamed[0] > 0 and waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=BLAME_SECONDS)
            for ref in done:
                try:
                    self._hear(ref, waiting)
                except _RankError as other:
                    failures.append(other.blamed)
        _, failure = min(failures, key=lambda blamed: blamed[0])
        if isinstance(failure, LearnerLostError) and (still := self._standing_still()):
            failure = LearnerLostError(still)
        alone = len(self._ranks) == 1 and not isinstance(failure, LearnerLostError)
        if not alone and not isinstance(failure, NonFiniteError):
            self.close()
        return failure

    def _standing_still(self) -> str | None:
        """What to say where the watch ended several ranks: which of them the others waited for nobody can tell."""
        hung = {rank: hang for rank, actor in enumerate(self._ranks) if (hang := self._supervisor.watch.why(actor))}
        if len(hung) < 2:
            return None
        first = next(iter(hung.values()))
        at = "" if first.call is None else f" in `{first.call}`"
        return f"ranks {', '.join(map(str, hung))} stand still{at}: {first.text}"


class _RankError(Exception):
    """A rank's error, as `LearnerGroup._blamed` sees it."""

    def __init__(self, blamed: tuple[int, Exception]) -> None:
        super().__init__(str(blamed[1]))
        self.blamed = blamed


def _needed(examples: pa.Table) -> pa.Table:
    """All that ranks read of examples; nothing else is sent."""
    return examples.select([name for name in examples.column_names if name in COLUMNS])
