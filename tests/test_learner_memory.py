"""The learner where memory runs out: smaller micro-batches, the same result, and it says so."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from online_po.batching import Examples
from online_po.errors import LearnerMemoryError
from online_po.learner import TorchLearner
from online_po.loop import run_rounds
from online_po.loss_configs import LOSS_BY_NAME
from online_po.policy_model import decoder_layers
from online_po.sections import LoraConfig, ModelConfig
from online_po.step_checkpoints import StepPlan, newest_whole
from online_po.types import Policy
from tests.fakes import FakeLearner, make_config
from tests.learner_setup import collect_logps, learner_config, make_pairs, save, start
from tests.test_loop import make_parts
from tests.test_step_checkpoints_learner import state_of, timeless

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = make_pairs(20)
DROPOUT = LoraConfig(rank=4, dropout=0.3)
CASES = {
    "full": (None, ("sigmoid",)),
    "lora": (DROPOUT, ("sigmoid",)),
    "two passes": (DROPOUT, ("bco_pair", "beta_dpo")),
}


def make(model: Path, case: str = "full", **changes: Any) -> Any:
    lora, names = CASES[case]
    losses = [LOSS_BY_NAME[name]() for name in names]  # type: ignore[call-arg]
    config = learner_config(lora=lora, **changes)
    return TorchLearner(ModelConfig(path=str(model)), config, losses, seed=7, rounds=3)


def cpu_error() -> None:
    """What torch's allocator really raises."""
    torch.empty(1 << 55)


def cuda_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fails(learner: Any, error: Callable[[], None], when: Callable[[int, int], bool]) -> list[int]:
    """Memory runs out in the passes of which `when(number of the pass, padded tokens)`; the tokens of all passes."""
    passes: list[int] = []

    def hook(_module: Any, args: Any) -> None:
        passes.append(args[0].numel())
        if when(len(passes), passes[-1]):
            error()

    learner.scorer.register_forward_pre_hook(hook)
    return passes


def train(learner: Any, reference: dict[str, np.ndarray], **options: Any) -> list[dict[str, float]]:
    return timeless(list(learner.update(1, PAIRS, reference, None, **options)))


def recomputes(learner: Any) -> bool:
    """Whether its layers recompute what they kept."""
    (on,) = {"forward" in vars(layer) for layer in decoder_layers(learner.scorer.model)}
    return on


def without_memory(step: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in step.items() if name not in ("micro_batch_tokens", "recomputes")}


def without_size(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if name != "micro_batch_tokens"} for step in steps]


@pytest.mark.parametrize(
    ("case", "size", "number", "error"),
    [
        ("full", 4096, 1, cpu_error),
        ("full", 50, 2, cuda_error),
        ("lora", 50, 3, cpu_error),
        ("two passes", 50, 2, cpu_error),  # without a gradient
        ("two passes", 50, 5, cuda_error),  # with one
    ],
)
def test_a_step_is_made_again_as_if_it_had_begun_with_smaller_micro_batches(
    tiny_model: Path, tmp_path: Path, case: str, size: int, number: int, error: Callable[[], None]
) -> None:
    """Whichever of its passes failed: bit for bit."""
    learner = make(tiny_model, case, micro_batch_tokens=size)
    reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
    passes = fails(learner, error, lambda count, tokens: count == number)
    steps = train(learner, reference)
    lowered = steps[0]["micro_batch_tokens"]
    assert 0 < lowered < size and [step["micro_batch_tokens"] for step in steps] == [lowered] * 3
    assert max(passes[number:]) < max(passes[:number]) and len(passes) > number + 3
    smaller = make(tiny_model, case, micro_batch_tokens=int(lowered))
    expected = train(smaller, reference)
    assert "micro_batch_tokens" not in expected[0] and without_size(steps) == expected
    left, right = state_of(learner, tmp_path / "left"), state_of(smaller, tmp_path / "right")
    lowered_to, as_configured = (json.loads(state.pop("trainertrainer.json")) for state in (left, right))
    assert left == right and lowered_to == as_configured | {"micro_batch_tokens": lowered}
    if case == "full":  # what dropout leaves out depends on how a step is cut
        for step, other in zip(train(make(tiny_model), reference), steps, strict=True):
            assert other["loss"] == pytest.approx(step["loss"], rel=1e-4)


def test_it_is_halved_until_it_fits_and_stays_so(tiny_model: Path, tmp_path: Path) -> None:
    learner = make(tiny_model, micro_batch_tokens=100_000)
    reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
    passes = fails(learner, cpu_error, lambda count, tokens: tokens > 34)
    steps = train(learner, reference)
    tried = [tokens for tokens in passes if tokens > 34]
    assert len(tried) >= 2 and tried[0] > 3 * 34
    sizes = [step["micro_batch_tokens"] for step in steps]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= 34
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    other = make(tiny_model, micro_batch_tokens=100_000)
    other.load(Policy(version=1, path=tmp_path / "policy"), tmp_path / "trainer")
    (step, *_) = train(other, reference)
    assert step["micro_batch_tokens"] == sizes[-1], "also after a resume"
    other.load(start(tiny_model), tmp_path)
    assert "micro_batch_tokens" not in train(other, reference)[0]


