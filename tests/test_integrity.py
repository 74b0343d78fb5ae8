"""A flipped byte in any file of a run is found, named, and the run offers the last round that is whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from judges.runtime import LocalJudgePool
from online_po import files, judge_view, launch, report
from online_po.cli import app
from online_po.errors import ConfigError, DamagedError, LedgerError
from online_po.export import export
from online_po.integrity import find_damage, go_back_by_hand, whole_round
from online_po.judge_trials import Trial
from online_po.ledger import SCHEMA_VERSION, Ledger
from online_po.loop import run_rounds
from online_po.observers import timeline_event
from online_po.run_view import load_run_view
from tests.fake_run import faked
from tests.fakes import FakeObserver, SickLearner, make_config
from tests.test_loop import ASKED, content, make_parts

SICK = {"loop__rounds": 4, "guards": {"entropy": {"action": "roll_back"}, "kl": {"action": "stop", "max_nats": 1e9}}}
NOT_READ = ("report.html", "lock", "rolled_back")
"""Not of the ledger: written for people, or taken out of the run."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with every kind of file: judge cache, a mean of policies as the reference, a roll-back, trials."""
    root = tmp_path_factory.mktemp("finished")
    config = make_config(root, judge=ASKED, reference={"kind": "ema", "alpha": 0.5}, checkpoint__keep=2, **SICK)
    judges = LocalJudgePool(config.judge, Ledger(config.run_dir).judge_cache)
    learner = SickLearner(config, 3, entropy=0.2)
    with pytest.MonkeyPatch.context() as patch, faked(judges=judges, learner=learner):
        patch.setattr(report, "render", lambda view: "")
        launch.run(config)
        judges.close()
    ledger = Ledger(config.run_dir)
    with ledger.lock():
        trial = Trial(pairs=4, accuracy=1.0, ties=0, failures={}, message=None, consistency=None, longer=None)
        ledger.write_judge_trial(0, trial.as_dict())
        ledger.write_judge_trial(4, trial.as_dict() | {"alarm": False})
        ledger.write_guard_stop({"policy": 1, "attempt": 0, "guard": "length", "round": 1, "message": "long"})
    return ledger.root


def ledger_files(root: Path) -> list[Path]:
    return [
        path for path in sorted(root.rglob("*")) if path.is_file() and path.relative_to(root).parts[0] not in NOT_READ
    ]


KINDS = [
    "config.yaml", "run.json", "timeline.jsonl", "roll_backs.json", "guard_stops.json", "judge_cache.sqlite",
    *(f"rounds/000000/{name}" for name in ("COMMIT.json", "eval.json", "eval.parquet", "judge_trial.json")),
    *(f"rounds/{round_:06d}/{name}" for round_ in (1, 2, 3, 4) for name in (
        "COMMIT.json", "eval.json", "eval.parquet", "judged.json", "metrics.jsonl", "pairs.parquet", "prompts.parquet",
        "reference_logps.parquet", "start_logps.parquet", "judgements/part-00000.parquet",
        "judgements/part-00001.parquet", "judgements/part-00002.parquet", "responses/part-00000.parquet",
        "responses/part-00001.parquet", "responses/part-00002.parquet",
    ) if (round_, name) != (1, "start_logps.parquet")),
    *(f"rounds/{round_:06d}/{name}" for round_ in (3, 4) for name in ("policy/skill.json", "trainer/state.json")),
    *(f"rounds/{round_:06d}/reference/skill.json" for round_ in (3, 4)),
    "rounds/000004/judge_trial.json",
]  # fmt: skip


def test_the_run_has_all_the_files_that_a_byte_is_flipped_in(finished):
    assert {str(path.relative_to(finished)) for path in ledger_files(finished)} == set(KINDS)
    assert find_damage(Ledger(finished), True) == []


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(share * len(data)))] ^= 0x08
    path.write_bytes(data)


def copied(finished: Path, to: Path) -> Path:
    shutil.copytree(finished, to / finished.name)
    return to / finished.name


def resume(root: Path, from_round: int | None = None) -> list[str]:
    """What a resumed run says; the run is finished, so that it only looks."""
    observer = FakeObserver()
    with pytest.MonkeyPatch.context() as patch, faked():
        patch.setattr(report, "render", lambda view: "")
        launch.resume(root, [observer], from_round=from_round)
    return observer.messages


def read_for_report(root: Path) -> None:
    """All that a report reads of the run folder, without drawing anything."""
    view = load_run_view(root)
    judge_view.notes(view)
    report._comparisons(view)
    report._examples(view, "pairs")


FEWER = [name for name in KINDS if not re.search(r"00000[23]/([^/]*$|.*part)", name)]
"""Rounds 2 and 3 are as 1 and 4."""


