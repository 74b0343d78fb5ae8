"""An OpenAI-compatible chat endpoint on loopback that fails as real ones do, as often as it is told to.

By hand on a socket, so that it can do what no HTTP server would: cut a connection in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FAULTS = (
    "429", "500", "503", "cut before the answer", "cut in the answer", "slow", "malformed JSON", "no choices", "empty",
    "half an answer", "no verdict", "out of range", "refusal", "content filter", "not HTTP",
)  # fmt: skip
"""Each passes when the question is asked again."""


@dataclass
class FaultServer:
    """`answer(body)` gives the text of a right answer. `share` of the requests fail, which and how by hash."""

    answer: Callable[[dict[str, Any]], str]
    share: float = 0.0
    faults: tuple[str, ...] = FAULTS
    latency_s: float = 0.0
    slow_s: float = 30.0
    key: str | None = None
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by question (hash of the messages, random fences aside: see `question`)."""
    paid: Counter[str] = field(default_factory=Counter)
    """Right answers that were sent whole, by question."""
    served: Counter[str] = field(default_factory=Counter)
    """Requests by fault, "" for none."""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> FaultServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024), self._loop
        ).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *error: object) -> None:
        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; False where the connection is to end."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = next((int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length")), 0)
        body = json.loads(await reader.readexactly(length) or b"{}")
        await asyncio.sleep(self.latency_s)
        if self.key is not None and f"authorization: bearer {self.key.lower()}" not in head:
            return await self._send(writer, 401, {"error": {"message": f"Incorrect API key provided in {head!r}"}})
        question = hashlib.sha256(json.dumps(body.get("messages"), sort_keys=True).encode()).hexdigest()
        self.asked[question] += 1
        self.bodies.append(body)
        fault = self._fault(question)
        self.served[fault] += 1
        return await self._fail(writer, fault, body) if fault else await self._answer(writer, body, question)

    def _fault(self, question: str) -> str:
        drawn = hashlib.sha256(f"{question} {self.asked[question]}".encode()).digest()
        if int.from_bytes(drawn[:4]) >= self.share * 2**32:
            return ""
        return self.faults[int.from_bytes(drawn[4:8]) % len(self.faults)]

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], question: str) -> bool:
        going = await self._send(writer, 200, reply(self.answer(body)))
        self.paid[question] += 1
        return going

    async def _fail(self, writer: asyncio.StreamWriter, fault: str, body: dict[str, Any]) -> bool:
        right = self.answer(body)
        match fault:
            case "429":
                return await self._send(writer, 429, {"error": {"message": "slow down"}}, "Retry-After: 0.05\r\n")
            case "500" | "503":
                return await self._send(writer, int(fault), {"error": {"message": "oops"}})
            case "cut before the answer":
                return False
            case "cut in the answer":
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n{"id":')
                await writer.drain()
                return False
            case "not HTTP":
                writer.write(b"\x00\x01 this is no HTTP at all\r\n\r\n")
                await writer.drain()
                return False
            case "slow":
                await asyncio.sleep(self.slow_s)
                return False
            case "malformed JSON":
                return await self._send(writer, 200, '{"id": "x", "choices": [{"message": {"content": ')
            case "no choices":
                return await self._send(writer, 200, reply(right) | {"choices": []})
            case "empty":
                return await self._send(writer, 200, reply(""))
            case "half an answer":
                return await self._send(writer, 200, reply(right[: len(right) // 2], finish_reason="length"))
            case "no verdict":
                return await self._send(writer, 200, reply("Both have their merits, and I would rather not say."))
            case "out of range":
                return await self._send(writer, 200, reply('{"score": 1000, "verdict": "Z", "winner": "Z"}'))
            case "refusal":
                return await self._send(writer, 200, reply(None, refusal="I cannot judge that."))
            case "content filter":
                return await self._send(writer, 200, reply("", finish_reason="content_filter"))
        raise ValueError(fault)

    async def _send(self, writer: asyncio.StreamWriter, status: int, body: Any, headers: str = "") -> bool:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{headers}\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return True


def reply(text: str | None, finish_reason: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    """A chat completion as OpenAI's endpoint sends it."""
    message = {"role": "assistant", "content": text} | ({"refusal": refusal} if refusal else {})
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
    }


def questions_paid_twice(server: FaultServer) -> dict[str, int]:
    """Questions that were answered rightly more than once."""
    return {question: count for question, count in server.paid.items() if count > 1}
