#!/usr/bin/env python3
"""Make a tiny reward model that has learned something: offline, on the CPU, in seconds.

A tiny Llama with a one-number head (scripts/make_tiny_model.py) is trained by the Bradley-Terry loss on synthetic
pairs: of two texts of random tokens the one with the larger share of lower-case letters and spaces is the better. Its
accuracy on pairs that it has not seen is printed.

    python scripts/make_reward_model.py FOLDER [--seed 0] [--steps 200]
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

from make_tiny_model import make_tiny_model

Pair = tuple[str, str, str]
"""(question, better response, worse response)."""


def true_reward(text: str) -> float:
    """The share of lower-case letters and spaces among a text's first 40 characters (short ones count as 8)."""
    head = text[:40]
    return sum(c.islower() or c == " " for c in head) / max(8, len(head))


def make_pairs(tokenizer: Any, count: int, seed: int) -> list[Pair]:
    """Pairs of texts of up to 24 random tokens, as an untrained tiny policy writes them, some with many letters."""
    rng = random.Random(seed)
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    usable = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    letters = [i for i in usable if all(c.islower() or c == " " for c in pieces[i])]

    def text() -> str:
        share = rng.random()
        ids = [rng.choice(letters if rng.random() < share else usable) for _ in range(rng.randint(0, 24))]
        return tokenizer.decode(ids)

    pairs: list[Pair] = []
    while len(pairs) < count:
        better, worse = sorted((text(), text()), key=true_reward, reverse=True)
        if true_reward(better) > true_reward(worse):
            pairs.append((f"say something about number {rng.randrange(1000)}", better, worse))
    return pairs


def make_reward_model(path: str | os.PathLike[str], *, seed: int = 0, steps: int = 200, batch: int = 24) -> float:
    """Writes a trained reward model to `path`; returns its accuracy on 200 held-out pairs."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    make_tiny_model(path, kind="reward", seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)

    def rewards(pairs: list[Pair], which: int) -> torch.Tensor:
        """(B,) of the better (1) or worse (2) responses."""
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[which]}], tokenize=False
            )
            for pair in pairs
        ]
        return model(**tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")).logits[:, 0]

    train, held_out = make_pairs(tokenizer, steps * batch, seed), make_pairs(tokenizer, 200, seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        pairs = train[step * batch : (step + 1) * batch]
        loss = -torch.nn.functional.logsigmoid(rewards(pairs, 1) - rewards(pairs, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        model.eval()
        accuracy = (rewards(held_out, 1) > rewards(held_out, 2)).float().mean().item()
    model.save_pretrained(path)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200, help="of 24 pairs each (%(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    accuracy = make_reward_model(args.path, seed=args.seed, steps=args.steps)
    print(f"{args.path}: right on {accuracy:.0%} of 200 held-out pairs")


if __name__ == "__main__":
    main()
