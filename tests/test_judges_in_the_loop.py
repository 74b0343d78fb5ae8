"""Two rounds with each judge on real parts: vLLM in a Ray actor, the judge in its own processes, the real learner."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from judges.policy import render
from judges.prompting import Prompting
from judges.questions import Question
from make_tiny_model import make_tiny_model
from online_po.judge_configs import SelfPairwise, SelfScore, self_judges
from online_po.ledger import Ledger
from serve_vllm import NAME, serving_vllm
from tests.actors.engines import make_adapter
from tests.judges.groups import make_group
from tests.judges.plugin_package import install
from tiny_runs import Bench, serving

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

KEY = "sk-on-loopback-only"
ANY = {"preflight": {"min_accuracy": 0.0}}
ENDPOINT = {"model": NAME, "base_url": "URL", "api_key_env": "TEST_KEY", "repeats_id": False, "max_tokens": 32}
SELF = {"repeats_id": False, "temperature": 1.0, "max_tokens": 24, "max_failure_rate": 0.6}
JUDGES: dict[str, dict[str, Any]] = {
    "plugin": {"kind": "plugin", "name": "length", "options": {"factor": 2.0}},
    "reward_model": {"kind": "reward_model", "path": "REWARD", **ANY},
    "comparing reward_model": {"kind": "reward_model", "path": "COMPARING", "compares": True, **ANY},
    "implicit": {"kind": "implicit", "path": "ADAPTER", "reference": "MODEL", **ANY},
    "llm_score": {"kind": "llm_score", "temperature": 1.0, "workers": 2, **ENDPOINT, **ANY},
    "llm_pairwise": {"kind": "llm_pairwise", "orders": "one", "rank": "tournament", **ENDPOINT, **ANY},
    "self_score, start": {"kind": "self_score", "policy": "start", **SELF, **ANY},
    "self_score, 1": {"kind": "self_score", "policy": 1, **SELF, **ANY},
    "self_pairwise": {"kind": "self_pairwise", **SELF, **ANY},
    "ensemble": {
        "kind": "ensemble",
        "combine": "majority",
        "members": [
            {"kind": "python", "function": "tiny_runs:reward", "weight": 2.0},
            {"kind": "implicit", "path": "ADAPTER", "reference": "MODEL"},
            {"kind": "llm_pairwise", **ENDPOINT},
        ],
    },
}
"""Words in capitals stand for what the fixture `places` has."""


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


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[Future[str]]:
    """Of vLLM's own server, once it is there. The judge is a random model: by JSON schema even that gives a verdict,
    some verdict."""
    folder = tmp_path_factory.mktemp("server")
    model = make_tiny_model(folder / "model", seed=5, max_length=4096)
    with ExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(1))
        yield executor.submit(stack.enter_context, serving_vllm(model, folder / "log", key=KEY))


@pytest.fixture(scope="module")
def bench(url, tmp_path_factory, one_thread) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    made = Bench(folder=folder, model=make_judging_model(folder / "model"))
    first = config(made, "first", {"kind": "python", "function": "tiny_runs:reward"})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TEST_KEY", KEY)  # what Ray starts has the environment that it was started in
        with serving(made, first):
            yield made


@pytest.fixture(scope="module")
def places(bench, url, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("judges")
    return {
        "MODEL": str(bench.model),
        "ADAPTER": str(make_adapter(bench.model, folder / "adapter", 1).path),
        "REWARD": str(make_tiny_model(folder / "reward", kind="reward")),
        "COMPARING": str(make_tiny_model(folder / "comparing", kind="reward", seed=2)),
        "URL": url.result(),
    }


def config(bench: Bench, name: str, judge: dict[str, Any]) -> Any:
    return bench.config(
        name,
        prompts={"heldout_size": 4},
        loop={"rounds": 2, "prompts_per_round": 8, "responses_per_prompt": 3},
        generator={"max_tokens": 12, "chunk_prompts": 4, "max_model_len": 2048},
        judge=judge,
        learner={"learning_rate": 1e-5, "global_batch_size": 4, "epochs": 1},
        eval={"every": 2, "responses_per_prompt": 1},
    )


def filled(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    return places.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("name", JUDGES)
def test_two_rounds(name, bench, places, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path))
    made = config(bench, name.replace(", ", "-").replace(" ", "-"), filled(JUDGES[name], places))
    with bench.judged_by(made):
        ledger = bench.run(made)
    assert ledger.last_committed() == 2
    for round_ in (1, 2):
        judgements = [j for part in range(2) for j in ledger.judgements(round_, part)]
        labelled = [judgement for judgement in judgements if judgement.scores is not None]
        assert len(judgements) == 8 and len(labelled) >= (4 if self_judges(made.judge) else 8)
        assert any(len(set(judgement.scores)) > 1 for judgement in labelled)
        assert all((judgement.comparisons is not None) == made.judge.pairwise for judgement in labelled)
        assert ledger.round_row(round_)["pairs"] > 0
        assert ledger.round_row(round_)["judge_calls"] > 0
    assert (ledger.judge_trial(0) is not None) == made.judge.general
    assert ledger.evaluation_summary(2)["against_start"] == made.judge.relative
    assert_no_key(ledger)


def assert_no_key(ledger: Ledger) -> None:
    written = (path for path in ledger.root.rglob("*") if path.is_file())
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