def test_a_round_that_goes_on_after_a_step_goes_on_with_its_micro_batches(tiny_model: Path, tmp_path: Path) -> None:
    runs = []
    for stops in (False, True):
        learner = make(tiny_model, "lora", micro_batch_tokens=60)
        reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
        fails(learner, cpu_error, lambda count, tokens: count == 2)
        plan = StepPlan(folder=tmp_path / "steps", every=1)
        if stops:
            begun = learner.update(1, PAIRS, reference, None, plan=plan)
            next(begun)
            begun.close()
            learner = make(tiny_model, "lora", micro_batch_tokens=60)
            plan = StepPlan(folder=tmp_path / "steps", every=1, after=newest_whole(tmp_path / "steps")[0])
        steps = [*timeless(plan.metrics), *train(learner, reference, plan=plan if stops else None)]
        runs.append((steps, state_of(learner, tmp_path / f"stops {stops}")))
    assert len(runs[0][0]) == 3 and runs[0] == runs[1]


@pytest.mark.parametrize(
    ("checkpointing", "remedy"),
    [
        (None, "start a new run"),
        (True, "start a new run"),
        (False, "go on with .*gradient_checkpointing=true`, or start"),
    ],
)
def test_one_pair_that_does_not_fit_is_said_and_nothing_has_changed(
    tiny_model: Path, checkpointing: bool | None, remedy: str
) -> None:
    learner = make(tiny_model, gradient_checkpointing=checkpointing)
    reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
    before = [p.detach().clone() for p in learner.model.parameters()]
    fails(learner, cpu_error, lambda count, tokens: tokens > 20 and learner.model.training is False)
    message = (
        r"round 1, step 1 of 3: .*out of memory \(.*can't allocate memory.*\) with one example of \d+ tokens in a "
    )
    with pytest.raises(LearnerMemoryError, match=f"{message}micro-batch; {remedy}"):
        train(learner, reference)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))
    assert all(p.grad is None for p in learner.model.parameters())


@pytest.mark.parametrize("case", ["full", "lora"])
def test_activations_are_recomputed_once_a_single_pair_does_not_fit(
    tiny_model: Path, tmp_path: Path, case: str
) -> None:
    learner = make(tiny_model, case)
    reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
    fails(learner, cpu_error, lambda count, tokens: tokens > 20 and not recomputes(learner))
    steps = train(learner, reference)
    assert [step["recomputes"] for step in steps] == [1.0] * 3 and recomputes(learner)
    # As if it had begun so, with micro-batches of one pair.
    told = make(tiny_model, case, gradient_checkpointing=True, micro_batch_tokens=int(steps[0]["micro_batch_tokens"]))
    expected = train(told, reference)
    assert [without_memory(step) for step in steps] == expected
    save(learner, 1, tmp_path / "policy", tmp_path / "trainer")
    saved = Policy(version=1, path=tmp_path / "policy", is_adapter=case == "lora"), tmp_path / "trainer"
    for given, goes_on in ((None, True), (False, False), (True, True)):
        other = make(tiny_model, case, gradient_checkpointing=given)
        other.load(*saved)
        assert recomputes(other) == goes_on
        again = train(other, reference)[0]
        assert again.get("recomputes") == (1.0 if given is None else None)
        other.load(start(tiny_model), tmp_path)
        assert recomputes(other) == (given is True)


def test_log_probabilities_recompute_nothing(tiny_model: Path) -> None:
    """It would not help them."""
    learner = make(tiny_model)
    fails(learner, cpu_error, lambda count, tokens: tokens > 20)
    with pytest.raises(LearnerMemoryError, match=r"^log-probabilities: .*micro-batch; start a new run"):
        collect_logps(learner.logps, PAIRS, start(tiny_model))
    assert not recomputes(learner)


def test_log_probabilities_too_are_computed_in_smaller_passes(tiny_model: Path) -> None:
    learner = make(tiny_model)
    expected = collect_logps(learner.logps, PAIRS, start(tiny_model))
    fails(learner, cuda_error, lambda count, tokens: count == 3)
    found = collect_logps(learner.logps, PAIRS, start(tiny_model))
    for side, logps in expected.items():
        np.testing.assert_allclose(found[side], logps, rtol=1e-5)
    (step, *_) = train(learner, expected)
    assert 0 < step["micro_batch_tokens"] <= 80


def test_other_errors_pass(tiny_model: Path) -> None:
    learner = make(tiny_model)
    reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
    fails(learner, lambda: torch.ones(2) @ torch.ones(3), lambda count, tokens: True)
    for call in (lambda: train(learner, reference), lambda: collect_logps(learner.logps, PAIRS, start(tiny_model))):
        with pytest.raises(RuntimeError, match="size"):
            call()


