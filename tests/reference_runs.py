"""Short runs of the real loop and the real learner, one for each kind of reference, stopped and resumed on the way;
and the same references built by hand from the policies that a run left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from online_po.config import Config
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.observers import PhaseTimer
from online_po.parts import Parts
from online_po.sections import SamplingConfig
from online_po.types import Group, Policy, Probe, Reference, Request, SyncReport
from tests.fakes import FakeGenerator, FakeJudge, FakeObserver, make_config, make_prompts
from tests.learner_setup import collect_logps, plain_logps

ROUNDS, CHUNKS, ALPHA = 4, 2, 0.6
SIDES = ("chosen", "rejected")
LORA: dict[str, Any] = {"full": None, "lora": {"rank": 4, "alpha": 12}}

REFERENCES: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed"},
    "refresh": {"kind": "refresh", "every": 2},
    "ema": {"kind": "ema", "alpha": ALPHA},
    "kl": {"kind": "kl", "above": 5},
}
TOKEN_LOGP = {0: -1.0, 1: -9.0, 2: -1.0, 3: -9.0}
"""What the generator says of each token, by policy version. The tiny model says about -6: so rounds 1 and 3, sampled by
versions 0 and 2, measure a KL far above 5 nats a response, and the others one below 0."""

NAMED = {
    "fixed": [Reference(round=0)] * 5,
    "refresh": [Reference(round=r) for r in (0, 0, 2, 2, 4)],
    "ema": [Reference(round=r, blended=r > 0) for r in range(5)],
    "kl": [Reference(round=r) for r in (0, 1, 1, 3, 3)],
}
"""What the commits of rounds 0 to 4 must name as the next round's reference."""


class ScriptedGenerator(FakeGenerator):
    """Takes any policy folder; its responses do not depend on the weights."""

    def sync(self, policy: Policy, probe: Probe, start: Probe | None = None) -> list[SyncReport]:
        self.skill, self.version = 0.0, policy.version
        return [SyncReport(replica=0, policy_version=policy.version, mean_logp_error=0.0, unmoved=False, seconds=0.0)]

    def _group(self, request: Request, sampling: SamplingConfig) -> Group:
        group = super()._group(request, sampling)
        logp = TOKEN_LOGP[self.version]
        responses = (dataclasses.replace(r, token_logps=(logp,) * len(r.token_ids)) for r in group.responses)
        return dataclasses.replace(group, responses=tuple(responses))


def reference_config(
    folder: Path, model: Path, reference: dict[str, Any], lora: Any, ranks: int = 1, **overrides: Any
) -> Config:
    """Four rounds of eight prompts and one step; every round's weights are kept."""
    learner = {"lora": lora, "ranks": ranks, "learning_rate": 3e-3, "global_batch_size": 8, "kl_to_start": False}
    return make_config(
        folder,
        model={"path": str(model)},
        prompts={"path": "p"},
        eval={"every": 0},
        checkpoint__keep=None,
        loop={"rounds": ROUNDS, "prompts_per_round": 8, "responses_per_prompt": 2},
        generator__chunk_prompts=8 // CHUNKS,
        learner=learner,
        reference=reference,
        **overrides,
    )


def run(config: Config, make_learner: Callable[[Config], Any], stop_after: int | None = None) -> Parts:
    """Goes on with a run in a new learner; stopped inside the round after `stop_after`."""
    ledger = Ledger(config.run_dir)
    with ledger.lock():
        ledger.begin(config, {})
    parts = Parts(
        config=config,
        ledger=ledger,
        generator=ScriptedGenerator(),
        judges=FakeJudge(),
        learner=make_learner(config),
        observer=FakeObserver(),
        timer=PhaseTimer(ledger.root / "timeline.jsonl"),
        train=make_prompts(20),
        heldout=None,
        start=Path(config.model.path),
    )
    if stop_after is None:
        run_rounds(parts)
        return parts
    parts.generator.fail_after = CHUNKS * stop_after + 1  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run_rounds(parts)
    parts.sampler.shutdown()
    assert ledger.last_committed() == stop_after
    return parts


