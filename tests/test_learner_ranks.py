"""Two ranks under FSDP2 and gloo, in processes of their own, against one rank in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from make_tiny_model import make_tiny_model
from online_po import logps as logps_module
from online_po.errors import NonFiniteError
from online_po.learner import TorchLearner
from online_po.loss_configs import LOSS_BY_NAME
from online_po.policy_model import gather
from online_po.sections import LoraConfig, ModelConfig
from online_po.step_checkpoints import StepPlan, newest_whole
from online_po.types import Policy
from tests.learner_setup import (
    VOCABULARY,
    collect_logps,
    learner_config,
    make_labels,
    make_learner,
    make_pairs,
    save,
)

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_thread")]

PROBE = list(range(4, 300, 7))
LORA = {"full": None, "lora": LoraConfig(rank=4)}
PAIRS = make_pairs(17)  # steps of 6, 6 and 5: in the last, one rank of two has a pair less
MORE = make_pairs(9, seed=1)
ONE = make_pairs(1, seed=2)  # a step in which one rank of two has no pair
LABELS = make_labels(17)
# Losses that look at the whole step, at parts of responses, or at other prompts' responses.
MIXTURES = {("aot", "beta_dpo", "wpo"): PAIRS, ("ld_dpo", "bco_pair"): PAIRS, ("kto", "bco"): LABELS}
SKIPPING = (("sigmoid",), ("bco_pair", "sigmoid"))
# A larger eps: Adam divides by the root of the second moment, which would turn rounding dust into steps.
SETTINGS = {"eps": 1e-4, "gradient_checkpointing": True, "weight_decay": 0.01}


def scenario(model: Path, out: Path, lora: LoraConfig | None, ranks: int) -> dict[str, Any]:
    """Two rounds with a stop and a load in between, or without; everything a rank saw, as plain values."""
    config = learner_config(lora=lora, ranks=ranks, **SETTINGS)
    start = Policy(version=0, path=model)
    learner = make_learner(model, config)
    reference = collect_logps(learner.logps, PAIRS, start)
    steps = list(learner.update(1, PAIRS, reference, reference))
    save(learner, 1, out / "policy1", out / "trainer1")
    first = Policy(version=1, path=out / "policy1", is_adapter=lora is not None)
    found: dict[str, Any] = {"logps0": reference, "probe": learner.token_logps([5, 6, 7, 8, 9])}
    found["logps1"] = collect_logps(learner.logps, MORE, first)
    found["start again"] = collect_logps(learner.logps, PAIRS, start)
    found["probe again"] = learner.token_logps([5, 6, 7, 8, 9])  # no other policy's weights stay behind
    for name in ("straight", "resumed", "stopped"):
        plan = None
        if name == "stopped":  # after the first of two steps
            learner.load(first, out / "trainer1")
            begun = learner.update(2, MORE, found["logps1"], None, plan=StepPlan(folder=out / "steps", every=1))
            next(begun)
            begun.close()
            if ranks > 1:
                dist.barrier()  # rank 0 has written it
            plan = StepPlan(folder=out / "steps", every=1, after=newest_whole(out / "steps")[0])
        if name != "straight":
            learner = make_learner(model, config)
            learner.load(first, out / "trainer1")
        steps2 = learner.update(2, MORE, found["logps1"], None, plan=plan)
        found[name] = [*(plan.metrics if plan else ()), *steps2]
        save(learner, 2, out / f"policy2-{name}", out / f"trainer2-{name}")
    found["logps1 from disk"] = collect_logps(learner.logps, MORE, first)
    second = Policy(version=2, path=out / "policy2-resumed", is_adapter=lora is not None)
    found["logps2"] = collect_logps(learner.logps, ONE, second)
    away = {"chosen": found["logps2"]["chosen"] - 1, "rejected": found["logps2"]["rejected"]}
    found["one pair"] = list(learner.update(3, ONE, away, None))
    save(learner, 3, out / "policy3", out / "trainer3")
    found["losses"] = {}
    for names, examples in MIXTURES.items():
        learner = make_mixture(model, config, names)
        # Off by nats: at margins of zero, which is all of them at first, rounding would decide who is sorted where.
        noise = np.random.default_rng(3)
        reference = {
            side: (logps + noise.normal(0, 2, len(logps))).astype(np.float32)
            for side, logps in collect_logps(learner.logps, examples, start).items()
        }
        found["losses"]["+".join(names)] = list(learner.update(1, examples, reference, reference))
    ill = {side: found["logps0"][side].copy() for side in ("chosen", "rejected")}
    ill["chosen"][3] = np.nan  # one pair, which one rank of two has
    for names in SKIPPING:
        learner = make_mixture(model, config, names, skip_nonfinite=True)
        found["skipping " + "+".join(names)] = list(learner.update(1, PAIRS, ill, None))
        save(learner, 1, out / f"policy-skipping-{names[0]}", out / f"trainer-skipping-{names[0]}")
    learner = make_learner(model, config)
    with pytest.raises(NonFiniteError, match="step was not applied"):
        list(learner.update(1, PAIRS, ill, None))
    learner.load(first, out / "trainer1")
    found["after an error"] = list(learner.update(2, MORE, found["logps1"], None))
    if ranks > 1:  # this folder was written by the other number of ranks
        learner.load(Policy(version=1, path=out.parent / "one" / "policy1", is_adapter=lora is not None),
                     out.parent / "one" / "trainer1")  # fmt: skip
        found["crossed"] = list(learner.update(2, MORE, found["logps1"], None))
    return found | {"round 1": steps}


def make_mixture(model: Path, config: Any, names: tuple[str, ...], skip_nonfinite: bool = False) -> Any:
    losses = tuple(LOSS_BY_NAME[name]() for name in names)  # type: ignore[call-arg]
    model_config = ModelConfig(path=str(model))
    return TorchLearner(model_config, config, losses, seed=7, rounds=3, skip_nonfinite=skip_nonfinite)


def rank_main(rank: int, ranks: int, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=ranks)
    for name, lora in LORA.items():
        found = scenario(model, out / name / "two", lora, ranks)
        (out / name / f"rank{rank}.json").write_text(json.dumps(found, default=np.ndarray.tolist))
    torch.save(bfloat16(model, ranks), out / f"bfloat16-{rank}.pt")
    dist.destroy_process_group()


def bfloat16(model: Path, ranks: int, compute_dtype: str = "bfloat16") -> dict[str, Any]:
    """Logps, one step and its gradients, all in small chunks; and what goes into the head and what comes of it."""
    logps_module.CHUNK_LOGITS["cpu"] = 7 * VOCABULARY
    learner = make_learner(model, learner_config(ranks=ranks, compute_dtype=compute_dtype))
    found: dict[str, Any] = {"logps": collect_logps(learner.logps, PAIRS, Policy(version=0, path=model))["chosen"]}
    hidden: list[torch.Tensor] = []
    with learner.scorer.model.base_model.register_forward_hook(
        lambda _m, _i, output: hidden.append(output.last_hidden_state[0, :-1].detach())
    ):
        found["probe"] = torch.tensor(learner.token_logps(PROBE))
    found["hidden"], found["head"] = hidden[0], gather(learner.scorer.model.lm_head.weight).clone()
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: gather(p.grad).clone() for name, p in learner.model.named_parameters()})

    learner.optimizer.register_step_pre_hook(keep)
    reference = {side: np.zeros(17, np.float32) for side in ("chosen", "rejected")}
    found["step"] = next(learner.update(1, PAIRS, reference, None))
    return found | {"gradients": gradients}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks")
    model = make_tiny_model(out / "model", kv_heads=2)
    found: dict[str, Any] = {"out": out, "model": model}
    for name, lora in LORA.items():
        one = scenario(model, out / name / "one", lora, ranks=1)
        found[name] = [json.loads(json.dumps(one, default=np.ndarray.tolist))]
    mp.spawn(rank_main, args=(2, model, out), nprocs=2)
    for name in LORA:
        found[name] += [json.loads((out / name / f"rank{rank}.json").read_text()) for rank in range(2)]
    return found


def comparable(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the clock, and without the share of margins above zero where all are zero but for rounding."""
    kept = timeless(steps)
    return [{k: v for k, v in step.items() if k != "accuracy" or abs(step["margin"]) > 1e-4} for step in kept]


