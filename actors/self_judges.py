"""The policy as its own judge: questions go to the run's generators, in between the chunks they sample."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from actors.engines import max_model_len
from actors.generators import GeneratorGroup
from judges.policy import PolicyModel
from judges.runtime import LocalJudgePool
from online_po.config import Config
from online_po.ledger import Ledger
from online_po.sections import SamplingConfig
from online_po.seeds import stable_id
from online_po.types import Group, Policy, Request


class SelfJudges(LocalJudgePool):
    """A `protocols.JudgePool` in the driver, whose judges ask the generators. `start`: folder of the starting model.
    `executor` is where it waits for them; who gives it waits for its end before Ray goes."""

    def __init__(
        self, config: Config, generators: GeneratorGroup, start: Path, tokenizer: Any, executor: Executor
    ) -> None:
        policies = LedgerPolicies(config, generators, start)
        ledger = Ledger(config.run_dir.absolute())
        super().__init__(
            config.judge,
            ledger.judge_cache,
            lambda judge: PolicyModel(judge, tokenizer, policies, executor),
        )

    def ready(self, timeout: float) -> None:
        """Nothing to wait for: the generators have their own."""


class LedgerPolicies:
    """Implements `judges.policy.Policies`: the policies of the run's ledger, through its generators."""

    def __init__(self, config: Config, generators: GeneratorGroup, start: Path) -> None:
        self.context = max_model_len(config)
        self._ledger, self._generators, self._start = Ledger(config.run_dir.absolute()), generators, start
        self._verified: dict[str, Policy] = {}

    def fingerprint(self, version: int) -> str:
        """By what the learner said of the probe tokens; the starting model is the run's own."""
        return "start" if version == 0 else stable_id(list(self._ledger.committed(version).probe.token_logps))

    def answer(self, version: int, requests: Sequence[Request], sampling: SamplingConfig) -> list[Group]:
        """See `judges.policy.Policies`. Also SyncError, LedgerError where the policy's weights are no longer there."""
        name = self.fingerprint(version)
        if name not in self._verified:
            self._verified[name] = self._ledger.policy(version, self._start)
        probe = self._ledger.committed(version).probe
        return self._generators.answer(requests, sampling, self._verified[name], probe)
