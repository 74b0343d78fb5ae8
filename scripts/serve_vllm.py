"""vLLM's own OpenAI server on loopback, for tests and trials: up while a context is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "judge"
"""The name under which it serves the model."""


@contextmanager
def serving_vllm(
    model: Path, log: Path, *, key: str | None = None, max_model_len: int = 4096, threads: int = 1, wait_s: float = 500
) -> Iterator[str]:
    """Gives the base URL once the server answers. CPU build, float32, what it prints goes to `log`.

    Raises RuntimeError with the log's end if it ends before, or is not there after `wait_s` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings: dict[str, object] = {
        "model": model, "served-model-name": NAME, "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": max_model_len, "max-num-seqs": 32, "generation-config": "vllm",
        # A random model would otherwise write blanks until it runs out of tokens.
        "structured-outputs-config": json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    # Seeds, and prompts split over steps, do not go together on the CPU ("CPU Generator does not use offset").
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(2048, max_model_len))]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        **({} if key is None else {"VLLM_API_KEY": key}),
    }
    with log.open("wb") as output:
        # A group of its own: the engine is another process, and must go too.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log, time.monotonic() + wait_s)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"vLLM's server is not there (exit status {process.poll()}): {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(20)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