def timeless(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if name != "seconds"} for step in steps]


@pytest.mark.parametrize("kind", list(LORA))
def test_two_ranks_equal_one(runs: dict[str, Any], kind: str) -> None:
    one, two, _ = runs[kind]
    assert [step["pairs"] for step in one["round 1"]] == [6, 6, 5]
    assert [step["pairs"] for step in one["one pair"]] == [1] and one["one pair"][0]["grad_norm"] > 1e-3
    for phase in ("round 1", "straight", "one pair"):
        for step, other in zip(comparable(one[phase]), comparable(two[phase]), strict=True):
            assert other == pytest.approx(step, rel=1e-4, abs=2e-5)
    for phase in ("logps0", "logps1", "logps2"):
        for side in ("chosen", "rejected"):
            np.testing.assert_allclose(two[phase][side], one[phase][side], rtol=2e-6, atol=1e-5)
    assert two["probe"] == pytest.approx(one["probe"], abs=2e-5)
    for folder in ("policy1", "trainer1", "policy2-straight", "trainer2-straight", "policy3", "trainer3"):
        (name,) = {file.name for file in (runs["out"] / kind / "one" / folder).glob("*.safetensors")}
        left, right = (load_file(runs["out"] / kind / count / folder / name) for count in ("one", "two"))
        assert left.keys() == right.keys() and len(left) > 0
        for key, value in left.items():
            torch.testing.assert_close(right[key], value, rtol=1e-4, atol=3e-6, msg=f"{folder}: {key}")


