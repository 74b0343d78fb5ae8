"""The run folder: whole files, locks, hashes, refusals."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time

import pyarrow as pa
import pytest

from online_po import files
from online_po.errors import ConfigError, LedgerError
from online_po.ledger import Ledger
from online_po.retention import Retention
from online_po.step_checkpoints import Trained
from online_po.tables import prompts_to_table
from online_po.types import Group, JudgeFailure, Judgement, MemberScores, Policy, Probe, Reference, Response
from tests.fakes import make_config, make_prompts

PROBE = Probe(token_ids=(1, 2, 3), token_logps=(-0.5, -1.25))


@pytest.fixture
def ledger(tmp_path):
    config = make_config(tmp_path)
    ledger = Ledger(config.run_dir)
    ledger.begin(config, {"model": {}})
    return ledger


def write_round(ledger: Ledger, round_: int, reference: Reference = Reference(round=0)) -> None:
    with ledger.weights(round_, "policy") as (policy, _):
        (policy / "model.safetensors").write_bytes(bytes(range(100)))
    with ledger.weights(round_, "trainer") as (trainer, _):
        (trainer / "state.json").write_text("{}")
    if reference == Reference(round=round_, blended=True):
        with ledger.blended_weights(round_) as folder:
            (folder / "model.safetensors").write_bytes(bytes(range(50)))
    ledger.commit(round_, is_adapter=False, reference=reference, probe=PROBE)


def groups(count: int) -> list[Group]:
    return [
        Group(
            prompt=prompt,
            responses=tuple(
                Response(
                    index=i,
                    text="a\nñ\x00 <|im_end|>",
                    token_ids=(5, 6, 2)[: i + 1],
                    token_logps=(-0.5, -0.25, -3.0)[: i + 1],
                    finish_reason="stop",
                    policy_version=3,
                    seed=2**31 - 1,
                )
                for i in range(3)
            ),
        )
        for prompt in make_prompts(count)
    ]


def test_records_come_back_as_they_were_written(ledger):
    made = groups(4)
    ledger.write_prompts(1, iter([prompts_to_table(g.prompt for g in made)]), {"epoch": 1})
    ledger.write_responses(1, 0, made)
    judgements = [
        Judgement(prompt_id="prompt-0", scores=(0.5, 1.0, 0.0), rationales=("a", "b", "c")),
        Judgement(prompt_id="prompt-1", failure=JudgeFailure(kind="timeout", message="slow")),
        Judgement(prompt_id="prompt-2", scores=(1.0, 1.0, 1.0)),
        Judgement(
            prompt_id="prompt-3",
            scores=(1.0, 0.1, 1e-9),
            members=(MemberScores(name="a", scores=(1.0, 0.0, 0.5)), MemberScores(name="b 2", scores=(9.0, 9.0, 1e9))),
        ),
    ]
    ledger.write_judgements(1, 0, judgements)
    assert list(ledger.prompts(1)) == [g.prompt for g in made]
    assert ledger.cursor(1) == {"epoch": 1}
    assert ledger.responses(1, 0, ledger.prompts(1)[0:4]) == made
    assert ledger.judgements(1, 0) == judgements
    assert ledger.has_responses(1, 0) and not ledger.has_responses(1, 1)
    assert ledger.has_judgements(1, 0) and not ledger.has_judgements(1, 1)


def test_commits_count_only_in_an_unbroken_row(ledger):
    assert ledger.last_committed() is None
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    write_round(ledger, 1)
    write_round(ledger, 3)
    assert ledger.last_committed() == 1
    assert ledger.committed(1).probe == PROBE
    assert set(ledger.committed(1).files) == {"policy/model.safetensors", "trainer/state.json"}
    with pytest.raises(LedgerError, match="round 2 .* not committed"):
        ledger.committed(2)


def test_a_flipped_byte_in_weights_is_found_and_named(ledger, tmp_path):
    write_round(ledger, 1)
    path = ledger.round_dir(1) / "policy" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(LedgerError, match=r"model.safetensors' is damaged"):
        ledger.policy(1, tmp_path)
    path.unlink()
    with pytest.raises(LedgerError, match=r"model.safetensors' is damaged: it is missing"):
        ledger.policy(1, tmp_path)


def test_a_flipped_byte_in_a_part_is_found(ledger):
    ledger.write_responses(1, 0, groups(50))
    path = ledger.round_dir(1) / "responses" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(LedgerError, match="part-00000.parquet' is damaged"):
        ledger.responses(1, 0, [g.prompt for g in groups(50)])


def test_a_file_is_whole_or_not_there(ledger):
    path = ledger.root / "x.json"
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not path.exists() and not list(ledger.root.glob("x.json*"))
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    with pytest.raises(ValueError, match="nan"), files.parquet_writer(ledger.root / "t.parquet", pa.schema([])):
        raise ValueError("nan")
    assert not (ledger.root / "t.parquet").exists()


def test_leftovers_of_a_killed_process_are_swept_under_the_lock(ledger):
    half = ledger.round_dir(1) / "responses" / f"part-00000.parquet{files.TMP}"
    half.parent.mkdir(parents=True)
    half.write_text("half")
    folder = ledger.round_dir(1) / f"policy{files.TMP}"
    folder.mkdir()
    with ledger.lock():
        assert not half.exists() and not folder.exists()


def _hold(root, ready):
    with Ledger(root).lock():
        ready.set()
        time.sleep(60)


def test_a_run_folder_in_use_is_refused_and_a_dead_process_holds_nothing(ledger):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(ledger.root, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(LedgerError, match=rf"in use by process {process.pid} on"), ledger.lock():
        pass
    assert str(process.pid) in ledger.holder()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert ledger.holder() is None
    with ledger.lock():
        pass


def test_another_config_is_refused_with_the_difference(ledger, tmp_path):
    info = {"model": {}}
    ledger.begin(make_config(tmp_path, loop__rounds=5), info)  # nothing committed yet: a failed start is no run
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    with pytest.raises(ConfigError, match=r"loop.rounds: 5 there, 4 now"):
        ledger.begin(make_config(tmp_path, loop__rounds=4), info)
    with pytest.raises(ConfigError, match="the starting model changed"):
        ledger.begin(make_config(tmp_path, loop__rounds=5), {"model": {"other": 1}})
    with pytest.raises(ConfigError, match="the prompts changed"):
        ledger.begin(make_config(tmp_path, loop__rounds=5), {"model": {}, "prompt_hashes": {"train": "x"}})
    judge = {"max_failure_rate": 0.5}
    ledger.begin(make_config(tmp_path, loop__rounds=5, ray={"judge_cpus": 1.0}, judge=judge), info)
    assert ledger.config().judge.max_failure_rate == 0.5, "settings that bound a run may change, and are kept"


def test_damaged_pieces_of_an_uncommitted_round_are_dropped_and_of_a_committed_one_are_not(ledger):
    made = groups(3)
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    for round_ in (1, 2):
        ledger.write_responses(round_, 0, made)
        ledger.write_judged(round_, 0)
        path = ledger.round_dir(round_) / "responses" / "part-00000.parquet"
        path.write_bytes(path.read_bytes()[:-20])
    ledger.commit(1, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    with ledger.lock():
        assert ledger.has_responses(1, 0) and ledger.is_judged(1)
        assert not ledger.has_responses(2, 0) and not ledger.is_judged(2)
    with pytest.raises(LedgerError, match="part-00000.parquet' is damaged"):
        ledger.responses(1, 0, [g.prompt for g in made])


def test_scores_go_with_the_responses_they_were_given_to(ledger):
    ledger.write_responses(1, 0, groups(1))
    ledger.write_responses(1, 1, groups(1))
    for part in (0, 1):
        ledger.write_judgements(1, part, [Judgement(prompt_id="prompt-0", scores=(1.0, 2.0, 3.0))])
    path = ledger.round_dir(1) / "responses/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with ledger.lock():
        pass
    assert ledger.has_judgements(1, 0) and not ledger.has_responses(1, 1) and not ledger.has_judgements(1, 1)


def test_what_a_disk_made_of_weights_is_held_against_what_it_was_given(ledger):
    """The writer's own hash counts, where it has one."""
    given = hashlib.sha256(b"moments").hexdigest()
    with ledger.weights(1, "policy") as (policy, _):
        (policy / "model.safetensors").write_bytes(b"weights")
    with ledger.weights(1, "trainer") as (trainer, hashes):
        (trainer / "optimizer.safetensors").write_bytes(b"monents")
        hashes["optimizer.safetensors"] = given
    ledger.write_trained(1, Trained(steps=[], token_logps=[]))
    commit = ledger.commit(1, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    assert commit.files["trainer/optimizer.safetensors"]["sha256"] == given
    ledger.verify(1, "policy")
    with pytest.raises(LedgerError, match=r"trainer/optimizer\.safetensors' is damaged"):
        ledger.verify(1, "trainer")


def test_weights_that_arrived_elsewhere_are_not_committed(ledger):
    """As on a cluster whose nodes do not share run.dir."""
    with pytest.raises(LedgerError, match=r"run\.dir must be a folder that every node"), ledger.weights(1, "policy"):
        pass
    assert not (ledger.round_dir(1) / "policy").exists()


def kept_folders(ledger: Ledger, rounds: range) -> dict[str, list[int]]:
    names = ("policy", "trainer", "reference")
    return {name: [r for r in rounds if (ledger.round_dir(r) / name).exists()] for name in names}


@pytest.mark.parametrize("blended", [False, True])
@pytest.mark.parametrize("incremental", [False, True])
def test_pruning_round_by_round_equals_pruning_at_once(ledger, incremental, blended):
    """Every kept round keeps what it goes on from: round 8 its own reference 6, round 5 in its time reference 3."""
    config = make_config(ledger.root, checkpoint__keep=2)
    retention = Retention(config, ledger)
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    for round_ in range(1, 9):
        reference = Reference(round=round_ // 3 * 3, blended=blended and round_ >= 3)
        write_round(ledger, round_, reference)
        (retention if incremental else Retention(config, ledger)).prune(round_)
        if round_ == 6:
            references = [3, 6] if blended else []
            policies = [5, 6] if blended else [3, 5, 6]
            assert kept_folders(ledger, range(1, 7)) == {
                "policy": policies, "trainer": [5, 6], "reference": references,
            }  # fmt: skip
            for kept in (5, 6):
                assert ledger.reference(ledger.committed(kept).reference, ledger.root).version == kept // 3 * 3
    expected = {"policy": [7, 8], "trainer": [7, 8], "reference": [6]} if blended else None
    expected = expected or {"policy": [6, 7, 8], "trainer": [7, 8], "reference": []}
    assert kept_folders(ledger, range(1, 9)) == expected


def test_nothing_is_pruned_before_there_is_more_than_is_kept(ledger):
    config = make_config(ledger.root, checkpoint__keep=2)
    retention = Retention(config, ledger)
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    for round_ in (1, 2):
        write_round(ledger, round_)
        for incremental in (False, True):
            (retention if incremental else Retention(config, ledger)).prune(round_)
    assert kept_folders(ledger, range(1, 3))["trainer"] == [1, 2]


def test_a_blended_reference_is_told_from_the_policy_of_its_round_and_checked(ledger, tmp_path):
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    write_round(ledger, 1, Reference(round=1, blended=True))
    assert "reference/model.safetensors" in ledger.committed(1).files
    assert ledger.reference(Reference(round=0), tmp_path) == Policy(version=0, path=tmp_path)
    found = ledger.reference(ledger.committed(1).reference, tmp_path)
    assert found == Policy(version=1, path=ledger.round_dir(1) / "reference", blended=True)
    assert ledger.reference(Reference(round=1), tmp_path) == ledger.policy(1, tmp_path) != found
    (found.path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(LedgerError, match=r"reference/model.safetensors' is damaged"):
        ledger.reference(ledger.committed(1).reference, tmp_path)
    with pytest.raises(LedgerError, match=r"run\.dir must be a folder that every node"), ledger.blended_weights(2):
        pass
    assert not (ledger.round_dir(2) / "reference").exists()


def test_folders_that_are_no_run(ledger, tmp_path):
    with pytest.raises(LedgerError, match="is not a run folder"):
        Ledger.open(tmp_path / "nothing")
    files.write_json(ledger.root / "run.json", {"schema_version": 99})
    with pytest.raises(LedgerError, match="schema 99, this version reads 4"):
        Ledger.open(ledger.root)


def test_an_unwritable_run_dir_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"run.dir: .* cannot be written"), Ledger(config.run_dir).lock():
        pass


def test_torn_json_is_named(ledger):
    ledger.commit(0, is_adapter=False, reference=Reference(round=0), probe=PROBE)
    (ledger.round_dir(0) / "COMMIT.json").write_text("{")
    with pytest.raises(LedgerError, match="COMMIT.json' is damaged"):
        ledger.commit_of(0)


@pytest.mark.parametrize("text", ["[Errno 28] No space left on device", "I/O: No space left on device (os error 28)"])
def test_a_full_disk_leaves_nothing_torn_and_says_so(ledger, text):
    write_round(ledger, 1)
    with (
        pytest.raises(LedgerError, match="no space left for .* free some space"),
        ledger.weights(1, "policy") as (p, _),
    ):
        (p / "model.safetensors").write_bytes(b"half")
        raise RuntimeError(text)
    assert not list(ledger.round_dir(1).glob(f"*{files.TMP}"))
    assert (ledger.round_dir(1) / "policy" / "model.safetensors").stat().st_size == 100
    with pytest.raises(LedgerError, match="no space left"), files.atomic(ledger.root / "x"):
        raise OSError(28, "No space left on device")
