"""Ensembles, by hand: what several judges' scores come to, and what one that fails does to the group."""

import asyncio
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.asking import Asker
from judges.ensemble import EnsembleJudge, combine, disagreement, in_order, member_names, normalised
from judges.protocol import JudgeError, failed, scored
from judges.runtime import LocalJudgePool, build_judge, check_judge, judge_groups
from online_po.config import Config
from online_po.errors import BudgetError, ConfigError
from online_po.judge_configs import Ensemble
from online_po.loop import run_rounds
from online_po.types import MemberScores
from online_po.yaml_text import load_yaml
from tests.fakes import make_config
from tests.test_examples import PLAIN, summaries
from tests.test_loop import make_parts

from .groups import make_group

THREE = (1.0, 2.0, 4.0)


def config(*members, **settings):
    """Members by their own settings; without any, two python judges."""
    kinds = [{"kind": "python", "function": "m:f"} | own for own in (members or ({}, {}))]
    return Ensemble(members=kinds, **settings)


# -- normalising ---------------------------------------------------------------------------------------


def test_normalised_by_hand():
    assert normalised(THREE, "none") == THREE
    assert normalised(THREE, "minmax") == (0.0, pytest.approx(1 / 3), 1.0)
    deviation = math.sqrt(14 / 9)  # of 1, 2, 4 about 7/3
    assert normalised(THREE, "zscore") == pytest.approx([(x - 7 / 3) / deviation for x in THREE])
    assert normalised((5.0, 5.0), "zscore") == (0.0, 0.0)
    assert normalised((5.0, 5.0), "minmax") == (0.5, 0.5)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    st.sampled_from(["zscore", "minmax"]),
)
def test_normalised_scores_are_finite_and_keep_their_order(scores, how):
    made = normalised(tuple(scores), how)
    assert all(map(math.isfinite, made))
    for (a, b), (x, y) in zip(itertools.combinations(scores, 2), itertools.combinations(made, 2), strict=True):
        assert (a <= b) <= (x <= y) and (a == b) <= (x == y)


# -- combining -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "settings", "table", "expected"),
    [
        ([{}, {"weight": 3}], {"normalise": "none"}, [(0, 1), (1, 0.5)], (0.75, 0.625)),
        ([{}, {"weight": 3}], {"normalise": "minmax"}, [(0, 10, 5), (1, 0, 1)], (0.75, 0.25, 0.875)),
        # One judge counts in thousands, one in fractions: neither drowns the other.
        ([], {}, [(0, 1000, 2000), (0.2, 0.1, 0.0)], (0.0, 0.0, 0.0)),
        # Without difference, without a say.
        ([], {}, [(7, 7), (1, 2)], (-0.5, 0.5)),
        # 0.1 + 0.2 is 0.3.
        ([], {}, [(0.1 + 0.2, 0.3), (1, 2)], (-0.5, 0.5)),
        ([], {"normalise": "none"}, [(0.1, 0.3), (0.2, 0.0)], (0.15, 0.15)),
        ([], {"combine": "rank_average"}, [(0, 10, 1000), (1, 2, 3)], (0.0, 0.5, 1.0)),
        ([], {"combine": "rank_average"}, [(5, 5, 9), (1, 2, 2)], (0.125, 0.5, 0.875)),
        ([], {"combine": "rank_average"}, [(5,), (1,)], (0.5,)),
        # Majority: two light judges against a heavy one; a tie abstains.
        ([{}, {}, {}], {"combine": "majority"}, [(1, 2), (1, 2), (9, 0)], (0.0, 1.0)),
        ([{}, {}, {"weight": 3}], {"combine": "majority"}, [(1, 2), (1, 2), (9, 0)], (1.0, 0.0)),
        ([{}, {}, {"weight": 2}], {"combine": "majority"}, [(1, 2), (1, 2), (9, 0)], (0.5, 0.5)),
        ([{}, {}, {}], {"combine": "majority"}, [(1, 2), (1, 1), (3, 3)], (0.0, 1.0)),
        # 0.1 + 0.2 against 0.3 is a draw.
        ([{"weight": w} for w in (0.1, 0.2, 0.3)], {"combine": "majority"}, [(1, 2), (1, 2), (2, 1)], (0.5, 0.5)),
        # Condorcet's circle: each beats one.
        ([{}, {}, {}], {"combine": "majority"}, [(3, 2, 1), (1, 3, 2), (2, 1, 3)], (0.5, 0.5, 0.5)),
        ([{}, {}, {}], {"combine": "majority"}, [(3, 2, 1), (3, 2, 1), (1, 2, 3)], (1.0, 0.5, 0.0)),
        ([], {"combine": "minimum", "normalise": "none"}, [(0, 9), (5, 1)], (0, 1)),
        ([], {"combine": "minimum", "normalise": "minmax"}, [(0, 9, 9), (5, 1, 4)], (0.0, 0.0, 0.75)),
        ([], {"combine": "minimum", "normalise": "minmax"}, [(7, 7, 7), (5, 1, 3)], (1.0, 0.0, 0.5)),
        ([], {"combine": "minimum"}, [(7, 7), (1, 1)], (0.0, 0.0)),
        # In order: safety first.
        ([], {"combine": "in_order"}, [(1, 0, 1), (0, 9, 5)], (0.5, 0.0, 1.0)),
        ([], {"combine": "in_order"}, [(1, 1, 1), (3, 3, 1)], (0.75, 0.75, 0.0)),
        ([{"min_gap": 0.5}, {}], {"combine": "in_order"}, [(1.0, 0.8, 0.2), (0, 5, 9)], (0.5, 1.0, 0.0)),
        ([{"min_gap": 0.1}, {}], {"combine": "in_order"}, [(0.9, 0.8), (0, 1)], (1.0, 0.0)),  # a gap of 0.1 is one
    ],
)  # fmt: skip
def test_combined_by_hand(members, settings, table, expected):
    assert combine(table, config(*members, **settings)) == pytest.approx(expected)
    if len(set(expected)) < len(expected):  # equal means equal, not nearly so
        found = combine(table, config(*members, **settings))
        assert len(set(found)) == len(set(expected))


