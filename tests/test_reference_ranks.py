"""References of two ranks under FSDP2 and gloo: the runs of test_reference.py, and adapters in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from make_tiny_model import make_tiny_model
from online_po.config import Config
from online_po.learner import TorchLearner
from online_po.ledger import Ledger
from online_po.sections import LoraConfig
from online_po.types import Policy
from tests.learner_setup import (
    collect_logps,
    learner_config,
    make_learner,
    make_pairs,
    save,
)
from tests.reference_runs import (
    LORA,
    REFERENCES,
    ROUNDS,
    SIDES,
    assert_as_by_hand,
    logps_again,
    reference_config,
    run,
    stored,
)

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_thread")]

CASES = [(kind, weights) for kind in REFERENCES for weights in LORA]
PAIRS = make_pairs(11)


class Leader:
    """Rank 0's learner: makes every call on the other rank too, as the actors' LearnerGroup does."""

    def __init__(self, config: Config) -> None:
        self.learner = self._tell("new", config)

    def _tell(self, method: str, *args: Any) -> Any:
        dist.broadcast_object_list([method, args])
        return torch_learner(*args) if method == "new" else getattr(self.learner, method)(*args)

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self._tell(method, *args)


def torch_learner(config: Config) -> Any:
    return TorchLearner(config.model, config.learner, config.loss, seed=config.run.seed, rounds=config.loop.rounds)


def follow() -> None:
    """Rank 1: makes the calls that rank 0 makes, until it is told to end."""
    learner: Any = None
    while True:
        call: list[Any] = [None, None]
        dist.broadcast_object_list(call)
        method, args = call
        if method == "end":
            return
        answer = torch_learner(*args) if method == "new" else getattr(learner, method)(*args)
        if method == "new":
            learner = answer
        elif isinstance(answer, Iterator):
            for _ in answer:
                pass


def run_folder(out: Path, ranks: int, kind: str, weights: str) -> Path:
    return out / f"{ranks}-{kind}-{weights}"


def rank_main(rank: int, ranks: int, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=ranks)
    if rank == 0:
        for kind, weights in CASES:
            config = reference_config(run_folder(out, 2, kind, weights), model, REFERENCES[kind], LORA[weights], ranks)
            run(config, Leader, stop_after=2)
            again = logps_again(run(config, Leader))
            torch.save(again, run_folder(out, 2, kind, weights) / "again.pt")
        dist.broadcast_object_list(["end", ()])
    else:
        follow()
    torch.save(bfloat16(model, out / "bfloat16", ranks), out / f"bfloat16-{rank}.pt")
    dist.destroy_process_group()


def bfloat16(model: Path, out: Path, ranks: int) -> list[dict[str, np.ndarray]]:
    """Policy 1's logps as it was trained and from its folder, then those of a mean; with adapters on the head too."""
    lora = LoraConfig(rank=4, target_modules=("q_proj", "down_proj", "lm_head"))
    config = learner_config(lora=lora, ranks=ranks, param_dtype="bfloat16", compute_dtype="bfloat16")
    learner = make_learner(model, config)
    start = Policy(version=0, path=model)
    reference = collect_logps(learner.logps, PAIRS, start)
    list(learner.update(1, PAIRS, reference, None))
    save(learner, 1, out / "policy1", out / "trainer1")
    learner.blend(start, 0.6, out / "reference1")
    first = Policy(version=1, path=out / "policy1", is_adapter=True)
    own = collect_logps(learner.logps, PAIRS, first)
    list(learner.update(2, PAIRS, reference, None))
    mean = Policy(version=1, path=out / "reference1", is_adapter=True, blended=True)
    # A new learner, so that FSDP sets itself up while another adapter is in place.
    fresh = make_learner(model, config)
    found = [collect_logps(fresh.logps, PAIRS, policy) for policy in (first, mean)]
    return [own, collect_logps(learner.logps, PAIRS, first), *found, reference]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("ranks")
    model = make_tiny_model(out / "model", kv_heads=2)
    for kind, weights in CASES:
        run_folder(out, 2, kind, weights).mkdir()
    mp.spawn(rank_main, args=(2, model, out), nprocs=2)
    return model, out


@pytest.mark.parametrize("weights", list(LORA))
@pytest.mark.parametrize("kind", list(REFERENCES))
def test_two_ranks_hold_the_reference_built_by_hand_before_and_after_a_resume(
    runs: tuple[Path, Path], kind: str, weights: str
) -> None:
    model, out = runs
    folder = run_folder(out, 2, kind, weights)
    ledger = Ledger(folder / "fake")
    assert_as_by_hand(kind, model, ledger, LORA[weights] is not None)
    again = torch.load(folder / "again.pt", weights_only=False)
    for found, expected in zip(again, stored(ledger), strict=True):
        assert all(np.array_equal(found[side], expected[side]) for side in SIDES)


@pytest.mark.parametrize("weights", list(LORA))
def test_one_rank_leaves_the_same_means(runs: tuple[Path, Path], weights: str) -> None:
    model, out = runs
    config = reference_config(run_folder(out, 1, "ema", weights), model, REFERENCES["ema"], LORA[weights])
    one = run(config, torch_learner).ledger
    two = Ledger(run_folder(out, 2, "ema", weights) / "fake")
    for round_ in range(1, ROUNDS + 1):
        for side in SIDES:
            np.testing.assert_allclose(stored(two)[round_ - 1][side], stored(one)[round_ - 1][side], atol=2e-3)
        files = {path.name for path in (one.round_dir(round_) / "reference").iterdir()}
        assert files == {path.name for path in (two.round_dir(round_) / "reference").iterdir()} and len(files) > 1


def test_adapters_in_bfloat16_say_the_same_from_their_folder(runs: tuple[Path, Path]) -> None:
    _, out = runs
    own, trained_on, fresh, mean, start = torch.load(out / "bfloat16-0.pt", weights_only=False)
    for side in SIDES:
        assert np.array_equal(trained_on[side], own[side]) and np.array_equal(fresh[side], own[side])
        assert np.abs(own[side] - start[side]).max() > 0.05
        assert np.abs(mean[side] - own[side]).max() > 0.01 and np.abs(mean[side] - start[side]).max() > 0.01
    for one, other in zip(torch.load(out / "bfloat16-1.pt", weights_only=False), (own, trained_on, fresh, mean, start),
                          strict=True):  # fmt: skip
        assert all(np.array_equal(one[side], other[side]) for side in SIDES)
