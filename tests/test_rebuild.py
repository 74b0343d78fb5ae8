"""Pairs built again from a run's judgements."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from online_po.errors import ConfigError
from online_po.loop import run_rounds
from online_po.rebuild import rebuild
from tests.fakes import make_config
from tests.test_loop import make_parts


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    parts = make_parts(make_config(tmp_path_factory.mktemp("run"), loop__rounds=2))
    run_rounds(parts)
    return parts.ledger


def test_with_the_runs_own_settings_they_are_the_same(ledger, tmp_path):
    made = rebuild(ledger, tmp_path / "again.parquet")
    again = pq.read_table(tmp_path / "again.parquet")
    own = [ledger.examples(round_, "pairs") for round_ in (1, 2)]
    assert made == {round_: table.num_rows for round_, table in zip((1, 2), own, strict=True)}
    assert again.to_pylist() == own[0].to_pylist() + own[1].to_pylist()


def test_other_settings_give_other_pairs(ledger, tmp_path):
    before = rebuild(ledger, tmp_path / "a.parquet", round_=2)
    every = rebuild(ledger, tmp_path / "b.parquet", ["pairs.strategy=all"], round_=2)
    assert set(before) == set(every) == {2} and every[2] > before[2] > 0
    labels = rebuild(ledger, tmp_path / "c.parquet", ["loss={name: kto}"], round_=1)
    assert pq.read_table(tmp_path / "c.parquet").column("label").null_count == 0 and labels[1] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["judge.kind=rules"], r"--set judge.kind=rules: .*only pairs., labels."),
        (["pairs.strategy=hardest_reward"], r"pairs.strategy is hardest_reward, which needs the policy's weights"),
        (["pairs.replay_share=0.5"], r"--set pairs.replay_share: only what rounds made themselves"),
        (["pairs.strategy=bst"], r"pairs.strategy"),
    ],
)
def test_what_pairs_are_not_made_of_is_refused(ledger, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        rebuild(ledger, tmp_path / "x.parquet", changes)
    assert not (tmp_path / "x.parquet").exists()


def test_a_round_that_is_not_there_and_a_file_of_another_kind_are_refused(ledger, tmp_path):
    with pytest.raises(ConfigError, match=r"--round is 3, but the run has judged rounds \[1, 2\]"):
        rebuild(ledger, tmp_path / "x.parquet", round_=3)
    own = ledger.round_dir(1) / "pairs.parquet"
    before = own.read_bytes()
    with pytest.raises(ConfigError, match=r"among the run's own; choose another place"):
        rebuild(ledger, own, ["pairs.strategy=all"])
    assert own.read_bytes() == before
    with pytest.raises(ConfigError, match=r"let its name end in .parquet"):
        rebuild(ledger, tmp_path / "x.json")