@pytest.mark.parametrize("name", FEWER)
def test_a_flipped_byte_is_found_and_named(finished, tmp_path, name):
    root = copied(finished, tmp_path)
    path = root / name
    whole = path.read_bytes()
    for share in (0.0, 0.02, 0.33, 0.5, 0.71, 0.97, 0.9999):
        if name == "timeline.jsonl" and share > 0.9:
            continue  # in the last line, it looks like one that a crash cut short
        path.write_bytes(whole)
        flip(path, share)
        (damage,) = find_damage(Ledger(root), True)
        assert damage.path == path, share
    said = CliRunner().invoke(app, ["verify", str(root)])
    assert isinstance(said.exception, LedgerError) and repr(str(path)) in str(said.exception)
    # Resumed, it is named too, and the run goes on only where it never reads the file again.
    needed = not re.search(r"responses|judgements|judged|_logps|00000[123]/prompts|timeline", name)
    loaded = not re.search(r"00000[123]/(policy|trainer|reference)", name)
    if needed and loaded:
        with pytest.raises(LedgerError) as refused:
            resume(root)
        assert repr(str(path)) in str(refused.value)
    elif loaded:
        assert any(repr(str(path)) in text and "the run goes on without" in text for text in resume(root))
    # A report shows nothing of a damaged file, and says which it is.
    shown = "config|run.json|roll_backs|guard_stops|metrics|eval.json|trial|sqlite|000[04]/eval.parq|pairs"
    try:
        read_for_report(root)
    except LedgerError as error:
        assert repr(str(path)) in str(error)
    else:
        assert not re.search(shown, name)


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("rounds/000004/COMMIT.json", 3),
        ("rounds/000004/policy/skill.json", 3),
        ("rounds/000004/trainer/state.json", 3),
        ("rounds/000004/eval.json", 3),
        ("rounds/000004/prompts.parquet", 3),
        ("rounds/000004/metrics.jsonl", 3),
        ("rounds/000003/pairs.parquet", 0),
        ("rounds/000001/COMMIT.json", 0),
        ("rounds/000000/COMMIT.json", None),
        ("run.json", None),
    ],
)
def test_the_last_round_that_is_whole_is_offered(finished, tmp_path, name, offered):
    root = copied(finished, tmp_path)
    flip(root / name, 0.5)
    ledger = Ledger(root)
    assert whole_round(ledger, find_damage(ledger, True)) == offered
    with pytest.raises(LedgerError) as refused:
        resume(root)
    command = f"online-po resume {root} --from-round {offered}"
    assert (command in str(refused.value)) == (offered is not None)
    assert "restore it from a copy" in str(refused.value)


def test_going_back_keeps_everything_and_ends_the_same(tmp_path):
    config = make_config(tmp_path, checkpoint__keep=None)
    with pytest.MonkeyPatch.context() as patch, faked():
        patch.setattr(report, "render", lambda view: "")
        launch.run(config)
        ledger, expected = Ledger(config.run_dir), content(config.run_dir)
        flip(ledger.round_dir(3) / "metrics.jsonl", 0.5)
        flip(ledger.round_dir(2) / "COMMIT.json", 0.5)
        kept = (ledger.round_dir(3) / "metrics.jsonl").read_bytes()
        with pytest.raises(
            LedgerError, match=r"COMMIT.json' is damaged(.|\n)*metrics.jsonl' is damaged(.|\n)*round 1, which"
        ):
            launch.resume(ledger.root)
        with pytest.raises(LedgerError, match=r"000002/COMMIT.json' is damaged"):
            launch.resume(ledger.root, from_round=2)
        with pytest.raises(ConfigError, match="--from-round is 4, but the rounds that are committed are 0 to 3"):
            launch.resume(ledger.root, from_round=4)
        launch.resume(ledger.root, from_round=1)
    assert content(ledger.root) == expected, "the same seeds, the same responses"
    assert find_damage(ledger, True) == [] and ledger.guard_roll_backs() == 0
    assert (ledger.root / "rolled_back/001/000003/metrics.jsonl").read_bytes() == kept
    (record,) = ledger.roll_backs()
    assert (record["from"], record["to"], record["guard"], record["done"]) == (3, 1, None, True)


def test_a_round_whose_weights_are_gone_is_none_to_go_back_to(finished, tmp_path):
    root = copied(finished, tmp_path)
    with pytest.raises(ConfigError, match=r"--from-round is 2, but round 2's policy is no longer kept"):
        resume(root, from_round=2)


