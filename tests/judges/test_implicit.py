"""The implicit judge: what two checkpoints say of the very token ids that were sampled."""

from __future__ import annotations

import asyncio
import json
import shutil

import huggingface_hub
import pytest

from judges.asking import Asker, Question
from judges.held import held_models
from judges.implicit import ImplicitJudge
from judges.runtime import build_judge, check_judge, check_judge_fits, judge_groups
from online_po.errors import ConfigError
from online_po.judge_configs import Ensemble, Implicit
from online_po.model_config import adapter_base
from online_po.types import Group, Policy, Prompt, Response
from tests.actors.engines import make_adapter, teacher_forced

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = (1, 70, 71, 72, 73)
RESPONSES = ((80, 81, 2), (90, 91, 92, 93, 94, 95), (100,), (4, 5, 6, 7, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from make_tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "trained", seed=1)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(tiny_model, folder / f"{seed}", seed).path for seed in (1, 2)]


def make_group(responses=RESPONSES, prompt=PROMPT) -> Group:
    """Texts are not what the ids say: who re-tokenises is found out."""
    return Group(
        prompt=Prompt(id="p", messages=({"role": "user", "content": "q"},), text="q", token_ids=prompt),
        responses=tuple(
            Response(
                index=index, text="text", token_ids=ids, token_logps=(-1.0,) * len(ids), finish_reason="stop",
                policy_version=0, seed=index,
            )
            for index, ids in enumerate(responses)
        ),
    )  # fmt: skip


def logps(model, ids, base=None) -> list[float]:
    policy = Policy(version=0, path=model, is_adapter=base is not None)
    return teacher_forced(policy, (*PROMPT, *ids), base or model)[len(PROMPT) - 1 :]


def scores(group=None, **settings):
    made = build_judge(Implicit(**{name: str(value) for name, value in settings.items()}))
    (judgement,) = asyncio.run(judge_groups(made, [group or make_group()]))
    assert judgement.scores is not None, judgement.failure
    return judgement.scores


def test_scores_are_beta_times_the_gap_of_the_logps(tiny_model, trained):
    gaps = [sum(logps(trained, ids)) - sum(logps(tiny_model, ids)) for ids in RESPONSES]
    assert max(gaps) - min(gaps) > 1
    found = scores(path=trained, reference=tiny_model, beta=0.5)
    assert found == pytest.approx([0.5 * gap for gap in gaps], abs=1e-4)
    means = [0.5 * gap / len(ids) for gap, ids in zip(gaps, RESPONSES, strict=True)]
    averaged = scores(path=trained, reference=tiny_model, beta=0.5, average_logps=True)
    assert averaged == pytest.approx(means, abs=1e-4)
    batched = scores(path=trained, reference=tiny_model, beta=0.5, batch_tokens=100_000)
    assert batched == pytest.approx(found, abs=1e-4)


def test_an_adapter_shares_the_reference_s_copy(tiny_model, adapters):
    gaps = [sum(logps(adapters[0], ids, tiny_model)) - sum(logps(tiny_model, ids)) for ids in RESPONSES]
    config = Implicit(path=str(adapters[0]), reference=str(tiny_model))
    assert scores(path=adapters[0], reference=tiny_model) == pytest.approx([0.1 * gap for gap in gaps], abs=1e-4)
    made = ImplicitJudge(config, Asker(config))
    one, other = made._scorer._scoring
    assert one.model is other.model
    held = held_models(config)
    assert [model.weights > 50_000 for model in held] == [True, False]


def test_two_adapters_on_one_model(tiny_model, adapters):
    gaps = [sum(logps(adapters[0], i, tiny_model)) - sum(logps(adapters[1], i, tiny_model)) for i in RESPONSES]
    found = scores(path=adapters[0], reference=adapters[1])
    assert found == pytest.approx([0.1 * gap for gap in gaps], abs=1e-4)


def test_known_pairs_without_token_ids_are_written_by_the_checkpoint_s_template(tiny_model, trained):
    config = Implicit(path=str(trained), reference=str(tiny_model))
    made = ImplicitJudge(config, Asker(config))
    group = make_group(responses=((),), prompt=())
    question = Question(prompt=group.prompt, responses=group.responses)
    assert made.shown(question) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\ntext<|im_end|>"
    assert len(scores(group, path=trained, reference=tiny_model)) == 1


