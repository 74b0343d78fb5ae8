"""Building, checking and running judges. Whatever goes wrong in one is a typed failure, never a label."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from judges.asking import Asker
from judges.calls import describe
from judges.ensemble import EnsembleJudge
from judges.plugin import build_plugin, load_plugin
from judges.protocol import Judge, JudgeError, failed
from judges.python import PythonJudge, load_function
from judges.rules import RulesJudge
from online_po.errors import ConfigError
from online_po.judge_configs import Ensemble, JudgeBase, Plugin, Python, Rules
from online_po.types import Group, Judgement


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
        case Plugin():
            load_plugin(config)
        case Ensemble():
            for member in config.members:
                check_judge(member.judge)
        case _:
            raise ConfigError(f"judge.kind is {config.kind!r}, which is not built yet")


def build_judge(config: JudgeBase, asker: Asker | None = None) -> Judge:
    """The judge that a config names; without an asker, one without memory. Raises ConfigError as `check_judge` does."""
    asker = asker or Asker(config)
    match config:
        case Rules():
            return RulesJudge(config)
        case Python():
            return PythonJudge(config, asker)
        case Plugin():
            return build_plugin(config, asker)
        case Ensemble():
            return EnsembleJudge(config, [build_judge(m.judge, asker.member(m.judge)) for m in config.members])
        case _:
            raise ConfigError(f"judge.kind is {config.kind!r}, which is not built yet")


async def judge_groups(judge: Judge, groups: Sequence[Group]) -> list[Judgement]:
    """One judgement per group, in order; an error in one group is that group's JudgeFailure."""
    return list(await asyncio.gather(*(_judge_one(judge, group) for group in groups)))


async def _judge_one(judge: Judge, group: Group) -> Judgement:
    try:
        return await judge.judge(group)
    except JudgeError as error:
        return failed(group, error.kind, str(error))
    except Exception as error:  # the fault boundary: a judge's bug costs one group, and is shown
        return failed(group, "error", describe(error))


class LocalJudgePool:
    """A `protocols.JudgePool` in a thread of this process, without Ray."""

    def __init__(self, config: JudgeBase) -> None:
        self._judge = build_judge(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judges", daemon=True)
        self._thread.start()

    def submit(self, groups: Sequence[Group], round_: int = 0) -> Future[list[Judgement]]:
        """One judgement per group, in order."""
        return asyncio.run_coroutine_threadsafe(judge_groups(self._judge, groups), self._loop)

    def close(self) -> None:
        """Ends the thread; what is still being judged is left without an answer."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
