"""Every guard fires on a run made to trigger it: vLLM and the judge in Ray actors, the real learner, a tiny model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from online_po.errors import GuardError
from online_po.learner import TorchLearner
from online_po.ledger import Ledger
from online_po.observers import CompositeObserver
from online_po.roll_back import load_round
from tests.fakes import FakeObserver
from tests.learner_setup import save
from tiny_runs import Bench, bench

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("guards")) as made:
        yield made


def findings(ledger: Ledger) -> dict[str, str]:
    """Guard -> what it said first."""
    found: dict[str, str] = {}
    for version in range(1, (ledger.last_committed() or 0) + 1):
        summary = ledger.evaluation_summary(version) or {}
        for finding in [*ledger.round_row(version)["guards"], *summary.get("guards", ())]:
            found.setdefault(finding["name"], finding["message"])
    return found


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- losses of the user's own that go wrong -----------------------------------------------------------

calls = {"poison": 0}
"""The loss is NaN at this call from now on; 0: never again."""


def push_both_down(chosen_logps: Any, rejected_logps: Any) -> Any:
    return (chosen_logps + 2 * rejected_logps) / 20


def poisoned(
    chosen_logps: Any, rejected_logps: Any, reference_chosen_logps: Any, reference_rejected_logps: Any, *, beta: float
) -> Any:
    margins = chosen_logps - rejected_logps - reference_chosen_logps + reference_rejected_logps
    losses = -torch.nn.functional.logsigmoid(beta * margins)
    calls["poison"] -= 1
    return losses * float("nan") if calls["poison"] == 0 else losses


def custom(name: str) -> dict[str, str]:
    return {"name": "custom", "function": f"{__name__}:{name}"}


# -- warnings ------------------------------------------------------------------------------------------


def test_a_healthy_run_fires_none(runs: Bench) -> None:
    # The reward takes points off very short responses, which are the only ones that differ in length here.
    guards = {"length_score": {"max_correlation": 0.9}}
    config = runs.config("healthy", learner={"learning_rate": 1e-3, "epochs": 1}, guards=guards)
    observer = FakeObserver()
    ledger = runs.run(config, observer)
    assert not findings(ledger), findings(ledger)
    assert ledger.last_committed() == 3


def test_kl_entropy_and_diversity(runs: Bench) -> None:
    guards = {"kl": {"max_nats": 0.5}, "entropy": {"min_share": 0.999}, "diversity": {"min_share": 0.999}}
    ledger = runs.run(runs.config("drift", guards=guards, learner={"learning_rate": 1e-2}))
    found = findings(ledger)
    assert found.keys() >= {"kl", "entropy", "diversity"}
    assert "nats a response to the reference, above guards.kl.max_nats = 0.5; raise loss.beta" in found["kl"]
    assert "raise loss.beta or generator.temperature" in found["entropy"]


def test_length_and_its_correlation_with_the_score(runs: Bench) -> None:
    """A response ends at its first "e"; who is paid by the character learns to leave it out."""
    generator = {"stop": ["e", "a", "o"], "max_tokens": 48}
    guards = {"length": {"max_ratio": 1.05}}
    found = findings(runs.run(runs.config("long", reward="length", generator=generator, guards=guards)))
    assert found.keys() >= {"length", "length_score"}
    assert "times round 1's, above guards.length.max_ratio = 1.05" in found["length"]


def test_likelihood_displacement(runs: Bench) -> None:
    reference = {"kind": "none"}
    found = findings(runs.run(runs.config("down", loss=custom("push_both_down"), reference=reference)))
    assert "less likely as well as rejected ones" in found["displacement"]


def test_over_optimisation(runs: Bench) -> None:
    """Training pays for letters, the held-out prompts' judge takes points off for them."""
    prompts = {"heldout_size": 0, "heldout_path": str(runs.prompts("heldout.jsonl", "no letters", range(80, 120)))}
    prompts["path"] = str(runs.prompts("more.jsonl", "letters"))
    guards = {"over_optimisation": {"min_accuracy": 0.6}}
    config = runs.config("over", prompts=prompts, guards=guards, eval={"every": 1})
    found = findings(runs.run(config))
    assert "the held-out score is" in found["over_optimisation"] and "over-optimisation;" in found["over_optimisation"]


def test_chosen_and_rejected_alike(runs: Bench) -> None:
    config = runs.config("flat", learner={"learning_rate": 1e-9}, pairs={"flip_rate": 0.45})
    found = findings(runs.run(config))
    assert "does not tell chosen from rejected" in found["flat"] and "raise learner.learning_rate" in found["flat"]


