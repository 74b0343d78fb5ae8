"""YAML of configs: keys once, words that stay words, numbers that are numbers."""

from __future__ import annotations

import pytest
import yaml

from online_po.config import Config
from online_po.errors import ConfigError
from online_po.yaml_text import load_yaml
from tests.test_config import BASE, write


def test_a_key_twice_is_refused(tmp_path):
    path, text = tmp_path / "c.yaml", yaml.safe_dump(BASE)
    lines = text.count("\n")
    path.write_text(text + "learner:\n  epochs: 2\nlearner:\n  ranks: 1\n")
    with pytest.raises(ConfigError, match=rf"c.yaml', line {lines + 3}: the key 'learner' .* line {lines + 1};"):
        Config.from_yaml(path)
    path.write_text(text + "learner:\n  epochs: 2\n  ranks: 1\n  'epochs': 3\n")
    with pytest.raises(ConfigError, match=rf"c.yaml', line {lines + 4}: the key 'epochs' .* line {lines + 2};"):
        Config.from_yaml(path)
    with pytest.raises(ConfigError, match="override .*: the value, line 1: the key 'rank'"):
        Config.from_yaml(write(tmp_path), ["learner.lora={rank: 3, rank: 4}"])


def test_anchors_and_merge_keys_go_on_working(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump({key: BASE[key] for key in ("model", "prompts")})
        + "run: &a {name: x, seed: 1}\n"
        + "generator: &b {temperature: 0.5, top_p: 0.9}\n"
        + "learner:\n  lora: &c {rank: 4, alpha: 8}\n"
        + "eval:\n  temperature: 0.2\n"
    )
    assert Config.from_yaml(path).run.seed == 1
    # Merged over and over: a mapping that was merged into is merged from.
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, x: 3}\nd: {<<: *b}\ne: {<<: *a, <<: *b}\nf: *b\n"
    found = load_yaml(text, "text")
    assert found["b"] == {"x": 1, "y": 2} and found["c"] == {"x": 3, "y": 2} and found["d"] == found["f"] == found["b"]
    assert found == yaml.safe_load(text)


def test_words_stay_words_and_small_numbers_are_numbers(tmp_path):
    # YAML 1.1, which PyYAML reads, makes `off` false and 1e-3 text: guards could not be switched off.
    text = "[off, on, yes, No, true, FALSE, 1e-3, -2E+5, .5e1, 5.e2, 1.5, 12, 1e, e3, 'true', 0x10]"
    found = load_yaml(text, "text")
    assert found == ["off", "on", "yes", "No", True, False, 1e-3, -2e5, 5.0, 500.0, 1.5, 12, "1e", "e3", "true", 16]
    config = Config.from_yaml(write(tmp_path), ["guards.flat.action=off", "run.tensorboard=off"])
    assert config.guards.flat.action == "off" and config.run.tensorboard is False
    config = Config.from_yaml(write(tmp_path), ["loss={name: custom, function: 'a:b', options: {gap: 1e-3}}"])
    assert config.loss[0].options == {"gap": 1e-3}
