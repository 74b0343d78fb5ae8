"""Seed pairs: files as TRL reads them become rows of PAIR_SCHEMA; what is no pair is refused by line and field."""

from __future__ import annotations

import json

import datasets
import pytest

from make_tiny_model import EOS, make_tiny_tokenizer
from online_po.errors import ConfigError
from online_po.given import ResponseEncoder
from online_po.prompts import load_prompts
from online_po.sections import PromptsConfig
from online_po.seed_pairs import load_seed_pairs, require_scores
from online_po.seeds import stable_id
from online_po.tables import PAIR_SCHEMA

TOKENIZER = make_tiny_tokenizer()
ROW = {"prompt": "what is it", "chosen": "this", "rejected": "that"}


def load(tmp_path, rows, held_out=(), max_length=200, name="seed.jsonl", **prompts):
    path = tmp_path / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = ResponseEncoder(TOKENIZER, apply_chat_template=True, max_length=max_length)
    config = PromptsConfig(path="p.jsonl", **prompts)
    return load_seed_pairs(str(path), config, TOKENIZER, encoder, set(held_out))


@pytest.mark.parametrize("name", ["seed.jsonl", "seed.parquet"])
def test_a_row_becomes_what_the_prompt_file_and_the_policy_would_have_made(tmp_path, name):
    scored = [{**ROW, "chosen_score": 3, "rejected_score": 1.5}]
    (row,) = load(tmp_path, scored, name=name, system="be brief").table.to_pylist()
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": ROW["prompt"]}))
    train, _ = load_prompts(PromptsConfig(path=str(tmp_path / "p.jsonl"), system="be brief"), TOKENIZER, 0)
    assert row["prompt"] == list(train[0].messages) and row["prompt_token_ids"] == list(train[0].token_ids)
    assert row["prompt_id"] == train[0].id
    assert row["chosen"] == [{"role": "assistant", "content": "this"}]
    assert row["rejected_token_ids"] == [*TOKENIZER("that")["input_ids"], EOS]
    assert (row["chosen_score"], row["rejected_score"], row["margin"]) == (3.0, 1.5, 1.5)
    assert (row["source"], row["source_round"], row["flipped"], row["policy_version"]) == ("seed", None, False, None)
    nulls = {name for name, value in row.items() if value is None}
    assert nulls == {
        *(f"{side}_{what}" for side in ("chosen", "rejected") for what in ("sampler_logp", "index", "rationale")),
        "preference_probability",
        "policy_version",
        "source_round",
    }


def test_text_and_message_forms_say_the_same(tmp_path):
    user = [{"role": "user", "content": ROW["prompt"]}]

    def said(text, before=()):
        return [*before, {"role": "assistant", "content": text}]

    forms = [
        ROW,
        {"prompt": user, "chosen": said("this"), "rejected": said("that")},
        {"prompt": ROW["prompt"], "chosen": said("this", user), "rejected": said("that", user)},
    ]
    made = load(tmp_path, forms)
    assert made.table.schema.equals(PAIR_SCHEMA)
    first, *others = made.table.to_pylist()
    assert others == [first] * 2


def test_what_cannot_be_trained_on_is_left_out_and_counted(tmp_path):
    rows = [
        ROW,
        {**ROW, "chosen": "that"},
        {**ROW, "chosen_score": 1, "rejected_score": 1},
        {**ROW, "prompt": "asked in evaluation"},
        {**ROW, "prompt": "and " * 60},
        {**ROW, "rejected": "and " * 90},
    ]
    held_out = stable_id([{"role": "user", "content": "asked in evaluation"}])
    made = load(tmp_path, rows, [held_out], max_length=100, max_tokens=50)
    assert made.counts == {"loaded": 6, "identical": 1, "tie": 1, "held_out": 1, "too_long": 2, "used": 1}
    assert made.table.num_rows == 1
    with pytest.raises(ConfigError, match=r"none of its 1 pairs can be used \(1 identical\)"):
        load(tmp_path, [rows[1]])
    with pytest.raises(ConfigError, match=r"none of its 0 pairs can be used \(it is empty\)"):
        load(tmp_path, [])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rejected": None}, "line 2 has no 'rejected', only prompt, chosen"),
        ({"prompt": " "}, "line 2: 'prompt' is empty"),
        ({"prompt": 3}, "line 2: column 'prompt' holds a int"),
        ({"chosen": 3}, "line 2: 'chosen' is neither text nor one assistant message"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "line 2: 'chosen' is neither"),
        ({"rejected": [{"role": "assistant", "content": "x"}] * 2}, "line 2: 'rejected' is neither"),
        ({"chosen_score": 1}, "line 2 has only one of chosen_score and rejected_score"),
        ({"chosen_score": "1", "rejected_score": 0}, "line 2: 'chosen_score' is '1', which is no finite number"),
        ({"chosen_score": 1, "rejected_score": 2}, "line 2: 'chosen_score' is 1, below 'rejected_score' 2"),
        ({"chosen": "\ud800"}, "line 2 holds .*surrogate"),
    ],
)
def test_what_is_no_pair_is_refused_by_line_and_field(tmp_path, bad, message):
    with pytest.raises(ConfigError, match=rf"pairs.seed_path '.*seed.jsonl', {message}"):
        load(tmp_path, [ROW, {**ROW, **bad}])


def test_files_that_are_none_are_refused(tmp_path):
    encoder = ResponseEncoder(TOKENIZER, apply_chat_template=True, max_length=99)
    for path, message in (
        (tmp_path / "none.jsonl", "is no file"),
        (tmp_path, "is no file"),
        (tmp_path / "a.csv", "is no .jsonl or .parquet"),
    ):
        if path.suffix == ".csv":
            path.write_text("prompt,chosen,rejected\n")
        with pytest.raises(ConfigError, match=rf"pairs.seed_path .* {message}"):
            load_seed_pairs(str(path), PromptsConfig(path="p"), TOKENIZER, encoder, set())
    with pytest.raises(ConfigError, match="row 1 has no 'rejected', only prompt, chosen"):
        load(tmp_path, [{"prompt": "a", "chosen": "b"}], name="seed.parquet")


def test_scores_are_asked_of_every_pair_where_a_loss_needs_them(tmp_path):
    scored = {**ROW, "chosen_score": 1, "rejected_score": 0}
    require_scores(load(tmp_path, [scored]), "s.jsonl", "odpo")
    with pytest.raises(
        ConfigError, match=r"loss.name: odpo needs scores, but 1 of 2 pairs of pairs.seed_path 's.jsonl'"
    ):
        require_scores(load(tmp_path, [scored, ROW]), "s.jsonl", "odpo")


def test_the_fingerprint_is_of_the_content(tmp_path):
    one = load(tmp_path, [ROW, {**ROW, "chosen": "other"}]).fingerprint()
    assert one == load(tmp_path, [ROW, {**ROW, "chosen": "other"}], name="moved.jsonl").fingerprint()
    assert one != load(tmp_path, [{**ROW, "chosen": "other"}, ROW]).fingerprint()
    assert (
        one
        != load(tmp_path, [{**ROW, "chosen_score": 1, "rejected_score": 0}, {**ROW, "chosen": "other"}]).fingerprint()
    )
