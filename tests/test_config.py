"""Config: what is refused, and how it is said."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from online_po.config import Config
from online_po.errors import ConfigError
from online_po.ledger import Ledger
from online_po.types import Probe, Reference
from online_po.yaml_text import load_yaml

BASE = {
    "run": {"name": "x"},
    "model": {"path": "model"},
    "prompts": {"path": "p.jsonl", "heldout_size": 4},
}


def write(tmp_path: Path, data: object = BASE) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.learning_rte=1", "learner.learning_rte: unknown key; did you mean 'learning_rate'?"),
        ("learnr.ranks=1", "learnr: unknown key; did you mean 'learner'?"),
        ("learner.lora.rnk=3", "learner.lora.rnk: unknown key; did you mean 'rank'?"),
        ("loop.rounds=a", "loop.rounds: .*integer.*got 'a'"),
        ("loop.rounds=0", "loop.rounds: .*greater than or equal to 1.*got 0"),
        ("learner.ranks=3", "learner.global_batch_size is 32, which learner.ranks = 3 does not divide"),
        ("loop.responses_per_prompt=1", "loop.responses_per_prompt is 1, .* use 2 or more"),
        ("generator.max_model_len=100", "generator.max_model_len is 100, below .* = 1536"),
        ("generator.temperature=0", "generator.temperature is 0"),
        ("loop.max_staleness=3", "loop.max_staleness is 3 but loop.rounds is 3"),
        ("judge.kind=python", "judge.function: required, but not given"),
        ("judge.function=a:b", "judge.function is for judge.kind: python; drop it"),
        ("judge.budget.calls=5", "judge.budget has no effect with judge.kind: rules, which calls nobody"),
        ("judge.kind=python judge.function=a:b judge.budget.money=1", "calls of judge.kind: python have no price"),
        (
            "judge.kind=reward_model judge.path=x judge.concurrency=3",
            "judge.concurrency has no effect with .* reward_m",
        ),
        (
            "judge.preflight.min_accuracy=0.9",
            r"judge.preflight has no effect: judge.kind: rules .* give judge.gold, or drop it",
        ),
        (
            "judge.kind=llm_score judge.model=m judge.preflight.min_consistency=0.5",
            "judge.preflight.min_consistency is 0.5, but has an effect only with .* both orders",
        ),
        ("judge.kind=llm_score judge.model=m judge.budget.money=1", "judge.prompt_price and judge.response_price must"),
        (
            "judge={kind: ensemble, budget: {money: 1}, members: [{kind: python, function: 'a:b'}, {kind: rules}]}",
            "judge.budget counts money, so members behind an endpoint need prices",
        ),
        ("eval.temperature=0 eval.responses_per_prompt=2", "eval.responses_per_prompt is 2, but at temperature 0"),
        ("judge=rules", "judge is 'rules', but it is a section; give keys below it"),
        (
            "judge.kind=llm_score judge.model=m judge.prompt_price=0 judge.response_price=0 judge.budget.money=1",
            "judge.prompt_price and judge.response_price must be given .* not both be 0",
        ),
        (
            "judge.kind=llm_score judge.model=m judge.prompt_price=1 judge.response_price=10 judge.budget.money=0.005",
            "judge.budget.money is 0.005, less than the 0.00512 that one answer of judge.max_tokens = 512 may cost",
        ),
        (
            "judge.kind=llm_score judge.model=m judge.budget.calls=5 judge.budget.calls_per_round=6",
            "judge.budget.calls_per_round is 6, above judge.budget.calls = 5",
        ),
        (
            "judge.kind=llm_score judge.model=m judge.preflight.min_consistency=0.8",
            "judge.preflight.min_consistency is 0.8, but has an effect only with judges that are shown pairs in both",
        ),
        (
            "judge.kind=llm_pairwise judge.model=m judge.orders=one judge.preflight.min_consistency=0.8",
            "judge.preflight.min_consistency is 0.8, but has an effect only with",
        ),
        ("judge.preflight.min_accuracy=0.9", "judge.preflight has no effect: judge.kind: rules .* give judge.gold"),
        ("judge.kind=python judge.function=mod", "judge.function is 'mod'; write it as module:function"),
        (
            "judge.kind=self_score judge.policy=0",
            "^judge.policy is 0; write current, start, or a round's number[^\n]*$",
        ),
        ("judge.preflight.gold=x", "judge.preflight.gold: unknown key; known here: min_accuracy, min_consistency"),
        (
            "judge={kind: ensemble, members: [{kind: rules}, {kind: ensemble, members: []}]}",
            "^judge.members.1.kind is 'ensemble', but no ensemble is a member of another; list[^\n]*$",
        ),
        ("judge={kind: ensemble, members: [{kind: rules}, {weight: 2}]}", "^judge.members.1.kind: required[^\n]*$"),
        (
            "judge={kind: ensemble, members: [{kind: rules}, {kind: rules, wieght: 2}]}",
            "^judge.members.1.wieght: unknown key; did you mean 'weight'[^\n]*$",
        ),
        (
            "judge={kind: ensemble, members: [{kind: rules}, {kind: llm_score, model: m, samples: 2}]}",
            "^judge.members.1: judge.samples is above 1",
        ),
        ('judge={"kind":"ensemble","members":{"kind":"rules"}}', "judge.members is .*, but it is a list"),
        (
            "judge={kind: ensemble, budget: {calls: 1}, members: [{kind: rules}, {kind: rules}]}",
            "judge.budget has no effect with members of kind rules alone",
        ),
        ("reference=null", "reference is None, but it is a section; .* or leave it out"),
        ("eval.every=0", "eval.every is 0 but held-out prompts are given"),
        ("prompts.heldout_size=0", "no held-out prompts"),
        ("prompts.dataset=d", "exactly one of prompts.path and prompts.dataset"),
        ("prompts.heldout_path=h", "heldout_path or prompts.heldout_size, not both"),
        ("reference.every=2", "reference.every is 2, but it is for reference.kind: refresh and ema, not fixed"),
        ("reference.kind=kl reference.above=5 reference.every=2", "reference.every is 2, .* not kl"),
        ("reference.kind=refresh reference.alpha=0.5", "reference.alpha is 0.5, .* reference.kind: ema, not refresh"),
        (
            "reference.kind=ema reference.alpha=0.5 reference.above=3",
            "reference.above is 3, .* reference.kind: kl, not ema",
        ),
        ("reference.kind=ema", "reference.kind is ema, so reference.alpha must be given"),
        ("reference.kind=kl", "reference.kind is kl, so reference.above must be given"),
        ("reference.kind=ema reference.alpha=0", "reference.alpha: .*greater than 0"),
        ("reference.kind=ema reference.alpha=0.5 reference.every=4", "reference.every is 4, but loop.rounds is 3"),
        ("pairs.strategy=top_bottom_k pairs.k=3", "pairs.k is 3: top_bottom_k needs 2 x k"),
        ("pairs.max_per_prompt=3", "pairs.max_per_prompt is for"),
        ("learner.betas=[0.9, 1.5]", "learner.betas are"),
        ("learner.param_dtype=bfloat16", "learner.compute_dtype must be bfloat16"),
        ("run.name=a/b", "run.name: .*got 'a/b'"),
        ("loop.rounds", "not of the form section.key=value"),
        ("run.name.x=1", "run.* name is a value|override 'run.name.x=1': name is a value"),
        ("generator.tensor_parallel=2 generator.engine=transformers", "needs generator.engine: vllm"),
        ("run.keep_checkpoints=1", "^run.keep_checkpoints: unknown key; it is checkpoint.keep now$"),
        ("checkpoint.keep=1 loop.max_staleness=1", "checkpoint.keep is 1"),
        (
            "learner.param_dtype=bfloat16 learner.compute_dtype=bfloat16",
            "learner.param_dtype is bfloat16, .*float32 with learner.compute_dtype: bfloat16, or learner.lora",
        ),
        ("model.attention=flash_attention_2", "flash_attention_2, which cannot .* learner.compute_dtype: float32"),
        ("ray.address=ray://head:10001", r"ray.address is 'ray://head:10001': .*host:6379.*address: auto"),
        ("ray.learner_gpus=2", "ray.learner_gpus is 2, but a learner rank uses one GPU"),
        ("ray.generator_gpus=1.5", "ray.generator_gpus is 1.5; above 1, .* use a whole number"),
        ("ray.judge_cpus=2.5", "ray.judge_cpus is 2.5; above 1, .* use a whole number"),
        (
            "generator.tensor_parallel=2 ray.generator_gpus=1",
            "ray.generator_gpus is 1, but generator.tensor_parallel is 2",
        ),
        ("learner.ranks=2 ray.learner_gpus=0.5", "ray.learner_gpus is 0.5, but learner.ranks is 2"),
        ("learner.ranks=2 ray.generator_gpus=0.5", "ray.generator_gpus is 0.5, but learner.ranks is 2"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, override, message):
    overrides = override.split(" ") if "[" not in override else [override]
    with pytest.raises(ConfigError, match=message):
        Config.from_yaml(write(tmp_path), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.param_dtype=bfloat16", "learner.compute_dtype=bfloat16", "learner.lora.rank=8"],
        ["model.attention=flash_attention_2", "learner.compute_dtype=bfloat16"],
        ["reference.kind=ema", "reference.alpha=0.5", "reference.every=3"],
        ["reference.kind=ema", "reference.alpha=1"],
        ["reference.kind=kl", "reference.above=0.5"],
        ["ray.address=head:6379", "ray.judge_cpus=2", "ray.generator_gpus=0.5", "ray.learner_gpus=0.5"],
        ["generator.tensor_parallel=2", "ray.generator_gpus=2", "learner.ranks=2", "ray.learner_gpus=1"],
        ["learner.ranks=2", "ray.learner_gpus=1", "ray.generator_gpus=0.5"],
        ["learner.ranks=2", "ray.learner_gpus=0", "ray.generator_gpus=0"],
    ],
)
def test_what_lies_beside_a_refusal_passes(tmp_path, overrides):
    Config.from_yaml(write(tmp_path), overrides)


def test_every_fault_is_told_at_once(tmp_path):
    data = copy.deepcopy(BASE) | {"learner": {"ranks": 0, "epochs": "x"}, "los": {}}
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(write(tmp_path, data))
    assert all(name in str(caught.value) for name in ("learner.ranks", "learner.epochs", "los"))


def test_overrides_are_typed_as_the_file_is(tmp_path):
    overrides = ["learner.learning_rate=5e-6", "learner.lora.rank=8", r'generator.stop=["\n", END]', "ray.address=null"]
    config = Config.from_yaml(write(tmp_path), overrides)
    assert config.learner.learning_rate == 5e-6
    assert config.learner.lora is not None and config.learner.lora.rank == 8
    assert config.generator.stop == ("\n", "END")


def test_file_faults(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml.* cannot be read: No such file"):
        Config.from_yaml(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("run: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        Config.from_yaml(bad)
    bad.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold sections"):
        Config.from_yaml(bad)


def test_the_example_in_the_page_on_guards_is_a_config(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "guards.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    data = BASE | {"run": {"name": "x"}, "checkpoint": {"keep": 4}} | load_yaml(example, "example")
    assert Config.parse(data).guards.flat.action == "off"


def test_yaml_round_trip(tmp_path):
    changes = ["learner.lora.rank=8", "generator.stop=[x, off]", "guards.kl.action=off", "learner.eps=1e-7"]
    config = Config.from_yaml(write(tmp_path), changes)
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    assert Config.from_yaml(path) == config


def test_paths_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "/somewhere")
    config = Config.from_yaml(write(tmp_path), ["model.path=$WHERE/m", "run.dir=~/runs"])
    assert config.model.path == "/somewhere/m"
    assert config.run.dir == str(Path.home() / "runs")


def test_eval_sampling_follows_the_generator_but_for_temperature(tmp_path):
    config = Config.from_yaml(write(tmp_path), ["generator.top_p=0.9", "eval.temperature=0.2"])
    assert config.eval_sampling.top_p == 0.9 and config.eval_sampling.temperature == 0.2
    assert Config.from_yaml(write(tmp_path)).eval_sampling.temperature == 1.0


JUDGES = {
    "reward_model": "judge={kind: reward_model, path: /a}",
    "implicit": "judge={kind: implicit, path: /a, reference: /b}",
}


def test_where_content_lies_is_no_part_of_the_identity(tmp_path):
    here = Config.from_yaml(write(tmp_path), ["prompts.heldout_path=h.jsonl", "prompts.heldout_size=0"])
    moved = ["model.path=/else/m", "prompts.path=/else/p.parquet", "prompts.heldout_path=/else/h.csv"]
    there = Config.from_yaml(write(tmp_path), [*moved, "prompts.heldout_size=0"])
    hub = Config.from_yaml(
        write(tmp_path),
        ["model.path=a/b", "model.revision=main", "prompts.path=null", "prompts.dataset=c/d", "prompts.split=x"],
    )
    assert here.identity() == there.identity()
    assert hub.identity()["model"] == here.identity()["model"]
    other = Config.from_yaml(write(tmp_path), ["prompts.column=question"])
    assert other.identity() != Config.from_yaml(write(tmp_path)).identity()
    judge = "judge={kind: reward_model, path: %s, max_length: %d}"
    one, same, shorter = (
        Config.from_yaml(write(tmp_path), [judge % at]) for at in (("/a", 99), ("/b", 99), ("/a", 98))
    )
    assert one.identity() == same.identity() != shorter.identity()


def test_a_moved_run_goes_on_and_other_content_is_refused(tmp_path):
    data = copy.deepcopy(BASE) | {"run": {"name": "x", "dir": str(tmp_path)}}
    config = Config.parse(data)
    info = {"model": {"weights": {"model.safetensors": 8}}, "prompt_hashes": {"train": "a", "heldout": "b"}}
    ledger = Ledger(config.run_dir)
    ledger.begin(config, info)
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=Probe(token_ids=(1, 2), token_logps=(-1.0,)))
    moved = Config.parse(data | {"model": {"path": "/else/m"}, "prompts": {"path": "/else/p", "heldout_size": 4}})
    ledger.begin(moved, info)
    assert ledger.config().model.path == "/else/m"
    with pytest.raises(ConfigError, match="the starting model changed"):
        ledger.begin(moved, info | {"model": {"weights": {"model.safetensors": 9}}})
    with pytest.raises(ConfigError, match="the prompts changed"):
        ledger.begin(moved, info | {"prompt_hashes": {"train": "a", "heldout": "c"}})
    with pytest.raises(ConfigError, match="judge: a model or file that it reads changed"):
        ledger.begin(moved, info | {"judge_hash": "d"})


@pytest.mark.parametrize("kind", ["reward_model", "implicit"])
def test_settings_of_single_calls_are_refused_for_judges_that_take_batches(tmp_path, kind):
    for setting in ("concurrency=2", "timeout_s=5"):
        name = setting.split("=")[0]
        with pytest.raises(ConfigError, match=rf"judge\.{name} has no effect with judge\.kind: {kind}"):
            Config.from_yaml(write(tmp_path), [JUDGES[kind], f"judge.{setting}"])


def test_importing_the_package_and_its_config_loads_nothing_heavy():
    code = (
        "import sys, online_po, online_po.config\n"
        "heavy = {'torch', 'transformers', 'ray', 'vllm', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOSS = {"run": {"name": "a"}, "model": {"path": "x"}, "prompts": {"path": "p", "heldout_size": 1}}


def test_a_loss_or_a_mixture_of_them():
    def parse(loss):
        config = Config.parse(LOSS | {"loss": loss})
        assert Config.parse(yaml.safe_load(config.to_yaml())).loss == config.loss
        return [(loss.name, loss.weight) for loss in config.loss]

    assert [(loss.name, loss.beta) for loss in Config.parse(LOSS).loss] == [("sigmoid", 0.1)]
    assert parse({"beta": 0.5}) == [("sigmoid", 1.0)]
    assert parse({"name": "ipo", "average_logps": False}) == [("ipo", 1.0)]
    assert parse([{"name": "apo_zero"}, {"name": "sft", "weight": 0.25}]) == [("apo_zero", 1.0), ("sft", 0.25)]


def test_losses_without_a_reference_have_none():
    config = Config.parse(LOSS | {"loss": {"name": "simpo"}})
    assert config.reference.kind == "none" and not config.measures_kl_to_start
    assert Config.parse(LOSS | {"loss": {"name": "orpo"}, "learner": {"kl_to_start": True}}).measures_kl_to_start
    both = Config.parse(LOSS | {"loss": [{"name": "sft"}, {"name": "hinge"}]})
    assert both.reference.kind == "fixed" and both.measures_kl_to_start
    with pytest.raises(ConfigError, match=r"reference.kind is fixed, but loss.name: cpo has no use for a reference"):
        Config.parse(LOSS | {"loss": {"name": "cpo"}, "reference": {"kind": "fixed"}})
    with pytest.raises(ConfigError, match=r"reference.kind is none, but loss.name: sigmoid needs a reference"):
        Config.parse(LOSS | {"reference": {"kind": "none"}})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"name": "simgoid"}, r"^loss.name is 'simgoid', which is no loss; did you mean 'sigmoid'\?$"),
        ({"name": "rdpo", "lable_smoothing": 0.1}, r"^loss.lable_smoothing: unknown key; did you mean 'label_smoo"),
        ({"beta": 0}, r"^loss.beta.* greater than 0, or a list .*got 0"),
        (
            [{"name": "kto"}, {"name": "sft"}],
            r"^loss mixes kto .unpaired. and sft .paired.",
        ),
        ({"beta": "much"}, r"^loss.beta.*number .*got 'much'"),
        ({"name": "dpo"}, r"^loss.name is 'dpo', which is no loss; did you mean 'sigmoid'\?$"),
        ({"name": "Robust"}, r"did you mean 'rdpo'\?$"),
        ([], r"^loss is an empty list"),
        ("sigmoid", r"^loss is 'sigmoid'; write one as {name: sigmoid, beta: 0.1}"),
        (None, r"^loss is None; write one as"),
        ({"name": ["sigmoid"]}, r"^loss"),
        ([{"name": "sigmoid"}, "sft"], r"^loss is \[.*'sft'\]; write one as"),
    ],
)
def test_losses_that_cannot_be(loss, words):
    with pytest.raises(ConfigError, match=words):
        Config.parse(LOSS | {"loss": loss})


@pytest.mark.parametrize(
    "setting",
    [
        "generator.max_num_seqs=8",
        "generator.max_model_len=5000",
        "learner.micro_batch_tokens=512",
        "learner.gradient_checkpointing=true",
    ],
)
def test_a_run_that_had_too_little_memory_goes_on_with_less(tmp_path, setting):
    path = write(tmp_path)
    assert Config.from_yaml(path, [setting]).identity() == Config.from_yaml(path).identity()


def test_the_context_of_a_policy_that_judges_says_which_questions_are_too_long(tmp_path):
    asks = "judge={kind: self_score, policy: start}"
    path = write(tmp_path)
    one, other = (Config.from_yaml(path, [asks, *more]) for more in ([], ["generator.max_model_len=5000"]))
    assert one.identity() != other.identity()
