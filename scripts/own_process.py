"""A measurement in a process of its own: a benchmark's script with `--task` and `--out`, both JSON files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MeasurementError(RuntimeError):
    """A process gave no figures. The message is one line; `output` is the end of what it wrote."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output
        if output:
            self.add_note(output)  # for a traceback


def measure(
    script: str, task: Mapping[str, Any], python: str = sys.executable, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `script` found of a task, in an environment with some more `variables`. Raises MeasurementError."""
    with tempfile.TemporaryDirectory() as name:
        given, found = Path(name, "task.json"), Path(name, "found.json")
        given.write_text(json.dumps(task))
        command = [python, script, "--task", str(given), "--out", str(found)]
        done = subprocess.run(command, env=os.environ | (variables or {}), capture_output=True, text=True)
        if done.returncode == -signal.SIGKILL:
            raise MeasurementError("killed, as processes are where the machine has too little memory")
        if done.returncode or not found.is_file():
            output = f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}".strip()
            raise MeasurementError((output.splitlines() or ["no word"])[-1][:300], output)
        return json.loads(found.read_text())
