"""Two rounds with each judge on real parts: vLLM in a Ray actor, the judge in its own processes, the real learner; the
model behind the endpoint is served by vLLM's own OpenAI server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from judges.runtime import build_judge, close_judge, judge_groups
from make_tiny_model import make_tiny_model
from online_po.judge_configs import LlmPairwise, LlmScore, self_judges
from online_po.ledger import Ledger
from serve_vllm import NAME, serving_vllm
from tests.actors.engines import make_adapter
from tests.judges.groups import make_group
from tests.judges.plugin_package import install
from tests.judging_model import make_judging_model
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


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    """Before Ray starts: what it starts has the environment that it was started in."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TEST_KEY", KEY)
        yield


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
    with serving(made, config(made, "first", {"kind": "python", "function": "tiny_runs:reward"})):
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


# -- what the server answers ---------------------------------------------------------------------------


def ask(kind, url, *groups, **settings):
    config = kind(
        model=NAME, base_url=url.result(), api_key_env="TEST_KEY", repeats_id=False, max_tokens=32, **settings
    )
    return asyncio.run(_judge(config, groups))


async def _judge(config, groups):
    judge = build_judge(config)
    judgements = await judge_groups(judge, groups)
    await close_judge(judge)
    return judgements


def test_scores_by_schema(url):
    (judgement,) = ask(LlmScore, url, make_group("a", "bb", "ccc"), scale_max=5)
    assert set(judgement.scores) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_soft_preferences_by_the_servers_logps(url):
    judgement, *again = ask(LlmPairwise, url, *[make_group("a", "bb", "ccc")] * 2, soft=True, orders="one")
    assert [comparison.preference for comparison in judgement.comparisons] == pytest.approx(
        [comparison.preference for comparison in again[0].comparisons], abs=1e-4
    )
    assert all(0 < comparison.preference < 1 for comparison in judgement.comparisons)
    assert len({comparison.preference for comparison in judgement.comparisons}) == 3


def test_text_of_a_random_model_is_no_verdict(url):
    (judgement,) = ask(LlmScore, url, make_group("a"), answers="text", attempts=1)
    assert judgement.scores is None and judgement.failure.kind == "unparsable"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"model": "other"}, "has no judge.model = 'other'"), ({"api_key_env": "WRONG"}, r"refuses the key in $WRONG")],
)
def test_wrong_names_and_keys(url, monkeypatch, settings, message):
    monkeypatch.setenv("WRONG", "sk-wrong-key")
    config = LlmScore(**{"model": NAME, "base_url": url.result(), "api_key_env": "TEST_KEY", **settings})
    (judgement,) = asyncio.run(_judge(config, [make_group("a")]))
    assert judgement.failure.kind == "transport" and message in judgement.failure.message
    assert "sk-wrong-key" not in judgement.failure.message
