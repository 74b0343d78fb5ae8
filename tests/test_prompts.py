import csv
import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from make_tiny_model import make_tiny_tokenizer
from online_po.errors import ConfigError
from online_po.prompts import load_prompts
from online_po.sections import PromptsConfig

SYSTEM_REFUSED = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture
def write(tmp_path):
    def write_jsonl(rows, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write_jsonl


def load(tokenizer, path, seed=0, **settings):
    return load_prompts(PromptsConfig(path=path, **settings), tokenizer, seed)


# -- what is read ------------------------------------------------------------------------------------


def test_plain_text_and_metadata(tokenizer, write):
    rows = [{"prompt": "  what is ünï? ", "level": 3, "tags": ["a", None], "more": {"x": 1.5}}, {"prompt": "two"}]
    train, heldout = load(tokenizer, write(rows))
    assert heldout is None and len(train) == 2
    prompt = train[0]
    assert prompt.messages == ({"role": "user", "content": "  what is ünï? "},)  # not stripped
    assert prompt.metadata == {"level": 3, "tags": ["a", None], "more": {"x": 1.5}}
    assert train[1].metadata == {}
    assert train.counts["loaded"] == train.counts["used"] == 2


def test_text_and_ids_are_the_chat_template_exactly(tokenizer, write):
    messages = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "yes"}]
    messages += [{"role": "user", "content": "and now?"}]
    prompt = load(tokenizer, write([{"prompt": messages}]))[0][0]
    assert list(prompt.messages) == messages
    assert prompt.text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.text.endswith("<|im_start|>assistant\n")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompt.token_ids) == ids
    assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_system_prompt_only_where_there_is_none(tokenizer, write):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]
    train, _ = load(tokenizer, write([{"prompt": "a"}, {"prompt": own}]), system="be brief")
    assert train[0].messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "a"})
    assert list(train[1].messages) == own


def test_plain_text_without_template(write):
    tokenizer = make_tiny_tokenizer(chat_template=False)
    train, _ = load(tokenizer, write([{"prompt": "once upon a time"}]), apply_chat_template=False)
    assert train[0].text == "once upon a time"
    assert tokenizer.decode(train[0].token_ids) == "once upon a time"


