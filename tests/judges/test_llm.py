import asyncio
import itertools
import json
import math
from dataclasses import replace

import pytest

from judges.asking import Asker
from judges.chat import Reply, Token
from judges.llm import ComparingJudge, ScoringJudge
from judges.protocol import JudgeError
from judges.questions import Answer
from judges.runtime import build_judge, close_judge, judge_groups
from online_po.judge_configs import LlmPairwise, LlmScore
from online_po.types import Comparison

from .chat_server import Asked, Sent, serving
from .groups import make_group


class Model:
    """A chat model that says what a function of the question says; it keeps the questions."""

    about = ""
    varies = True

    def __init__(self, says):
        self.says = says
        self.asked = []
        self.seeds = []

    def for_group(self, group):
        return self

    async def chat(self, wording, *, seed, logps=False):
        asked = Asked({"messages": wording.as_json, "response_format": {}}, "")
        self.asked.append(asked)
        self.seeds.append(seed)
        await asyncio.sleep(0)
        said = self.says(asked)
        if isinstance(said, Reply):
            return said
        return Reply(text=said, is_json=True, prompt_tokens=5, response_tokens=2, cost=0.5)


class Notes(Asker):
    """Remembers what was answered, and tells of errors."""

    answers: list[Answer]
    errors: list[JudgeError]

    async def ask(self, question, call):
        self.__dict__.setdefault("answers", [])
        self.__dict__.setdefault("errors", [])
        try:
            self.answers.append(await call())
        except JudgeError as error:
            self.errors.append(error)
            raise
        return self.answers[-1]


def config(kind, **settings):
    return kind(model="m", api_key_env=None, attempts=1, **settings)


def score(says, *groups, asker=None, **settings):
    made, model = config(LlmScore, **settings), Model(says)
    judgements = asyncio.run(judge_groups(ScoringJudge(made, asker or Asker(made), model), groups))
    return judgements, model


def compare(says, *groups, soft=False, **settings):
    made, model = config(LlmPairwise, soft=soft, **settings), Model(says)
    judgements = asyncio.run(judge_groups(ComparingJudge(made, Asker(made), model, soft=soft), groups))
    return judgements, model


def by_length(asked):
    """Honest: the longer of two."""
    _, one, two = asked.blocks
    return asked.verdict("A" if len(one) > len(two) else "B")


def always_first(asked):
    return asked.verdict("A")


# -- scores --------------------------------------------------------------------------------------------


def test_a_score_for_each_response():
    (one, two), model = score(
        lambda asked: asked.verdict(len(asked.blocks[1])), make_group("a", "bbb", name="x"), make_group("cc", name="y")
    )
    assert (one.prompt_id, one.scores, one.rationales) == ("x", (1.0, 3.0), None) and two.scores == (2.0,)
    assert len(model.asked) == 3 and len({asked.id for asked in model.asked}) == 3


def test_samples_are_averaged_and_differ_in_their_seeds():
    verdicts = itertools.count(3)
    (judgement,), model = score(
        lambda asked: asked.verdict(next(verdicts), reasons="because"),
        make_group("a"),
        samples=3,
        temperature=1.0,
        rationale=True,
    )
    assert judgement.scores == (4.0,) and judgement.rationales == ("because\nbecause\nbecause",)
    assert len(set(model.seeds)) == 3
    again = score(
        lambda asked: asked.verdict(1, reasons="x"), make_group("a"), samples=3, temperature=1, rationale=True
    )
    assert again[1].seeds == model.seeds


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        (lambda asked: "I like it", "unparsable"),
        (lambda asked: "", "unparsable"),
        (lambda asked: asked.verdict(11), "bad_value"),
        (lambda asked: asked.verdict("A"), "bad_value"),
        (lambda asked: asked.verdict(5).replace(asked.id, "000000"), "unparsable"),
    ],
)
def test_one_bad_answer_is_a_failure_of_its_group_alone(says, kind):
    def mostly(asked):
        return says(asked) if asked.blocks[1] == "bad" else asked.verdict(5)

    made = config(LlmScore)
    asker = Notes(made)
    (bad, good), _ = score(mostly, make_group("ok", "bad", "fine"), make_group("ok"), asker=asker)
    assert bad.scores is None and bad.failure.kind == kind and bad.failure.message.startswith("response 1: ")
    assert good.scores == (5.0,)
    # The other answers of the group were paid for: they are remembered. The bad one was paid for too.
    assert len(asker.answers) == 3
    assert [(e.prompt_tokens, e.response_tokens, e.cost, e.retry) for e in asker.errors] == [(5, 2, 0.5, True)]


