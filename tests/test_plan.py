"""The plan: everything that can be wrong is found before anything starts, and said with field, value and remedy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from online_po.config import Config
from online_po.errors import ConfigError
from online_po.memory import Memory
from online_po.model_content import count_weights
from online_po.plan import GIB, estimate, make_plan, on_cpu, read_shape

PROMPTS = [{"prompt": f"question {i}", "constraints": [{"type": "lowercase"}]} for i in range(20)]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Plans of a machine without GPUs, whatever these tests run on."""
    monkeypatch.setattr("online_po.plan.on_cpu", lambda config: config.ray.address is None)


def parse(tmp_path, model, prompts=PROMPTS, **overrides) -> Config:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    data: dict = {
        "run": {"name": "plan", "dir": str(tmp_path)},
        "model": {"path": str(model)},
        "prompts": {"path": str(path), "heldout_size": 4, "max_tokens": 96},
        "loop": {"prompts_per_round": 8},
        "generator": {"max_tokens": 16, "cpu_kv_cache_gib": 0.1},
        "learner": {"global_batch_size": 8},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            data.setdefault(section, {})[name] = value
        else:
            data[section] = value
    return Config.parse(data)


@pytest.mark.parametrize(
    ("driver", "build", "expected"),
    [(None, "+cpu", True), (None, "", True), ("/usr/bin/nvidia-smi", "", False), ("/usr/bin/nvidia-smi", "+cpu", True)],
)
def test_the_cpu_is_used_where_torch_knows_no_other(tmp_path, tiny_model, monkeypatch, driver, build, expected):
    monkeypatch.setattr("online_po.plan.shutil.which", lambda name: driver)
    monkeypatch.setattr("online_po.plan.Path.is_dir", lambda path: False)
    monkeypatch.setattr("online_po.plan.importlib.metadata.version", lambda name: f"2.13.0{build}")
    here, elsewhere = (parse(tmp_path, tiny_model, ray={"address": address}) for address in (None, "10.0.0.1:6379"))
    assert on_cpu(here) is expected and on_cpu(elsewhere) is False


def test_a_plan_counts_and_measures(tmp_path, tiny_model):
    rows = [*PROMPTS, PROMPTS[0], {**PROMPTS[0], "prompt": "long " * 200}, {**PROMPTS[0], "prompt": " "}]
    plan = make_plan(parse(tmp_path, tiny_model, rows))
    assert len(plan.train) == 16 and plan.heldout is not None and len(plan.heldout) == 4
    assert "1 duplicates" in plan.figures["train prompts"] and "1 too long" in plan.figures["train prompts"]
    assert plan.figures["rounds"].startswith("3 of 8 prompts x 4 responses (1.50 epochs)")
    assert plan.shape.context == 1024 and not plan.warnings


def test_the_parameter_count_is_the_model_s(tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM

    counted = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert read_shape(parse(tmp_path, tiny_model), tiny_model).parameters == counted


def test_lora_needs_less_and_more_ranks_share(tmp_path, tiny_model):
    shape = read_shape(parse(tmp_path, tiny_model), tiny_model)
    full = estimate(parse(tmp_path, tiny_model), shape)
    assert estimate(parse(tmp_path, tiny_model, learner__lora={"rank": 4}), shape).learner < full.learner / 3
    assert estimate(parse(tmp_path, tiny_model, learner__ranks=2), shape).learner == full.learner / 2
    every = estimate(parse(tmp_path, tiny_model, pairs__strategy="all"), shape)
    assert (full.examples, every.examples) == (8, 48)
    assert estimate(parse(tmp_path, tiny_model, pairs__strategy="all", pairs__max_per_prompt=2), shape).examples == 16


def test_references_of_their_own_are_counted(tmp_path, tiny_model):
    shape = read_shape(parse(tmp_path, tiny_model), tiny_model)
    weights = 4 * shape.parameters

    def needs(**reference):
        found = estimate(parse(tmp_path, tiny_model, reference=reference, loop__rounds=9), shape)
        return round((found.disk - fixed.disk) / weights), round((found.learner - fixed.learner) / weights)

    fixed = estimate(parse(tmp_path, tiny_model, loop__rounds=9), shape)
    assert needs(kind="refresh", every=2) == needs(kind="kl", above=3) == (1, 0)
    assert needs(kind="ema", alpha=0.5) == (4, 0)  # of the 2 rounds kept, of the next, and of one before


def test_step_checkpoints_are_counted(tmp_path, tiny_model):
    shape = read_shape(parse(tmp_path, tiny_model), tiny_model)
    none, some = (estimate(parse(tmp_path, tiny_model, checkpoint__every_steps=n), shape) for n in (None, 5))
    whole = 3 * 4 * shape.parameters  # weights and two moments
    assert (some.disk - none.disk, some.learner - none.learner) == (3 * whole, whole)
    lora = {"learner__lora": {"rank": 4}, "checkpoint__every_steps": 5}
    assert estimate(parse(tmp_path, tiny_model, **lora), shape).disk < none.disk


def test_the_kv_cache_is_counted_in_the_engine_s_type(tmp_path, tiny_model):
    # 2 layers x (K and V) x 1 head of 32 x 4 bytes = 512 bytes a token, 112 tokens: 56 KiB, or half of it.
    fits_half = 40 * 2**10 / GIB
    assert read_shape(parse(tmp_path, tiny_model), tiny_model).kv_bytes_per_token == 512
    with pytest.raises(ConfigError, match="one sequence of 112 tokens"):
        make_plan(parse(tmp_path, tiny_model, generator__cpu_kv_cache_gib=fits_half))
    make_plan(parse(tmp_path, tiny_model, generator__cpu_kv_cache_gib=fits_half, generator__dtype="bfloat16"))


def test_a_judge_s_model_is_counted(tmp_path, tiny_model, monkeypatch):
    from make_tiny_model import make_tiny_model

    reward = make_tiny_model(tmp_path / "reward", kind="reward", hidden=96, max_length=512)
    judge = {"kind": "reward_model", "path": str(reward)}
    config = parse(tmp_path, tiny_model, judge=judge)
    plan = make_plan(config)
    assert plan.figures["judge"] == "reward_model, 0.2 M weights, reads 512 tokens"
    assert plan.figures["judge memory"].endswith("a process (of 1), and activations")
    shape = read_shape(config, tiny_model)
    weights = 4 * count_weights(reward)
    assert estimate(config, shape).judge == weights
    assert estimate(parse(tmp_path, tiny_model, judge={**judge, "dtype": "bfloat16"}), shape).judge == weights / 2
    pretend_memory(monkeypatch, 1 << 40, 1)
    with_it, without = (
        next(w for w in make_plan(some).warnings if w.startswith("memory"))
        for some in (config, parse(tmp_path, tiny_model))
    )
    assert "lower judge.workers" in with_it and "judge" not in without
    monkeypatch.setattr("online_po.plan._judge_memory", lambda config: float(1 << 41))
    with pytest.raises(ConfigError, match=r"judge: one process takes about 2048.0 GiB, .*judge\.dtype: bfloat16"):
        make_plan(config)


def test_a_judge_s_checkpoint_must_read_the_policy_s_tokens(tmp_path, tiny_model):
    from make_tiny_model import make_tiny_model

    start, trained = (make_tiny_model(tmp_path / str(seed), seed=seed, vocab=300) for seed in (0, 1))
    judge = {"kind": "implicit", "path": str(trained), "reference": str(start)}
    assert make_plan(parse(tmp_path, start, judge=judge)).figures["judge"].startswith("implicit, 0.1 M + 0.1 M weights")
    with pytest.raises(ConfigError, match=r"whose tokenizer is not the policy's \(model\.path\)"):
        make_plan(parse(tmp_path, tiny_model, judge=judge))


def pretend_memory(monkeypatch, total, available):
    monkeypatch.setattr("online_po.plan.memory", lambda: Memory(total=total, available=available))


def test_too_little_memory_is_an_error_and_memory_in_use_a_warning(tmp_path, tiny_model, monkeypatch):
    config = parse(tmp_path, tiny_model)
    need = estimate(config, read_shape(config, tiny_model))
    enough = int(need.learner + need.generator) + 1
    pretend_memory(monkeypatch, enough, enough)
    assert not make_plan(config).warnings
    pretend_memory(monkeypatch, enough, enough - 2)
    assert [w.split(":")[0] for w in make_plan(config).warnings] == ["memory"]
    pretend_memory(monkeypatch, int(need.generator) - 1, enough)
    with pytest.raises(ConfigError, match=r"generator: one engine takes about .* lower generator.cpu_kv_cache_gib"):
        make_plan(config)
    engine = parse(tmp_path, tiny_model, generator={"max_tokens": 16, "engine": "transformers"})
    pretend_memory(monkeypatch, int(need.learner) - 1, enough)
    with pytest.raises(ConfigError, match=r"learner: one rank takes about .* set learner.lora, or"):
        make_plan(engine)
    monkeypatch.setattr("online_po.plan.on_cpu", lambda config: False)
    assert not make_plan(engine).warnings


def test_settings_without_effect_are_told(tmp_path, tiny_model, monkeypatch):
    def warnings(**overrides):
        return make_plan(parse(tmp_path, tiny_model, **overrides)).warnings

    assert warnings() == []
    (found,) = warnings(learner__global_batch_size=9)
    assert found.startswith("learner.global_batch_size is 9, but a round gives 8 pairs at most")
    assert warnings(learner__global_batch_size=9, pairs__strategy="all") == []
    (found,) = warnings(generator__replicas=3, generator__chunk_prompts=4)
    assert found.startswith("generator.replicas is 3,") and "2 chunks" in found and "1 stay idle" in found
    assert warnings(generator__replicas=2, generator__chunk_prompts=7) == []
    (found,) = warnings(generator__gpu_memory_utilization=0.5)
    assert "generator.gpu_memory_utilization is 0.5, which has no effect on this machine: it has no GPU" in found
    monkeypatch.setattr("online_po.plan.on_cpu", lambda config: False)
    (found,) = warnings(generator__gpu_memory_utilization=0.5)
    assert "generator.cpu_kv_cache_gib is 0.1, which has no effect on this machine: it has GPUs" in found
    assert warnings(ray__address="head:6379") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__path": "/nowhere/at/all"}, r"model.path is '/nowhere/at/all', but no such folder exists"),
        ({"model__path": "nobody/nothing"}, r"model.path is 'nobody/nothing': no such local folder, and the hub"),
        ({"prompts__path": "/nowhere.jsonl"}, r"prompts.path.*/nowhere.jsonl"),
        ({"prompts__column": "promt"}, r"prompts.column.*'promt'.*prompt"),
        ({"prompts__max_tokens": 5}, r"20 longer than prompts.max_tokens = 5: raise it"),
        ({"loop__prompts_per_round": 17}, r"loop.prompts_per_round is 17, but only 16 prompts"),
        ({"prompts__heldout_size": 20}, r"prompts.heldout_size"),
        (
            {"generator__max_tokens": 1020, "prompts__max_tokens": 96},
            r"generator.max_tokens is 1020 .* context of 1024",
        ),
        ({"generator__max_model_len": 4096}, r"generator.max_model_len is 4096, beyond .* 1,?024"),
        ({"generator__cpu_kv_cache_gib": 1e-6}, r"generator.cpu_kv_cache_gib is 1e-06, but one sequence"),
        ({"judge__kind": "python", "judge__function": "no_such_module:f"}, r"judge.function.*no_such_module"),
        ({"judge__kind": "python", "judge__function": "json:nothing"}, r"judge.function.*nothing"),
        ({"judge__kind": "python", "judge__function": "json:decoder"}, r"judge.function.*not (a function|callable)"),
    ],
)
def test_bad_input_is_named(tmp_path, tiny_model, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(parse(tmp_path, tiny_model, **overrides))


def test_constraints_are_checked_before_the_run(tmp_path, tiny_model):
    rows = [*PROMPTS, {"prompt": "q", "constraints": [{"type": "max_wrods", "n": 3}]}]
    with pytest.raises(ConfigError, match="max_wrods.*did you mean 'max_words'"):
        make_plan(parse(tmp_path, tiny_model, rows, prompts__heldout_size=0, eval__every=0))
    with pytest.raises(ConfigError, match="judge.kind: rules reads the prompt column 'constraints'"):
        make_plan(parse(tmp_path, tiny_model, [{"prompt": f"{i}"} for i in range(20)]))
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "A"}))
    with pytest.raises(ConfigError, match=r"judge.gold .*line 1: judge.kind: rules reads the prompt column"):
        make_plan(parse(tmp_path, tiny_model, judge__gold=str(gold)))
    members = [{"kind": "rules"}, {"kind": "python", "function": "tests.judges.groups:length"}]
    with pytest.raises(ConfigError, match="max_wrods"):  # the rules judge of an ensemble too
        make_plan(
            parse(
                tmp_path,
                tiny_model,
                rows,
                prompts__heldout_size=0,
                eval__every=0,
                judge={"kind": "ensemble", "members": members},
            )
        )


