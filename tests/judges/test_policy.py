import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from judges.policy import PolicyModel, judging_version, render
from judges.runtime import LocalJudgePool, build_judge
from make_tiny_model import make_tiny_tokenizer
from online_po.config import Config
from online_po.errors import ConfigError, EngineError
from online_po.judge_configs import SelfPairwise, SelfScore, self_judges
from online_po.types import Group, Response

from .chat_server import Asked
from .groups import make_group


class FakePolicies:
    """Answers as a function of question and version says; keeps the batches."""

    context = 4000

    def __init__(self, says):
        self.says = says
        self.batches = []
        self.threads = set()

    def fingerprint(self, version):
        return f"weights {version}"

    def answer(self, version, requests, sampling):
        self.batches.append((version, len(requests), sampling))
        self.threads.add(threading.current_thread().name)
        return [Group(prompt=r.prompt, responses=(self._response(r, version),)) for r in requests]

    def _response(self, request, version):
        said = self.says(Asked({"messages": request.prompt.messages}, ""), version)
        (seed,) = request.seeds
        return Response(
            index=0,
            text=said.removesuffix("..."),
            token_ids=(1, 2, 3),
            token_logps=(-1.0,) * 3,
            finish_reason="length" if said.endswith("...") else "stop",
            policy_version=version,
            seed=seed,
        )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


@pytest.fixture
def judge(tokenizer):
    """Judges groups in a pool whose policy answers like a function of question and version."""
    with ThreadPoolExecutor(1, thread_name_prefix="questions") as executor:

        def run(says, *groups, kind=SelfScore, policies=None, **settings):
            policies = policies or FakePolicies(says)
            pool = LocalJudgePool(
                kind(**settings), policy=lambda config: PolicyModel(config, tokenizer, policies, executor)
            )
            try:
                return pool.submit(groups).result(60), policies
            finally:
                pool.close()

        yield run


def sampled_by(version, *texts):
    group = make_group(*texts)
    return replace(group, responses=tuple(replace(r, policy_version=version) for r in group.responses))


def test_scores(judge):
    (one, two), policies = judge(
        lambda asked, version: asked.verdict(len(asked.blocks[1])),
        make_group("a", "bbb"),
        make_group("cc"),
        max_tokens=9,
    )
    assert one.scores == (1.0, 3.0) and two.scores == (2.0,)
    assert sum(count for _, count, _ in policies.batches) == 3 > len(policies.batches)
    assert policies.threads == {"questions_0"}
    assert (policies.batches[0][2].temperature, policies.batches[0][2].max_tokens) == (0.0, 9)


def test_comparisons(judge):
    (judgement,), _ = judge(
        lambda asked, version: asked.verdict("A" if len(asked.blocks[1]) > len(asked.blocks[2]) else "B"),
        make_group("a", "bbb", "cc"),
        kind=SelfPairwise,
    )
    assert judgement.scores[0] < judgement.scores[2] < judgement.scores[1]


@pytest.mark.parametrize(("policy", "asked"), [("current", [0, 2, 5]), ("start", [0, 0, 0]), (3, [0, 2, 3])])
def test_which_policy_is_asked(judge, policy, asked):
    groups = [sampled_by(version, f"by {version}") for version in (0, 2, 5)]
    judgements, _ = judge(lambda asked, version: asked.verdict(version + 1), *groups, policy=policy)
    assert [judgement.scores for judgement in judgements] == [(version + 1.0,) for version in asked]
    assert [judging_version(policy, version) for version in (0, 2, 5)] == asked


def test_the_question_is_in_the_policys_template(judge, tokenizer):
    texts = []

    class Policies(FakePolicies):
        def answer(self, version, requests, sampling):
            for request in requests:
                texts.append(request.prompt.text)
                assert tokenizer.decode(request.prompt.token_ids) == request.prompt.text
            return super().answer(version, requests, sampling)

    judge(None, make_group("Hello"), policies=Policies(lambda asked, version: asked.verdict(3)))
    (text,) = texts
    assert text.startswith("<|im_start|>system\nYou judge") and text.endswith("N<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("says", "kind", "message"),
    [
        (lambda asked, version: asked.verdict(3) + "...", "unparsable", r"half an answer.*judge\.max_tokens = 512"),
        (lambda asked, version: "so so", "unparsable", "no verdict on the last line"),
        (lambda asked, version: asked.verdict(99), "bad_value", "outside 1 to 10"),
    ],
)
def test_bad_answers_fail_at_once(judge, says, kind, message):
    # At temperature 0 the same question gets the same answer: it is not asked again.
    (judgement,), policies = judge(says, make_group("a"))
    assert judgement.failure.kind == kind
    assert re.search(message, judgement.failure.message)
    assert sum(count for _, count, _ in policies.batches) == 1


