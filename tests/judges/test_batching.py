"""The batcher: what waits goes together, sorted, within the budget; each gets its own answer."""

from __future__ import annotations

import asyncio
import threading

import pytest

from judges.batching import Batcher
from judges.protocol import JudgeError


class Model:
    """Says a text's length; keeps what it was given. Holds its first batch until `gate` is set."""

    def __init__(self, open_: bool = True) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        if open_:
            self.gate.set()

    def run(self, texts: list[str]) -> list[int]:
        self.batches.append(texts)
        assert self.gate.wait(30)
        if "bad" in texts:
            raise RuntimeError("no memory")
        return [len(text) for text in texts]


def ask_all(model: Model, texts: list[str], tokens: int | None) -> list[int | BaseException]:
    async def main():
        batcher = Batcher(model.run, len, tokens)
        try:
            return await asyncio.gather(*map(batcher.ask, texts), return_exceptions=True)
        finally:
            batcher.close()

    return asyncio.run(main())


def test_batches_are_sorted_and_within_the_budget():
    model = Model()
    texts = ["aa", "a" * 30, "a" * 7, "a" * 8, "aaa", "a"]
    assert ask_all(model, texts, 16) == [2, 30, 7, 8, 3, 1]
    assert [[len(text) for text in batch] for batch in model.batches] == [[30], [8, 7], [3, 2, 1]]


def test_without_a_budget_all_that_waits_is_one_batch():
    model = Model()
    assert ask_all(model, ["a", "bbb", "cc"], None) == [1, 3, 2]
    assert model.batches == [["bbb", "cc", "a"]]


def test_what_comes_while_a_batch_runs_goes_together():
    model = Model(open_=False)

    async def main():
        batcher = Batcher(model.run, len, None)
        first = asyncio.create_task(batcher.ask("first"))
        while not model.batches:
            await asyncio.sleep(0.001)
        later = [asyncio.create_task(batcher.ask(text)) for text in ("b", "cc")]
        gone = asyncio.create_task(batcher.ask("nobody waits for this"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        model.gate.set()
        assert await asyncio.gather(first, *later) == [5, 1, 2]
        batcher.close()

    asyncio.run(main())
    assert model.batches == [["first"], ["cc", "b"]]


def test_a_batch_that_fails_fails_its_own_questions_only():
    model = Model()
    found = ask_all(model, ["a" * 20, "bad", "okay"], 10)
    assert found[0] == 20
    assert [(type(error), error.kind, str(error)) for error in found[1:]] == [
        (JudgeError, "error", "RuntimeError: no memory")
    ] * 2
    with pytest.raises(JudgeError):
        raise found[1]
