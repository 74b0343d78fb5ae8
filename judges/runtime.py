"""Building, checking and running judges. Whatever goes wrong in one is a typed failure, never a label."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from judges.asking import OCCASION, ROUND, Asker
from judges.calls import describe
from judges.chat import ChatModel
from judges.endpoint import Endpoint, read_key
from judges.ensemble import EnsembleJudge
from judges.llm import ComparingJudge, ScoringJudge
from judges.plugin import build_plugin, load_plugin
from judges.policy import check_template
from judges.prompting import Prompting
from judges.protocol import Judge, JudgeError, failed
from judges.python import PythonJudge, load_function
from judges.questions import Question, Shows
from judges.rules import RulesJudge
from judges.store import JudgeStore, prepare, release
from online_po.errors import ConfigError, OnlinePOError
from online_po.judge_configs import (
    Ensemble,
    Implicit,
    JudgeBase,
    LlmPairwise,
    LlmScore,
    Plugin,
    Python,
    RewardModel,
    Rules,
    Self,
    SelfPairwise,
    SelfScore,
    single_judges,
)
from online_po.types import Group, Judgement

if TYPE_CHECKING:
    from judges.reward_scorer import MakeScorer

AskPolicy = Callable[[Self], ChatModel]
"""Gives the policy as a chat model."""


def check_judge(config: JudgeBase) -> None:
    """Finds out, before anything expensive, what makes a judge unusable. Raises ConfigError.

    Imports the user's module. The constraints of the `rules` judge are in the prompts: see
    `judges.rules.validate_constraints`.
    """
    match config:
        case Rules():
            pass
        case Python():
            load_function(config.function)
        case LlmScore() | LlmPairwise():
            read_key(config)
            Prompting(config)
        case SelfScore() | SelfPairwise():
            Prompting(config)
        case RewardModel():
            from judges.reward_files import read_reward_files

            read_reward_files(config)
        case Implicit():
            from judges.implicit import read_checkpoints

            read_checkpoints(config)
        case Plugin():
            load_plugin(config)
        case Ensemble():
            for member in config.members:
                check_judge(member.judge)
        case _:
            raise ConfigError(f"judge.kind is {config.kind!r}, which is not built yet")


def check_judge_fits(config: JudgeBase, tokenizer: Any) -> None:
    """Raises ConfigError where a judge cannot judge the policy whose tokenizer this is."""
    for member in single_judges(config):
        if isinstance(member, Implicit):
            from judges.implicit import require_same_tokens

            require_same_tokens(member, tokenizer)
        if isinstance(member, Self):
            check_template(tokenizer, member.kind)


def build_judge(
    config: JudgeBase,
    asker: Asker | None = None,
    *,
    policy: AskPolicy | None = None,
    make_scorer: MakeScorer | None = None,
) -> Judge:
    """The judge that a config names. Raises ConfigError as `check_judge` does.

    Without an asker, it remembers nothing. `policy`: for judges that are the run's own policy; ConfigError where they
    have none. `make_scorer`: loads reward models, for engines that this package does not know; None: `judge.engine:
    transformers`.
    """
    asker = asker or Asker(config)
    match config:
        case Rules():
            return RulesJudge(config)
        case Python():
            return PythonJudge(config, asker)
        case LlmScore():
            return ScoringJudge(config, asker, Endpoint(config))
        case LlmPairwise():
            return ComparingJudge(config, asker, Endpoint(config), soft=config.soft)
        case SelfScore() if policy is not None:
            return ScoringJudge(config, asker, policy(config))
        case SelfPairwise() if policy is not None:
            return ComparingJudge(config, asker, policy(config))
        case SelfScore() | SelfPairwise():
            raise ConfigError(
                f"judge.kind is {config.kind}, the run's own policy, which only a run has; serve its weights, and set "
                "judge.kind: llm_score or llm_pairwise"
            )
        case RewardModel():
            from judges import reward_model, reward_scorer

            return reward_model.RewardModelJudge(config, asker, make_scorer or reward_scorer.make_scorer)
        case Implicit():
            from judges.implicit import ImplicitJudge

            return ImplicitJudge(config, asker)
        case Plugin():
            return build_plugin(config, asker)
        case Ensemble():
            return EnsembleJudge(
                config,
                [
                    build_judge(m.judge, asker.member(m.judge), policy=policy, make_scorer=make_scorer)
                    for m in config.members
                ],
            )
        case _:
            raise ConfigError(f"judge.kind is {config.kind!r}, which is not built yet")


async def close_judge(judge: Judge) -> None:
    """Lets go of what a judge holds open; in the event loop that it judged in."""
    match judge:
        case ScoringJudge() | ComparingJudge():
            await judge.model.close()
        case EnsembleJudge():
            for _, member in judge.members:
                await close_judge(member)


async def judge_groups(judge: Judge, groups: Sequence[Group], round_: int = 0, occasion: str = "") -> list[Judgement]:
    """One judgement per group, in order; an error in one group is that group's JudgeFailure.

    round_: what calls count for; occasion: what was said on another one is not remembered. Errors that are the run's,
    not a group's, are raised: BudgetError, a judge cache that cannot be written.
    """
    ROUND.set(round_)  # each group's task has its own copy
    OCCASION.set(occasion)
    return list(await asyncio.gather(*(_judge_one(judge, group) for group in groups)))


async def _judge_one(judge: Judge, group: Group) -> Judgement:
    try:
        return await judge.judge(group)
    except JudgeError as error:
        return failed(group, error.kind, str(error))
    except Exception as error:  # the fault boundary: a judge's bug costs one group, and is shown
        if (ours := _of_the_run(error)) is not None:
            raise ours from error
        return failed(group, "error", describe(error))


def _of_the_run(error: BaseException) -> OnlinePOError | None:
    """An error that no judge can mean for one group alone; it may be in a task group's."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := _of_the_run(inner)) is not None), None)
    return error if isinstance(error, OnlinePOError) else None


