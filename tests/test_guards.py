"""What each guard fires on and what it lets pass; the section `guards`; the table in docs/guards.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import make_guard_table
from online_po.config import Config
from online_po.errors import ConfigError
from online_po.evaluation import best_version, early_stop
from online_po.guard_configs import GuardsConfig
from online_po.guards import CHECKS, evaluation_findings, round_findings, rows_needed
from online_po.metrics import likelihood_shift, round_means

HEALTHY = {
    "kind": "round",
    "attempt": 0,
    "steps": 6,
    "pairs": 1000,
    "reference_round": 0,
    "reference_blended": False,
    "loss": 0.6,
    "accuracy": 0.7,
    "margin": 0.3,
    "beta": 0.1,
    "entropy": 1.8,
    "distinct_2": 0.6,
    "length_mean": 100.0,
    "length_score_correlation": 0.1,
    "chosen_length": 100.0,
    "rejected_length": 80.0,
    "chosen_shift": 0.5,
    "rejected_shift": -4.0,
    "kl_reference": 3.0,
    "kl_start": 5.0,
}
FLAT = {"accuracy": 0.52, "margin": -0.004}


def row(round_: int, **changes: Any) -> dict[str, Any]:
    return HEALTHY | {"round": round_, "policy_version_sampled": round_ - 1} | changes


def findings(last: dict[str, Any], *earlier: dict[str, Any], **guards: Any) -> list[Any]:
    return round_findings(GuardsConfig.model_validate(guards), last, earlier)


def test_a_healthy_run_has_nothing_to_say():
    rows = [row(r, entropy=1.8 - 0.1 * r, length_mean=100.0 + 5 * r) for r in range(1, 8)]
    for last in rows:
        needed = rows_needed(GuardsConfig.model_validate({}), last["round"])
        assert findings(last, *[rows[r - 1] for r in needed]) == []


@pytest.mark.parametrize(
    ("name", "ill", "almost", "said"),
    [
        ("kl", {"kl_start": 30.1}, {"kl_start": 30.0}, "policy 3 has a KL of 30.1 nats a response to the start"),
        ("kl", {"kl_reference": 99.0}, {"kl_reference": 30.0}, "KL of 99 nats a response to the reference, above"),
        (
            "displacement",
            {"chosen_shift": -20.0, "rejected_shift": -40.0},
            {"chosen_shift": -9.0, "rejected_shift": -400.0},
            "by 0.2 and 0.5 nats a token",
        ),
        (
            "displacement",
            {"chosen_shift": -10.1, "rejected_shift": -8.1},
            {"chosen_shift": -400.0, "rejected_shift": -7.9},
            "less likely as well as rejected",
        ),
        ("entropy", {"entropy": 0.89}, {"entropy": 0.9}, "entropy is 0.89 nats a token, 49% of round 1's"),
        ("diversity", {"distinct_2": 0.29}, {"distinct_2": 0.3}, "distinct_2 is 0.29, 48% of round 1's"),
        ("length", {"length_mean": 151.0}, {"length_mean": 150.0}, "151 tokens on average, 1.51 times round 1's"),
        (
            "length_score",
            {"length_score_correlation": 0.51},
            {"length_score_correlation": 0.5},
            "correlation 0.51, above guards.length_score.max_correlation = 0.5",
        ),
        ("flat", FLAT, FLAT | {"margin": 0.02}, "accuracy 52%, margin -0.004, loss 0.6"),
        ("flat", FLAT, FLAT | {"accuracy": 0.56}, "2 rounds on end"),
        ("nonfinite", {"skipped": 2.0}, {"skipped": 0.0}, "2 of 6 steps of round 4"),
    ],
)
def test_it_fires_past_its_bound_and_not_at_it(name, ill, almost, said):
    earlier = [row(1), row(3, **(FLAT if name == "flat" else {}))]
    (found,) = findings(row(4, **ill), *earlier)
    remedy = GuardsConfig.model_validate({}).each()[name].remedy
    assert (found["name"], found["action"]) == (name, "warn")
    assert said in found["message"] and found["message"].endswith(f"; {remedy}.") and "\n" not in found["message"]
    assert found["policy"] == (3 if CHECKS[name][1] else 4)
    assert findings(row(4, **almost), *earlier) == []
    assert findings(row(4, **ill), *earlier, **{name: {"action": "off" if name != "nonfinite" else "stop"}}) == (
        [] if name != "nonfinite" else [found | {"action": "stop"}]
    )


def test_bounds_are_the_configs():
    (found,) = findings(row(2, kl_start=6.0), row(1), kl={"action": "stop", "max_nats": 5.5})
    assert found["action"] == "stop" and "guards.kl.max_nats = 5.5" in found["message"]


def test_round_1_is_compared_with_nothing_and_what_is_not_measured_is_not_looked_at():
    assert findings(row(1, entropy=0.01, length_mean=9e9, **FLAT)) == []
    bare = {"round": 5, "policy_version_sampled": 4, "attempt": 0, "steps": 2, "loss": 0.1}
    assert findings(bare, {**bare, "round": 1}, {**bare, "round": 4}) == []
    known_only_now = {**bare, "entropy": 0.1, "length_score_correlation": None, "distinct_2": None}
    assert findings(known_only_now, {**bare, "round": 1}, {**bare, "round": 4}) == []


def test_flat_needs_rounds_on_end():
    flat = {r: row(r, **FLAT) for r in range(1, 6)}
    guards = {"flat": {"rounds": 3}}
    assert [f["name"] for f in findings(flat[5], flat[1], flat[3], flat[4], **guards)] == ["flat"]
    assert findings(flat[5], flat[1], row(3), flat[4], **guards) == []
    assert findings(flat[2], flat[1], **guards) == [], "there are no three rounds yet"
    assert [f["name"] for f in findings(flat[1], flat={"rounds": 1})] == ["flat"]


def test_one_step_on_a_reference_that_is_the_policy_has_no_margin_by_construction():
    def of(round_: int, reference: int | None, blended: bool = False, steps: int = 1) -> dict[str, Any]:
        held = {} if reference is None else {"reference_round": reference, "reference_blended": blended}
        bare = {key: value for key, value in row(round_).items() if "reference_" not in key}
        return bare | FLAT | {"steps": steps} | held

    def fires(*rows: dict[str, Any]) -> bool:
        return "flat" in [f["name"] for f in findings(rows[-1], *rows[:-1])]

    assert not fires(of(1, 0), of(2, 1), of(3, 2)), "refreshed every round"
    assert fires(of(1, 0), of(2, 1, steps=2), of(3, 2, steps=2)), "the second step has one"
    assert not fires(of(1, 0), of(2, 0)), "in round 1 a fixed reference is the policy too"
    assert fires(of(1, 0), of(2, 0), of(3, 0)), "later it is not"
    assert not fires(of(1, 0), of(4, 2), of(5, 4)), "refreshed every other round: round 5 starts from it, round 4 not"
    assert fires(of(1, 0), of(2, 1, blended=True), of(3, 2, blended=True)), "a mean is not the policy"
    assert fires(of(1, None), of(2, None)), "without a reference margins are never zero by construction"


def test_rows_needed_are_few():
    guards = GuardsConfig.model_validate({"flat": {"rounds": 3}})
    assert [rows_needed(guards, r) for r in (1, 2, 3, 9)] == [[], [1], [1, 2], [1, 7, 8]]


def comparison(low: float, high: float) -> Any:
    interval = {"mean": (low + high) / 2, "low": low, "high": high}
    return {"difference": interval, "worse": high < 0, "better": low > 0}


def test_over_optimisation_needs_both_a_near_perfect_fit_and_a_fall_beyond_noise():
    guards = GuardsConfig.model_validate({})
    (found,) = evaluation_findings(guards, 4, 0.97, 2, comparison(-0.3, -0.1))
    assert (found["name"], found["policy"]) == ("over_optimisation", 4)
    assert "0.2 below that of policy 2 (95% interval -0.3 to -0.1)" in found["message"]
    assert evaluation_findings(guards, 4, 0.94, 2, comparison(-0.3, -0.1)) == []
    assert evaluation_findings(guards, 4, 0.97, 2, comparison(-0.3, 0.1)) == []
    off = GuardsConfig.model_validate({"over_optimisation": {"action": "off"}})
    assert evaluation_findings(off, 4, 0.97, 2, comparison(-0.3, -0.1)) == []


def test_flatness_is_in_nats_whatever_beta_is():
    small = {"accuracy": 0.5, "margin": 0.004, "beta": 0.001}  # 4 nats apart, as SPPO's beta shows them
    assert findings(row(2, **small), row(1, **small)) == []
    assert findings(row(2, **small | {"beta": 0.1}), row(1, **small | {"beta": 0.1}))


def test_a_small_round_is_flat_within_what_chance_gives():
    few, many = ({"accuracy": 0.65, "margin": 0.001, "pairs": pairs} for pairs in (40, 1000))
    assert [f["name"] for f in findings(row(2, **few), row(1, **few))] == ["flat"]
    assert findings(row(2, **many), row(1, **many)) == []


def test_likelihood_shift_is_of_the_same_pairs():
    pairs = {"chosen": np.array([-10.0, -20.0]), "rejected": np.array([-30.0, -30.0])}
    steps = [
        {"pairs": 1.0, "chosen_logps": -9.0, "rejected_logps": -33.0},
        {"pairs": 1.0, "chosen_logps": -18.0, "rejected_logps": -37.0},
    ]
    assert likelihood_shift(round_means(steps), pairs) == {"chosen_shift": 1.5, "rejected_shift": -5.0}
    assert likelihood_shift(round_means([*steps, {"pairs": 1.0, "skipped": 1.0}]), pairs) == {}
    assert likelihood_shift({"loss": 1.0}, pairs) == {}
    foreign = pairs | {"chosen": np.array([-10.0, np.nan])}
    assert likelihood_shift(round_means(steps), foreign) == {}


def test_steps_left_out_are_counted_and_the_rest_averaged():
    means = round_means([{"pairs": 2.0, "loss": 0.5}, {"pairs": 2.0, "skipped": 1.0}, {"pairs": 2.0, "skipped": 1.0}])
    assert means == {"pairs": 6.0, "loss": 0.5, "skipped": 2.0}


def test_early_stop_waits_for_patience_evaluations_without_gain():
    scores = {0: 0.5, 1: 0.6, 2: 0.6, 3: 0.65, 4: 0.64, 5: 0.65, 6: 0.66}
    assert early_stop(scores, 2, 0.0) == 5
    assert early_stop(scores, 3, 0.0) is None
    assert early_stop(scores, 2, 0.08) == 3, "0.65 gains too little over 0.6"
    assert early_stop({}, 1, 0.0) is None and early_stop({0: 1.0}, 1, 0.0) is None
    assert best_version(scores) == 6 and best_version({0: 0.5, 2: 0.7, 3: 0.7}) == 2 and best_version({}) is None


# -- the section -----------------------------------------------------------------------------------


def config(*overrides: str, **sections: Any) -> Config:
    base = {"run": {"name": "x"}, "model": {"path": "m"}, "prompts": {"path": "p", "heldout_size": 4}}
    data: dict[str, Any] = {**base, **sections}
    for override in overrides:
        name, value = override.split("=")
        *parents, last = name.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = {"null": None}.get(value, int(value) if value.isdigit() else value)
    return Config.parse(data)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"guards": {"klx": {}}}, "guards.klx: unknown key; did you mean 'kl'?"),
        ({"guards": {"kl": {"max_nts": 3}}}, "guards.kl.max_nts: unknown key; did you mean 'max_nats'?"),
        ({"guards": {"kl": {"action": "rollback"}}}, "guards.kl.action: .*'roll_back'.*got 'rollback'"),
        ({"guards": {"nonfinite": {"action": "off"}}}, "guards.nonfinite.action: .*got 'off'"),
        ({"guards": {"length": {"max_ratio": 1}}}, "guards.length.max_ratio: .*greater than 1"),
        (
            {"guards": {"kl": {"action": "off", "max_nats": 9}}},
            r"guards.kl.max_nats is 9.0, but guards.kl.action is off",
        ),
        ({"guards": {"max_roll_backs": 5}}, "guards.max_roll_backs is 5, but no guard has action: roll_back"),
        (
            {"guards": {"kl": {"action": "roll_back"}}, "run": {"name": "x"}, "checkpoint": {"keep": 1}},
            r"checkpoint.keep is 1, but guards.kl.action: roll_back .* keep at least 2, or null",
        ),
        (
            {"guards": {"flat": {"action": "roll_back"}}, "loop": {"max_staleness": 1}},
            r"checkpoint.keep is 2, but guards.flat.action: .*loop.max_staleness = 1 keep at least 4",
        ),
        (
            {"guards": {"kl": {"action": "stop"}}, "loss": {"name": "simpo"}},
            "guards.kl .* has an effect only with a reference, or learner.kl_to_start: true",
        ),
        (
            {"guards": {"displacement": {"action": "stop"}}, "loss": {"name": "kto"}},
            "guards.displacement .* only with pairs of the round's own responses alone: no replay",
        ),
        (
            {"guards": {"displacement": {"max_fall": 0.2}}, "pairs": {"replay_share": 0.5}},
            "guards.displacement .* only with pairs .* no replay, seed pairs",
        ),
        (
            {
                "guards": {"over_optimisation": {"min_accuracy": 0.9}},
                "eval": {"every": 0},
                "prompts": {"path": "p"},
            },
            "guards.over_optimisation .* only with eval.every above 0",
        ),
        *(
            ({"guards": {"displacement": {"action": "stop"}}, **sections}, "guards.displacement .* own responses alone")
            for sections in (
                {"pairs": {"replay_share": 0.5}},
                {"pairs": {"seed_path": "s", "seed_share": 0.5}},
                {"pairs": {"strategy": "spin", "chosen_column": "c"}},
                {"loss": {"name": "kto"}},
            )
        ),
        (
            {
                "guards": {"length_score": {"max_correlation": 0.3}},
                "loop": {"responses_per_prompt": 1},
                "pairs": {"strategy": "spin", "chosen_column": "c"},
            },
            "guards.length_score .* only with loop.responses_per_prompt above 1",
        ),
        ({"guards": {"entropy": {"action": "stop"}}, "loop": {"rounds": 1}}, "guards.entropy .* loop.rounds above 1"),
        ({"guards": {"flat": {"rounds": 4}}}, "guards.flat .* only with loop.rounds of 4 or more"),
        (
            {"eval": {"every": 0, "early_stop": {}}, "prompts": {"path": "p"}},
            "eval.early_stop is .* has an effect only with eval.every above 0",
        ),
        ({"eval": {"early_stop": {"patience": 0}}}, "eval.early_stop.patience: .*greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(sections, message):
    with pytest.raises(ConfigError, match=message):
        config(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"guards": {"kl": {"action": "roll_back"}}, "run": {"name": "x"}, "checkpoint": {"keep": None}},
        {"guards": {"kl": {"action": "roll_back"}, "max_roll_backs": 0}},
        {"guards": {"kl": {"action": "off"}}, "loss": {"name": "simpo"}},
        {"guards": {"displacement": {"action": "off"}, "flat": {"rounds": 3}}, "loss": {"name": "kto"}},
        {"loop": {"rounds": 1}, "pairs": {"seed_path": "s", "seed_share": 0.5}},
        {"guards": {"displacement": {"action": "off"}}, "loss": {"name": "kto"}},
        {"guards": {"displacement": {"action": "stop"}}, "pairs": {"strategy": "all"}},
        {
            "guards": {"kl": {"action": "stop"}},
            "loss": {"name": "simpo"},
            "learner": {"kl_to_start": True},
        },
        {
            "guards": {"flat": {"action": "roll_back"}},
            "loop": {"max_staleness": 1},
            "run": {"name": "x"},
            "checkpoint": {"keep": 4},
        },
    ],
)
def test_what_lies_beside_a_refusal_passes(sections):
    assert Config.parse(config(**sections).model_dump(mode="json")) == config(**sections)


def test_only_guards_that_roll_back_shape_results():
    plain = config().identity()
    for guards in ({"kl": {"action": "off"}}, {"kl": {"max_nats": 3}}, {"nonfinite": {"action": "stop"}}):
        assert config(guards=guards).identity() == plain
    back = config(guards={"kl": {"action": "roll_back"}}).identity()
    assert back["guards"] == {"kl": {"action": "roll_back", "max_nats": 30.0}}
    assert {key: value for key, value in back.items() if key != "guards"} == plain


def test_the_section_loads_neither_torch_nor_numpy():
    code = "import sys, online_po.guard_configs; print([m for m in ('torch', 'numpy', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- docs/guards.md --------------------------------------------------------------------------------


def test_the_table_of_guards_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "guards.md"
    assert page.read_text(encoding="utf-8") == make_guard_table.page()
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == list(GuardsConfig.model_validate({}).each())


def test_check_tells_an_old_table(tmp_path, monkeypatch):
    monkeypatch.setattr(make_guard_table, "PAGE", tmp_path / "guards.md")
    monkeypatch.setattr(sys, "argv", ["make_guard_table.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        make_guard_table.main()