def test_one_of_several_ranks_says_what_to_lower(tiny_model: Path) -> None:
    scoring = make(tiny_model)._scoring
    scoring.ranks = 2  # it would have to ask the other
    with pytest.raises(LearnerMemoryError, match=r"step 3: rank 0 ran out of memory \(oh\) ") as caught:
        scoring.make_smaller(Examples(PAIRS), np.arange(20), "step 3", "oh")
    assert 0 < caught.value.smaller <= 80
    assert pickle.loads(pickle.dumps(caught.value)).smaller == caught.value.smaller, "also in another process"
    scoring.micro_batch_tokens = 1
    with pytest.raises(LearnerMemoryError, match="one example of") as caught:
        scoring.make_smaller(Examples(PAIRS), np.arange(20), "step 3", "oh")
    assert caught.value.smaller is None


def test_a_setting_that_was_changed_holds_and_a_halving_too(tiny_model: Path, tmp_path: Path) -> None:
    start_of, policy = make(tiny_model, micro_batch_tokens=100), Policy(version=1, path=tmp_path / "policy")
    reference = collect_logps(start_of.logps, PAIRS, start(tiny_model))

    def resumed(folder: str, **changes: Any) -> int:
        other = make(tiny_model, **changes)
        other.load(replace(policy, path=tmp_path / folder / "policy"), tmp_path / folder / "trainer")
        return other._scoring.micro_batch_tokens

    for folder in ("whole", "halved"):
        learner = make(tiny_model, micro_batch_tokens=100)
        fails(learner, cpu_error, lambda count, tokens, folder=folder: count == 1 and folder == "halved")
        train(learner, reference)
        save(learner, 1, tmp_path / folder / "policy", tmp_path / folder / "trainer")
    assert [resumed("whole", micro_batch_tokens=size) for size in (50, 100, 200)] == [50, 100, 200]
    low = learner._scoring.micro_batch_tokens
    assert low < 60 and [resumed("halved", micro_batch_tokens=size) for size in (10, 100, 200)] == [10, low, low]


def test_micro_batches_may_begin_smaller_than_configured(tiny_model: Path) -> None:
    config = learner_config(micro_batch_tokens=4096)
    losses = [LOSS_BY_NAME["sigmoid"]()]  # type: ignore[call-arg]
    learner = TorchLearner(ModelConfig(path=str(tiny_model)), config, losses, seed=7, rounds=3, micro_batch_tokens=90)
    for _ in range(2):
        reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
        assert train(learner, reference)[0]["micro_batch_tokens"] == 90, "and it is told"
        learner.load(start(tiny_model), tiny_model)


def test_an_optimizer_step_without_memory_says_what_it_was_at(tiny_model: Path) -> None:
    learner = make(tiny_model)
    reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
    learner.optimizer.step = cuda_error
    with pytest.raises(
        LearnerMemoryError, match=r"step 1 of 3: .* in the optimizer's step \(CUDA out of.*learner.lora"
    ):
        train(learner, reference)


def test_whatever_comes_of_its_work_is_heard(tiny_model: Path, tmp_path: Path) -> None:
    ticks: list[None] = []
    losses = [LOSS_BY_NAME["sigmoid"]()]  # type: ignore[call-arg]
    config = learner_config(micro_batch_tokens=90)
    learner = TorchLearner(
        ModelConfig(path=str(tiny_model)), config, losses, seed=7, rounds=3, tick=lambda: ticks.append(None)
    )

    def heard(work: Callable[[], Any]) -> int:
        ticks.clear()
        work()
        return len(ticks)

    tensors = sum(1 for _ in learner.model.parameters())
    passes = fails(learner, cpu_error, lambda count, tokens: False)
    assert heard(lambda: collect_logps(learner.logps, PAIRS, start(tiny_model))) == len(passes) > 3
    reference = collect_logps(learner.logps, PAIRS, start(tiny_model))
    passes.clear()
    assert heard(lambda: train(learner, reference)) == len(passes) > 3
    folders = tmp_path / "policy", tmp_path / "trainer"
    assert heard(lambda: save(learner, 1, *folders)) > 3 * tensors
    assert heard(lambda: learner.load(Policy(version=1, path=folders[0]), folders[1])) >= 3 * tensors


def test_the_run_says_so_once_a_change(tmp_path: Path) -> None:
    class Short(FakeLearner):
        def update(self, *args: Any) -> Any:
            for step, metrics in enumerate(super().update(*args)):
                yield metrics | ({"micro_batch_tokens": 512.0} if step else {})

    parts = make_parts(make_config(tmp_path, loop__rounds=1))
    parts.learner = Short()
    parts.learner.steps = 4
    run_rounds(parts)
    told = [text for text in parts.observer.messages if "memory" in text]  # type: ignore[attr-defined]
    assert told == ["round 1, step 2: micro-batches hold 512 tokens (learner.micro_batch_tokens: 4096): memory ran out"]
    assert parts.ledger.round_row(1)["micro_batch_tokens"] == 512
