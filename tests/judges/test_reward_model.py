"""The reward_model judge on tiny models: bad ones refused, scores that depend on nothing but the text."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from judges.asking import Answer, Asker, Question
from judges.batching import Batcher
from judges.protocol import JudgeError
from judges.reward_files import read_reward_files
from judges.reward_model import RewardModelJudge, comparison_message
from judges.runtime import build_judge, check_judge, judge_groups
from online_po.errors import ConfigError
from online_po.judge_configs import RewardModel
from tests.judges.groups import make_group
from tests.judges.reward_models import BAD, BOS_TEMPLATE, copy_of, cut_file, with_template, without_head

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("yes", "no, not at all", "x", "the words of a long answer " * 8, "")


class Remembering(Asker):
    """Keeps what was asked and answered."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.answers: list[tuple[Question, Answer]] = []

    async def ask(self, question, call):
        answer = await call()
        self.answers.append((question, answer))
        return answer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from make_tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "reward", kind="reward")


def judge(groups, **settings):
    """Judgements of some groups, and what was asked for them."""
    config = RewardModel(**settings)
    asker = Remembering(config)
    return asyncio.run(judge_groups(build_judge(config, asker), groups)), asker.answers


def own_score(path, group, place: int, dtype="float32") -> float:
    """What transformers' own forward says of one response, alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [*group.prompt.messages, {"role": "assistant", "content": group.responses[place].text}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits.item()


# -- models that cannot be used ----------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_refused_before_its_weights_are_read(model, tmp_path, name):
    make, said = BAD[name]
    with pytest.raises(ConfigError, match=said):
        check_judge(RewardModel(path=str(make(model, tmp_path / "bad"))))


def test_a_check_reads_no_weights(model, tmp_path):
    folder = copy_of(model, tmp_path / "x")
    (folder / "model.safetensors").write_bytes(b"")
    check_judge(RewardModel(path=str(folder)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (cut_file, r"bad/model.safetensors.* is damaged or cut"),
        (without_head, r"do not fit its config.json: score.weight would be random"),
    ],
)
def test_damaged_weights_are_refused_when_they_are_loaded(model, tmp_path, make, said):
    config = RewardModel(path=str(make(model, tmp_path / "bad")))
    check_judge(config)
    with pytest.raises(ConfigError, match=said):
        build_judge(config)


def test_an_encoder_is_refused(tmp_path, model):
    from transformers import BertConfig, BertForSequenceClassification

    folder = copy_of(model, tmp_path / "bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=384, num_labels=1, **sizes)).save_pretrained(folder)
    with pytest.raises(ConfigError, match="BertForSequenceClassification, which does not read its last token"):
        build_judge(RewardModel(path=str(folder)))


def test_settings_that_do_not_fit_are_refused(model):
    with pytest.raises(ConfigError, match="judge.max_length is 2000, beyond the reward model's context of 1024"):
        check_judge(RewardModel(path=str(model), max_length=2000))
    with pytest.raises(ValueError, match="judge.revision is 'main', but judge.path is a local folder"):
        RewardModel(path=str(model), revision="main")
    with pytest.raises(ConfigError, match="judge.engine is vllm, which runs in the judge processes"):
        build_judge(RewardModel(path=str(model), engine="vllm"))


# -- scores ----------------------------------------------------------------------------------------


def test_scores_are_the_model_s_own(model):
    group = make_group(*TEXTS)
    (judgement,), answers = judge([group], path=str(model))
    own = [own_score(model, group, place) for place in range(len(TEXTS))]
    assert judgement.scores == pytest.approx(own, abs=1e-5)
    assert len({round(score, 4) for score in own}) == len(own)  # or all this would show little
    assert {question.responses for question, _ in answers} == {(response,) for response in group.responses}
    assert all(answer.prompt_tokens > 20 and not answer.cut for _, answer in answers)


def test_alone_a_score_is_the_same_bit_for_bit_and_in_batches_nearly(model):
    groups = [make_group(*TEXTS, name=f"question {i}" * (1 + i % 3)) for i in range(6)]
    alone, _ = judge(groups, path=str(model))
    for some in (groups[:1], groups[::-1]):
        again, _ = judge(some, path=str(model))
        assert {j.prompt_id: j.scores for j in again}.items() <= {j.prompt_id: j.scores for j in alone}.items()
    for tokens in (200, 1000, 100_000):
        batched, _ = judge(groups, path=str(model), batch_tokens=tokens)
        assert [j.scores for j in batched] == [pytest.approx(j.scores, abs=1e-5) for j in alone]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_side_nor_token_matters(model, tmp_path, side):
    from transformers import AutoTokenizer

    group = make_group(*TEXTS)
    (expected,), _ = judge([group], path=str(model))
    folder = copy_of(model, tmp_path / "no_pad", pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side, pad_token=None)
    assert tokenizer.pad_token_id is None
    tokenizer.save_pretrained(folder)
    (found,), _ = judge([group], path=str(folder), batch_tokens=100_000)
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)


def test_a_text_that_ends_on_the_pad_token_is_read_as_transformers_reads_it(model, tmp_path):
    """pad = end of turn, and a template that ends on it: transformers' classifiers read the token before."""
    template = BOS_TEMPLATE.removeprefix("{{ bos_token }}").replace("<|im_end|>\n", "<|im_end|>")
    folder = with_template(model, tmp_path / "x", template)
    folder = copy_of(folder, tmp_path / "y", pad_token_id=2)
    group = make_group("yes", "no, never")
    (judgement,), _ = judge([group], path=str(folder), batch_tokens=100_000)
    assert judgement.scores == pytest.approx([own_score(folder, group, place) for place in range(2)], abs=1e-5)