@pytest.mark.parametrize("kind", ["parquet", "csv", "dataset", "saved"])
def test_other_sources_give_what_jsonl_gives(tokenizer, write, tmp_path, kind):
    rows = [{"prompt": f"line\none, {i}", "level": i, "name": f"n{i}"} for i in range(5)]
    expected, _ = load(tokenizer, write(rows))
    match kind:
        case "parquet":
            config = {"path": str(tmp_path / "p.parquet")}
            pq.write_table(pa.Table.from_pylist(rows), config["path"])
        case "csv":
            config = {"path": str(tmp_path / "p.csv")}
            with open(config["path"], "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case "dataset":
            (tmp_path / "folder").mkdir()
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "folder" / "train.parquet")
            config = {"dataset": str(tmp_path / "folder")}
        case "saved":
            import datasets

            datasets.DatasetDict({"main": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
            config = {"dataset": str(tmp_path / "saved"), "split": "main"}
    found, _ = load_prompts(PromptsConfig(**config), tokenizer, 0)
    assert list(found) == list(expected)


def test_chat_messages_in_parquet(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    pq.write_table(
        pa.Table.from_pylist([{"chat": messages, "day": datetime.date(2024, 2, 29)}]), tmp_path / "p.parquet"
    )
    train, _ = load(tokenizer, str(tmp_path / "p.parquet"), column="chat")
    assert list(train[0].messages) == messages and train[0].metadata == {"day": "2024-02-29"}


def test_csv_prompts_stay_text(tokenizer, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,n\n007,1\ntrue,2\n")
    train, _ = load(tokenizer, str(tmp_path / "p.csv"))
    assert [p.messages[0]["content"] for p in train] == ["007", "true"]
    assert [p.metadata for p in train] == [{"n": 1}, {"n": 2}]


def test_slices_and_negative_indices(tokenizer, write):
    train, _ = load(tokenizer, write([{"prompt": f"p{i}"} for i in range(5)]))
    assert train[-1] == train[4] and train[1:3] == [train[1], train[2]]
    with pytest.raises(IndexError):
        train[5]


def test_ids_name_content(tokenizer, write):
    rows = [{"prompt": "a", "x": 1, "y": 2}, {"prompt": "a", "x": 2}, {"prompt": "b", "x": 1}]
    first, _ = load(tokenizer, write(rows))
    again, _ = load(tokenizer, write([rows[2], rows[1], {"y": 2, "x": 1, "prompt": "a"}]))
    assert [p.id for p in first] == [p.id for p in again][::-1]
    assert len({p.id for p in first}) == 3


# -- what is left out --------------------------------------------------------------------------------


def test_counts_add_up(tokenizer, write):
    rows = [
        "",
        {"prompt": "a"},
        {"prompt": "a"},
        {"prompt": " \n"},
        {"prompt": None},
        {"prompt": "b" * 300},
        {"prompt": []},
    ]
    rows += [{"prompt": "c", "n": 1}, {"prompt": "c", "n": 2}, {"prompt": [{"role": "user", "content": ""}]}]
    train, _ = load(tokenizer, write(rows), max_tokens=100)
    assert train.counts == {
        "loaded": 9,
        "duplicates": 1,
        "empty": 4,
        "too_long": 1,
        "held_out": 0,
        "in_train": 0,
        "used": 3,
    }
    assert len(train) == 3
    assert train.token_counts.tolist() == [len(p.token_ids) for p in train]


def test_too_long_counts_the_template(tokenizer, write):
    path = write([{"prompt": "hello"}])
    length = len(load(tokenizer, path)[0][0].token_ids)
    assert len(load(tokenizer, path, max_tokens=length)[0]) == 1
    with pytest.raises(ConfigError, match=rf"1 longer than prompts\.max_tokens = {length - 1}"):
        load(tokenizer, path, max_tokens=length - 1)


def test_limit(tokenizer, write):
    calls = []
    config = PromptsConfig(path=write([{"prompt": f"p{i}"} for i in range(3000)]), limit=2500)
    train, _ = load_prompts(config, tokenizer, 0, lambda done, total: calls.append((done, total)))
    assert len(train) == 2500 and train[2499].messages[0]["content"] == "p2499"
    assert calls == [(1024, 2500), (2048, 2500), (2500, 2500)]


def test_all_skipped_says_why(tokenizer, write):
    with pytest.raises(ConfigError, match=r"none of its 2 prompts can be used .*2 empty: does prompts\.column"):
        load(tokenizer, write([{"prompt": ""}, {"prompt": None}]))
    with pytest.raises(ConfigError, match="holds no rows"):
        load(tokenizer, write([]))


# -- held-out prompts --------------------------------------------------------------------------------


def test_split_does_not_depend_on_file_order(tokenizer, write):
    rows = [{"prompt": f"p{i}"} for i in range(50)]
    train, heldout = load(tokenizer, write(rows), heldout_size=10)
    backwards = load(tokenizer, write(rows[::-1]), heldout_size=10)[1]
    assert {p.id for p in heldout} == {p.id for p in backwards} and len(heldout) == 10 and len(train) == 40
    assert not {p.id for p in heldout} & {p.id for p in train}
    assert (train.counts["held_out"], train.counts["used"], heldout.counts["used"]) == (10, 40, 10)
    assert {p.id for p in load(tokenizer, write(rows), seed=1, heldout_size=10)[1]} != {p.id for p in heldout}


def test_split_keeps_same_questions_together(tokenizer, write):
    rows = [{"prompt": f"p{i // 3}", "n": i} for i in range(60)]
    for seed in range(5):
        train, heldout = load(tokenizer, write(rows), seed=seed, heldout_size=15)
        assert len(heldout) == 15
        assert not {p.text for p in heldout} & {p.text for p in train}


def test_heldout_file_loses_what_is_trained_on(tokenizer, write):
    path = write([{"prompt": "a", "n": 1}, {"prompt": "b"}])
    heldout_path = write([{"prompt": "a", "n": 2}, {"prompt": "c"}, {"prompt": "c"}], "heldout.jsonl")
    train, heldout = load(tokenizer, path, heldout_path=heldout_path)
    assert len(train) == 2
    assert [p.messages[0]["content"] for p in heldout] == ["c"]
    assert (heldout.counts["loaded"], heldout.counts["in_train"], heldout.counts["duplicates"]) == (3, 1, 1)
    with pytest.raises(ConfigError, match=r"prompts\.heldout_path .*2 also in the training prompts"):
        load(tokenizer, path, heldout_path=write([{"prompt": "a"}, {"prompt": "b"}], "heldout.jsonl"))


def test_nothing_left_to_train_on(tokenizer, write):
    with pytest.raises(ConfigError, match=r"prompts\.heldout_size is 2, but .* only 2 usable"):
        load(tokenizer, write([{"prompt": "a"}, {"prompt": "b"}]), heldout_size=2)


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (['{"prompt": "a"}', '{"prompt": '], {}, r"prompts\.path '.*', line 2 is not valid JSON"),
        (["[1]"], {}, "line 1 is a JSON list"),
        (
            [{"promt": "a"}],
            {},
            r"prompts\.column is 'prompt', .*line 1 has no such column, only 'promt'; did you mean 'promt'",
        ),
        ([{"prompt": 3}], {}, "line 1: column 'prompt' holds a int"),
        ([{"prompt": ["a"]}], {}, "holds a message that is not {role, content}.* but a str"),
        ([{"prompt": [{"from": "human", "value": "a"}]}], {}, "but the keys from, value"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], {}, "with text in both"),
        ([{"prompt": [{"role": "human", "content": "a"}]}], {}, "role 'human'; roles are system"),
        (
            [{"prompt": "a"}, {"prompt": [{"role": "assistant", "content": "a"}]}],
            {},
            "line 2: the last message is the ass",
        ),
        ([{"prompt": [{"role": "user", "content": "a"}]}], {"apply_chat_template": False}, "holds chat messages, but"),
        ([{"prompt": "a"}], {"apply_chat_template": False, "system": "s"}, r"prompts\.system is set, but"),
    ],
)
def test_bad_rows(tokenizer, write, rows, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(tokenizer, write(rows), **settings)


def test_not_utf8(tokenizer, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 2 is not valid JSON: 'utf-8'"):
        load(tokenizer, str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("p.txt", "a", r"ends in '\.txt'; give a \.jsonl"),
        ("p.parquet", "no parquet", r"not a valid \.parquet file"),
        ("p.csv", "", "is empty"),
        ("p.csv", "promt,n\na,1\n", "did you mean 'promt'"),
        ("p.csv", "prompt,n\na,1,2\n", r"not a valid \.csv file"),
    ],
)
def test_bad_files(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(tokenizer, str(tmp_path / name))


@pytest.mark.parametrize(
    "row",
    [
        r'{"prompt": "half \ud83d"}',
        r'{"prompt": [{"role": "user", "content": "\ud83d"}]}',
        r'{"prompt": "a", "level": "\uDE00 first"}',
        r'{"prompt": "a", "more": {"x": ["\ud83d"]}}',
        r'{"prompt": "a", "more": {"\ud83d": 1}}',
    ],
)
def test_half_a_surrogate_pair(tokenizer, write, row):
    whole = r'{"prompt": "whole \ud83d\ude00", "level": "\ud83d\ude00"}'
    with pytest.raises(ConfigError, match=r"prompts\.path '.*', line 2 holds \\u(d83d|de00), one half of a surrogate"):
        load(tokenizer, write([whole, row]))
    assert load(tokenizer, write([whole]))[0][0].messages[0]["content"] == "whole 😀"


def test_parquet_that_is_not_utf8(tokenizer, tmp_path):
    _, offsets, data = pa.array(["good", "\u0939"]).buffers()
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, offsets, pa.py_buffer(data.to_pybytes()[:4] + b"\xed\xa0\xbd")]
    )
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=r"prompts\.path '.*': one of rows 1 to 2 holds bytes that are not UTF-8"):
        load(tokenizer, str(tmp_path / "p.parquet"))