# -- comparisons ---------------------------------------------------------------------------------------


def test_both_orders_are_asked():
    (judgement,), model = compare(by_length, make_group("a", "bbb"))
    assert [asked.blocks[1:] for asked in model.asked] == [["a", "bbb"], ["bbb", "a"]]
    assert judgement.comparisons == (Comparison(first=0, second=1, preference=0.0, consistent=True),)
    assert judgement.scores == pytest.approx((-1.286545, 1.286545))


@pytest.mark.parametrize("rank", ["round_robin", "best_worst", "tournament"])
@pytest.mark.parametrize("soft", [False, True])
def test_who_always_prefers_the_first_makes_ties_only(rank, soft):
    def says(asked):
        verdict = asked.verdict("A")
        place = verdict.index('"A"') + 1
        texts = [verdict[:place], "A", verdict[place + 1 :]]
        tokens = tuple(Token(text=text, logps={text: -0.2, "B": -1.8}) for text in texts)
        return Reply(text=verdict, is_json=True, tokens=tokens)

    texts = [f"response {'x' * i}" for i in range(7)]
    (judgement,), _ = compare(says, make_group(*texts), rank=rank, soft=soft)
    assert judgement.scores == (0.0,) * 7
    assert {(c.preference, c.consistent) for c in judgement.comparisons} == {(0.5, False)}


@pytest.mark.parametrize(("rank", "questions"), [("round_robin", 12), ("best_worst", 8), ("tournament", 10)])
def test_rankings(rank, questions):
    (judgement,), model = compare(by_length, make_group("ccc", "a", "dddd", "bb"), rank=rank)
    third, first, best, second = judgement.scores
    assert best > third and best > second and first < second and first < third
    assert len(model.asked) == questions == 2 * len(judgement.comparisons)
    assert list(judgement.comparisons) == sorted(judgement.comparisons, key=lambda c: (c.first, c.second))


def test_same_texts_tie_and_nobody_is_asked():
    (judgement, all_same), model = compare(by_length, make_group("a", "bb", "a", "bb", "a"), make_group("c", "c"))
    a, b = judgement.scores[:2]
    assert judgement.scores == (a, b, a, b, a) and a < b
    assert [(c.first, c.second) for c in judgement.comparisons] == [(0, 1)]
    assert all_same.scores == (0.0, 0.0) and all_same.comparisons == ()
    assert len(model.asked) == 2


def test_one_order_is_drawn_and_drawn_alike_again():
    groups = [make_group(f"one {i}", f"two {i}") for i in range(30)]
    judgements, model = compare(always_first, *groups, orders="one")
    assert {c.consistent for judgement in judgements for c in judgement.comparisons} == {None}
    shown = [asked.blocks[1].split()[0] for asked in model.asked]
    assert len(shown) == 30 and 5 < shown.count("one") < 25
    _, again = compare(always_first, *reversed(groups), orders="one")
    assert [asked.blocks[1].split()[0] for asked in again.asked] == shown[::-1]
    # The other way round in the group is the same pair, shown in the same order.
    _, swapped = compare(always_first, *[make_group(f"two {i}", f"one {i}") for i in range(30)], orders="one")
    assert [asked.blocks[1].split()[0] for asked in swapped.asked] == shown


