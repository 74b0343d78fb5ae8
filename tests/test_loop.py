"""The real loop with fake parts: order of work, resume, staleness, reference, failures."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from judges.runtime import LocalJudgePool
from online_po import judge_view
from online_po.config import Config
from online_po.errors import BudgetError, JudgeFailureRateError, LedgerError, NoPairsError, OnlinePOError
from online_po.judge_cache import judge_statistics
from online_po.judging import check_failure_rate
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.observers import PhaseTimer
from online_po.parts import Parts
from online_po.round import draw_prompts
from online_po.run_view import load_run_view
from online_po.types import JudgeFailure, Reference
from tests.fakes import FakeGenerator, FakeJudge, FakeLearner, FakeObserver, make_config, make_prompts
from tests.kills import Killed, killed_at, memory_folder


def make_parts(config: Config, heldout: int = 4) -> Parts:
    prompts = make_prompts(20 + heldout)
    ledger = Ledger(config.run_dir)
    with ledger.lock():  # as at every start: sweeps, and drops what is damaged
        ledger.begin(config, {})
    return Parts(
        config=config,
        ledger=ledger,
        generator=FakeGenerator(),
        judges=FakeJudge(),
        learner=FakeLearner(),
        observer=FakeObserver(),
        timer=PhaseTimer(ledger.root / "timeline.jsonl"),
        train=prompts[:20],
        heldout=prompts[20:] or None,
        start=Path(config.model.path),
    )


def content(root: Path) -> dict[str, object]:
    """Everything of a run that must not depend on how often it was stopped."""
    found: dict[str, object] = {}
    for path in sorted(root.glob("rounds/**/*.parquet")):
        found[str(path.relative_to(root))] = pq.read_table(path).to_pylist()
    for path in [*sorted(root.glob("rounds/*/policy/skill.json")), *sorted(root.glob("rounds/*/reference/skill.json"))]:
        found[str(path.relative_to(root))] = path.read_text()
    for path in sorted(root.glob("rounds/*/COMMIT.json")):
        found[str(path.relative_to(root))] = json.loads(path.read_text())["reference"]
    for path in sorted(root.glob("rounds/*/metrics.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found[str(path.relative_to(root))] = [row for row in rows if row["kind"] == "step"]
    return found


def test_rounds_are_sampled_by_the_policy_of_the_round_before(tmp_path):
    parts = make_parts(make_config(tmp_path))
    summaries = run_rounds(parts)
    versions = {r: set(parts_versions(parts.ledger, r)) for r in (1, 2, 3)}
    assert versions == {1: {0}, 2: {1}, 3: {2}}
    assert [s["policy_version"] for s in summaries] == [0, 1, 2, 3]
    assert summaries[-1]["score"]["mean"] > summaries[0]["score"]["mean"] + 0.5
    assert summaries[-1]["versus_start"]["win_rate"]["mean"] == 1.0
    syncs = [entry[1] for entry in parts.generator.log if entry[0] == "sync"]
    assert syncs == [0, 1, 2, 3], "one sync after each commit, and one proof of the start"


def parts_versions(ledger: Ledger, round_: int):
    return ledger.pairs(round_)["policy_version"].to_pylist()


@pytest.mark.parametrize("staleness", [1, 2])
def test_stale_rounds_lag_by_exactly_max_staleness(tmp_path, staleness):
    loop = {"rounds": 5, "prompts_per_round": 4, "responses_per_prompt": 3, "max_staleness": staleness}
    config = make_config(tmp_path, loop=loop, checkpoint__keep=staleness + 1)
    parts = make_parts(config)
    run_rounds(parts)
    lag = {r: r - 1 - parts_versions(parts.ledger, r)[0] for r in range(1, 6)}
    assert lag == {r: min(r - 1, staleness) for r in range(1, 6)}
    assert [s["policy_version"] for s in map(parts.ledger.evaluation_summary, range(6))] == list(range(6))


def test_prompts_pass_through_whole_epochs(tmp_path):
    parts = make_parts(make_config(tmp_path, loop__rounds=5, loop__prompts_per_round=8))
    run_rounds(parts)
    drawn = [p.id for r in range(1, 6) for p in parts.ledger.prompts(r)]
    assert len(set(drawn[:20])) == 20 and len(set(drawn[20:])) == 20
    assert all(len(set(drawn[i : i + 8])) == 8 for i in range(0, 40, 8))


def test_reference_refresh_is_recorded_in_the_commit_and_used(tmp_path):
    config = make_config(tmp_path, reference={"kind": "refresh", "every": 2}, loop__rounds=5)
    parts = make_parts(config)
    run_rounds(parts)
    references = [parts.ledger.committed(r).reference for r in range(6)]
    assert references == [Reference(round=r) for r in (0, 0, 2, 2, 4, 4)]
    logps = [entry[1] for entry in parts.learner.log if entry[0] == "logps"]
    # Round 3, 4, 5: the reference, then the start for KL.
    assert logps == [0, 0, 2, 0, 2, 0, 4, 0]


def test_kl_to_start_costs_no_pass_when_switched_off(tmp_path):
    config = make_config(tmp_path, reference={"kind": "refresh"}, learner={"kl_to_start": False})
    parts = make_parts(config)
    run_rounds(parts)
    assert [entry[1] for entry in parts.learner.log if entry[0] == "logps"] == [0, 1, 2]
    assert [entry[2] for entry in parts.learner.log if entry[0] == "update"] == [True, False, False]


def test_a_loss_without_a_reference_costs_no_pass_and_loads_no_weights(tmp_path):
    parts = make_parts(make_config(tmp_path, loss={"name": "simpo"}))
    run_rounds(parts)
    assert [entry for entry in parts.learner.log if entry[0] == "logps"] == []
    rows = [json.loads(line) for line in (parts.ledger.round_dir(2) / "metrics.jsonl").open()]
    assert "kl_reference" not in rows[-1] and "kl_start" not in rows[-1]
    started = make_parts(make_config(tmp_path / "kl", loss={"name": "simpo"}, learner={"kl_to_start": True}))
    run_rounds(started)
    assert [entry[1] for entry in started.learner.log if entry[0] == "logps"] == [0, 0, 0]
    rows = [json.loads(line) for line in (started.ledger.round_dir(2) / "metrics.jsonl").open()]
    assert "kl_reference" not in rows[-1] and "kl_start" in rows[-1]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_stopped_anywhere_while_generating_ends_the_same(tmp_path, staleness):
    whole = make_parts(make_config(tmp_path / "whole", loop__max_staleness=staleness))
    run_rounds(whole)
    config = make_config(tmp_path / "stopped", loop__max_staleness=staleness)
    stops = 0
    for _ in range(200):
        parts = make_parts(config)  # new process: nothing but the ledger is left
        parts.generator.fail_after = 1 + stops % 3
        try:
            run_rounds(parts)
            break
        except KeyboardInterrupt:
            parts.sampler.shutdown()
            stops += 1
    assert stops > 3
    assert content(whole.ledger.root) == content(parts.ledger.root)


def test_after_a_resume_the_generators_get_the_committed_weights_first(tmp_path):
    config = make_config(tmp_path)
    parts = make_parts(config)
    parts.generator.fail_after = 2 + 3 + 2 + 1  # evaluation is two chunks, a round three: stops inside round 2
    with pytest.raises(KeyboardInterrupt):
        run_rounds(parts)
    assert parts.ledger.last_committed() == 1
    again = make_parts(config)
    run_rounds(again)
    assert again.generator.log[0] == ("sync", 1)
    assert again.generator.start == parts.ledger.committed(0).probe  # what its engines began with
    assert again.learner.log[0] == ("load", 1)


def test_responses_and_judgements_of_a_stopped_round_are_not_made_again(tmp_path):
    config = make_config(tmp_path)
    parts = make_parts(config)
    parts.generator.fail_after = 2 + 2  # evaluation is two chunks, then two of round 1's three
    with pytest.raises(KeyboardInterrupt):
        run_rounds(parts)
    judged = list(parts.judges.judged)
    again = make_parts(config)
    run_rounds(again)
    first = next(entry for entry in again.generator.log if entry[0] == "generate")
    assert first == ("generate", 2, 0)
    assert not set(judged[4:]) & set(again.judges.judged[:2])


def test_a_group_is_judged_while_its_chunk_is_still_generated(tmp_path, monkeypatch):
    config = make_config(tmp_path, prompts={"path": "p"}, eval={"every": 0}, loop__rounds=1, generator__chunk_prompts=8)
    parts, events = make_parts(config, heldout=0), []
    make, judge, write = parts.generator._group, parts.judges._judge, parts.ledger.write_responses
    for owner, name, real in (
        (parts.generator, "_group", make),
        (parts.judges, "_judge", judge),
        (parts.ledger, "write_responses", write),
    ):
        monkeypatch.setattr(owner, name, lambda *args, name=name, real=real: (events.append(name), real(*args))[1])
    run_rounds(parts)
    assert events == ["_group", "_judge"] * 7 + ["_group", "write_responses", "_judge"]


class LateJudge(FakeJudge):
    """Answers from another thread, the latest question first, once `hold` groups wait for it."""

    def __init__(self, hold: int) -> None:
        super().__init__()
        self.hold, self.waiting, self.most = hold, [], 0

    def submit(self, groups, round_=0, occasion=""):
        future = Future()
        self.waiting.append((future, groups))
        self.most = max(self.most, sum(len(groups) for _, groups in self.waiting))
        if len(self.waiting) >= self.hold:
            threading.Thread(target=self.answer, args=[self.waiting[:]]).start()
            self.waiting.clear()
        return future

    def answer(self, waiting):
        for future, groups in reversed(waiting):
            time.sleep(0.002)
            future.set_result([self._judge(group) for group in groups])


def test_what_a_round_holds_does_not_depend_on_when_the_judge_answers(tmp_path, monkeypatch):
    setting = {"prompts": {"path": "p"}, "eval": {"every": 0}}
    at_once = make_parts(make_config(tmp_path / "at_once", **setting), heldout=0)
    run_rounds(at_once)
    late = make_parts(make_config(tmp_path / "late", **setting), heldout=0)
    late.judges = LateJudge(hold=4)
    monkeypatch.setattr("online_po.judging.MAX_CHUNKS_IN_JUDGING", 2)  # 6 groups: the judge holds back at most 4
    run_rounds(late)
    assert content(at_once.ledger.root) == content(late.ledger.root)
    assert late.judges.most == 4


def test_generation_waits_for_a_judge_that_is_far_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("online_po.judging.MAX_CHUNKS_IN_JUDGING", 1)
    parts = make_parts(make_config(tmp_path, prompts={"path": "p"}, eval={"every": 0}), heldout=0)
    parts.judges = LateJudge(hold=100)  # never answers
    running = ThreadPoolExecutor(1).submit(run_rounds, parts)
    deadline = time.monotonic() + 30
    while parts.judges.most < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # for what must not come
    assert parts.judges.most == 3, "one chunk's groups, and no more"
    parts.stopping.set()
    with pytest.raises(OnlinePOError, match="ending"):
        running.result(10)


def test_too_many_judge_failures_stop_the_round_at_once_and_only_they_are_asked_again(tmp_path):
    config = make_config(tmp_path, prompts={"path": "p"}, eval={"every": 0})
    parts = make_parts(config, heldout=0)
    first = draw_prompts(parts, 1)[1].id
    parts.judges.fails = {first: JudgeFailure(kind="timeout", message="too slow")}
    with pytest.raises(
        JudgeFailureRateError, match=r"1 of 8 groups \(1 x timeout\).*max_failure_rate = 0.05.*too slow"
    ):
        run_rounds(parts)
    assert len([entry for entry in parts.generator.log if entry[0] == "generate"]) == 1, "no more was generated"
    again = make_parts(config, heldout=0)
    run_rounds(again)
    assert again.judges.judged[0] == first
    assert len(again.judges.judged) == 1 + 5 + 2 * 8


def test_what_a_failing_judge_did_answer_is_not_asked_again(tmp_path):
    """Also of a part that it had not answered whole when the round was stopped."""
    config = make_config(tmp_path, prompts={"path": "p"}, eval={"every": 0}, loop__rounds=1, generator__chunk_prompts=4)
    parts = make_parts(config, heldout=0)
    prompts = [prompt.id for prompt in draw_prompts(parts, 1)]
    parts.judges = SilentJudge(silent=prompts[5])  # in the second part
    parts.judges.fails = {prompts[1]: JudgeFailure(kind="error", message="no")}  # in the first
    parts.config = config.model_copy(update={"judge": config.judge.model_copy(update={"max_failure_rate": 0.2})})
    run = ThreadPoolExecutor(1).submit(run_rounds, parts)
    deadline = time.monotonic() + 30
    while len(parts.judges.judged) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    parts.stopping.set()
    with pytest.raises(OnlinePOError, match="ending"):
        run.result(10)
    again = make_parts(config, heldout=0)
    run_rounds(again)
    assert sorted(again.judges.judged) == sorted([prompts[1], prompts[5]])


class SilentJudge(FakeJudge):
    """Never answers about one prompt."""

    def __init__(self, silent: str) -> None:
        super().__init__()
        self.silent = silent

    def submit(self, groups, round_=0, occasion=""):
        return Future() if groups[0].prompt.id == self.silent else super().submit(groups)


ASKED = {"kind": "python", "function": "tests.fakes:said"}


def run_asking(config: Config) -> Ledger:
    """A run whose judge is a real one, with the run's judge cache."""
    parts = make_parts(config)
    parts.judges = LocalJudgePool(config.judge, parts.ledger.judge_cache)
    try:
        run_rounds(parts)
    finally:
        parts.judges.close()
    return parts.ledger