def test_a_question_longer_than_the_engine_takes(judge):
    (bad, good), _ = judge(lambda asked, version: asked.verdict(3), make_group("x" * 5000), make_group("fine"))
    assert bad.failure.kind == "too_long" and "context of 4000; raise generator.max_model_len" in bad.failure.message
    assert good.scores == (3.0,)


def test_an_engine_that_dies_is_the_runs_error_not_a_verdict(judge):
    class Dead(FakePolicies):
        def answer(self, version, requests, sampling):
            raise EngineError("replica 0 died")

    with pytest.raises(EngineError, match="replica 0 died"):
        judge(None, make_group("a", "b"), policies=Dead(None))


def test_templates_without_a_system_message(tokenizer):
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "This."}]
    strict = make_tiny_tokenizer()
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert render(messages, strict) == "<|im_start|>user\nJudge.\n\nThis.<|im_end|>\n<|im_start|>assistant\n"


def test_a_policy_that_is_no_chat_model():
    with ThreadPoolExecutor(1) as executor, pytest.raises(ConfigError, match="no chat template"):
        PolicyModel(SelfScore(), make_tiny_tokenizer(chat_template=False), FakePolicies(None), executor)


def test_outside_of_a_run_there_is_no_policy():
    with pytest.raises(ConfigError, match="judge.kind is self_score, the run's own policy"):
        build_judge(SelfScore())


# -- settings ------------------------------------------------------------------------------------------


def parse(tmp_path, ray=None, **judge):
    return Config.parse(
        {
            "run": {"name": "r", "dir": str(tmp_path)},
            "model": {"path": str(tmp_path)},
            "prompts": {"path": "p.jsonl", "heldout_size": 4},
            "loop": {"rounds": 3},
            "judge": judge,
            "ray": ray or {},
        }
    )


def test_self_judges_are_found_in_ensembles(tmp_path):
    assert self_judges(parse(tmp_path, kind="self_score", policy=2).judge) == [SelfScore(policy=2)]
    members = [{"kind": "rules"}, {"kind": "self_score"}]
    assert self_judges(parse(tmp_path, kind="ensemble", members=members, normalise="none").judge) == [SelfScore()]
    assert self_judges(parse(tmp_path, kind="rules").judge) == []


@pytest.mark.parametrize(
    ("ray", "engine", "message"),
    [
        ({"judge_gpus": 1}, "transformers", r"ray\.judge_gpus is 1, but beside judge\.kind self_score"),
        ({"judge_cpus": 2}, "transformers", r"ray\.judge_cpus is 2, but beside"),
        ({}, "vllm", r"judge\.members: a reward_model of engine vllm needs judge processes"),
    ],
)
def test_what_needs_judge_processes_cannot_be_beside_the_policy(tmp_path, ray, engine, message):
    members = [{"kind": "self_score"}, {"kind": "reward_model", "path": str(tmp_path), "engine": engine}]
    with pytest.raises(ConfigError, match=message):
        parse(tmp_path, ray, kind="ensemble", members=members)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": 3}, r"judge\.policy is 3, but loop\.rounds is 3"),
        ({"policy": 0}, "judge.policy"),
        ({"policy": "last"}, "judge.policy"),
        ({"workers": 2}, r"judge\.workers is 2.*see generator\.replicas"),
        ({"timeout_s": 5.0}, r"judge\.timeout_s has no effect"),
        ({"soft": True}, r"judge\.soft is for judge\.kind: llm_pairwise"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        parse(tmp_path, kind="self_pairwise", **settings)