def test_gaps_that_are_not_transitive():
    """0.0, 0.4, 0.8 with gaps of 0.5: each near the next one, the ends apart. From the best down: {0.8, 0.4}, {0.0}."""
    assert in_order([(0.0, 0.4, 0.8), (3, 2, 1)], [0.5, 0.0]) == (0.0, 1.0, 0.5)
    # Another one, far above, does not change who is in whose class below it but by where the classes begin.
    assert in_order([(0.0, 0.4, 0.8, 9.0), (3, 2, 1, 0)], [0.5, 0.0]) == pytest.approx((0.0, 2 / 3, 1 / 3, 1.0))


tables = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.tuples(*[st.integers(-3, 3).map(lambda x: x / 10)] * n), min_size=2, max_size=4)
)


@given(tables, st.sampled_from(["weighted_mean", "rank_average", "majority", "minimum", "in_order"]), st.randoms())
def test_whoever_all_members_prefer_is_never_below(table, how, rng):
    made = combine(table, config(*[{}] * len(table), combine=how))
    assert all(map(math.isfinite, made))
    for i, j in itertools.permutations(range(len(made)), 2):
        if all(row[i] >= row[j] for row in table):
            assert made[i] >= made[j]
            assert how == "minimum" or made[i] > made[j] or all(row[i] == row[j] for row in table)
    # The order of the responses changes nothing.
    order = list(range(len(made)))
    rng.shuffle(order)
    turned = combine([tuple(row[i] for i in order) for row in table], config(*[{}] * len(table), combine=how))
    assert turned == pytest.approx([made[i] for i in order])


@given(tables, st.floats(0, 0.5))
def test_in_order_keeps_the_best_class_exact(table, gap):
    made = in_order(table, [gap] + [0.0] * (len(table) - 1))
    best = max(table[0])
    for index, score in enumerate(made):
        if max(made) == score:
            assert best - table[0][index] < max(gap, 1e-9) or best == table[0][index]


@pytest.mark.parametrize(
    ("table", "share"),
    [
        ([(1, 2), (1, 2)], 0.0),
        ([(1, 2), (2, 1)], 1.0),
        ([(1, 2), (1, 1)], 0.0),
        ([(1, 2), (2, 1), (2, 1)], 2 / 3),
        ([(1, 2, 3), (1, 3, 2)], 1 / 3),
        ([(0.1 + 0.2, 0.3), (1, 2)], 0.0),
        ([(1,), (2,)], 0.0),
    ],
)
def test_disagreement_by_hand(table, share):
    assert disagreement(table) == pytest.approx(share)


# -- the judge -----------------------------------------------------------------------------------------


class Says:
    """Scores, a failure, or an error."""

    def __init__(self, what):
        self.what = what

    async def judge(self, group):
        await asyncio.sleep(0)
        if isinstance(self.what, Exception):
            raise self.what
        return self.what if not isinstance(self.what, tuple) else scored(group, self.what)


def ask(made, *what, group=None):
    judge = EnsembleJudge(made, [Says(item) for item in what])
    (verdict,) = asyncio.run(judge_groups(judge, [group or make_group("a", "b", "c")]))
    return verdict


def test_scores_rationales_and_members():
    made = config({}, {"function": "m:g"}, combine="rank_average")
    verdict = ask(made, (1.0, 2.0, 3.0), (0.5, 0.25, 1.0))
    assert verdict.scores == (0.25, 0.25, 1.0) and verdict.failure is None
    assert verdict.rationales[1] == "python 1 2 · python 2 0.25"
    assert verdict.members == (
        MemberScores(name="python 1", scores=(1.0, 2.0, 3.0)),
        MemberScores(name="python 2", scores=(0.5, 0.25, 1.0)),
    )


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ([(1.0, 2.0, 3.0), JudgeError("refusal", "no")], "refusal", "python 2: no"),
        ([JudgeError("timeout", "slow"), JudgeError("refusal", "no")], "timeout", "python 1: slow"),
        ([failed(make_group("a"), "unparsable", "what?"), (1.0, 2.0, 3.0)], "unparsable", "python 1: what?"),
        ([(1.0, 2.0, 3.0), KeyError("bug")], "error", "KeyError: 'bug'"),
    ],
)
def test_a_member_that_fails_fails_the_group(what, kind, message):
    verdict = ask(config(), *what)
    assert verdict.scores is None and (verdict.failure.kind, verdict.failure.message) == (kind, message)