def test_the_failure_rate_that_is_allowed_is_allowed():
    failures = [JudgeFailure(kind="timeout", message="")] * 29
    check_failure_rate(failures, 100, 0.29, "")  # in floats 0.29 * 100 is below 29
    with pytest.raises(JudgeFailureRateError):
        check_failure_rate(failures, 100, 0.28, "")


def test_what_judging_cost_is_counted_by_round(tmp_path):
    ledger = run_asking(make_config(tmp_path, judge=ASKED))
    plain = make_parts(make_config(tmp_path / "plain"))
    run_rounds(plain)
    assert content(plain.ledger.root) == content(ledger.root)
    questions = 8 * 3 + 4  # of a round, and of the evaluation of the policy before
    for round_ in (1, 2, 3):
        row = ledger.round_row(round_)
        assert row["judge_calls"] + row["judge_hits"] == questions and row["judge_calls"] > 20
        assert row["judge_failed_calls"] == {} and row["judge_latency_p99"] >= row["judge_latency_p50"] > 0
        assert row["judge_failures"] == {}  # of groups
    last = judge_statistics(ledger.judge_cache, 4)
    assert last["calls"] + last["hits"] == 4, "the last policy's evaluation"
    calls = sum(ledger.round_row(r)["judge_calls"] for r in (1, 2, 3)) + last["calls"]
    assert judge_statistics(ledger.judge_cache, None)["calls"] == calls
    (note,) = (note for note in judge_view.notes(load_run_view(ledger.root)) if note.startswith("In all"))
    assert f"In all, {calls} calls went out:" in note
    assert not any(name.startswith("judge_calls") for name in plain.ledger.round_row(1))


