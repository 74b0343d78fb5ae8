import asyncio
import email.utils
import json
import re
import time
import traceback

import pytest

from judges.chat import Wording
from judges.endpoint import Endpoint, read_key, retry_after
from judges.protocol import JudgeError
from judges.runtime import check_judge
from online_po.config import Config
from online_po.errors import ConfigError
from online_po.judge_configs import LlmScore

from .chat_server import Sent, serving

KEY = "sk-very-secret-0123456789"
WORDING = Wording(
    as_text=[{"role": "user", "content": "as text"}],
    as_json=[{"role": "user", "content": "as json"}],
    schema={"type": "object"},
)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def config(server, **settings):
    return LlmScore(**{"model": "m", "base_url": server.url, "api_key_env": "TEST_KEY", **settings})


def ask(answer, times=1, logps=False, seed=3, **settings):
    """What one call gives or raises, `times` over with the same client; and the server."""
    with serving(answer) as server:
        outcomes = asyncio.run(_ask(config(server, **settings), times, logps, seed))
    return outcomes, server


async def _ask(made, times, logps, seed):
    endpoint = Endpoint(made)
    assert KEY not in repr(endpoint)
    outcomes = []
    for _ in range(times):
        try:
            outcomes.append(await endpoint.chat(WORDING, seed=seed, logps=logps))
        except JudgeError as error:
            outcomes.append(error)
    await endpoint.close()
    return outcomes


def test_a_whole_answer():
    (reply,), server = ask(lambda asked: "hello", prompt_price=2.0, response_price=30.0, timeout_s=7)
    assert (reply.text, reply.is_json, reply.tokens) == ("hello", True, ())
    assert (reply.prompt_tokens, reply.response_tokens, reply.cost) == (100, 10, pytest.approx(5e-4))
    (asked,) = server.asked
    assert asked.key == KEY
    assert asked.request == {
        "model": "m", "messages": WORDING.as_json, "temperature": 0.0, "max_tokens": 512,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": {"type": "object"}}
        },
    }  # fmt: skip


def test_sampling_has_a_seed():
    _, server = ask(lambda asked: "x", temperature=0.5, max_tokens=7, answers="text", seed=11)
    assert server.asked[0].request == {
        "model": "m", "messages": WORDING.as_text, "temperature": 0.5, "max_tokens": 7, "seed": 11
    }  # fmt: skip


def test_logps_of_the_tokens():
    spots = [
        {"token": "A", "logprob": -0.5, "bytes": [65], "top_logprobs": [{"token": "B", "logprob": -1.0}]},
        {"token": "!", "logprob": -0.1},
    ]
    (reply,), server = ask(lambda asked: Sent("A!", logprobs=spots), logps=True)
    assert [(token.text, token.logps) for token in reply.tokens] == [("A", {"A": -0.5, "B": -1.0}), ("!", {"!": -0.1})]
    assert server.asked[0].request["logprobs"] is True and server.asked[0].request["top_logprobs"] == 20


def test_without_logps_where_they_are_wanted():
    (error,), _ = ask(lambda asked: "A", logps=True)
    assert (error.kind, error.retry) == ("unparsable", False) and "judge.soft" in str(error)


ERROR = json.dumps({"error": {"message": f"no: {KEY} is bad", "code": None}})
QUOTA = json.dumps({"error": {"message": "pay", "code": "insufficient_quota"}})
MANY_TOKENS = '{"choices": [{"message": {}}], "usage": {"prompt_tokens": 1e30}}'
TOO_LONG = '{"error": {"message": "This model\'s maximum context length is 10 tokens."}}'
FILTER = json.dumps({"error": {"message": "no", "code": "content_filter"}})


@pytest.mark.parametrize(
    ("sent", "kind", "retry", "wait", "message"),
    [
        (Sent(status=429, body=ERROR, headers={"Retry-After": "7"}), "transport", True, 7.0, "status 429"),
        (Sent(status=429, body=ERROR), "transport", True, None, "status 429"),
        (Sent(status=429, body=QUOTA), "transport", False, None, "quota"),
        (Sent(status=500, body="<html>oh</html>"), "transport", True, None, "status 500: <html>oh</html>"),
        (Sent(status=503, body="", headers={"Retry-After": "0.5"}), "transport", True, 0.5, "status 503"),
        (Sent(status=408, body=ERROR), "timeout", True, None, "status 408"),
        (Sent(status=401, body=ERROR), "transport", False, None, r"refuses the key in \$TEST_KEY"),
        (Sent(status=403, body=ERROR), "transport", False, None, r"refuses the key in \$TEST_KEY"),
        (Sent(status=404, body=ERROR), "transport", False, None, r"judge\.model = 'm'"),
        (Sent(status=400, body=FILTER), "refusal", False, None, "filter"),
        (Sent(status=400, body=TOO_LONG), "too_long", False, None, "longer than judge.model can read"),
        (Sent(body=MANY_TOKENS), "unparsable", True, None, "usage"),
        (Sent(status=422, body=ERROR), "transport", False, None, r"status 422: .*no: \*\*\* is bad"),
        (Sent("x", cut=True), "transport", True, None, r"no whole answer from judge\.base_url"),
        (Sent("x", after_s=1.0), "timeout", True, None, r"judge\.timeout_s = 0\.3 s"),
        (Sent(body="{not json"), "unparsable", True, None, "no chat completion"),
        (Sent(body=""), "unparsable", True, None, "no chat completion"),
        (Sent(body=f'{{"error": "{KEY}"}}'), "unparsable", True, None, r"no chat completion.*\*\*\*"),
        (Sent(body='{"choices": []}'), "unparsable", True, None, "choices"),
        (Sent(body="text", headers={"Content-Type": "text/plain"}), "unparsable", True, None, "no chat completion"),
        (Sent("half", finish_reason="length"), "unparsable", True, None, r"half an answer.*judge\.max_tokens = 512"),
        (Sent("", finish_reason="content_filter"), "refusal", False, None, "filter cut"),
        (Sent(message={"refusal": f"I will not say {KEY}"}), "refusal", False, None, r"I will not say \*\*\*"),
    ],
)  # fmt: skip
def test_faults_by_kind(sent, kind, retry, wait, message):
    (error,), server = ask(lambda asked: sent, timeout_s=0.3 if sent.after_s else 20, answers="text")
    assert isinstance(error, JudgeError)
    assert (error.kind, error.retry, error.retry_after) == (kind, retry, wait)
    assert re.search(message, str(error))
    assert KEY not in "".join(traceback.format_exception(error)) and error.__context__ is None
    assert len(server.asked) == 1  # the client asks once