def test_a_spent_budget_is_no_failure_of_a_member():
    judge = EnsembleJudge(config(), [Says((1.0,)), Says(BudgetError("spent"))])
    with pytest.raises(BudgetError, match="spent"):
        asyncio.run(judge.judge(make_group("a")))


@pytest.mark.parametrize(("bound", "abstains"), [(0.3, True), (0.34, False), (1.0, False)])
def test_it_abstains_where_members_disagree(bound, abstains):
    verdict = ask(config(max_disagreement=bound), (1.0, 2.0, 3.0), (1.0, 3.0, 2.0))
    assert (verdict.scores is None) == abstains and len(verdict.members) == 2
    if abstains:
        assert verdict.failure.kind == "abstained"
        assert verdict.failure.message == "33% of member pairs disagree, above judge.max_disagreement = 0.3"


def test_it_is_built_of_real_members():
    here = "tests.judges.groups"
    made = Ensemble(
        members=[{"kind": "rules"}, {"kind": "python", "function": f"{here}:length"}],
        combine="in_order",
    )
    check_judge(made)
    assert member_names(made) == ["rules", "python"]
    asked = []

    class Counting(Asker):
        def member(self, config):
            asked.append(config.kind)
            return super().member(config)

    group = make_group("ok but Long", "short", "longer one", metadata={"constraints": [{"type": "lowercase"}]})
    (verdict,) = asyncio.run(judge_groups(build_judge(made, Counting(made)), [group]))
    assert verdict.scores == (0.0, 0.5, 1.0) and asked == ["rules", "python"]
    with pytest.raises(ConfigError, match="judge.function"):
        check_judge(config())


# -- in a run, and in a config -------------------------------------------------------------------------

MEMBERS = [
    {"kind": "python", "function": "tests.judges.groups:number_said"},
    {"kind": "python", "function": "tests.judges.groups:length"},
]


def test_a_run_keeps_what_each_member_gave_and_tells_how_far_they_agree(tmp_path):
    judge = {"kind": "ensemble", "members": MEMBERS, "combine": "in_order"}
    parts = make_parts(make_config(tmp_path, **PLAIN, judge=judge), 0)
    parts.judges = LocalJudgePool(parts.config.judge)
    try:
        run_rounds(parts)
    finally:
        parts.judges.close()
    for row in summaries(parts.ledger).values():
        assert -1 <= row["judge_agreement"] <= 1
    kept = [judgement for part in range(3) for judgement in parts.ledger.judgements(1, part)]
    assert len(kept) == 8
    for judgement in kept:
        said, length = judgement.members
        assert (said.name, length.name) == ("python 1", "python 2")
        assert judgement.scores.index(max(judgement.scores)) == said.scores.index(max(said.scores))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (
            {"members": MEMBERS, "timeout_s": 5},
            "judge.timeout_s is 5.0, but has an effect only with another judge.kind",
        ),
        ({"members": MEMBERS, "concurrency": 5}, "judge.concurrency is 5, .* or in a member"),
        ({"members": [{**MEMBERS[0], "min_gap": 1}, MEMBERS[1]]}, "min_gap is for judge.combine: in_order"),
        ({"members": [{**MEMBERS[0], "workers": 2}, MEMBERS[1]]}, "judge.members.0.workers is the run's"),
        ({"members": [{**MEMBERS[0], "weight": 2}, MEMBERS[1]], "combine": "minimum"}, "weight has no effect"),
        ({"members": MEMBERS, "combine": "majority", "normalise": "none"}, "judge.normalise has no effect"),
        ({"members": MEMBERS[:1]}, "judge.members: 2 or more are needed, but there is 1"),
    ],
)
def test_what_a_config_may_not_say(tmp_path, judge, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **PLAIN, judge={"kind": "ensemble", **judge})


def test_a_config_with_members_reads_back(tmp_path):
    """A run's config.yaml holds every field, the members' run-level ones too: read back, they are their defaults."""
    members = [{**MEMBERS[0], "weight": 2}, {"kind": "llm_pairwise", "model": "m", "api_key_env": None}]
    made = make_config(tmp_path, **PLAIN, judge={"kind": "ensemble", "members": members})
    assert Config.parse(load_yaml(made.to_yaml(), "config.yaml")) == made


def test_members_have_their_own_time_outs(tmp_path):
    judge = {"kind": "ensemble", "members": [{"kind": "rules", "timeout_s": 5}, *MEMBERS]}
    made: Config = make_config(tmp_path, **PLAIN, judge=judge)
    assert made.judge.members[0].judge.timeout_s == 5