def test_a_spent_budget_pauses_the_run_and_nothing_is_asked_twice(tmp_path):
    never = run_asking(make_config(tmp_path / "never", judge=ASKED))
    for calls in (1, 30, 50):
        config = make_config(tmp_path / "paused", judge={**ASKED, "budget": {"calls": calls}})
        with pytest.raises(BudgetError, match=f"judge.budget.calls = {calls} is spent"):
            run_asking(config)
    ledger = run_asking(make_config(tmp_path / "paused", judge=ASKED))
    assert content(ledger.root) == content(never.root)
    asked = [sum(judge_statistics(each.judge_cache, r)["calls"] for r in range(5)) for each in (ledger, never)]
    assert asked[0] == asked[1]


def test_failures_that_were_let_pass_stay_failures_after_a_resume(tmp_path):
    config = make_config(tmp_path, judge={"max_failure_rate": 0.5}, prompts={"path": "p"}, eval={"every": 0})
    parts = make_parts(config, heldout=0)
    first = draw_prompts(parts, 1)[1].id
    parts.judges.fails = {first: JudgeFailure(kind="timeout", message="too slow")}
    parts.learner.update = None  # dies after pairing
    with pytest.raises(TypeError):
        run_rounds(parts)
    again = make_parts(config, heldout=0)  # its judge would answer now
    run_rounds(again)
    assert first not in again.ledger.pairs(1)["prompt_id"].to_pylist()


