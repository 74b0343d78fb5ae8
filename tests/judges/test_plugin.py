"""Judges of other packages, loaded through their entry points as installed ones are."""

import asyncio
import shutil
import sys

import pytest

from judges.asking import Asker
from judges.runtime import build_judge, check_judge, judge_groups
from online_po.errors import ConfigError
from online_po.judge_configs import Plugin

from .groups import make_group
from .plugin_package import install


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(install(tmp_path))])
    yield tmp_path
    sys.modules.pop("judges_for_sale", None)


def judge(*groups, asker=None, **settings):
    config = Plugin(**settings)
    return asyncio.run(judge_groups(build_judge(config, asker), groups or [make_group("aab", "")]))


def test_an_object_that_judges_groups():
    (verdict,) = judge(name="brevity", options={"weight": 2})
    assert verdict.scores == (-6.0, 0.0) and verdict.rationales == ("short", "short")


def test_a_function_that_a_factory_makes():
    assert judge(name="counter", options={"letter": "a"})[0].scores == (2.0, 0.0)


def test_a_function_itself():
    assert judge(name="length")[0].scores == (3.0, 0.0)
    assert judge(name="length", options={"factor": 0.5})[0].scores == (1.5, 0.0)


@pytest.mark.parametrize(
    ("give", "kind", "message"),
    [
        ("hang", "timeout", "judge.timeout_s = 0.5 s"),
        ("error", "error", "KeyError: 'k'"),
        ("text", "bad_value", "brevity returned a str, not a Judgement"),
        ("short", "bad_length", "1 scores for 2 responses"),
        ("other", "bad_value", "answered for another prompt, 'another'"),
        ("one reason", "bad_length", "1 rationales for 2 responses"),
        ("no text", "bad_value", "rationales that are not all text: ('short', 3)"),
    ],
)
def test_what_goes_wrong_is_a_failure(give, kind, message):
    (verdict,) = judge(name="brevity", options={"give": give}, timeout_s=0.5)
    assert verdict.scores is None and verdict.failure.kind == kind and message in verdict.failure.message


def test_what_no_file_can_hold_is_no_rationale():
    (verdict,) = judge(name="brevity", options={"give": "half"})
    assert verdict.rationales == ("short ?", "short")


def test_a_changed_source_is_another_judge(installed):
    def identity() -> str:
        sys.modules.pop("judges_for_sale", None)
        config = Plugin(name="brevity")
        asker = Asker(config)
        build_judge(config, asker)
        return asker._judge

    before = identity()
    assert identity() == before
    module = installed / "judges_for_sale.py"
    module.write_text(module.read_text() + "# changed\n")
    assert identity() != before


def test_it_asks_by_its_asker():
    """So that answers are remembered: JSON goes in and comes out."""
    import json

    class Remembering(Asker):
        answers = {}

        async def ask(self, question, call):
            key = question.key(json.dumps(self.config.identity()))
            if key not in self.answers:
                self.answers[key] = json.dumps((await call()).value)
            return type("Answer", (), {"value": json.loads(self.answers[key])})

    config = {"name": "brevity"}
    first = judge(asker=Remembering(Plugin(**config)), **config)
    assert judge(asker=Remembering(Plugin(**config)), **config) == first and len(Remembering.answers) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "brevety"},
            "judge.name is 'brevety', .* did you mean 'brevity'.* installed: brevity, broken, counter",
        ),
        ({"name": "elsewhere"}, "no installed package has a judge of that name"),
        ({"name": "gone"}, "'gone' of judges-for-sale, but loading 'judges_for_sale:gone' fails with AttributeError"),
        ({"name": "broken"}, "fails with ModuleNotFoundError"),
        ({"name": "nothing"}, "is a int, not a callable"),
        ({"name": "brevity", "options": {"wait": 1}}, "judge.options is .* does not take: got an unexpected .* 'wait'"),
        ({"name": "counter"}, "does not take: missing a required argument: 'letter'"),
        ({"name": "length", "options": {"scale": 2}}, "does not take"),
    ],
)
def test_found_out_before_a_run(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_judge(Plugin(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "brevity", "options": {"weight": -1}}, "cannot be made .*: ValueError: no negative weights here"),
        ({"name": "number"}, "made a int: neither an object with `async judge"),
        ({"name": "sync"}, "made a Scorer: neither"),
    ],
)
def test_found_out_when_it_is_made(settings, message):
    check_judge(Plugin(**settings))
    with pytest.raises(ConfigError, match=message):
        build_judge(Plugin(**settings))


def test_nothing_installed(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:-1])
    with pytest.raises(ConfigError, match=r"entry points of group 'online_po\.judges'\); installed: none"):
        check_judge(Plugin(name="brevity"))


def test_another_version_is_another_judge(installed):
    assert Plugin(name="brevity").identity()["packages"] == ["judges-for-sale 1.2.3"]
    before = Plugin(name="brevity", options={"weight": 1}).identity()
    assert before != Plugin(name="brevity").identity()
    shutil.rmtree(installed / "judges_for_sale-1.2.3.dist-info")
    install(installed, version="1.3.0")
    assert Plugin(name="brevity", options={"weight": 1}).identity() == before | {"packages": ["judges-for-sale 1.3.0"]}


def test_two_packages_with_one_name(installed, monkeypatch):
    other = installed / "other"
    other.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(install(other, name="more-judges"))])
    with pytest.raises(ConfigError, match="judges-for-sale and more-judges both have"):
        check_judge(Plugin(name="brevity"))
