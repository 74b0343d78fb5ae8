"""Where a round's fixed log-probabilities come from: the learner, or the sampler where it says the same."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from online_po.anchors import Anchors, ask_learner, sampler_logps
from online_po.errors import ConfigError
from online_po.loop import run_rounds
from online_po.tables import PAIR_SCHEMA
from tests.fakes import FakeLearner, make_config
from tests.test_loop import content, make_parts

SAMPLER = {"kind": "refresh", "logps": "sampler"}


class AgreeingLearner(FakeLearner):
    """Says what the fake generator says of its own responses, -1 a token, but for `off`."""

    off = 0.0

    def logps(self, examples, policy):
        self.log.append(("logps", policy.version, examples.num_rows))
        rows = np.arange(examples.num_rows)
        sides = {side: -examples[f"{side}_token_ids"].combine_chunks().value_lengths().to_numpy() for side in
                 ("chosen", "rejected")}  # fmt: skip
        yield {"row": rows} | {side: (values * (1 + self.off)).astype(np.float32) for side, values in sides.items()}


def run(tmp_path, off=0.0, **changes):
    config = make_config(
        tmp_path,
        reference=SAMPLER | changes,
        loop__prompts_per_round=20,
        pairs__strategy="all",
        learner={"kl_to_start": False},
    )
    parts = make_parts(config)
    parts.learner = AgreeingLearner()
    parts.learner.off = off
    run_rounds(parts)
    return parts


def summaries(parts):
    import json

    paths = sorted(parts.ledger.root.glob("rounds/*/metrics.jsonl"))
    return [json.loads(path.read_text().splitlines()[-1]) for path in paths]


def test_a_sampler_that_agrees_is_believed_and_the_learner_asked_of_a_few(tmp_path):
    parts = run(tmp_path)
    asked = [entry for entry in parts.learner.log if entry[0] == "logps"]
    assert asked == [("logps", version, 32) for version in range(3)]
    for round_, summary in enumerate(summaries(parts), 1):
        pairs, logps = parts.ledger.pairs(round_), parts.ledger.logps(round_, "reference")
        for side in ("chosen", "rejected"):
            np.testing.assert_allclose(logps[side], pairs[f"{side}_sampler_logp"].to_numpy(), rtol=1e-6)
        assert summary["sampler_mismatch"] == 0 and summary["kl_reference"] == 0


@pytest.mark.parametrize(("off", "trusted"), [(0.009, True), (0.011, False)])
def test_past_the_bound_the_learner_says_it_all_and_a_person_is_told(tmp_path, off, trusted):
    parts = run(tmp_path, off)
    assert [summary["sampler_mismatch"] for summary in summaries(parts)] == pytest.approx([off] * 3, rel=1e-4)
    pairs, logps = parts.ledger.pairs(1), parts.ledger.logps(1, "reference")
    factor = 1 if trusted else 1 + off
    np.testing.assert_allclose(logps["chosen"], factor * pairs["chosen_sampler_logp"].to_numpy(), rtol=1e-6)
    (said, *_) = [text for text in parts.observer.messages if "a token" in text]
    assert ("within" if trusted else "above") in said
    assert ("from it" if trusted else "the learner computes") in said


def test_a_resumed_round_keeps_what_was_decided(tmp_path):
    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again")
    last = again.ledger.round_dir(3)
    (last / "COMMIT.json").unlink()
    for name in ("policy", "trainer"):
        import shutil

        shutil.rmtree(last / name)
    (last / "metrics.jsonl").unlink()
    parts = make_parts(again.config)
    parts.learner = AgreeingLearner()
    run_rounds(parts)
    assert not [entry for entry in parts.learner.log if entry[0] == "logps"]
    assert content(parts.ledger.root) == content(whole.ledger.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": {"kind": "fixed", "logps": "sampler"}}, "reference is not the policy that samples"),
        ({"reference": SAMPLER | {"every": 2}}, "reference is not the policy that samples"),
        ({"reference": SAMPLER, "loop__max_staleness": 1}, "reference is not the policy that samples"),
        ({"reference": SAMPLER, "loss": {"name": "ld_dpo"}}, "ld_dpo may read more of the reference"),
        (
            {"reference": {"kind": "refresh", "max_mismatch": 0.1}},
            "reference.max_mismatch is 0.1, but it is for reference.logps: sampler, not learner; drop it",
        ),
        ({"reference": SAMPLER, "pairs__replay_share": 0.5}, "with pairs.replay_share not all responses are"),
        ({"reference": SAMPLER, "pairs": {"seed_path": "s", "seed_share": 0.5}}, "with pairs.seed_share not all"),
        ({"reference": SAMPLER, "pairs": {"strategy": "spin", "chosen_column": "c"}}, "with pairs.strategy: spin not"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **change)


def test_kl_counts_what_the_round_sampled_itself():
    rows = [
        {"chosen_sampler_logp": c, "rejected_sampler_logp": r} for c, r in ((-4.0, -6.0), (None, -2.0), (-9.0, -9.0))
    ]
    table = pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)
    if "source" not in PAIR_SCHEMA.names:
        table = table.append_column("source", pa.array(["fresh", "spin", "replay"]))
    else:
        table = table.set_column(table.column_names.index("source"), "source", pa.array(["fresh", "spin", "replay"]))
    assert np.isnan(sampler_logps(table)["chosen"]).tolist() == [False, True, True]
    reference = {"chosen": np.array([-5.0, -1, -1]), "rejected": np.array([-6.0, -5, -1])}
    kl = Anchors(reference=reference, start=None).sampling_kl(table)
    assert kl == {"kl_reference": pytest.approx((1.0 + (0 + 3) / 2) / 2)}
    assert Anchors(reference=reference, start=None).sampling_kl(table.slice(2)) == {}


def test_a_logp_that_is_no_number_is_left_to_the_guard_of_steps(tmp_path):
    """The learner says of it what was not finite, and where; a reference is not the place to fall over it."""
    parts = run(tmp_path)
    examples = parts.ledger.pairs(1)
    parts.learner.off = float("nan")
    logps = ask_learner(parts, examples, parts.ledger.policy(0, parts.start))
    assert np.isnan(logps["chosen"]).all()

    class Forgetful(AgreeingLearner):
        def logps(self, examples, policy):
            (batch,) = super().logps(examples, policy)
            yield {name: values[1:] for name, values in batch.items()}

    parts.learner = Forgetful()
    with pytest.raises(AssertionError, match="left examples out"):
        ask_learner(parts, examples, parts.ledger.policy(0, parts.start))