@pytest.mark.parametrize(
    ("staleness", "reference"),
    [(0, {"kind": "refresh", "every": 2}), (1, {"kind": "refresh", "every": 2}), (0, {"kind": "ema", "alpha": 0.5})],
)
def test_killed_anywhere_and_resumed_it_ends_the_same(staleness, reference):
    """Dies at every seventh fail point, resumes, and compares everything."""
    overrides = {"checkpoint__keep": staleness + 1, "reference": reference, "loop__max_staleness": staleness}
    with memory_folder() as folder:
        whole = make_parts(make_config(folder / "whole", **overrides))
        with killed_at(None) as points:
            run_rounds(whole)
        expected = content(whole.ledger.root)
        assert len(points) > 250
        for point in range(2, len(points), 7):
            config = make_config(folder / str(point), **overrides)
            parts = make_parts(config)
            with pytest.raises(Killed), killed_at(point):
                run_rounds(parts)
            parts.sampler.shutdown()
            again = make_parts(config)
            run_rounds(again)
            assert content(again.ledger.root) == expected, f"killed at {points[point - 1]}, point {point}"


@pytest.mark.parametrize("every", [1, 2])
def test_killed_anywhere_in_an_update_it_ends_the_same_and_few_steps_are_made_twice(every):
    """Inside a step checkpoint, between two, and where they are deleted, before and after the commit."""
    changes = {"prompts": {"path": "p"}, "eval": {"every": 0}, "loop__rounds": 1, "generator__chunk_prompts": 8}

    def start(folder: Path) -> Parts:
        parts = make_parts(make_config(folder, **changes, checkpoint__every_steps=every), heldout=0)
        parts.learner.steps = 6
        return parts

    with memory_folder() as folder:
        whole, began = start(folder / "whole"), []
        update = whole.learner.update
        with killed_at(None) as points:
            whole.learner.update = lambda *args: (began.append(len(points)), update(*args))[1]
            run_rounds(whole)
        expected, reused = content(whole.ledger.root), 0
        for point in range(began[0] + 1, len(points) + 1):
            parts, label = start(folder / str(point)), f"killed at {points[point - 1]}, point {point}"
            with pytest.raises(Killed), killed_at(point):
                run_rounds(parts)
            parts.sampler.shutdown()
            again = start(folder / str(point))
            run_rounds(again)
            assert content(again.ledger.root) == expected, label
            assert not list(again.ledger.root.glob("rounds/*/steps*"))
            made = [*parts.learner.taken, *again.learner.taken]
            if "file.durable@trained.json" in points[: point - 1]:
                assert not again.learner.taken, f"{label}: it was trained and saved"
            # Those since the newest checkpoint, and those that were made while the next one was written.
            assert len(made) - len(set(made)) <= 2 * every, f"{label}: {made}"
            reused += 0 < len(again.learner.taken) < 6
        assert reused > 5


