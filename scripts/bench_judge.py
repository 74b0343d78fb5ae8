"""What asking a judge costs besides the judge itself: many questions to a loopback HTTP judge of a fixed latency.

    python scripts/bench_judge.py                        # 10,000 judgements at 64 at once, 200 ms each
    python scripts/bench_judge.py --judgements 2000      # quicker

What is asked is a process of its own that answers each request after --latency seconds. An llm_score judge as a run has
it (wording, JSON schema, openai client, reader, judge cache) judges groups of 4 responses; then all of them once more,
from the cache. For comparison, as many calls by the client alone. Prints the time as a ratio to the ideal (judgements /
concurrency x latency), this process's CPU time, and how much its memory grew between the first tenth of the judgements
and the last. Goals on a quiet machine: 1.3 or less, and flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import openai
import psutil
from rich.console import Console
from rich.table import Table

from judges.asking import Asker
from judges.protocol import Judge
from judges.runtime import build_judge, close_judge, judge_groups
from judges.store import JudgeStore, prepare
from online_po.judge_cache import judge_statistics
from online_po.judge_configs import LlmScore
from online_po.types import Group, Prompt, Response

GROUP = 4
"""Responses a prompt."""
USAGE = {"prompt_tokens": 500, "completion_tokens": 10, "total_tokens": 510}


def body(request: bytes) -> bytes:
    """A chat completion with a verdict for the question's id."""
    found = re.search(rb'id\\": \\"(\d+)', request)
    verdict = {"verdict": 7} | ({"id": found[1].decode()} if found else {})
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(verdict)}}
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": USAGE}
    return json.dumps(answer).encode()


async def serve(latency: float) -> None:
    """Answers every request after `latency` seconds; prints the port, then ends with its standard input."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"content-length" in line.lower()
                )
                content = body(await reader.readexactly(length))
                await asyncio.sleep(latency)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(content), content)
                )
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def group(number: int) -> Group:
    prompt = Prompt(
        id=f"{number}",
        messages=({"role": "user", "content": f"question {number} " * 20},),
        text="",
        token_ids=tuple(range(100)),
    )
    responses = tuple(
        Response(
            index=index,
            text=f"answer {index} " * 50,
            token_ids=tuple(range(200)),
            token_logps=(),
            finish_reason="stop",
            policy_version=0,
            seed=0,
        )
        for index in range(GROUP)
    )
    return Group(prompt=prompt, responses=responses)


async def by_judge(judge: Judge, number: int) -> None:
    (judgement,) = await judge_groups(judge, [group(number)])
    assert judgement.scores == (7.0,) * GROUP, judgement


async def by_client(client: openai.AsyncOpenAI, number: int) -> None:
    async def call() -> None:
        messages = [{"role": "user", "content": "x" * 2000}]
        answer = await client.chat.completions.create(model="m", messages=messages, max_tokens=10)
        assert json.loads(answer.choices[0].message.content)["verdict"] == 7

    await asyncio.gather(*(call() for _ in range(GROUP)))


async def all_of(work: Callable[[int], Awaitable[None]], judgements: int, at_once: int) -> tuple[float, float, float]:
    """(seconds, ms of CPU time a judgement, MiB of memory growth after the first tenth)."""
    process, sizes, count = psutil.Process(), [], judgements // GROUP
    numbers = iter(range(count))

    async def next_ones() -> None:
        for number in numbers:
            await work(number)
            if number % max(1, count // 10) == 0:
                sizes.append(process.memory_info().rss)

    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(next_ones() for _ in range(at_once)))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    sizes.append(process.memory_info().rss)
    return seconds, 1000 * cpu / judgements, (sizes[-1] - sizes[1]) / 2**20


async def measure(args: argparse.Namespace, cache: Path, url: str) -> dict[str, float]:
    prepare(cache)
    store = JudgeStore(cache)
    budget = {"calls": 10 * args.judgements} if args.budget else {}
    settings = {"model": "m", "base_url": url, "api_key_env": None, "concurrency": args.concurrency}
    config = LlmScore.model_validate(settings | {"budget": budget})
    ideal = args.judgements / args.concurrency * args.latency
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, http_client=openai.DefaultAioHttpClient()
    ) as client:
        work = functools.partial(by_client, client)
        alone, cpu_alone, _ = await all_of(work, args.judgements, args.concurrency // GROUP)
    judge = build_judge(config, Asker(config, store))
    work = functools.partial(by_judge, judge)
    # As in a run, more questions wait than may be asked at once.
    seconds, cpu, growth = await all_of(work, args.judgements, args.concurrency)
    cached, _, _ = await all_of(work, args.judgements, args.concurrency)
    await close_judge(judge)
    await asyncio.to_thread(store.close)
    found = judge_statistics(cache, 0)
    assert found["calls"] == found["hits"] == args.judgements, found
    return {
        "ideal_seconds": ideal,
        "seconds": seconds,
        "ratio": seconds / ideal,
        "ratio_of_the_client_alone": alone / ideal,
        "cpu_ms": cpu,
        "cpu_ms_of_the_client_alone": cpu_alone,
        "memory_growth_mib": growth,
        "latency_p50": found["latency_p50"],
        "latency_p99": found["latency_p99"],
        "cached_per_s": args.judgements / cached,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--budget", action="store_true", help="with a budget: each call is on disk before it goes out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.latency))
        return
    command = [sys.executable, __file__, "--serve", "--latency", str(args.latency)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None and server.stdin is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        try:
            figures = asyncio.run(measure(args, Path(folder) / "judge_cache.sqlite", url))
        finally:
            server.stdin.close()
    table = Table("figure", "value", title=f"{args.judgements:,} judgements, {args.concurrency} at once")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
