#!/usr/bin/env python3
"""Make the quickstart's prompts: everyday questions with instructions that a program can verify.

Two JSONL files, train and heldout, with the columns prompt, topic and constraints (see judges/rules.py).
Every prompt is one topic x one way to ask x one or two constraints. Which topics are held out, and
everything else, is decided by --seed; no topic is in both files. A second call finds the same content
and leaves it.

    python scripts/make_prompts.py [--out FOLDER] [--train 2000] [--heldout 96] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

HELDOUT_SHARE = 0.2
"""Share of the topics of each kind that only held-out prompts ask about."""

# Kind of topic -> (ways to ask, topics).
TOPICS: dict[str, tuple[list[str], str]] = {
    "animal": (
        ["What does {} eat?", "Describe {}.", "Where does {} live?", "Tell me one fact about {}."],
        "a cat; a dog; a horse; an owl; a penguin; a dolphin; an elephant; a honey bee; a frog; a rabbit; a squirrel; "
        "a goat; a hedgehog; a parrot; an octopus; a turtle; a fox; a wolf; a bear; a butterfly; a spider; a duck; "
        "a crow; a whale; a kangaroo; a camel; a mouse; a snail; a bat; a sheep",
    ),
    "food": (
        ["Describe the taste of {}.", "How do you make {}?", "Describe {}.", "What goes well with {}?"],
        "pizza; tomato soup; pancakes; fried rice; apple pie; an omelette; hot chocolate; a fruit salad; bread; "
        "a cheese sandwich; spaghetti; lemonade; popcorn; mashed potatoes; ice cream; green tea; vegetable curry; "
        "oatmeal; a burrito; peanut butter; pickles; honey; scrambled eggs; chicken soup; a smoothie; sushi; "
        "dumplings; yogurt; coffee; a baked potato",
    ),
    "place": (
        ["What can people do at {}?", "Describe {}.", "Why do people go to {}?", "What can you hear near {}?"],
        "the beach; a library; a train station; a farm; a museum; the zoo; a bakery; an airport; a playground; "
        "a swimming pool; a harbor; a garden center; a hospital; a cinema; a campsite; a market; a bookshop; a castle; "
        "a barber shop; a ski resort; a school; a lighthouse; a concert hall; a post office; a gym; a waterfall; "
        "a hotel; a circus",
    ),
    "activity": (
        ["Why do people enjoy {}?", "Give a tip for {}.", "How do you start {}?", "What do you need for {}?"],
        "swimming; painting; gardening; hiking; playing chess; knitting; fishing; dancing; riding a bicycle; "
        "learning a language; playing the piano; taking photos; cooking dinner; jogging; camping; singing in a choir; "
        "writing letters; birdwatching; sailing; doing yoga; building model trains; reading novels; playing football; "
        "juggling; rock climbing; stargazing; baking cookies; making pottery; collecting stamps; skating",
    ),
    "thing": (
        ["What is {} used for?", "Describe {}.", "Who needs {}?", "How do you choose {}?"],
        "an umbrella; a hammer; a backpack; a candle; a pair of scissors; a pillow; a mirror; a bicycle pump; "
        "a wooden chair; a teapot; a compass; a notebook; a bucket; a winter coat; a telescope; a guitar; a ladder; "
        "an alarm clock; a suitcase; a flashlight; a pair of boots; a kite; a broom; a toothbrush; a watering can; "
        "a lunch box; a blanket; a drum; a ruler; a sewing machine",
    ),
    "nature": (
        [
            "How would you explain {} to a child?",
            "Describe {}.",
            "What is special about {}?",
            "How do people feel about {}?",
        ],
        "rain; a rainbow; thunder; snow; the wind; the tides; fog; an earthquake; the sunrise; autumn leaves; "
        "a volcano; a full moon; frost; a desert; a flood; echoes; shadows; ocean waves; clouds; a heat wave",
    ),
}

# What to ask for, as often as it stands here; chosen and worded so that the demo model does it now and then.
RECIPES: list[tuple[str, ...]] = [
    *[("no_commas",)] * 4,
    *[("words",)] * 4,
    *[("bullet_points",)] * 4,
    *[("includes",)] * 3,
    *[("starts_with", "lowercase")] * 2,
    *[("ends_with",)] * 2,
    *[("no_commas", "bullet_points")] * 2,
    *[("words", "no_commas")] * 2,
]
WORD_RANGES = [(5, 10), (5, 12), (8, 15), (10, 20)]
PHRASES = ["The end.", "That is all."]
KEYWORDS = """
    green happy small water morning friend old red quiet sweet light warm family music window river soft bright slow
    house summer good blue strong
