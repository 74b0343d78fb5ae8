"""What a run is made of: the parts that the loop is handed, known to it by their protocols."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from online_po.config import Config
from online_po.errors import OnlinePOError
from online_po.fail_points import fail_point
from online_po.given import ResponseEncoder
from online_po.handover import Handover
from online_po.ledger import Ledger
from online_po.observers import PhaseTimer
from online_po.protocols import Generator, JudgePool, Learner, Observer
from online_po.room import RoundBytes
from online_po.seed_pairs import PairRow
from online_po.stopping import Stop
from online_po.types import Prompt


@dataclass(kw_only=True)
class Parts:
    """What a run is made of."""

    config: Config
    ledger: Ledger
    generator: Generator
    judges: JudgePool
    learner: Learner
    observer: Observer
    timer: PhaseTimer
    train: Sequence[Prompt]
    heldout: Sequence[Prompt] | None
    start: Path
    """Folder of the starting model (policy version 0)."""
    seed_pairs: pa.Table | None = None
    """The pairs of `pairs.seed_path`, in PAIR_SCHEMA."""
    known: Sequence[PairRow] = ()
    """Pairs of which the better response is known, to try the judge on."""
    encode: ResponseEncoder | None = None
    """Tokenises given responses, for pairs.strategy: spin."""
    expected: RoundBytes = field(default_factory=RoundBytes)
    """What a round takes on the disk, as far as it is known before the first one."""
    stop: Stop = field(default_factory=Stop)
    """Asked to stop, the run ends between two pieces of work."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the run ends, for good or ill: sampling hands out no more work."""
    sampler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="sampler"))
    """The one thread that sampling and evaluation run in; who makes the parts waits for its end."""

    handover: Handover | None = None
    """The newest policy, from when generators can have it; the training thread's."""
    taken: Handover | None = None
    """What the generators hold, where that was handed over; the sampling thread's."""

    @contextmanager
    def phase(self, name: str, round_: int) -> Iterator[None]:
        """Around one phase: observers see it, and tests may kill the run before and after it."""
        fail_point(f"{name}.begin")
        with self.observer.phase(name, round_):
            yield
        fail_point(f"{name}.end")

    def require_going_on(self) -> None:
        """Raises OnlinePOError once the run is ending: what is sampled half must not count as whole."""
        if self.stopping.is_set():
            raise OnlinePOError("the run is ending")

    def require_settled(self) -> None:
        """Waits where the round of the policy that the generators hold is still being written. Raises OnlinePOError
        where it will not be, or the run is ending, Interrupted where it was asked to stop meanwhile."""
        if self.taken is not None and not self.taken.is_settled:
            self.taken.wait(self.require_going_on)
            self.stop.check()
