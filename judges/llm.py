"""Judges that are asked in words, whoever answers: a model behind an endpoint, or the policy itself."""

from __future__ import annotations

import itertools
from statistics import fmean

from judges.asking import Answer, Asker, Question
from judges.chat import Chat, ChatModel, Reply, all_of
from judges.endpoint import charged
from judges.parsing import read_verdict, to_scale
from judges.prompting import Prompting
from judges.protocol import JudgeError, scored
from online_po.judge_configs.prompted import Scoring
from online_po.seeds import stable_seed
from online_po.types import Group, Judgement, Response


class ScoringJudge:
    """Asks for a score of each response, `judge.samples` times; the mean counts. One question without a verdict leaves
    the whole group without a label."""

    def __init__(self, config: Scoring, asker: Asker, model: ChatModel) -> None:
        self._config, self._asker, self._model = config, asker, model
        self._prompting = Prompting(config)

    async def judge(self, group: Group) -> Judgement:
        chat = self._model.for_group(group)
        about = self._prompting.about(group.prompt, group.responses, chat.about)
        samples = self._config.samples
        answers = await all_of(
            self._ask(group, response, sample, about, chat) for response in group.responses for sample in range(samples)
        )
        by_response = [answers[start : start + samples] for start in range(0, len(answers), samples)]
        rationales = None
        if self._config.rationale:
            rationales = ["\n".join(answer.rationale or "" for answer in own) for own in by_response]
        return scored(group, [fmean(answer.value for answer in own) for own in by_response], rationales)

    async def _ask(self, group: Group, response: Response, sample: int, about: str, chat: Chat) -> Answer:
        question = Question(prompt=group.prompt, responses=(response,), sample=sample, about=about)
        wording, id_, config = self._prompting.score(question), self._prompting.id_of(question), self._config
        attempts = itertools.count()

        async def call() -> Answer:
            seed = stable_seed("judge", question.key(""), next(attempts))
            reply = await chat.chat(wording, seed=seed)
            try:
                value, rationale = read_verdict(reply, id_=id_, rationale=config.rationale)
                score = to_scale(value, config.scale_min, config.scale_max)
            except JudgeError as error:
                raise charged(error, reply) from None
            return _answer(score, rationale, reply)

        try:
            return await self._asker.ask(question, call)
        except JudgeError as error:
            raise JudgeError(error.kind, f"response {response.index}: {error}") from error


def _answer(value: float, rationale: str | None, reply: Reply) -> Answer:
    return Answer(
        value=value,
        rationale=rationale,
        prompt_tokens=reply.prompt_tokens,
        response_tokens=reply.response_tokens,
        cost=reply.cost,
    )
