"""Judges that are asked in words, whoever answers: a model behind an endpoint, or the policy itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from judges.asking import Answer, Asker, Question
from judges.bradley_terry import strengths
from judges.chat import Chat, ChatModel, Reply, Wording, all_of, charged
from judges.parsing import choice_probability, read_verdict, to_choice, to_scale
from judges.prompting import TEMPLATE, Prompting
from judges.protocol import JudgeError, scored
from judges.ranking import RANKINGS
from online_po.judge_configs.prompted import Comparing, Scoring
from online_po.seeds import stable_seed
from online_po.types import Comparison, Group, Judgement


class ScoringJudge:
    """Asks for a score of each response, `judge.samples` times; the mean counts. One question without a verdict leaves
    the whole group without a label."""

    def __init__(self, config: Scoring, asker: Asker, model: ChatModel) -> None:
        self._config, self._asker, self.model = config, asker, model
        self._prompting = Prompting(config)
        asker.identify(template=TEMPLATE)

    async def judge(self, group: Group) -> Judgement:
        chat = self.model.for_group(group)
        about = self._prompting.about(group.prompt, group.responses, chat.about)
        samples = self._config.samples
        answers = await all_of(
            self._ask(Question(prompt=group.prompt, responses=(response,), sample=sample, about=about), chat)
            for response in group.responses
            for sample in range(samples)
        )
        by_response = [answers[start : start + samples] for start in range(0, len(answers), samples)]
        rationales = None
        if self._config.rationale:
            rationales = ["\n".join(answer.rationale or "" for answer in own) for own in by_response]
        return scored(group, [fmean(answer.value for answer in own) for own in by_response], rationales)

    def shown(self, question: Question) -> str:
        """See `judges.questions.Shows`."""
        chat = self.model.for_group(Group(prompt=question.prompt, responses=question.responses))
        about = self._prompting.about(question.prompt, question.responses, chat.about)
        return chat.shown(self._prompting.score(replace(question, about=about)))

    async def _ask(self, question: Question, chat: Chat) -> Answer:
        def read(reply: Reply) -> tuple[float, str | None]:
            id_ = self._prompting.id_of(question)
            value, rationale = read_verdict(reply, id_=id_, rationale=self._config.rationale)
            return to_scale(value, self._config.scale_min, self._config.scale_max), rationale

        what = f"response {question.responses[0].index}"
        return await ask(self._asker, question, chat, self._prompting.score(question), read, what)


class ComparingJudge:
    """Shows responses two by two, and makes scores of who wins: Bradley-Terry log-strengths.

    Responses with the same text are one player: they tie, and nobody is asked. One comparison that failed leaves the
    whole group without a label.
    """

    def __init__(self, config: Comparing, asker: Asker, model: ChatModel, *, soft: bool = False) -> None:
        self._config, self._asker, self.model, self._soft = config, asker, model, soft
        self._prompting = Prompting(config)
        asker.identify(template=TEMPLATE)

    async def judge(self, group: Group) -> Judgement:
        if len(group.responses) < 2:
            raise JudgeError("error", f"judge.kind {self._config.kind} compares responses, and there is only one")
        chat, texts = self.model.for_group(group), [response.text for response in group.responses]
        players = sorted({texts.index(text) for text in texts})
        notes: dict[int, list[str]] = {player: [] for player in players}

        async def compare(first: int, second: int) -> Comparison:
            comparison, rationales = await self._compare(group, first, second, chat)
            for shown_first, rationale in rationales:
                other = second if shown_first == first else first
                notes[shown_first].append(f"against response {other}: {rationale}")
            return comparison

        made = await RANKINGS[self._config.rank](players, compare)
        made.sort(key=lambda comparison: (comparison.first, comparison.second))
        places = {player: place for place, player in enumerate(players)}
        strength = strengths(len(players), [(places[c.first], places[c.second], c.preference) for c in made])
        own = [texts.index(text) for text in texts]
        judgement = scored(
            group,
            [strength[places[player]] for player in own],
            ["\n".join(sorted(notes[player])) for player in own] if self._config.rationale else None,
        )
        return replace(judgement, comparisons=tuple(made))

    async def _compare(
        self, group: Group, first: int, second: int, chat: Chat
    ) -> tuple[Comparison, list[tuple[int, str]]]:
        """The comparison, and the rationales by which of the two was shown first."""
        one, other = group.responses[first], group.responses[second]
        about = self._prompting.about(group.prompt, (one, other), chat.about)
        orders = [(one, other), (other, one)]
        if self._config.orders == "one":
            # A draw by what is compared, whichever of the two is the first of the group.
            texts = sorted((one.text, other.text))
            drawn = texts[stable_seed("order", group.prompt.id, *texts) % 2]
            orders = [order for order in orders if order[0].text == drawn]
        answers = await all_of(
            self._ask(Question(prompt=group.prompt, responses=shown, about=about), chat) for shown in orders
        )
        # By order: the probability that `first` is the better one.
        preferences = [
            answer.value if shown[0] is one else 1 - answer.value for shown, answer in zip(orders, answers, strict=True)
        ]
        sides = {(preference > 0.5) - (preference < 0.5) for preference in preferences}
        preference = fmean(preferences) if len(sides) == 1 else 0.5
        consistent = len(sides) == 1 if len(orders) == 2 else None
        comparison = Comparison(first=first, second=second, preference=preference, consistent=consistent)
        return comparison, [
            (shown[0].index, answer.rationale)
            for shown, answer in zip(orders, answers, strict=True)
            if answer.rationale is not None
        ]

    def shown(self, question: Question) -> str:
        """See `judges.questions.Shows`."""
        chat = self.model.for_group(Group(prompt=question.prompt, responses=question.responses))
        about = self._prompting.about(question.prompt, question.responses, chat.about)
        return chat.shown(self._prompting.compare(replace(question, about=about)))

    async def _ask(self, question: Question, chat: Chat) -> Answer:
        def read(reply: Reply) -> tuple[float, str | None]:
            id_ = self._prompting.id_of(question)
            value, rationale = read_verdict(reply, id_=id_, rationale=self._config.rationale)
            choice = to_choice(value)
            return choice_probability(reply) if self._soft else float(choice == "A"), rationale

        what = "responses {} and {}".format(*(response.index for response in question.responses))
        return await ask(self._asker, question, chat, self._prompting.compare(question), read, what, logps=self._soft)


async def ask(
    asker: Asker,
    question: Question,
    chat: Chat,
    wording: Wording,
    read: Callable[[Reply], tuple[float, str | None]],
    what: str,
    *,
    logps: bool = False,
) -> Answer:
    """The answer to a question, from memory or from the model; `read` makes verdict and rationale of a reply.

    `what` is asked about, for messages. Raises JudgeError."""
    attempts = itertools.count()

    async def call() -> Answer:
        # Of the question's own content: which group came first does not matter, and a second attempt may end well.
        reply = await chat.chat(wording, seed=stable_seed("judge", question.key(""), next(attempts)), logps=logps)
        try:
            value, rationale = read(reply)
        except JudgeError as error:
            error.retry = error.retry and chat.varies
            raise charged(error, reply) from None
        return Answer(
            value=value,
            rationale=rationale,
            prompt_tokens=reply.prompt_tokens,
            response_tokens=reply.response_tokens,
            cost=reply.cost,
        )

    try:
        return await asker.ask(question, call)
    except JudgeError as error:
        raise JudgeError(error.kind, f"{what}: {error}") from error
