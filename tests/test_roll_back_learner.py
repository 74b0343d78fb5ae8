"""Going back with the real learner: bit for bit what the good round was committed with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from online_po.config import Config
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.types import Policy, SyncReport
from tests.fakes import FakeGenerator, make_config
from tests.learner_setup import learner_config, make_learner, make_pairs, save
from tests.test_loop import make_parts

pytestmark = pytest.mark.usefixtures("one_thread")


class AnyGenerator(FakeGenerator):
    """Takes any policy's folder."""

    def sync(self, policy: Policy, probe: Any, start: Any = None) -> list[SyncReport]:
        self.skill, self.version = 0.1 * policy.version, policy.version
        return [SyncReport(replica=0, policy_version=policy.version, mean_logp_error=0.0, unmoved=False, seconds=0.0)]


def files_of(*folders: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders for path in sorted(folder.iterdir())]


class Ill:
    """The real learner; `round_` shows a collapse of entropy the first time. Saves what it was given back."""

    def __init__(self, config: Config, round_: int, saved: Path) -> None:
        self.learner = make_learner(Path(config.model.path), config.learner)
        self.ledger, self.round, self.saved = Ledger(config.run_dir), round_, saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def update(self, round_: int, *args: Any) -> Iterator[dict[str, float]]:
        ill = round_ == self.round and self.ledger.attempt(round_) == 0
        for metrics in self.learner.update(round_, *args):
            yield metrics | ({"entropy": 0.01} if ill else {})

    def load(self, policy: Policy, trainer_dir: Path) -> None:
        self.learner.load(policy, trainer_dir)
        for name in ("policy", "trainer"):
            (self.saved / name).mkdir(parents=True)
        save(self.learner, policy.version, self.saved / "policy", self.saved / "trainer")


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.parametrize("reference", [{"kind": "refresh", "every": 2}, {"kind": "ema", "alpha": 0.5}])
def test_weights_and_optimizer_are_those_of_the_good_round(tmp_path, tiny_model, lora, reference):
    learner = learner_config(lora=lora, threads=1).model_dump(mode="json")
    config = make_config(
        tmp_path,
        model={"path": str(tiny_model)},
        learner=learner,
        reference=reference,
        guards={"entropy": {"action": "roll_back"}},
    )
    parts = make_parts(config)
    parts.generator, parts.learner = AnyGenerator(), Ill(config, 3, tmp_path / "saved")
    run_rounds(parts)
    (record,) = parts.ledger.roll_backs()
    assert (record["from"], record["to"]) == (3, 2) and parts.ledger.last_committed() == 3
    committed = [parts.ledger.round_dir(2) / name for name in ("policy", "trainer")]
    assert files_of(tmp_path / "saved" / "policy", tmp_path / "saved" / "trainer") == files_of(*committed)
    assert {"chosen_shift", "rejected_shift"} <= parts.ledger.round_row(3).keys()


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_back_to_the_start_is_a_new_learner(tmp_path, tiny_model, lora):
    config = learner_config(lora=lora, threads=1)
    learner, fresh = make_learner(tiny_model, config), make_learner(tiny_model, config)
    pairs = make_pairs(16)
    reference = {name: pairs["chosen_score"].to_numpy() * 0 for name in ("chosen", "rejected")}
    list(learner.update(1, pairs, reference, None))
    learner.load(Policy(version=0, path=tiny_model), tmp_path / "no trainer")
    for each, name in ((learner, "a"), (fresh, "b")):
        list(each.update(1, pairs, reference, None))
        for kind in ("policy", "trainer"):
            (tmp_path / name / kind).mkdir(parents=True)
        save(each, 1, tmp_path / name / "policy", tmp_path / name / "trainer")
    saved = [files_of(tmp_path / name / "policy", tmp_path / name / "trainer") for name in "ab"]
    assert saved[0] == saved[1]
