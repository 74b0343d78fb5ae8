import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from judges.rules import validate_constraints
from make_prompts import RECIPES, TOPICS, make_prompts, split_topics

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_prompts.py"


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--train", "300", "--heldout", "60", *arguments]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    run(path)
    return path


def test_no_topic_on_both_sides(folder):
    train, heldout = read(folder / "train.jsonl"), read(folder / "heldout.jsonl")
    assert (len(train), len(heldout)) == (300, 60)
    assert not {row["topic"] for row in train} & {row["topic"] for row in heldout}
    assert len({row["prompt"] for row in train + heldout}) == 360


def test_every_prompt_names_its_topic_and_can_be_judged(folder):
    for row in read(folder / "train.jsonl") + read(folder / "heldout.jsonl"):
        assert set(row) == {"prompt", "topic", "constraints"}
        assert row["topic"].lower() in row["prompt"].lower()
        validate_constraints(row)


def test_recipes_come_in_their_shares(folder):
    for name in ("train", "heldout"):
        rows = read(folder / f"{name}.jsonl")
        made = collections.Counter(tuple(c["type"] for c in row["constraints"]) for row in rows)
        for recipe, count in collections.Counter(RECIPES).items():
            assert made[recipe] / len(rows) == pytest.approx(count / len(RECIPES), abs=0.03)


def test_same_seed_same_files_and_a_second_call_leaves_them(folder, tmp_path):
    run(tmp_path)
    stamp = (tmp_path / "train.jsonl").stat().st_mtime_ns
    assert run(tmp_path).count("already there") == 2
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == stamp
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    run(tmp_path, "--seed", "1")
    assert (tmp_path / "train.jsonl").read_bytes() != (folder / "train.jsonl").read_bytes()


def test_many_different_topics():
    topics = [topic for _, text in TOPICS.values() for topic in text.split("; ")]
    assert len(topics) == len(set(topics)) >= 150
    train, heldout = split_topics(0)
    assert sorted(topic for _, topic in train + heldout) == sorted(topics)
    assert {kind for kind, _ in heldout} == set(TOPICS)


def test_more_than_there_are():
    import random

    with pytest.raises(ValueError, match="1 topics gave only"):
        make_prompts([("animal", "a cat")], 2300, random.Random(0))