def remembers(config: JudgeBase) -> bool:
    """Whether a judge keeps answers in the run's judge cache."""
    return any(judge.cached for judge in single_judges(config))


def shown(judge: Judge, config: JudgeBase, group: Group) -> str | None:
    """The exact text of one question on a group, as the judge reads it, special tokens and all; None for judges that
    read no text of ours."""
    if isinstance(judge, EnsembleJudge) and isinstance(config, Ensemble):
        texts = zip(judge.members, config.members, strict=True)
        found = [(name, shown(member, section.judge, group)) for (name, member), section in texts]
        return "\n\n".join(f"{name}:\n{text}" for name, text in found if text is not None) or None
    if not isinstance(judge, Shows):
        return None
    return judge.shown(Question(prompt=group.prompt, responses=group.responses[: 2 if config.pairwise else 1]))


async def _end(judge: Judge) -> None:
    """Ends whatever else runs in this event loop, and waits until it has: what is only dropped would complain."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await close_judge(judge)


class LocalJudgePool:
    """A `protocols.JudgePool` in a thread of this process, without Ray. cache: the judge cache; None: no memory.
    policy: gives judges that are the policy what they ask."""

    def __init__(self, config: JudgeBase, cache: Path | None = None, policy: AskPolicy | None = None) -> None:
        self._cache = cache if remembers(config) else None
        self._store = None
        if self._cache is not None:
            prepare(self._cache)
            self._store = JudgeStore(self._cache)
        self._config = config
        try:
            self._judge = build_judge(config, Asker(config, self._store), policy=policy)
        except BaseException:
            self._close_store()
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judges", daemon=True)
        self._thread.start()

    def submit(self, groups: Sequence[Group], round_: int = 0, occasion: str = "") -> Future[list[Judgement]]:
        """One judgement per group, in order; BudgetError where `judge.budget` is spent."""
        return asyncio.run_coroutine_threadsafe(judge_groups(self._judge, groups, round_, occasion), self._loop)

    def shown(self, group: Group) -> str | None:
        """See `shown`."""
        return shown(self._judge, self._config, group)

    def close(self) -> None:
        """Ends the thread; what is still being judged is left without an answer."""
        asyncio.run_coroutine_threadsafe(_end(self._judge), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._close_store()

    def _close_store(self) -> None:
        if self._store is not None and self._cache is not None:
            self._store.close()
            release(self._cache)