def test_models_that_cannot_be_used(tmp_path, tiny_model):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"model.path .* without config.json"):
        make_plan(parse(tmp_path, empty))
    no_weights = tmp_path / "no_weights"
    shutil.copytree(tiny_model, no_weights)
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        make_plan(parse(tmp_path, no_weights))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ConfigError, match="config.json is not one transformers knows"):
        make_plan(parse(tmp_path, broken))
    cut = tmp_path / "cut"
    shutil.copytree(tiny_model, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model.safetensors' is damaged or cut"):
        make_plan(parse(tmp_path, cut))


def test_a_model_that_is_no_causal_language_model(tmp_path, tiny_model):
    from make_tiny_model import make_tiny_model

    reward = make_tiny_model(tmp_path / "reward", kind="reward")
    with pytest.raises(ConfigError, match=r"model.path is '.*/reward', a LlamaForSequenceClassification: not a causal"):
        make_plan(parse(tmp_path, reward))
    settings = json.loads((tiny_model / "config.json").read_text())
    seq2seq = tmp_path / "seq2seq"
    shutil.copytree(tiny_model, seq2seq)
    settings |= {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (seq2seq / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="a T5ForConditionalGeneration: not a causal"):
        make_plan(parse(tmp_path, seq2seq))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Lm"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
    ],
)
def test_code_of_a_model_is_refused_and_never_asked_about(tmp_path, tiny_model, monkeypatch, file, change):
    own = tmp_path / "own"
    shutil.copytree(tiny_model, own)
    (own / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    (own / file).write_text(json.dumps(json.loads((own / file).read_text()) | change))
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(ConfigError, match=r"model.path is '.*/own', which needs its own code to load"):
        make_plan(parse(tmp_path, own))
    assert not (tmp_path / "executed").exists()


def test_chat_prompts_need_a_chat_template(tmp_path):
    from make_tiny_model import make_tiny_model

    plain = make_tiny_model(tmp_path / "plain", chat_template=False)
    with pytest.raises(ConfigError, match="prompts.apply_chat_template"):
        make_plan(parse(tmp_path, plain))
    assert len(make_plan(parse(tmp_path, plain, prompts__apply_chat_template=False)).train) == 16


def test_a_missing_engine_is_found_without_importing_it(tmp_path, tiny_model, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    with pytest.raises(ConfigError, match=r"vLLM is not installed.*generator.engine: transformers"):
        make_plan(parse(tmp_path, tiny_model))
    make_plan(parse(tmp_path, tiny_model, generator={"max_tokens": 16, "engine": "transformers"}))


def test_check_starts_nothing_and_exit_codes_are_kept(tmp_path, tiny_model):
    path = tmp_path / "config.yaml"
    path.write_text(parse(tmp_path, tiny_model).to_yaml())
    code = (
        "import sys, pathlib\n"
        "from online_po.cli import main\n"
        f"sys.argv = ['online-po', 'check', {str(path)!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'ray', 'vllm'} & set(sys.modules)\n"
        f"assert not pathlib.Path({str(tmp_path / 'plan')!r}).exists()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "optimizer steps" in done.stdout and "disk" in done.stdout
    command = [sys.executable, "-m", "online_po.cli", "check", str(path), "loop.round=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: loop.round: unknown key; did you mean 'rounds'?"


def with_reference(chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta):
    return -beta * (chosen_logps - rejected_logps - reference_chosen_logps + reference_rejected_logps)


def reference_without_beta(chosen_logps, reference_chosen_logps):
    return reference_chosen_logps - chosen_logps


def without_reference(chosen_logps, rejected_logps):
    return rejected_logps - chosen_logps


def with_a_mean(chosen_logps, margin_mean):
    return chosen_logps - margin_mean


def with_scores(chosen_logps, rejected_logps, chosen_scores, *, beta):
    return -beta * chosen_scores * (chosen_logps - rejected_logps)


def with_probabilities(chosen_logps, rejected_logps, preference_probabilities):
    return preference_probabilities * (rejected_logps - chosen_logps)


@pytest.mark.parametrize(
    ("function", "reference", "message"),
    [
        ("with_reference", "fixed", None),
        ("without_reference", "none", None),
        ("with_reference", "none", "reference.kind is none, but loss.function '.*' reads the reference's"),
        ("without_reference", "fixed", "loss.function '.*' reads nothing of a reference; set reference.kind: none"),
        ("with_a_mean", "none", "reads margin_mean, which a custom loss is not given"),
        ("without_refference", "none", "did you mean 'without_reference'"),
    ],
)
def test_a_loss_of_the_users_is_loaded_and_its_needs_seen(tmp_path, tiny_model, function, reference, message):
    loss = {"name": "custom", "function": f"{__name__}:{function}"}
    config = parse(tmp_path, tiny_model, loss=loss, reference={"kind": reference})
    if message is None:
        make_plan(config)
        return
    with pytest.raises(ConfigError, match=message):
        make_plan(config)


def test_what_a_loss_of_the_users_reads_must_be_given(tmp_path, tiny_model):
    path = tmp_path / "seed.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "a", "rejected": "b"}) + "\n" for i in range(30)))
    seed, spin = {"seed_path": str(path), "seed_share": 0.5}, {"strategy": "spin", "chosen_column": "gold"}
    rows = [{**row, "gold": "an answer"} for row in PROMPTS]

    def plan(function, reference="none", **sections):
        loss = {"name": "custom", "function": f"{__name__}:{function}"}
        make_plan(parse(tmp_path, tiny_model, rows, loss=loss, reference={"kind": reference}, **sections))

    plan("with_scores")
    plan("with_probabilities", judge={"bradley_terry_scale": 1})
    for function, message, sections in (
        ("with_scores", "loss.name: custom needs scores, but 30 of 30", {"pairs": seed}),
        ("with_scores", "loss.function .*with_scores' reads scores, which .* spin do not have", {"pairs": spin}),
        ("with_probabilities", "reads preference_probabilities, but judge.bradley_terry_scale is null", {}),
        (
            "with_probabilities",
            "reads preference_probabilities, but pairs of pairs.seed_path",
            {"judge": {"bradley_terry_scale": 1}, "pairs": seed},
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(function, **sections)
    plan("without_reference", pairs=spin)
    with pytest.raises(ConfigError, match="beta_control is set, but loss.function .* takes no option beta"):
        plan("reference_without_beta", "fixed", beta_control={"target_kl": 1})
    plan("with_reference", "fixed", beta_control={"target_kl": 1})


def test_shares_references_and_stops_that_never_come_are_told(tmp_path, tiny_model):
    path = tmp_path / "seed.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "a", "rejected": "b"}) + "\n" for i in range(3)))

    def warnings(**overrides):
        return make_plan(parse(tmp_path, tiny_model, **overrides)).warnings

    seed = {"seed_path": str(path)}
    for quiet in (
        {"pairs": seed | {"seed_share": 0.2, "replay_share": 0.2}},
        {"reference": {"kind": "refresh"}},
        {"eval": {"early_stop": {"patience": 2}}},
    ):
        assert warnings(**quiet) == [], quiet
    for loud, message in (
        (
            {"checkpoint": {"every_steps": 9}},
            "checkpoint.every_steps is 9, but a round makes . optimizer steps at most",
        ),
        ({"pairs": {"replay_share": 0.01}}, "pairs.replay_share is 0.01, which of 8 pairs a round is less than one"),
        ({"pairs": seed | {"seed_share": 0.01}}, "pairs.seed_share is 0.01, which of 8 pairs"),
        ({"pairs": seed | {"seed_share": 0.5}}, "pairs.seed_share is 0.5, up to 8 pairs a round, but .* has 3, and"),
        ({"reference": {"kind": "refresh", "every": 3}}, "reference.kind is refresh, but with loop.rounds = 3 the"),
        ({"eval": {"early_stop": {"patience": 3}}}, "eval.early_stop.patience is 3, but with loop.rounds = 3"),
    ):
        (found,) = warnings(**loud)
        assert re.match(message, found), found


def test_given_responses_are_checked_and_tokenised_before_anything_starts(tmp_path, tiny_model):
    rows = [{**row, "gold": "an answer", "topic": i % 3} for i, row in enumerate(PROMPTS)]
    spin = {"pairs": {"strategy": "spin", "chosen_column": "gold", "balance_column": "topic"}}
    plan = make_plan(parse(tmp_path, tiny_model, rows, **spin))
    assert plan.encode is not None and plan.seed_pairs is None
    assert plan.encode.max_length == 96 + 16
    assert plan.encode(["an answer"])[0].token_ids[-1] == plan.tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="pairs.balance_column is 'topic', but prompt 'question .*no such column"):
        make_plan(parse(tmp_path, tiny_model, **spin))
    assert make_plan(parse(tmp_path, tiny_model)).encode is None


def test_seed_pairs_are_read_and_counted_before_anything_starts(tmp_path, tiny_model):
    path = tmp_path / "seed.jsonl"
    rows = [{"prompt": f"question {i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seed = {"pairs": {"seed_path": str(path), "seed_share": 0.5}}
    config = parse(tmp_path, tiny_model, **seed)
    plan = make_plan(config)
    assert plan.seed_pairs is not None
    assert plan.seed_pairs.counts["held_out"] == 4 and plan.seed_pairs.table.num_rows == 26
    assert plan.figures["pairs"].startswith("up to 16 a round: 2") and "50% of them out of 26" in plan.figures["pairs"]
    assert plan.figures["seed pairs left out"] == "30 loaded, not used: 4 held out"
    with pytest.raises(ConfigError, match="loss.name: odpo needs scores, but 26 of 26"):
        make_plan(parse(tmp_path, tiny_model, **seed, loss={"name": "odpo"}))


def test_the_most_a_round_can_give(tmp_path, tiny_model, monkeypatch):
    shape = read_shape(parse(tmp_path, tiny_model), tiny_model)

    def most(**settings) -> int:
        return estimate(parse(tmp_path, tiny_model, **settings), shape).examples

    spin = {"strategy": "spin", "chosen_column": "gold"}
    assert most(pairs=spin) == 8 and most(pairs=spin | {"max_per_prompt": 9}) == 32
    assert most(pairs__replay_share=0.5) == 16
    assert most(loss={"name": "kto"}) == 32
    assert most(loss={"name": "kto"}, labels={"rule": "top_bottom"}) == 16