def stored(ledger: Ledger) -> list[dict[str, np.ndarray]]:
    """The reference logps of rounds 1 to 4."""
    found = [ledger.logps(round_, "reference") for round_ in range(1, ROUNDS + 1)]
    assert all(logps is not None for logps in found)
    return found  # type: ignore[return-value]


def logps_again(parts: Parts) -> list[dict[str, np.ndarray]]:
    """The same, asked of the learner as it is at the end of a run."""
    ledger = parts.ledger
    named = [ledger.committed(round_ - 1).reference for round_ in range(1, ROUNDS + 1)]
    return [
        collect_logps(parts.learner.logps, ledger.pairs(round_), ledger.reference(reference, parts.start))
        for round_, reference in enumerate(named, 1)
    ]


# -- by hand ---------------------------------------------------------------------------------------


def load(model: Path, policy: Path | None, is_adapter: bool) -> PreTrainedModel:
    """A policy folder as transformers and PEFT load it, an adapter merged; None: the starting model."""
    lm = AutoModelForCausalLM.from_pretrained(model if policy is None or is_adapter else policy)
    if policy is not None and is_adapter:
        return PeftModel.from_pretrained(lm, str(policy)).merge_and_unload()
    return lm


def mean_model(model: Path, policies: list[Path], is_adapter: bool, alpha: float) -> PreTrainedModel:
    """The start, moved towards each policy in turn by `alpha`: state dicts averaged in float64."""
    mean = {name: tensor.double() for name, tensor in load(model, None, False).state_dict().items()}
    for policy in policies:
        for name, tensor in load(model, policy, is_adapter).state_dict().items():
            mean[name] = alpha * tensor.double() + (1 - alpha) * mean[name]
    lm = load(model, None, False)
    lm.load_state_dict({name: tensor.to(torch.float32) for name, tensor in mean.items()})
    return lm


def reference_by_hand(kind: str, round_: int, model: Path, ledger: Ledger, is_adapter: bool) -> PreTrainedModel:
    """The reference of a round, from the policy folders of the rounds before it."""
    policies = [ledger.round_dir(r) / "policy" for r in range(1, round_)]
    if kind == "ema":
        return mean_model(model, policies, is_adapter, ALPHA)
    version = {"fixed": [0, 0, 0, 0], "refresh": [0, 0, 2, 2], "kl": [0, 1, 1, 3]}[kind][round_ - 1]
    return load(model, policies[version - 1] if version else None, is_adapter)


def assert_as_by_hand(kind: str, model: Path, ledger: Ledger, is_adapter: bool) -> None:
    """Holds a run's stored reference logps to models built by hand, for every round; and its commits to NAMED."""
    assert [ledger.committed(round_).reference for round_ in range(ROUNDS + 1)] == NAMED[kind]
    for round_, logps in enumerate(stored(ledger), 1):
        pairs = ledger.pairs(round_)
        lm = reference_by_hand(kind, round_, model, ledger, is_adapter)
        newest = load(model, ledger.round_dir(round_ - 1) / "policy" if round_ > 1 else None, is_adapter)
        for side in SIDES:
            expected = plain_logps(lm, pairs, side)
            np.testing.assert_allclose(logps[side], expected, rtol=3e-6, atol=3e-5, err_msg=f"round {round_}")
            if NAMED[kind][round_ - 1] != Reference(round=round_ - 1):  # the policy of the round would be seen
                assert np.abs(plain_logps(newest, pairs, side) - expected).max() > 1e-3
        blended = ledger.round_dir(round_) / "reference"
        assert blended.exists() == (kind == "ema")
        if blended.exists() and round_ < ROUNDS:  # the folder loads as it is
            ahead, pairs = stored(ledger)[round_], ledger.pairs(round_ + 1)
            found = plain_logps(load(model, blended, is_adapter), pairs, "chosen")
            np.testing.assert_allclose(found, ahead["chosen"], rtol=3e-6, atol=3e-5)
