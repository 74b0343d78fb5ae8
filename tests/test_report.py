"""The report and what it is read from: verdicts, escaping, unfinished runs, no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from online_po import files
from online_po.observers import PhaseTimer, timeline_line
from online_po.report import write_report
from online_po.report_charts import MAX_POINTS, charts, thin
from online_po.run_view import (
    duration,
    interval,
    load_run_view,
    number,
    phase_seconds,
    sample_comparisons,
    sample_pairs,
    time_use,
    verdict,
)
from tests.run_folder import make_run_folder


class Page(HTMLParser):
    """The elements of a page: tags with attributes, scripts with text, visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif self.inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run_folder) -> Page:
    return Page(write_report(run_folder).read_text())


def test_the_report_says_what_the_run_holds(run_folder, page):
    text = re.sub(r"\s+", " ", page.text)
    assert verdict(load_run_view(run_folder)).sentence in text
    for expected in ("Preference pairs", "Before and after", "2.13.0+cpu", "all scores equal", "timed out"):
        assert expected in text
    assert "learning_rate:" in text, "the resolved config"
    drawn = {attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs}
    data = next(json.loads(text) for attrs, text in page.scripts if attrs.get("id") == "chart-data")
    assert set(data) == drawn | {"length"}
    assert {"score", "win_rate", "loss", "kl", "time", "score_bins", "length_bins"} <= drawn


def test_the_same_folder_gives_the_same_report(run_folder, tmp_path):
    first = write_report(run_folder, tmp_path / "a.html").read_bytes()
    assert first == write_report(run_folder, tmp_path / "b.html").read_bytes()


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "base"), tag
        assert "src" not in attrs
        if tag == "a":
            assert attrs["href"].startswith("#")
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} <= ids, "every link has its place"


def test_only_the_reports_own_scripts_may_run(page):
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    code = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_markup_in_responses_stays_text(tmp_path):
    evil = "</script></pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}"
    folder = make_run_folder(tmp_path, rounds=1, text=evil)
    config = files.read_yaml(folder / "config.yaml")
    files.write_yaml(folder / "config.yaml", config.replace("prompts.jsonl", "'</pre><script>alert(3)</script>'"))
    page = Page(write_report(folder).read_text())
    assert len(page.scripts) == 3, "the data, plotly.js and the report's own"
    assert not [tag for tag, attrs in page.tags if tag == "img" or any(name.startswith("on") for name in attrs)]
    assert page.text.count(evil) > 8, "shown as it was written"


