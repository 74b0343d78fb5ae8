"""What losses ask of the rest of the config. The reference, its log-probabilities and the controller of beta are in
test_config, test_anchors and test_betas; losses of the user's own, which are loaded, in test_plan."""

from __future__ import annotations

import pytest

from online_po.errors import ConfigError
from tests.fakes import make_config

SOFT = {"name": "sppo", "probability": "soft"}
SCALE = {"judge__bradley_terry_scale": 1}
SPIN = {"pairs__strategy": "spin", "pairs__chosen_column": "gold"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": SOFT},
            "loss.probability is soft, but judge.bradley_terry_scale is null: .* set it .*probability: hard",
        ),
        (
            {"loss": SOFT, **SCALE, "pairs": {"seed_path": "s.jsonl", "seed_share": 0.1}},
            "loss.probability is soft, but pairs of pairs.seed_path '.*s.jsonl' have no probability",
        ),
        ({"loss": SOFT, **SPIN}, "loss.probability is soft, but pairs of pairs.strategy: spin have no probability"),
        ({**SCALE, **SPIN}, "judge.bradley_terry_scale is 1, but has no effect with pairs.strategy: spin"),
        ({**SCALE, "loss": {"name": "kto"}}, "judge.bradley_terry_scale is 1, but has no effect with loss.name: kto"),
        ({"judge__bradley_terry_scale": 0}, "judge.bradley_terry_scale: .*greater than 0"),
    ],
)
def test_probabilities_that_nobody_gives_or_reads_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **settings)


def test_what_lies_beside_a_refusal_passes(tmp_path):
    make_config(tmp_path, loss=SOFT, **SCALE, pairs={"replay_share": 0.2, "flip_rate": 0.1})
    make_config(tmp_path, **SCALE, pairs={"seed_path": "s.jsonl", "seed_share": 0.3})  # the column is there for others