def test_a_file_that_was_put_there_is_found(finished, tmp_path):
    root = copied(finished, tmp_path)
    planted = root / "rounds/000004/policy/pytorch_model.bin"
    planted.write_bytes(b"anything")
    with pytest.raises(LedgerError, match=r"pytorch_model.bin' is damaged: it was not there at the commit"):
        resume(root)
    with pytest.raises(DamagedError, match=r"pytorch_model.bin"):
        export(root, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_weights_of_rounds_that_are_not_gone_on_from_are_checked_when_they_are_loaded(finished, tmp_path):
    root = copied(finished, tmp_path)
    flip(root / "rounds/000003/policy/skill.json", 0.5)
    assert resume(root) == []
    with pytest.raises(DamagedError, match=r"000003/policy/skill.json"):
        Ledger(root).policy(3, root)


@pytest.mark.parametrize("piece", ["prompts.parquet", "responses/part-00000.parquet", "judgements/part-00001.parquet",
                                   "judged.json", "pairs.parquet", "reference_logps.parquet"])  # fmt: skip
def test_a_damaged_piece_of_a_round_under_way_is_named_and_made_again(finished, tmp_path, piece):
    root = copied(finished, tmp_path)
    expected = content(root)
    (root / "rounds/000004/COMMIT.json").unlink()
    flip(root / "rounds/000004" / piece, 0.97)
    config = Ledger(root).config()
    judges, observer = LocalJudgePool(config.judge, root / "judge_cache.sqlite"), FakeObserver()
    with pytest.MonkeyPatch.context() as patch, faked(judges=judges):
        patch.setattr(report, "render", lambda view: "")
        launch.resume(root, [observer])
    judges.close()
    assert any(piece in text and "made again" in text for text in observer.messages)
    assert content(root) == expected


def test_a_damaged_piece_of_a_round_under_way_is_named_by_status_too(finished, tmp_path):
    root = copied(finished, tmp_path)
    (root / "rounds/000004/COMMIT.json").unlink()
    flip(root / "rounds/000004/prompts.parquet", 0.99)
    done = CliRunner().invoke(app, ["status", str(root)])
    assert isinstance(done.exception, DamagedError) and done.exception.path.name == "prompts.parquet"


# -- other versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3, SCHEMA_VERSION + 1])
def test_a_run_of_another_schema_is_refused_by_name(finished, tmp_path, version):
    """Older ones as they were: without hashes."""
    root = copied(finished, tmp_path)
    info = files.read_json(root / "run.json") | {"schema_version": version}
    if version > SCHEMA_VERSION:
        files.write_json(root / "run.json", info)
    else:
        (root / "run.json").write_text(json.dumps(info | {"versions": {"online-po": "0.0.1"}}))
    before = {path: path.read_bytes() for path in ledger_files(root)}
    for command in (["status"], ["resume"], ["report"], ["verify"], ["export", "OUT"], ["pairs", "OUT.parquet"]):
        name, *out = command
        done = CliRunner().invoke(app, [name, str(root), *(str(tmp_path / o) for o in out)])
        assert isinstance(done.exception, LedgerError), (command, done.output, done.exception)
        assert f"ledger schema {version}" in str(done.exception), command
        assert f"this version reads {SCHEMA_VERSION}" in str(done.exception) and "run.name" in str(done.exception)
    with faked(), pytest.raises(LedgerError, match=f"ledger schema {version}"):
        launch.run(make_config(root.parent))
    assert {path: path.read_bytes() for path in ledger_files(root)} == before, "nothing was touched"


def test_a_commit_of_another_schema_is_refused(finished, tmp_path):
    root = copied(finished, tmp_path)
    path = root / "rounds/000002/COMMIT.json"
    files.write_json(path, files.read_json(path) | {"schema_version": SCHEMA_VERSION - 1})
    with pytest.raises(LedgerError, match=f"COMMIT.json' was written with ledger schema {SCHEMA_VERSION - 1}"):
        Ledger(root).committed(2)


def test_other_package_versions_are_told(finished, tmp_path):
    root = copied(finished, tmp_path)
    info = files.read_json(root / "run.json")
    files.write_json(root / "run.json", info | {"versions": {"python": "3.9", "torch": "1.0"}})
    (said,) = resume(root)
    assert "other versions" in said and "python 3.9 then, 3.11 now; torch 1.0 then, none now" in said
    (said,) = resume(root)  # what it was started with stays what it is
    assert "python 3.9 then" in said


def test_a_config_changed_by_hand_is_told(finished, tmp_path):
    root = copied(finished, tmp_path)
    text = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(text.replace("rounds: 4", "rounds: 5"))
    with pytest.raises(DamagedError, match=r"changed by hand .*online-po run CONFIG section.key=value"):
        resume(root)


def test_a_line_of_the_timeline_has_its_checksum(finished):
    lines = (finished / "timeline.jsonl").read_bytes().splitlines()
    assert all(timeline_event(line) for line in lines)
    assert timeline_event(lines[0].replace(b'"phase"', b'"Phase"')) is None
    assert timeline_event(b"[1]") is None and timeline_event(b"") is None


def test_hashes_do_not_keep_others_from_reading(finished):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(finished / "rounds/000001/pairs.parquet"), split="train",
                        cache_dir=str(finished.parent / "cache"))  # fmt: skip
    assert rows.num_rows == Ledger(finished).pairs(1).num_rows > 0
    digest = files.sha256([finished / "rounds/000001/pairs.parquet"])[0]
    command = ["sha256sum", str(finished / "rounds/000001/pairs.parquet")]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith(digest)


