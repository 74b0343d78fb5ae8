"""A policy that generators may take while its round is still being written: what they make waits until it is."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

from online_po.errors import OnlinePOError
from online_po.types import Policy, Probe

POLL_S = 0.2


class Handover:
    """The newest policy, not committed and maybe not saved yet, and what the learner says of the probe under it.

    A kill before the commit makes the round again, maybe to other last bits: so nothing that was made with this policy
    may reach the run folder, or a judge, before `settle`.
    """

    def __init__(self, policy: Policy, probe: Probe) -> None:
        self.policy, self.probe = policy, probe
        self._settled: Future[None] = Future()

    def settle(self) -> None:
        """The round is committed, and nothing wants it back."""
        self._settled.set_result(None)

    def withdraw(self) -> None:
        """The round is made again: who waits must throw away what it has. Nothing, once it is settled."""
        if not self._settled.done():
            self._settled.set_exception(OnlinePOError(f"policy {self.policy.version} is trained again"))

    @property
    def is_settled(self) -> bool:
        return self._settled.done() and self._settled.exception() is None

    @property
    def is_withdrawn(self) -> bool:
        return self._settled.done() and self._settled.exception() is not None

    def wait(self, look: Callable[[], None]) -> None:
        """Until it is settled; `look` is called meanwhile, and may raise. Raises OnlinePOError if it is withdrawn."""
        while True:
            look()
            try:
                return self._settled.result(POLL_S)
            except NotYet:
                continue