""".split()  # noqa: SIM905
OPENINGS = ["it is", "i think", "most people say"]


def constraint(kind: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """An instruction of a kind, with its parameters drawn, and the constraint that checks it."""
    match kind:
        case "no_commas":
            return "Do not use any commas.", {"type": kind}
        case "words":
            low, high = rng.choice(WORD_RANGES)
            return f"Answer in one sentence of {low} to {high} words.", {"type": kind, "low": low, "high": high}
        case "bullet_points":
            # Last of its prompt: the dash at the end starts the list.
            return "Answer with exactly three short bullet points:\n-", {
                "type": kind,
                "count": 3,
            }
        case "includes":
            first, second = rng.sample(KEYWORDS, 2)
            return (
                f'Answer in one sentence with the words "{first}" and "{second}".',
                {"type": kind, "keywords": [first, second]},
            )
        case "lowercase":
            return "use no capital letters.", {"type": kind}
        case "starts_with":
            phrase = rng.choice(OPENINGS)
            return f'answer in one sentence. begin with "{phrase}".', {"type": kind, "phrase": phrase}
        case "ends_with":
            phrase = rng.choice(PHRASES)
            return f'Answer in one sentence, then write "{phrase}"', {"type": kind, "phrase": phrase}
    raise ValueError(kind)


def make_prompt(kind: str, topic: str, recipe: tuple[str, ...], rng: random.Random) -> dict[str, Any]:
    """One row: prompt, topic, constraints."""
    question = rng.choice(TOPICS[kind][0]).format(topic)
    parts = [constraint(part, rng) for part in recipe]
    if recipe == ("no_commas",):
        question += " Write one or two sentences."
    if "lowercase" in recipe:
        question = question.lower()  # the model follows the prompt's own style
    return {
        "prompt": " ".join([question, *(instruction for instruction, _ in parts)]),
        "topic": topic,
        "constraints": [checked for _, checked in parts],
    }


def split_topics(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(kind, topic) pairs to train on, and those held out: HELDOUT_SHARE of every kind."""
    rng = random.Random(f"{seed} topics")
    train, heldout = [], []
    for kind, (_, text) in TOPICS.items():
        topics = [(kind, topic) for topic in text.split("; ")]
        rng.shuffle(topics)
        cut = round(len(topics) * HELDOUT_SHARE)
        heldout += topics[:cut]
        train += topics[cut:]
    return train, heldout


def make_prompts(topics: list[tuple[str, str]], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """`count` different prompts, with every recipe in its share and every topic about as often.

    Raises ValueError if the topics do not give so many.
    """
    rows: dict[str, dict[str, Any]] = {}
    queue: list[tuple[str, str]] = []
    for attempt in range(20 * count):
        if len(rows) == count:
            break
        if not queue:
            queue = rng.sample(topics, len(topics))
        row = make_prompt(*queue.pop(), RECIPES[attempt % len(RECIPES)], rng)
        rows.setdefault(row["prompt"], row)
    if len(rows) < count:
        raise ValueError(f"{len(topics)} topics gave only {len(rows)} different prompts, not {count}")
    return list(rows.values())


def write(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Writes JSONL whole or not at all; False if the file has this content already."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)  # temporary files are private
    os.replace(file.name, path)
    return True


def cache_dir() -> Path:
    """ONLINE_PO_CACHE, else ~/.cache/online-po, where the configs look."""
    if own := os.environ.get("ONLINE_PO_CACHE"):
        return Path(own)
    return Path.home() / ".cache" / "online-po"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=cache_dir() / "quickstart", help="folder (%(default)s)")
    parser.add_argument("--train", type=int, default=2000, help="training prompts (%(default)s)")
    parser.add_argument("--heldout", type=int, default=96, help="held-out prompts (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (%(default)s)")
    args = parser.parse_args()
    topics = split_topics(args.seed)
    for name, among, count in zip(("train", "heldout"), topics, (args.train, args.heldout), strict=True):
        path = args.out / f"{name}.jsonl"
        made = write(path, make_prompts(among, count, random.Random(f"{args.seed} {name}")))
        print(f"make_prompts: {'made' if made else 'already there'}: {count} prompts on {len(among)} topics, {path}")


if __name__ == "__main__":
    main()