@pytest.mark.parametrize("damaged", ["policy/skill.json", "trainer/state.json", "steps/trained.json"])
def test_weights_that_were_saved_but_not_committed_are_checked_before_they_are_taken(tmp_path, damaged):
    whole = make_parts(make_config(tmp_path / "whole"))
    with killed_at(None) as points:
        run_rounds(whole)
    config = make_config(tmp_path / "damaged")
    parts = make_parts(config)
    with pytest.raises(Killed), killed_at(points.index("commit.begin") + 1):
        run_rounds(parts)
    parts.sampler.shutdown()
    path = parts.ledger.round_dir(1) / damaged
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    again = make_parts(config)
    run_rounds(again)
    assert again.learner.taken[0] == (1, 1)
    said = "the weights that round 1 saved are not as they were written: it is trained again"
    assert (said in again.observer.messages) == (damaged != "steps/trained.json")
    assert content(again.ledger.root) == content(whole.ledger.root)


def test_failures_under_the_bound_are_counted_and_never_trained_on(tmp_path):
    parts = make_parts(make_config(tmp_path, judge={"max_failure_rate": 0.5}))
    bad = {p.id for p in make_prompts(20)[:5]}
    parts.judges.fails = {prompt_id: JudgeFailure(kind="error", message="no") for prompt_id in bad}
    run_rounds(parts)
    trained = {i for r in (1, 2, 3) for i in parts.ledger.pairs(r)["prompt_id"].to_pylist()}
    assert trained and not trained & bad
    rows = [json.loads(line) for r in (1, 2, 3) for line in (parts.ledger.round_dir(r) / "metrics.jsonl").open()]
    rounds = [row for row in rows if row["kind"] == "round"]
    failed = [row["judge_failures"].get("error", 0) for row in rounds]
    assert failed == [row["pair_skips"].get("judge_failed", 0) for row in rounds]
    assert 0 < sum(failed) <= 2 * len(bad)