def test_nobody_listens():
    with serving(lambda asked: "x") as server:
        pass
    (error,) = asyncio.run(_ask(config(server), 1, False, 0))
    assert (error.kind, error.retry) == ("transport", True) and server.url in str(error)


def test_answers_without_a_verdict_are_charged():
    (error,), _ = ask(
        lambda asked: Sent("half", finish_reason="length"), prompt_price=1.0, response_price=1.0, answers="text"
    )
    assert (error.prompt_tokens, error.response_tokens, error.cost) == (100, 10, pytest.approx(1.1e-4))


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, None), ("3", 3.0), ("-1", 0.0), ("soon", None), ("inf", None), ("nan", None)]
)
def test_retry_after(header, seconds):
    assert retry_after(header) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_retry_after_a_date(zone):
    date = email.utils.formatdate(time.time() + 100, usegmt=True).replace("GMT", zone)
    assert 90 < retry_after(date) < 101


# -- JSON schema or text -------------------------------------------------------------------------------


def no_schemas(asked):
    return Sent(status=400, body=ERROR) if asked.is_json else Sent("text")


def test_an_endpoint_without_schemas_is_asked_for_text_from_then_on():
    replies, server = ask(no_schemas, times=3)
    assert [(reply.text, reply.is_json) for reply in replies] == [("text", False)] * 3
    assert [asked.is_json for asked in server.asked] == [True, False, False, False]
    assert server.asked[1].text == "as text"


def test_a_question_that_no_form_helps_says_nothing_of_schemas():
    answers = iter([Sent(status=400, body=ERROR)] * 2 + [Sent("{}")])
    outcomes, server = ask(lambda asked: next(answers), times=2)
    assert outcomes[0].kind == "transport" and outcomes[1].is_json
    assert [asked.is_json for asked in server.asked] == [True, False, True]


def test_an_endpoint_that_took_a_schema_has_them():
    answers = iter([Sent("{}"), Sent(status=400, body=ERROR)])
    (first, second), server = ask(lambda asked: next(answers), times=2)
    assert first.is_json and second.kind == "transport" and len(server.asked) == 2


@pytest.mark.parametrize("form", ["json_schema", "text"])
def test_a_form_that_was_asked_for_is_kept_to(form):
    outcomes, server = ask(no_schemas, times=2, answers=form)
    assert {asked.is_json for asked in server.asked} == {form == "json_schema"} and len(server.asked) == 2
    assert all(isinstance(outcome, JudgeError) == (form == "json_schema") for outcome in outcomes)


# -- found out before anything starts ------------------------------------------------------------------


def made(**settings):
    return LlmScore(**{"model": "m", "base_url": "http://localhost:1/v1", "api_key_env": "TEST_KEY", **settings})


def test_a_key_that_is_there():
    check_judge(made())
    assert read_key(made()) == KEY and read_key(made(api_key_env=None)) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "has no such variable"), ("", "no such"), (f"{KEY}\n", "line break"), ("a b", "space")],
)
def test_a_key_that_is_none(monkeypatch, value, message):
    monkeypatch.delenv("TEST_KEY")
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(ConfigError, match=rf"judge\.api_key_env is TEST_KEY.*{message}") as caught:
        check_judge(made())
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "judge.base_url is no http"),
        ({"base_url": "http:///v1"}, "judge.base_url is no http"),
        ({"base_url": "http://host:99999/v1"}, "judge.base_url is no URL"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "judge.base_url holds more"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "judge.base_url holds more"),
        ({"base_url": "http://host/v1/chat/completions"}, "end it before"),
        ({"api_key_env": KEY}, "judge.api_key_env must be the name"),
        ({"api_key_env": "AIzaSyKey0123"}, "judge.api_key_env must be the name"),
        ({"api_key": KEY}, "judge.api_key: unknown key; did you mean 'api_key_env'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    data = {
        "run": {"name": "r", "dir": str(tmp_path)},
        "model": {"path": str(tmp_path)},
        "prompts": {"path": "p.jsonl", "heldout_size": 4},
        "judge": {"kind": "llm_score", "model": "m", **settings},
    }
    with pytest.raises(ConfigError, match=message) as caught:
        Config.parse(data)
    assert all(value not in str(caught.value) for value in (KEY, "AIzaSyKey0123"))