def test_too_long_is_a_failure(tiny_model, trained):
    made = build_judge(Implicit(path=str(trained), reference=str(tiny_model)))
    (judgement,) = asyncio.run(judge_groups(made, [make_group(responses=((80,), (81,) * 1020))]))
    assert (
        judgement.failure.kind == "too_long"
        and "response 1: prompt and response have 1025" in judgement.failure.message
    )


def test_the_checkpoint_must_read_the_policy_s_tokens(tmp_path, tiny_model, trained):
    from make_tiny_model import make_tiny_model, make_tiny_tokenizer

    check_judge_fits(Implicit(path=str(trained), reference=str(tiny_model)), make_tiny_tokenizer())
    config = Implicit(path=str(trained), reference=str(tiny_model))
    ensemble = Ensemble(members=[{"judge": config}, {"judge": config}])
    for judge in (config, ensemble):
        with pytest.raises(ConfigError, match="whose tokenizer is not the policy's"):
            check_judge_fits(judge, make_tiny_tokenizer(vocab=300))
    other = make_tiny_model(tmp_path / "other", vocab=300)
    with pytest.raises(ConfigError, match="whose tokenizers differ"):
        check_judge(Implicit(path=str(trained), reference=str(other)))


@pytest.mark.parametrize("name", ["path", "reference"])
def test_bad_checkpoints(tmp_path, tiny_model, trained, adapters, name):
    def check(bad, said):
        given = {"path": str(trained), "reference": str(tiny_model), name: str(bad)}
        with pytest.raises(ConfigError, match=said):
            check_judge(Implicit(**given))

    check(tmp_path / "nowhere", rf"judge\.{name} is .*no such folder exists")
    shutil.copytree(tiny_model, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    check(tmp_path / "empty", rf"judge\.{name} is .*no \.safetensors file")
    shutil.copytree(tiny_model, tmp_path / "reward")
    settings = json.loads((tmp_path / "reward" / "config.json").read_text())
    settings["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "reward" / "config.json").write_text(json.dumps(settings))
    check(tmp_path / "reward", rf"judge\.{name} is .*LlamaForSequenceClassification: not a causal language model")
    if name == "reference":
        check(adapters[0], r"judge\.reference is .*an adapter, but judge\.path is .*a whole model; merge")
    with pytest.raises(ValueError, match="both .*every score would be 0"):
        Implicit(path=str(tiny_model), reference=str(tiny_model))


def test_an_adapter_that_does_not_fit(tmp_path, tiny_model, adapters):
    from make_tiny_model import make_tiny_model

    wide = make_tiny_model(tmp_path / "wide", hidden=96)
    stray = without_its_base(adapters[0], tmp_path / "stray")
    with pytest.raises(ConfigError, match=r"judge\.path is .*an adapter that does not fit its model"):
        build_judge(Implicit(path=str(stray), reference=str(wide)))


def without_its_base(adapter, folder):
    """A copy that names a model that is not there any more."""
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/elsewhere"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapter_goes_on_no_other_model_than_its_own(tmp_path, tiny_model, trained, adapters):
    with pytest.raises(ConfigError, match=r"judge\.path is .*an adapter of .*judge\.reference is .*another model"):
        check_judge(Implicit(path=str(adapters[0]), reference=str(trained)))
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    check_judge(Implicit(path=str(adapters[0]), reference=str(moved)))


def test_identity_is_by_content(tmp_path, tiny_model, trained, adapters):
    def identity(path, reference, **settings):
        return Implicit(path=str(path), reference=str(reference), **settings).identity()

    for source in (trained, adapters[0]):
        moved = shutil.copytree(source, tmp_path / source.name)
        assert identity(moved, tiny_model) == identity(source, tiny_model)
    stray = without_its_base(adapters[0], tmp_path / "stray")
    assert identity(stray, tiny_model) == identity(adapters[0], tiny_model)
    assert identity(adapters[0], tiny_model) != identity(adapters[1], tiny_model)
    assert identity(trained, tiny_model) != identity(trained, tiny_model, beta=0.2)


def test_an_adapter_s_base_is_the_revision_it_was_trained_on(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "organisation/name", "revision": "v2"})
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision, **_: f"/{name}/{revision}")
    assert str(adapter_base(tmp_path, "judge.reference")) == "/organisation/name/v2"