@pytest.mark.parametrize("round_", [0, 3])
def test_a_commit_that_is_gone_is_named_and_later_rounds_are_not_taken_for_unfinished(finished, tmp_path, round_):
    root = copied(finished, tmp_path)
    (root / f"rounds/{round_:06d}/COMMIT.json").unlink()
    before = {path: path.read_bytes() for path in ledger_files(root)}
    with pytest.raises(LedgerError, match=rf"{round_:06d}/COMMIT.json' is damaged: it is missing, though later"):
        resume(root)
    assert {path: path.read_bytes() for path in ledger_files(root)} == before


def test_a_damaged_timeline_is_told_and_in_nobodys_way(finished, tmp_path):
    root = copied(finished, tmp_path)
    path = root / "timeline.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0" * 40, *lines[2:]]))
    assert any("timeline.jsonl' is damaged" in message and "goes on without" in message for message in resume(root))
    assert len(load_run_view(root).phases) == len(load_run_view(finished).phases) - 1


def test_weights_that_nothing_goes_on_from_are_no_reason_to_go_back(finished, tmp_path):
    root = copied(finished, tmp_path)
    flip(root / "rounds/000003/trainer/state.json", 0.5)
    done = CliRunner().invoke(app, ["verify", str(root)])
    said = " ".join(str(done.exception).split())
    assert "000003/trainer/state.json' is damaged" in said and "goes on without" in said and "--from-round" not in said
    resume(root)


@pytest.mark.parametrize("name", ["config.yaml", "rounds/000002/eval.parquet"])
def test_a_file_that_is_gone_is_named(finished, tmp_path, name):
    root = copied(finished, tmp_path)
    (root / name).unlink()
    assert [str(damage.path) for damage in find_damage(Ledger(root), True)] == [str(root / name)]


def test_a_run_under_way_is_not_verified(finished, tmp_path):
    ledger = Ledger(copied(finished, tmp_path))
    with ledger.lock():
        done = CliRunner().invoke(app, ["verify", str(ledger.root)])
    assert "in use by process" in str(done.exception)


def test_going_back_by_hand_is_to_what_a_guard_left(tmp_path):
    """A roll-back that was cut off is finished first: what it moves cannot be gone back to."""
    config = make_config(tmp_path)
    parts = make_parts(config)
    run_rounds(parts)
    record = {"from": 3, "to": 2, "guard": "entropy", "message": "ill", "done": False}
    parts.ledger._write_acts("roll_backs.json", [record])
    with pytest.raises(ConfigError, match=r"--from-round is 3, but the rounds that are committed are 0 to 2"):
        go_back_by_hand(parts.ledger, 3)
    assert [done["done"] for done in parts.ledger.roll_backs()] == [True]


@pytest.mark.parametrize("moved", [False, True])
def test_going_back_by_hand_past_what_a_guard_went_back_to_makes_the_same_run(tmp_path, moved):
    """`moved`: also where the guard's roll-back was cut off before its folders were moved."""
    config = make_config(tmp_path, checkpoint__keep=None, **SICK)
    with pytest.MonkeyPatch.context() as patch, faked(learner=SickLearner(config, 3, entropy=0.2)):
        patch.setattr(report, "render", lambda view: "")
        launch.run(config)
        ledger, expected = Ledger(config.run_dir), content(config.run_dir)
        (guard,) = ledger.roll_backs()
        assert (guard["from"], guard["to"]) == (3, 2)
        if moved:
            ledger._write_acts("roll_backs.json", [guard | {"done": False}])
            files.move_folder(ledger.round_dir(4), tmp_path / "kept")  # else it would be moved out too
            files.move_folder(ledger.round_dir(3), tmp_path / "kept3")
    with pytest.MonkeyPatch.context() as patch, faked(learner=SickLearner(config, 3, entropy=0.2)):
        patch.setattr(report, "render", lambda view: "")
        launch.resume(ledger.root, from_round=1)
    assert [record["done"] for record in ledger.roll_backs()] == [True, True]
    assert content(ledger.root) == expected
