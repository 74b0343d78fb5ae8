"""What a run is made of: the parts that the loop is handed, known to it by their protocols."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from online_po.config import Config
from online_po.ledger import Ledger
from online_po.observers import PhaseTimer
from online_po.protocols import Generator, JudgePool, Learner, Observer
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
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the run ends early: sampling hands out no more work."""