@pytest.mark.parametrize(
    ("options", "tone", "words"),
    [
        ({"gain": 0.15}, "better", "rose from"),
        ({"gain": -0.09}, "worse", "fell from"),
        ({"gain": 0.0}, "unclear", "No clear change"),
        ({"committed": 1, "gain": 0.2}, "better", "Unfinished: 1 of 3 rounds committed."),
        ({"committed": 0}, "open", "there is no comparison yet"),
        ({"gain": 0.3, "heldout": 8, "failing": 0}, "better", "too few for the intervals to be trusted"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(tmp_path, options, tone, words):
    folder = make_run_folder(tmp_path, **options)
    found = verdict(load_run_view(folder))
    assert (found.tone, words in found.sentence) == (tone, True), found.sentence
    assert write_report(folder).exists()


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    folder = make_run_folder(tmp_path, committed=0)
    for path in (folder / "rounds" / "000000").iterdir():
        path.unlink()
    (folder / "timeline.jsonl").unlink()
    assert "has no evaluation yet" in write_report(folder).read_text()


def test_a_beta_for_each_round_is_shown(tmp_path):
    folder = make_run_folder(tmp_path)
    path = folder / "config.yaml"
    config = yaml.safe_load(files.read_yaml(path))
    config["loss"] = [{"name": "ipo", "weight": 1.0, "beta": [0.5, 0.25]}]
    files.write_yaml(path, yaml.safe_dump(config))
    assert "ipo, β 0.5, 0.25" in write_report(folder).read_text()


def test_a_line_cut_short_is_skipped(tmp_path):
    folder = make_run_folder(tmp_path, rounds=1)
    with (folder / "timeline.jsonl").open("a") as file:
        file.write('{"phase": "gen')
    assert len(load_run_view(folder).phases) == 12


def test_an_evaluation_that_was_never_asked_for(tmp_path):
    folder = make_run_folder(tmp_path, rounds=1)
    config = files.read_yaml(folder / "config.yaml")
    files.write_yaml(folder / "config.yaml", re.sub(r"(eval:\n  every: )1", r"\g<1>0", config))
    for path in folder.glob("rounds/*/eval.*"):
        path.unlink()
    view = load_run_view(folder)
    assert view.finished
    assert "eval.every is 0" in verdict(view).sentence


def test_examples_are_drawn_without_looking_at_scores(run_folder):
    rounds = load_run_view(run_folder).rounds
    pairs = sample_pairs(rounds[1].folder, 5, seed=3)
    assert pairs == sample_pairs(rounds[1].folder, 5, seed=3) != sample_pairs(rounds[1].folder, 5, seed=4)
    assert len(sample_pairs(rounds[1].folder, 10_000, seed=3)) == rounds[1].summary["pairs"]
    items = sample_comparisons(rounds[0].folder, rounds[-1].folder, 1000, seed=0)
    assert len(items) == 47, "all but the prompt whose judgement failed"
    assert {item["after"]["score"] > item["before"]["score"] for item in items} == {True, False}
    assert all(item["before"]["prompt_id"] == item["after"]["prompt_id"] for item in items)


def test_time_use_is_a_union_over_sessions(tmp_path):
    folder = make_run_folder(tmp_path, committed=0)
    lines = [
        ("start", 0, 100.0, 10.0),
        ("learn", 1, 112.0, 8.0),
        ("generate", 2, 110.0, 6.0),  # overlaps learn by 4
        ("commit", 1, 120.0, 2.0),
        ("start", 0, 1000.0, 5.0),
        ("generate", 3, 1005.0, 5.0),
    ]
    rows = [dict(zip(("phase", "round", "start", "seconds"), line, strict=True)) for line in lines]
    (folder / "timeline.jsonl").write_text("".join(timeline_line(row) + "\n" for row in rows))
    view = load_run_view(folder)
    assert time_use(view) == {"startup": 15.0, "wall": 12.0 + 5.0, "useful": 10.0 + 5.0}
    assert phase_seconds(view)[2] == {"generate": 6.0}


def test_restarts_are_told_of_and_are_no_phases(tmp_path):
    folder = make_run_folder(tmp_path)
    use = time_use(load_run_view(folder))
    timer = PhaseTimer(folder / "timeline.jsonl")
    for who, seconds in (("generator replica 0", 8.0), ("the learner", 12.0), ("generator replica 0", 10.0)):
        timer.restart(who, "killed", seconds)
    timer.close()
    view = load_run_view(folder)
    assert time_use(view) == use and [restart["seconds"] for restart in view.restarts] == [8.0, 12.0, 10.0]
    text = write_report(folder).read_text()
    assert "Died and started again: generator replica 0 (2 times), the learner (1 time); that took 30 s" in text


def test_many_rounds_and_steps_stay_small(tmp_path):
    folder = make_run_folder(tmp_path, rounds=15, steps=100, prompts=6, heldout=6)
    view = load_run_view(folder)
    found = charts(view)
    assert len(found["loss"]["series"][0]["x"]) <= MAX_POINTS
    assert found["time"]["stack"] == "v"
    assert found["loss"]["breaks"] == []
    assert [r.number for r in view.table_rounds][::11] == [0, 15] and len(view.table_rounds) == 12
    assert "12 of 16 policies, evenly spaced" in write_report(folder).read_text()
    assert len(found["length_bins"]["series"]) == 5
    assert thin([(float(i), 2.0 * i) for i in range(1200)])[0] == (0.5, 1.0)


def test_numbers_for_people():
    assert [number(x) for x in (0.1234, -12.345, 1234.5, None)] == ["0.123", "-12.35", "1234.5", "–"]
    assert interval({"mean": 0.74, "low": 0.68, "high": 0.8}, percent=True) == "74% [68, 80]"
    assert interval({"mean": 0.5, "low": None, "high": None}) == "0.500"
    assert [duration(s) for s in (0.44, 42.4, 59.6, 185, 7810)] == [
        "0.4 s",
        "42 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]


def test_a_beta_for_each_round_a_renewed_reference_and_mixed_pairs_are_shown(tmp_path):
    folder = make_run_folder(tmp_path)
    text = files.read_yaml(folder / "config.yaml")
    text = text.replace("beta: 0.1", "beta: [0.1, 0.2, 0.2]").replace("kind: fixed", "kind: refresh")
    files.write_yaml(folder / "config.yaml", text)
    for round_, source in ((1, {"fresh": 40}), (2, {"fresh": 40, "replay": 10}), (3, {"fresh": 40, "replay": 9})):
        path = folder / f"rounds/00000{round_}/metrics.jsonl"
        *steps, row = files.read_json_lines(path)
        more = {"beta": 0.2 if round_ > 1 else 0.1, "reference_round": round_ - 1, "sources": source}
        more |= {"sampler_mismatch": 0.001 * round_}
        files.write_json_lines(path, [*steps, row | more])
    page = Page(write_report(folder).read_text())
    assert "sigmoid, β 0.1, 0.2, 0.2" in page.text and "refresh, every 1" in page.text
    shown = {attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs}
    assert {"beta", "reference", "mismatch", "sampling_kl", "sources"} <= shown
    (data,) = [json.loads(text) for attrs, text in page.scripts if attrs.get("id") == "chart-data"]
    assert [line["y"] for line in data["sources"]["series"]] == [[40, 40, 40], [0, 10, 9]]
    assert data["reference"]["series"][0]["y"] == [0, 1, 2] and data["beta"]["series"][0]["y"] == [0.1, 0.2, 0.2]
    assert data["mismatch"]["line"] > 0
    plain = charts(load_run_view(make_run_folder(tmp_path / "plain")))
    assert not {"beta", "reference", "mismatch", "sources"} & plain.keys()


def test_labelled_responses_are_shown_as_such(tmp_path):
    from online_po.loop import run_rounds
    from tests.fakes import SickLearner, make_config
    from tests.test_loop import make_parts

    parts = make_parts(make_config(tmp_path, loss={"name": "kto"}, pairs={"replay_share": 0.3}))
    parts.learner = SickLearner(parts.config, 99, chosen_reward=0.1)
    run_rounds(parts)
    page = Page(write_report(parts.ledger.root).read_text())
    assert "Labelled responses" in page.text and "Desirable" in page.text and "Preference pairs" not in page.text
    assert "replayed from earlier rounds" in page.text and "sign of their label" in page.text
