"""A chat endpoint on loopback that answers as a test says, honestly or not."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Sent:
    """What the server sends back. `text` is what the model says, `body` the whole body in place of a completion."""

    text: str | None = None
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)
    finish_reason: str = "stop"
    logprobs: list[dict[str, Any]] | None = None
    after_s: float = 0.0
    cut: bool = False
    """The connection ends in the middle of the body."""

    def content(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text, **self.message},
            "finish_reason": self.finish_reason,
            "logprobs": None if self.logprobs is None else {"content": self.logprobs},
        }
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


@dataclass
class Asked:
    """A question as the server got it."""

    request: dict[str, Any]
    key: str

    @property
    def is_json(self) -> bool:
        return "response_format" in self.request

    @property
    def text(self) -> str:
        return self.request["messages"][-1]["content"]

    @property
    def id(self) -> str | None:
        found = re.search(r'"id": "(\d+)"|Verdict (\d+):', self.text)
        return (found[1] or found[2]) if found else None

    @property
    def blocks(self) -> list[str]:
        """The prompt and the responses, out of their fences."""
        return [text for _, text in re.findall(r"<<<([0-9a-f]+)\n(.*?)\n\1>>>", self.text, re.DOTALL)]

    def verdict(self, value: Any, **more: Any) -> str:
        """A good answer, in the form that was asked for."""
        if self.is_json:
            return json.dumps({**({"id": self.id} if self.id else {}), **more, "verdict": value})
        return "".join(f"{text}\n" for text in more.values()) + f"Verdict{f' {self.id}' if self.id else ''}: {value}"


@dataclass
class Server:
    url: str
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[Asked], Sent | str]) -> Iterator[Server]:
    """A server that answers by `answer`, up while the context is."""
    server: Server

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(request, self.headers["Authorization"].removeprefix("Bearer "))
            server.asked.append(asked)
            found = answer(asked)
            sent = found if isinstance(found, Sent) else Sent(found)
            time.sleep(sent.after_s)
            content = sent.content()
            self.close_connection = sent.cut
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that would not wait
                self.send_response(sent.status)
                for name, value in ({"Content-Type": "application/json"} | sent.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if sent.cut else content)

    class Listening(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # clients that connect at once

    listening = Listening(("127.0.0.1", 0), Handler)
    server = Server(url=f"http://127.0.0.1:{listening.server_port}/v1")
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