def test_soft_preferences_are_the_mean_of_both_orders():
    def says(asked):
        first = asked.blocks[1] == "good"
        # Of 0.8 and 0.2 mass for "good" in the first place, of 0.6 and 0.3 (and something else) in the second.
        a, b = (0.8, 0.2) if first else (0.3, 0.6)
        tokens = (Token(text="Verdict: ", logps={}), Token(text="A", logps={"A": math.log(a), "B": math.log(b)}))
        return Reply(text="Verdict: A", is_json=False, tokens=tokens)

    (judgement,), _ = compare(says, make_group("good", "bad"), soft=True, repeats_id=False)
    (comparison,) = judgement.comparisons
    assert comparison.preference == pytest.approx((0.8 + 0.6 / 0.9) / 2) and comparison.consistent


def test_orders_that_disagree_are_a_tie_however_sure_they_are():
    def says(asked):
        sure = 0.9 if asked.blocks[1] == "good" else 0.6  # always of the first
        tokens = (
            Token(text="Verdict: ", logps={}),
            Token(text="A", logps={"A": math.log(sure), "B": math.log(1 - sure)}),
        )
        return Reply(text="Verdict: A", is_json=False, tokens=tokens)

    (judgement,), _ = compare(says, make_group("good", "bad"), soft=True, repeats_id=False)
    assert judgement.comparisons == (Comparison(first=0, second=1, preference=0.5, consistent=False),)
    assert judgement.scores == (0.0, 0.0)


def test_reasons_are_kept_by_response():
    (judgement,), _ = compare(
        lambda asked: asked.verdict("A", reasons=f"{asked.blocks[1]} over {asked.blocks[2]}"),
        make_group("a", "b", "a"),
        rationale=True,
    )
    assert judgement.rationales == (
        "against response 1: a over b", "against response 0: b over a", "against response 1: a over b"
    )  # fmt: skip


def test_one_failed_comparison_fails_the_group():
    def says(asked):
        return asked.verdict("C") if {"a", "c"} <= set(asked.blocks) else by_length(asked)

    (bad, good), model = compare(says, make_group("a", "bb", "c"), make_group("d", "ee"))
    assert bad.scores is bad.comparisons is None
    assert (bad.failure.kind, bad.failure.message) == (
        "bad_value", "responses 0 and 2: the verdict is 'C', neither A nor B"
    )  # fmt: skip
    assert good.scores is not None and len(model.asked) == 8


def test_one_response_alone_is_no_comparison():
    (judgement,), _ = compare(by_length, make_group("a"))
    assert judgement.failure.kind == "error" and "there is only one" in judgement.failure.message


def test_who_answers_is_part_of_the_question():
    keys = []

    class Keys(Asker):
        async def ask(self, question, call):
            keys.append(question.key(""))
            return await call()

    class Version(Model):
        def for_group(self, group):
            self.about = f"policy {group.responses[0].policy_version}"
            return self

    made = config(LlmScore)
    group = make_group("a")
    newer = replace(group, responses=(replace(group.responses[0], policy_version=3),))
    judge = ScoringJudge(made, Keys(made), Version(lambda asked: asked.verdict(5)))
    for asked in (group, newer, group):
        asyncio.run(judge.judge(asked))
    assert keys[0] == keys[2] != keys[1]


# -- with an endpoint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["auto", "text"])
def test_both_kinds_through_an_endpoint(answers):
    def says(asked):
        if asked.is_json:
            return Sent(status=400, body=json.dumps({"error": {"message": "response_format is not supported"}}))
        reasons = "Reasons, {and} more."
        return asked.verdict(len(asked.blocks[1]) if len(asked.blocks) == 2 else "B", reasons=reasons)

    with serving(says) as server:
        for kind in (LlmScore, LlmPairwise):
            made = kind(model="m", base_url=server.url, api_key_env=None, rationale=True, answers=answers)
            (judgement,) = asyncio.run(_judge(made, make_group("a", "bbb")))
            assert judgement.scores == ((1.0, 3.0) if kind is LlmScore else (0.0, 0.0))
            assert judgement.rationales[0].endswith("Reasons, {and} more.")


async def _judge(made, *groups):
    judge = build_judge(made)
    judgements = await judge_groups(judge, groups)
    await close_judge(judge)
    return judgements