def test_the_head_is_float32_whatever_the_layers_are(model):
    import torch
    from safetensors.torch import load_file

    config = RewardModel(path=str(model), dtype="bfloat16")
    files = read_reward_files(config)
    from judges.reward_scorer import TransformersScorer

    scorer = TransformersScorer(config, files)
    sequences = [list(range(10, 10 + n)) for n in (3, 40, 90)]
    scores = scorer.score(sequences)
    hidden = [scorer._backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
    assert {state.dtype for state in hidden} == {torch.bfloat16}
    head = load_file(model / "model.safetensors")["score.weight"][0]
    assert head.dtype == torch.float32 and (head != head.bfloat16()).any()
    exact = [(state.double() @ head.double()).item() for state in hidden]
    assert scores == pytest.approx(exact, abs=0.02)  # batches differ in bfloat16's rounding
    alone = [scorer.score([ids])[0] for ids in sequences]
    assert alone == pytest.approx(exact, rel=1e-5)
    assert any(score != torch.tensor(score).bfloat16().item() for score in alone)


def test_a_score_that_is_no_number_is_a_failure(model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(model, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] *= math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (judgement,), _ = judge([make_group("yes", "no")], path=str(folder))
    assert judgement.failure.kind == "bad_value" and "response 0: the reward is nan" in judgement.failure.message


# -- what is too long ----------------------------------------------------------------------------------


def test_a_long_prompt_is_cut_and_counted_and_a_long_response_fails(model):
    groups = [make_group("yes", "no", name="word " * 40), make_group("short", name="q"), make_group("x" * 90)]
    found, answers = judge(groups, path=str(model), max_length=64)
    assert found[0].scores is not None and found[1].scores is not None
    assert found[2].failure.kind == "too_long" and "response 0" in found[2].failure.message
    assert sorted((answer.cut, answer.prompt_tokens <= 64) for _, answer in answers) == [
        (False, True), (True, True), (True, True)
    ]  # fmt: skip


def test_a_cut_prompt_gives_the_score_of_what_is_left(model):
    config = RewardModel(path=str(model), max_length=64)
    made = RewardModelJudge(config, Asker(config))
    group = make_group("yes", name="a" * 100 + " last words?")
    shown = made.shown(Question(prompt=group.prompt, responses=group.responses))
    assert shown.startswith("<|im_start|>user\na") and "last words?<|im_end|>\n<|im_start|>assistant\nyes" in shown


# -- comparing -------------------------------------------------------------------------------------


def test_the_form_of_a_comparison_is_rlhflow_s():
    """As their template and format string, kept here as published, render it."""
    from make_tiny_model import make_tiny_tokenizer

    template = (
        "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
        "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
    )
    messages = [{"role": role, "content": role[::-1]} for role in ("user", "assistant", "user")]
    context = make_tiny_tokenizer().apply_chat_template(messages, chat_template=template, tokenize=False)
    expected = "[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n".format(context=context, a="one", b="two")
    assert comparison_message(messages, "one", "two") == {"role": "user", "content": expected}


def own_log_odds(path, text: str) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    a, b = (tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "AB")
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    return (logits[a] - logits[b]).item()


def test_a_language_model_compares_by_its_letters_in_both_orders(tiny_model):
    group = make_group("good", "bad", "worse")
    (judgement,), answers = judge([group], path=str(tiny_model), compares=True)
    made = RewardModelJudge(config := RewardModel(path=str(tiny_model), compares=True), Asker(config))
    first = {}
    for question, answer in answers:
        shown = made.shown(question)
        assert shown.endswith("<|im_start|>assistant\n")
        odds = own_log_odds(tiny_model, shown)
        assert answer.value == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-5)
        first[tuple(response.index for response in question.responses)] = answer.value
    assert len(first) == 6
    for comparison in judgement.comparisons:
        a, b = comparison.first, comparison.second
        assert comparison.preference == pytest.approx((first[a, b] + 1 - first[b, a]) / 2)
        assert comparison.consistent == ((first[a, b] > 0.5) == (first[b, a] < 0.5))
    assert len(judgement.comparisons) == 3 and len(judgement.scores) == 3


def test_one_that_always_prefers_the_first_sees_ties_only(model):
    class Biased:
        batch_tokens = None

        def score(self, sequences):
            return [3.0] * len(sequences)

    config = RewardModel(path=str(model), compares=True)
    made = RewardModelJudge(config, Asker(config), lambda config, files: Biased())
    (judgement,) = asyncio.run(judge_groups(made, [make_group("a", "b", "c")]))
    assert [(c.preference, c.consistent) for c in judgement.comparisons] == [(0.5, False)] * 3
    assert judgement.scores == (0, 0, 0)


def test_a_classifier_that_compares_gives_log_odds(model):
    (judgement,), answers = judge([make_group("good", "bad")], path=str(model), compares=True)
    assert len(answers) == 2 and all(0 < answer.value < 1 for _, answer in answers)
    assert judgement.scores[0] == pytest.approx(-judgement.scores[1], abs=1e-6)


# -- identity --------------------------------------------------------------------------------------


def test_a_judge_is_known_by_what_its_model_says_not_by_where_it_lies(model, tmp_path):
    def identity(path, **settings):
        return RewardModel(path=str(path), **settings).identity()

    moved = copy_of(model, tmp_path / "moved")
    assert identity(moved) == identity(model) == identity(model, batch_tokens=7, workers=3)
    assert identity(model) != identity(model, max_length=100)
    assert identity(model) != identity(with_template(model, tmp_path / "template", BOS_TEMPLATE))


def test_one_trained_weight_makes_another_judge(model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(model, tmp_path / "trained")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"][0, 3] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert RewardModel(path=str(folder)).identity() != RewardModel(path=str(model)).identity()


def test_failing_batches_are_failures_of_their_questions(model):
    class Full:
        batch_tokens = 1

        def score(self, sequences):
            if len(sequences[0]) > 60:
                raise MemoryError("out of memory")
            return [random.random() for _ in sequences]

    config = RewardModel(path=str(model))
    made = RewardModelJudge(config, Asker(config), lambda config, files: Full())
    good, bad = asyncio.run(judge_groups(made, [make_group("a", "b"), make_group("a", "b" * 60)]))
    assert good.scores is not None and bad.failure.message == "response 1: MemoryError: out of memory"
    assert isinstance(made._batcher, Batcher) and bad.failure.kind == "error"
    with pytest.raises(JudgeError, match="too_long|leaves no room"):
        made.token_ids(Question(prompt=make_group("x" * 2000).prompt, responses=make_group("x" * 2000).responses))
