"""A tiny policy that can be its own judge."""

from __future__ import annotations

import random
from pathlib import Path

from judges.policy import render
from judges.prompting import Prompting
from judges.questions import Question
from make_tiny_model import make_tiny_model
from online_po.judge_configs import SelfPairwise, SelfScore
from tests.judges.groups import make_group


def make_judging_model(folder: Path) -> Path:
    """A tiny policy that has learned to end with a verdict, whatever it is asked: some number or letter, drawn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    path = make_tiny_model(folder, max_length=4096)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    scoring, comparing = Prompting(SelfScore(repeats_id=False)), Prompting(SelfPairwise(repeats_id=False))
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        rows = []
        for compares in (False, True) * 2:
            prompting = comparing if compares else scoring
            texts = ["".join(rng.choices("abc def7", k=rng.randint(1, 20))) for _ in range(1 + compares)]
            group = make_group(*texts)
            about = prompting.about(group.prompt, group.responses, "")
            question = Question(prompt=group.prompt, responses=group.responses, about=about)
            wording = prompting.compare(question) if compares else prompting.score(question)
            verdict = rng.choice("AB") if compares else rng.randint(1, 10)
            asked = tokenizer(render(wording.as_text, tokenizer))["input_ids"]
            rows.append((asked, tokenizer(f"Verdict: {verdict}<|im_end|>")["input_ids"]))
        width = max(len(asked) + len(said) for asked, said in rows)
        pads = [width - len(asked) - len(said) for asked, said in rows]
        ids = torch.tensor([[0] * pad + asked + said for pad, (asked, said) in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        labels = torch.tensor([[-100] * (width - len(said)) + said for _, said in rows])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path
