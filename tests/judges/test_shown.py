"""What a judge is asked is shown before a run, to the letter."""

from __future__ import annotations

import pytest

from judges.runtime import LocalJudgePool
from online_po.judge_configs import Ensemble, LlmPairwise, LlmScore, Rules
from tests.judges.chat_server import serving
from tests.judges.groups import make_group

GROUP = make_group("first answer", "second answer")


def said(asked) -> str:
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in asked.request["messages"])


@pytest.mark.parametrize(("kind", "verdict"), [(LlmScore, 3), (LlmPairwise, "A")])
@pytest.mark.parametrize("answers", ["json_schema", "text"])
def test_what_is_shown_is_what_is_sent(kind, verdict, answers):
    with serving(lambda asked: asked.verdict(verdict)) as server:
        pool = LocalJudgePool(kind(model="m", base_url=server.url, api_key_env=None, answers=answers))
        text = pool.shown(GROUP)
        pool.submit([GROUP]).result(30)
        pool.close()
    assert "first answer" in text and text in [said(asked) for asked in server.asked]


def test_members_are_shown_by_name_and_judges_that_read_nothing_are_not():
    llm = {"kind": "llm_score", "model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": None}
    pool = LocalJudgePool(Ensemble(members=({"kind": "rules"}, llm)))
    text = pool.shown(GROUP)
    pool.close()
    assert text.startswith("llm_score:\n[system]\n") and "rules" not in text.split("\n")[0]
    pool = LocalJudgePool(Rules())
    assert pool.shown(GROUP) is None
    pool.close()
