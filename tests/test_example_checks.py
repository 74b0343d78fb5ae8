"""What sections pairs and labels ask of the rest of the config, and of the prompts."""

from __future__ import annotations

import pytest

from online_po.config import Config
from online_po.errors import ConfigError
from online_po.example_checks import check_prompt_columns
from online_po.types import Prompt
from tests.fakes import make_config

REFERENCE_FREE = {"name": "simpo"}
KTO = {"loss": {"name": "kto"}}
SPIN = {"pairs__strategy": "spin", "pairs__chosen_column": "gold"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs__strategy": "spin"}, "pairs.chosen_column must name the column"),
        ({"pairs__chosen_column": "gold"}, "pairs.chosen_column is for pairs.strategy: spin, not best_worst"),
        ({**SPIN, "pairs__min_margin": 0.1}, "pairs.min_margin has no effect with pairs.strategy: spin"),
        ({**SPIN, "pairs__flip_rate": 0.1}, "pairs.flip_rate has no effect with pairs.strategy: spin"),
        ({**SPIN, "loss": {"name": "odpo"}}, "loss.name: odpo needs scores, .* pairs.strategy: spin"),
        ({"pairs__seed_path": "s.jsonl"}, "both pairs.seed_path and a pairs.seed_share above 0"),
        ({"pairs__seed_share": 0.5}, "both pairs.seed_path and a pairs.seed_share above 0"),
        (
            {"pairs": {"seed_path": "s.jsonl", "seed_share": 0.5, "replay_share": 0.5}},
            "pairs.replay_share is 0.5 and pairs.seed_share is 0.5: nothing is left",
        ),
        ({"pairs__replay_rounds": 2}, "pairs.replay_rounds is 2, .* only with pairs.replay_share"),
        ({"pairs__balance_ratio": 2}, "pairs.balance_ratio is 2, .* only with pairs.balance_column"),
        ({"pairs__replay_share": 0.5, "loop__rounds": 1}, "pairs.replay_share is 0.5, but loop.rounds is 1"),
        ({"pairs__flip_rate": 0.5}, "pairs.flip_rate"),
        ({"pairs__max_length_ratio": 0.5}, "pairs.max_length_ratio"),
        ({"pairs": {"strategy": "hardest", "max_per_prompt": 2}}, "pairs.max_per_prompt is for"),
        ({"labels": {"rule": "top_bottom"}}, "labels.rule is 'top_bottom', but loss.name: sigmoid trains on pairs"),
        ({"loss": [{"name": "sigmoid"}, {"name": "kto"}]}, r"loss mixes sigmoid \(paired\) and kto \(unpaired\)"),
        (
            {"generator__temperature": 0, **SPIN},
            "generator.temperature is 0: all 3 .* or set loop.responses_per_prompt: 1",
        ),
        ({"generator__temperature": 0}, "generator.temperature is 0: all 3 responses .* would be the same; raise it$"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs__strategy": "hardest"}, "pairs.strategy is 'hardest', but loss.name: kto trains on single"),
        ({"pairs": {"strategy": "spin", "chosen_column": "g"}}, "pairs.strategy is 'spin', but loss.name: kto"),
        ({"pairs": {"seed_path": "s.jsonl", "seed_share": 0.1}}, "pairs.seed_path is .*, but loss.name: kto"),
        ({"pairs__min_margin": 0.1}, "pairs.min_margin is 0.1, but loss.name: kto"),
        ({"pairs__max_length_ratio": 2}, "pairs.max_length_ratio is 2"),
        ({"loop__responses_per_prompt": 1}, "labels.rule: group_mean compares .* use 2 or more"),
        ({"labels": {"share": 0.5}}, "labels.share is 0.5, .* only with labels.rule: top_bottom"),
        ({"loss": [{"name": "kto"}, {"name": "sft"}]}, "loss mixes kto"),
    ],
)
def test_what_does_not_fit_labels_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **{**KTO, **settings})


def test_what_lies_beside_a_refusal_passes(tmp_path):
    one = {"loop": {"prompts_per_round": 8, "responses_per_prompt": 1}}
    assert make_config(tmp_path, **SPIN, **one, generator__temperature=0).example_kind == "pairs"
    config = make_config(tmp_path, **KTO, **one, labels={"rule": "threshold", "threshold": 0.5})
    assert config.example_kind == "labels"
    for_both = {"replay_share": 0.2, "replay_rounds": 2, "balance_column": "d", "balance_ratio": 2, "flip_rate": 0.1}
    make_config(tmp_path, **KTO, pairs=for_both, labels={"rule": "top_bottom", "share": 0.5})
    make_config(tmp_path, loss=[{"name": "kto"}, {"name": "bco"}])
    make_config(tmp_path, pairs=for_both | {"seed_path": "s.jsonl", "seed_share": 0.3}, loss={"name": "odpo"})


def test_reward_gaps_that_are_always_zero_are_refused(tmp_path):
    def parse(**settings) -> Config:
        return make_config(tmp_path, pairs__strategy="hardest_reward", **settings)

    refresh = {"kind": "refresh", "every": 1}
    for settings in ({"reference": refresh}, {"loop__rounds": 1}, {"reference": {"kind": "ema", "alpha": 1}}):
        with pytest.raises(ConfigError, match="pairs.strategy is hardest_reward, but in every round"):
            parse(**settings)
    parse()
    parse(reference={"kind": "refresh", "every": 2})
    parse(reference={"kind": "ema", "alpha": 0.9})
    parse(reference={"kind": "kl", "above": 1})
    parse(reference=refresh, loop__max_staleness=1)
    parse(loss=REFERENCE_FREE)
    parse(loss=REFERENCE_FREE, loop__rounds=1)


def test_where_seed_pairs_lie_is_no_part_of_the_identity(tmp_path):
    def identity(path: str, share: float) -> dict:
        return make_config(tmp_path, pairs={"seed_path": path, "seed_share": share}).identity()

    assert identity("a.jsonl", 0.5) == identity("b.jsonl", 0.5) != identity("a.jsonl", 0.4)


def prompts(*metadata: dict) -> list[Prompt]:
    return [
        Prompt(id=str(i), messages=({"role": "user", "content": f"question {i}"},), text="", token_ids=(1,), metadata=m)
        for i, m in enumerate(metadata)
    ]


def test_columns_are_looked_for_in_every_prompt(tmp_path):
    config = make_config(tmp_path, **SPIN, pairs__balance_column="topic")
    check_prompt_columns(config, prompts({"gold": "a", "topic": None}, {"gold": "b", "topic": 3}))
    for bad, message in (
        (
            {"gold": "a", "topics": 1},
            "pairs.balance_column is 'topic', but prompt 'question 1' of prompts.path .*"
            "only 'gold', 'topics'; did you mean 'topics'",
        ),
        ({"topic": 1}, "pairs.chosen_column is 'gold', but prompt 'question 1' .* give every prompt one"),
        ({"topic": 1, "gold": None}, "pairs.chosen_column is 'gold', which holds a NoneType for prompt 'question 1'"),
        ({"topic": 1, "gold": " "}, "pairs.chosen_column is 'gold', which holds an empty text"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_prompt_columns(config, prompts({"gold": "a", "topic": 1}, bad))
