"""online-po: iterative and online preference optimization, in one loop.

    from online_po import Config, run

    result = run(Config.from_yaml("configs/quickstart.yaml"))

Importing this package loads neither torch nor transformers, ray or vllm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_po.config import Config
    from online_po.launch import RunResult, run

__all__ = ["Config", "RunResult", "run"]

_HOMES = {"Config": "online_po.config", "RunResult": "online_po.launch", "run": "online_po.launch"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
