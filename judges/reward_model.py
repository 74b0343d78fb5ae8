"""The `reward_model` judge: a model in the judge process that scores a response, or compares two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from judges.asking import Answer, Asker, Question
from judges.batching import Batcher, ask_all
from judges.bradley_terry import strengths
from judges.protocol import scored, to_score
from judges.reward_files import LETTERS, RewardFiles, read_reward_files
from judges.reward_scorer import MakeScorer, make_scorer
from online_po.judge_configs import RewardModel
from online_po.types import Comparison, Group, Judgement, Message


class RewardModelJudge:
    """Scores each response by a reward model.

    It reads the conversation as ITS tokenizer's chat template writes it, with one BOS where it has one. Text that is
    too long is cut from the prompt's left, see `judges.chat_text.ChatText.fit`.

    With `judge.compares` it is shown two responses at a time, in both orders, and says which is better; the scores are
    the Bradley-Terry strengths of all comparisons of a group (see `comparison_message` for what it is shown). One
    order's probability is sigmoid(its logit), and the two orders' are averaged, as the authors of the form do.
    """

    def __init__(self, config: RewardModel, asker: Asker, make: MakeScorer = make_scorer) -> None:
        self._files = read_reward_files(config)
        self._asker = asker
        self._compares = config.compares
        scorer = make(config, self._files)
        self._batcher: Batcher[list[int], float] = Batcher(scorer.score, len, scorer.batch_tokens)

    async def judge(self, group: Group) -> Judgement:
        if self._compares:
            return await self._compare_all(group)
        return scored(group, await ask_all(self._ask, group, [(response,) for response in group.responses]))

    async def _compare_all(self, group: Group) -> Judgement:
        pairs = list(combinations(group.responses, 2))
        orders = [order for a, b in pairs for order in ((a, b), (b, a))]
        found = await ask_all(self._ask, group, orders)
        comparisons = tuple(
            Comparison(
                first=a.index,
                second=b.index,
                preference=0.5 + (forward - backward) / 2,  # exactly 0.5 where they are the same
                consistent=(forward - 0.5) * (0.5 - backward) > 0 or forward == backward == 0.5,
            )
            for (a, b), forward, backward in zip(pairs, found[::2], found[1::2], strict=True)
        )
        scores = strengths(len(group.responses), [(c.first, c.second, c.preference) for c in comparisons])
        return replace(scored(group, scores), comparisons=comparisons)

    async def _ask(self, question: Question) -> float:
        """The reward of the one response, or the probability that the first of two is the better one."""

        async def call() -> Answer:
            ids, cut = self.token_ids(question)
            value = to_score(await self._batcher.ask(ids), "the reward")
            if self._compares:
                value = _sigmoid(value)
            return Answer(value=value, prompt_tokens=len(ids), cut=cut)

        return float((await self._asker.ask(question, call)).value)

    def token_ids(self, question: Question) -> tuple[list[int], bool]:
        """(what the model reads of a question, whether something was cut off it). Raises JudgeError."""
        return encode(self._files, question)

    def shown(self, question: Question) -> str:
        """The text that the model reads of a question, special tokens and all. Raises JudgeError."""
        return self._files.chat.shown(self.token_ids(question)[0])


def encode(files: RewardFiles, question: Question) -> tuple[list[int], bool]:
    """(token ids, whether something was cut): one response behind its prompt, or two in one message."""
    texts = [response.text for response in question.responses]

    def finish(messages: Sequence[Message]) -> list[Message]:
        if len(texts) == 1:
            return [*messages, {"role": "assistant", "content": texts[0]}]
        return [comparison_message(messages, texts[0], texts[1])]

    ids, cut = files.chat.fit(question.prompt.messages, finish)
    if files.letters is None:
        # transformers' own classifiers read the last token that is not the pad token: where a template ends on it (as
        # with pad = end of turn), they were trained to read the one before.
        while len(ids) > 1 and ids[-1] == files.pad:
            ids.pop()
    return ids, cut


def comparison_message(messages: Sequence[Message], first: str, second: str) -> Message:
    """What a model that compares is asked, as one user message of its own chat template: the form of RLHFlow's
    pair-preference models (Dong et al. 2024, RLHF Workflow, arXiv 2405.07863).

    A causal language model answers with the letter A (the first is better) or B; a classifier's logit is the log-odds
    that the first is better.
    """
    context = "".join(f"\n<turn> {message['role']}\n {message['content']}" for message in messages)
    a, b = LETTERS
    text = f"[CONTEXT] \n{context}\n [RESPONSE {a}] {first} [RESPONSE {b}] {second} \n"
    return {"role": "user", "content": text}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
