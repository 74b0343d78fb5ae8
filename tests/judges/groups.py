"""Groups to judge, and functions that judge them well or badly: the `python` judge's users."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from fractions import Fraction

import numpy as np

from online_po.types import Group, Prompt, Response


def make_group(*texts: str, metadata: dict | None = None, name: str = "p") -> Group:
    prompt = Prompt(
        id=name,
        messages=({"role": "system", "content": "s"}, {"role": "user", "content": name}),
        text=name,
        token_ids=(1,),
        metadata=metadata or {},
    )
    responses = tuple(
        Response(
            index=index,
            text=text,
            token_ids=(2,),
            token_logps=(-1.0,),
            finish_reason="stop",
            policy_version=0,
            seed=index,
        )
        for index, text in enumerate(texts)
    )
    return Group(prompt=prompt, responses=responses)


def length(prompt, response, metadata):
    return len(response)


def number_said(prompt, response, metadata):
    return float(response)


async def length_async(prompt, response, metadata):
    await asyncio.sleep(0)
    return len(response)


class _Callable:
    async def __call__(self, prompt, response, metadata):
        return len(response)


awaitable = _Callable()


def lengths(prompt, responses, metadata):
    return [len(response) for response in responses]


def lengths_array(prompt, responses, metadata):
    return np.array([len(response) for response in responses], dtype=np.float32)


def greedy(prompt, response, metadata):
    """Checks what it is given, and spoils it: the next call must not notice."""
    assert prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], prompt
    assert metadata == {"key": [1]}, metadata
    prompt.clear()
    metadata["key"].append(2)
    return 1


VALUES = {
    "int": 2,
    "bool": True,
    "numpy": np.float32(0.5),
    "fraction": Fraction(1, 4),
    "nan": float("nan"),
    "inf": -np.inf,
    "none": None,
    "text": "0.5",
    "list": [1.0],
    "array": np.zeros(2),
    "huge": 10**400,
    "complex": 1j,
}


def value(prompt, response, metadata):
    return VALUES[response]


GROUP_VALUES = {
    "short": [1.0],
    "long": [1.0, 2.0, 3.0],
    "none": None,
    "text": "ab",
    "dict": {"a": 1, "b": 2},
    "set": {1.0, 2.0},
    "number": 3.0,
    "nan": [1.0, float("nan")],
    "tuple": (1, 2),
    "generator": None,
}


def group_value(prompt, responses, metadata):
    if metadata["give"] == "generator":
        return (x for x in (1.0, 2.0))
    return GROUP_VALUES[metadata["give"]]


def trouble(prompt, response, metadata):
    match response:
        case "raise":
            raise ValueError("no such\n  thing")
        case "exit":
            sys.exit(3)
        case "stop":
            return next(iter(()))
        case "timeout error":
            raise TimeoutError("the socket's, not ours")
        case "long":
            raise ValueError("x" * 1000)
        case "hang":
            time.sleep(30)
    return 1.0


async def trouble_async(prompt, response, metadata):
    match response:
        case "raise":
            raise KeyError("k")
        case "exit":
            sys.exit(3)
        case "cancel":
            raise asyncio.CancelledError
        case "hang":
            await asyncio.sleep(30)
    return 1.0


peak = running = 0


async def crowd(prompt, response, metadata):
    """Counts how many calls are under way."""
    global peak, running
    running += 1
    peak = max(peak, running)
    await asyncio.sleep(0.01)
    running -= 1
    return 1.0


def two_arguments(prompt, response):
    return 0.0


def defaults(prompt, response, metadata=None, extra=1):
    return 0.0


def keyword_only(prompt, response, *, metadata):
    return 0.0


class Scorer:
    @staticmethod
    def score(prompt, response, metadata):
        return 0.0


not_a_function = 3


def noted(prompt, response, metadata):
    """The length; each call is a line in the file that CALLS names."""
    with open(os.environ["CALLS"], "a") as file:
        file.write(response + "\n")
    return len(response)


def no_f(prompt, response, metadata):
    if response == "f":
        raise ValueError("f")
    return len(response)
