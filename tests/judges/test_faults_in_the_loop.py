"""A round whose judge is an endpoint that fails at 30% of its requests, in every way it can: what could be judged is,
nothing else becomes a label, and no good answer is paid twice."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from pathlib import Path

import pytest

from judges import asking
from judges.runtime import LocalJudgePool
from online_po.judge_cache import judge_statistics
from online_po.loop import run_rounds
from online_po.parts import Parts
from online_po.report import render
from online_po.run_view import load_run_view
from online_po.types import Group, Judgement
from tests.fakes import make_config
from tests.judges.chat_server import Asked, Sent, Server, serving
from tests.test_loop import make_parts

ROUNDS, PROMPTS = 2, 20
SLOW_S = 4.0
TRANSIENT = {
    "429": Sent(status=429, headers={"Retry-After": "0.01"}, body='{"error": {"message": "slow down"}}'),
    "500": Sent(status=500, body='{"error": {"message": "oops"}}'),
    "503, no JSON": Sent(status=503, body="<html>down for maintenance</html>"),
    "cut": Sent("Verdict: 3", cut=True),
    "slow": Sent("Verdict: 3", after_s=SLOW_S),
    "malformed": Sent(body='{"id": "x", "choices": [{"message": {"content": '),
    "no choices": Sent(body='{"id": "x", "choices": []}'),
    "empty": Sent(""),
    "half": Sent('{"verd', finish_reason="length"),
    "no verdict": Sent("Both have their merits, and I would rather not say."),
    "out of range": Sent("1000"),
    "another id": Sent("7"),
}
FINAL = {
    "refusal": Sent(None, message={"refusal": "I cannot judge that."}),
    "content filter": Sent("", finish_reason="content_filter"),
}
FAULTS = {**TRANSIENT, **FINAL}


def score(text: str) -> int:
    return 1 + sum(map(ord, text)) % 10


class FaultyModel:
    """Answers rightly, or fails: which and how is drawn from the question and how often it was asked."""

    def __init__(self, share: float) -> None:
        self.share, self.lock = share, threading.Lock()
        self.asked: Counter[tuple[str, str]] = Counter()
        """By prompt and response."""
        self.paid: Counter[tuple[str, str]] = Counter()
        """Right answers."""
        self.served: Counter[str] = Counter()
        self.declined: set[tuple[str, str]] = set()

    def __call__(self, asked: Asked) -> Sent | str:
        prompt, response = question = tuple(asked.blocks)
        with self.lock:
            self.asked[question] += 1
            drawn = hashlib.sha256(f"{prompt} {response} {self.asked[question]}".encode()).digest()
            if int.from_bytes(drawn[:4]) >= self.share * 2**32:
                self.paid[question] += 1
                return asked.verdict(score(response))
            fault = list(FAULTS)[int.from_bytes(drawn[4:8]) % len(FAULTS)]
            self.served[fault] += 1
            if fault in FINAL:
                self.declined.add(question)
        if fault == "out of range":
            return asked.verdict(1000)
        if fault == "another id":
            return Sent(asked.verdict(3).replace(asked.id or "?", "000000"))
        return FAULTS[fault]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits as always, only shorter."""
    monkeypatch.setattr(asking, "_backoff", lambda state: 0.02 * state.attempt_number)


def parts_of(folder: Path, server: Server) -> Parts:
    judge = {
        "kind": "llm_score",
        "model": "judge",
        "base_url": server.url,
        "api_key_env": None,
        "timeout_s": SLOW_S / 2,
        "max_failure_rate": 1.0,
        "attempts": 12,
        "prompt_price": 1.0,
        "response_price": 2.0,
    }
    loop = {"rounds": ROUNDS, "prompts_per_round": PROMPTS, "responses_per_prompt": 3}
    config = make_config(folder, loop=loop, judge=judge, eval={"every": 0}, prompts={"path": "p"})
    parts = make_parts(config, heldout=0)
    parts.judges = LocalJudgePool(config.judge, parts.ledger.judge_cache)
    return parts


def judged(parts: Parts) -> list[tuple[Group, Judgement]]:
    """Every group of the run with its judgement, out of the ledger."""
    ledger, size, found = parts.ledger, parts.config.generator.chunk_prompts, []
    for round_ in range(1, ROUNDS + 1):
        prompts = ledger.prompts(round_)
        for part, begin in enumerate(range(0, len(prompts), size)):
            groups = ledger.responses(round_, part, prompts[begin : begin + size])
            found += zip(groups, ledger.judgements(round_, part), strict=True)
    return found


def test_every_judgement_that_could_be_had_and_no_other(tmp_path):
    model = FaultyModel(0.3)
    with serving(model) as server:
        parts = parts_of(tmp_path, server)
        run_rounds(parts)
        parts.judges.close()
        found = judged(parts)
        failures = Counter(judgement.failure.kind for _, judgement in found if judgement.failure)
        assert len(found) == ROUNDS * PROMPTS and len(found) // 2 < len(found) - failures.total() < len(found)
        assert set(model.served) == set(FAULTS), "every fault was there"
        # No label but what the judge said; no failure but where it declined for good.
        for group, judgement in found:
            questions = {(group.prompt.messages[-1]["content"], response.text) for response in group.responses}
            assert (judgement.failure is not None) == bool(questions & model.declined)
            assert judgement.scores is None or [*judgement.scores] == [score(r.text) for r in group.responses]
        assert set(failures) == {"refusal"}
        assert max(model.paid.values()) == 1, "a good answer is paid once"
        took = [judge_statistics(parts.ledger.judge_cache, round_) for round_ in range(1, ROUNDS + 1)]
        calls, failed = (sum(r["calls"] for r in took), sum(sum(r["failed_calls"].values()) for r in took))
        # Some calls never arrive: a server that cuts and stalls has full queues.
        assert calls - failed == model.paid.total() and calls >= model.asked.total()
        page = render(load_run_view(parts.ledger.root))
        assert "What judging took" in page and f'<td class="num">{took[0]["calls"]}</td>' in page
        assert all(f"{count} x {kind}" in page for kind, count in took[1]["failed_calls"].items())

        # Once the endpoint is well, only what it declined is asked again.
        model.share, before = 0.0, model.asked.copy()
        pool = LocalJudgePool(parts.config.judge, parts.ledger.judge_cache)
        again = pool.submit([group for group, _ in found], ROUNDS + 1).result()
        pool.close()
        for (group, _), judgement in zip(found, again, strict=True):
            assert judgement.scores is not None and [*judgement.scores] == [score(r.text) for r in group.responses]
        assert set(model.asked - before) == model.declined and max(model.paid.values()) == 1