def test_folder_as_path(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder; .*prompts\.dataset"):
        load(tokenizer, str(tmp_path))


def test_binary_metadata(tokenizer, tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "image": [b"\x00"]}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match="row 1: column 'image' holds a bytes"):
        load(tokenizer, str(tmp_path / "p.parquet"))


def test_bad_datasets(tokenizer, tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train.parquet")
    for settings, message in (
        ({"dataset": str(tmp_path), "split": "test"}, r"split 'test'\) does not load"),
        ({"dataset": str(tmp_path)}, r"prompts\.column is 'prompt', .* only 'text'"),
        ({"dataset": str(tmp_path / "missing")}, "does not load"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_prompts(PromptsConfig(**settings), tokenizer, 0)


# -- bad tokenizers ----------------------------------------------------------------------------------


def test_no_chat_template(write):
    tokenizer = make_tiny_tokenizer(chat_template=False)
    for prompt in ("a", [{"role": "user", "content": "a"}]):
        with pytest.raises(ConfigError, match=r"no chat template; set prompts\.apply_chat_template: false"):
            load(tokenizer, write([{"prompt": prompt}]))


def test_template_that_refuses(write):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = SYSTEM_REFUSED
    with pytest.raises(ConfigError, match=r"line 1: .*refuses these messages \(no system role\).*system, user"):
        load(tokenizer, write([{"prompt": "a"}]), system="s")


def test_doubled_bos(write):
    tokenizer = make_tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    with pytest.raises(
        ConfigError, match=r"begins with two '<\|endoftext\|>' tokens; take one out of the chat template"
    ):
        load(tokenizer, write([{"prompt": "a"}]))
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    assert load(tokenizer, write([{"prompt": "a"}]))[0][0].token_ids.count(tokenizer.bos_token_id) == 1