def test_a_round_without_pairs_says_why(tmp_path):
    parts = make_parts(make_config(tmp_path))
    parts.judges.tie = True
    with pytest.raises(NoPairsError, match=r"round 1 gave no pair .* 8 prompts \(8 x tie\)"):
        run_rounds(parts)
    assert parts.ledger.last_committed() == 0


def test_old_weights_are_pruned_but_not_the_reference(tmp_path):
    config = make_config(tmp_path, reference={"kind": "refresh", "every": 2}, loop__rounds=5, checkpoint__keep=1)
    parts = make_parts(config)
    run_rounds(parts)
    kept = {r for r in range(1, 6) if (parts.ledger.round_dir(r) / "policy").exists()}
    assert kept == {4, 5}
    assert {r for r in range(1, 6) if (parts.ledger.round_dir(r) / "trainer").exists()} == {5}
    with pytest.raises(LedgerError, match=r"round 2 .*checkpoint.keep"):
        parts.ledger.policy(2, parts.start)


def test_the_best_policy_is_never_pruned(tmp_path):
    parts = make_parts(make_config(tmp_path, loop__rounds=6, checkpoint__keep=1))
    update = parts.learner.update

    def sink(round_, *args):
        yield from update(round_, *args)
        parts.learner.skill = {1: 1.0, 2: 6.0}.get(round_, 2.0)

    parts.learner.update = sink
    summaries = run_rounds(parts)
    assert max(summaries, key=lambda summary: summary["score"]["mean"])["policy_version"] == 2
    assert {r for r in range(1, 7) if (parts.ledger.round_dir(r) / "policy").exists()} == {2, 6}


def test_the_policy_that_judges_is_never_pruned(tmp_path):
    judge = {"kind": "self_score", "policy": 2}
    parts = make_parts(make_config(tmp_path, judge=judge, loop__rounds=5, checkpoint__keep=1))
    run_rounds(parts)
    # The best of those that were evaluated when round 5 was committed is kept too.
    assert {r for r in range(1, 6) if (parts.ledger.round_dir(r) / "policy").exists()} == {2, 4, 5}
    assert parts.ledger.policy(2, parts.start).version == 2


def test_a_mean_of_policies_goes_on_from_the_one_before_and_old_ones_are_pruned(tmp_path):
    reference = {"kind": "ema", "alpha": 0.25, "every": 2}
    parts = make_parts(make_config(tmp_path, reference=reference, loop__rounds=5, checkpoint__keep=2))
    skill = {0: 0.0}
    save = parts.learner.save_policy
    parts.learner.save_policy = lambda r, folder: (skill.__setitem__(r, parts.learner.skill), save(r, folder))[1]
    run_rounds(parts)
    named = [parts.ledger.committed(r).reference for r in range(6)]
    assert named == [Reference(round=r, blended=r > 0) for r in (0, 0, 2, 2, 4, 4)]
    assert [entry[1] for entry in parts.learner.log if entry[0] == "blend"] == [0, 2]
    mean = {0: 0.0, 2: 0.25 * skill[2]}
    mean[4] = 0.25 * skill[4] + 0.75 * mean[2]
    for round_ in range(1, 6):
        logps = parts.ledger.logps(round_, "reference")["chosen"]
        assert logps == pytest.approx(mean[named[round_ - 1].round], rel=1e-6)
    kept = {r for r in range(1, 6) if (parts.ledger.round_dir(r) / "reference").exists()}
    assert kept == {4}, "round 5 and round 4 go on from it"
    rows = [json.loads(line) for line in (parts.ledger.round_dir(4) / "metrics.jsonl").open()]
    assert (rows[-1]["reference_round"], rows[-1]["reference_blended"]) == (2, True), "what it was trained against"


def test_a_finished_run_does_nothing_when_run_again(tmp_path):
    config = make_config(tmp_path)
    run_rounds(make_parts(config))
    again = make_parts(config)
    assert [s["policy_version"] for s in run_rounds(again)] == [0, 1, 2, 3]
    assert again.generator.log == [] and [e[0] for e in again.learner.log] == ["load"]