@pytest.mark.parametrize("names", ["+".join(names) for names in MIXTURES])
@pytest.mark.parametrize("kind", list(LORA))
def test_losses_that_look_across_examples_see_both_ranks(runs: dict[str, Any], kind: str, names: str) -> None:
    one, two, other = (run["losses"][names] for run in runs[kind])
    assert timeless(two) == timeless(other) and len(one) == 3
    for step, same in zip(comparable(one), comparable(two), strict=True):
        assert same == pytest.approx(step, rel=1e-3, abs=5e-5)


@pytest.mark.parametrize("names", SKIPPING, ids="+".join)
@pytest.mark.parametrize("kind", list(LORA))
def test_both_ranks_leave_out_a_step_that_is_not_finite_and_go_on(
    runs: dict[str, Any], kind: str, names: tuple[str, ...]
) -> None:
    one, two, other = (run["skipping " + "+".join(names)] for run in runs[kind])
    assert sum("skipped" in step for step in one) == 1 and len(one) == 3
    assert timeless(two) == timeless(other)
    for step, same in zip(one, two, strict=True):
        assert ("skipped" in step) == ("skipped" in same)
        if "skipped" not in step:
            assert same["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-3)
    for folder in (f"policy-skipping-{names[0]}", f"trainer-skipping-{names[0]}"):
        (name,) = {file.name for file in (runs["out"] / kind / "one" / folder).glob("*.safetensors")}
        left, right = (load_file(runs["out"] / kind / count / folder / name) for count in ("one", "two"))
        for key, value in left.items():
            torch.testing.assert_close(right[key], value, rtol=1e-4, atol=3e-6, msg=f"{folder}: {key}")


@pytest.mark.parametrize("kind", list(LORA))
def test_ranks_train_on_after_a_step_that_was_not_finite(runs: dict[str, Any], kind: str) -> None:
    for run in runs[kind]:
        assert timeless(run["after an error"]) == timeless(run["straight"])


@pytest.mark.parametrize("kind", list(LORA))
def test_the_first_loss_is_log_2_on_two_ranks(runs: dict[str, Any], kind: str) -> None:
    assert runs[kind][1]["round 1"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", list(LORA))
def test_all_ranks_say_the_same(runs: dict[str, Any], kind: str) -> None:
    _, first, second = runs[kind]
    assert first.keys() == second.keys()
    for phase in first.keys() - {"losses"}:
        if isinstance(first[phase], list) and isinstance(first[phase][0], dict):
            assert timeless(first[phase]) == timeless(second[phase])
        else:
            assert first[phase] == second[phase]


@pytest.mark.parametrize("how", ["resumed", "stopped"])
@pytest.mark.parametrize("kind", list(LORA))
def test_two_ranks_resume_bit_for_bit(runs: dict[str, Any], kind: str, how: str) -> None:
    """After a round, and after a step inside one."""
    found = runs[kind][1]
    assert len(found["straight"]) == 2 and timeless(found["straight"]) == timeless(found[how])
    for folder in ("policy2", "trainer2"):
        straight, resumed = (runs["out"] / kind / "two" / f"{folder}-{name}" for name in ("straight", how))
        (name,) = {file.name for file in straight.glob("*.safetensors")}
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize("kind", list(LORA))
def test_other_policies_pass_through_two_ranks_without_a_trace(runs: dict[str, Any], kind: str) -> None:
    found = runs[kind][1]
    assert found["start again"] == found["logps0"]
    assert found["probe again"] == found["probe"]
    assert found["logps1 from disk"] == found["logps1"]


@pytest.mark.parametrize("kind", list(LORA))
def test_two_ranks_continue_what_one_saved(runs: dict[str, Any], kind: str) -> None:
    one, two, _ = runs[kind]
    for step, other in zip(comparable(one["straight"]), comparable(two["crossed"]), strict=True):
        assert other == pytest.approx(step, rel=1e-4, abs=2e-5)


def test_bfloat16_on_two_ranks(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logps_module.CHUNK_LOGITS, "cpu", logps_module.CHUNK_LOGITS["cpu"])  # `bfloat16` sets it
    exact = bfloat16(runs["model"], ranks=1, compute_dtype="float32")
    found = torch.load(runs["out"] / "bfloat16-0.pt", weights_only=False)
    np.testing.assert_allclose(found["logps"], exact["logps"], rtol=0.03)
    assert found["logps"].tolist() != exact["logps"].tolist()
    assert found["step"]["loss"] == pytest.approx(exact["step"]["loss"], rel=0.02)
    assert found["gradients"].keys() == exact["gradients"].keys() and len(found["gradients"]) > 10
    for name, gradient in exact["gradients"].items():
        assert found["gradients"][name].dtype == torch.float32
        assert (found["gradients"][name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_bfloat16_the_head_computes_in_float32(
    runs: dict[str, Any], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logps_module.CHUNK_LOGITS, "cpu", logps_module.CHUNK_LOGITS["cpu"])
    if ranks == 1:
        found = bfloat16(runs["model"], ranks=1)
    else:
        found = torch.load(runs["out"] / "bfloat16-0.pt", weights_only=False)
        assert found["hidden"].dtype == torch.bfloat16
    # FSDP gathers weights in bfloat16; one rank has them in float32.
    hidden, head = found["hidden"].float(), found["head"].to(torch.bfloat16 if ranks == 2 else torch.float32).float()
    targets = torch.tensor(PROBE[1:])[:, None]
    logits = hidden @ head.T
    logps, rounded = (torch.log_softmax(x, -1).gather(1, targets)[:, 0] for x in (logits, logits.bfloat16().float()))
    torch.testing.assert_close(found["probe"], logps, rtol=0, atol=1e-5)
    assert (rounded - logps).abs().max() > 3e-3