# -- not finite ----------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_left_out_and_told(runs: Bench) -> None:
    calls["poison"] = 3
    ledger = runs.run(runs.config("skip", loss=custom("poisoned")))
    assert ledger.round_row(1)["skipped"] == 1 and ledger.round_row(2).get("skipped") is None
    assert "were left out" in findings(ledger)["nonfinite"]


def test_it_goes_back_to_the_round_before_and_on_from_there(runs: Bench) -> None:
    """Weights, optimizer, reference, beta and cursor are those of the good round, and the run ends."""
    changes = {
        "loss": custom("poisoned"),
        "reference": {"kind": "ema", "alpha": 0.5},
        "beta_control": {"target_kl": 1.0},
        "guards": {"nonfinite": {"action": "roll_back"}},
    }
    calls["poison"] = 0
    whole = runs.run(runs.config("whole", **changes))
    config = runs.config("back", **changes)
    ledger = Ledger(config.run_dir)
    seen: dict[str, Any] = {}

    class Watch(FakeObserver):
        """Poisons the third round, once, and looks at what the run goes back to."""

        def phase(self, name: str, round_: int) -> Any:
            if name == "learn" and round_ == 3 and ledger.attempt(round_) == 0:
                calls["poison"] = 2
            if name == "pair" and round_ == 3 and ledger.attempt(round_) == 1:
                seen.update(hashes(ledger.round_dir(2)))
            return super().phase(name, round_)

    watch = Watch()
    runs.run(config, watch)
    (record,) = ledger.roll_backs()
    assert (record["from"], record["to"], record["guard"]) == (3, 2, "nonfinite")
    assert any("went back from round 3 to round 2" in message for message in watch.messages)
    assert ledger.last_committed() == 3 and ledger.round_row(3)["attempt"] == 1
    # Rounds 1 and 2 are those of a run that never fell ill, and stayed what they were.
    for name, digest in hashes(whole.round_dir(2)).items():
        if name.split("/")[0] in ("policy", "reference", "trainer", "pairs.parquet", "prompts.parquet"):
            assert seen[name] == digest == hashes(ledger.round_dir(2))[name], name
    assert ledger.committed(2).beta_scale == whole.committed(2).beta_scale != 1.0
    assert ledger.cursor(3) == whole.cursor(3)
    assert ledger.round_row(3)["beta"] == whole.round_row(3)["beta"]
    # The same prompts, other responses.
    first, second = (one._read(one.round_dir(3) / "prompts.parquet") for one in (whole, ledger))
    assert first.equals(second)
    assert hashes(whole.round_dir(3) / "responses") != hashes(ledger.round_dir(3) / "responses")


def test_what_is_loaded_is_what_was_committed(runs: Bench) -> None:
    """A learner that trained on and went back saves the good round's files again, bit for bit."""
    config = runs.config("loaded", learner={"learning_rate": 1e-2})
    ledger = runs.run(config)
    from online_po.plan import make_plan

    parts = runs.parts(config, ledger, make_plan(config), CompositeObserver([]))
    assert isinstance(parts.learner, TorchLearner)
    load_round(parts, 3)
    load_round(parts, 2)
    again = runs.folder / "again"
    save(parts.learner, 2, again / "policy", again / "trainer")
    for name in ("policy", "trainer"):
        assert hashes(again / name) == hashes(ledger.round_dir(2) / name)


# -- stop ----------------------------------------------------------------------------------------------


def test_roll_backs_come_to_an_end_and_a_stopped_run_can_go_on(runs: Bench) -> None:
    guards = {"kl": {"max_nats": 0.5, "action": "roll_back"}, "max_roll_backs": 1}
    config = runs.config("stop", guards=guards, learner={"learning_rate": 1e-2})
    with pytest.raises(GuardError, match="and stopped: guards.max_roll_backs is 1"):
        runs.run(config)
    ledger = Ledger(config.run_dir)
    assert [record["to"] for record in ledger.roll_backs()] == [0, 0] and ledger.last_committed() == 0
    assert len(list((ledger.root / "rolled_back").iterdir())) == 2


def test_stop(runs: Bench) -> None:
    guards = {"kl": {"max_nats": 0.5, "action": "stop"}}
    config = runs.config("halt", guards=guards, learner={"learning_rate": 1e-2})
    with pytest.raises(GuardError, match="guards.kl.action is stop: policy 1 has a KL of .* All rounds up to 2 are"):
        runs.run(config)
    ledger = Ledger(config.run_dir)
    assert ledger.last_committed() == 2
    with pytest.raises(GuardError, match="policy 2 has a KL"):
        runs.run(config)
    assert ledger.last_committed() == 3
