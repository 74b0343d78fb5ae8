"""Functions of the user's own, named `module:function` in a config."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from online_po.errors import ConfigError, first_line


def load_function(name: str, *, setting: str) -> Callable[..., Any]:
    """The function `module:function`, looked for in the working folder first, then where Python looks.

    setting: where it was named, for messages (`loss.function`). Raises ConfigError, with near names, if the module
    does not import or holds no such function.
    """
    module_name, _, path = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(_explain_import(name, module_name, error, setting)) from error
    for part in path.split("."):
        if part not in dir(found):
            known = [key for key in dir(found) if not key.startswith("_") and inspect.isroutine(getattr(found, key))]
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"functions there: {', '.join(known) or 'none'}"
            raise ConfigError(f"{setting} is {name!r}, but {module_name} has no {path!r}; {hint}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, type):
        raise ConfigError(f"{setting} is {name!r}, which is a {type(found).__name__}, not a function; name a function")
    return found


def _explain_import(name: str, module_name: str, error: Exception, setting: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and (module_name + ".").startswith(f"{error.name}."):
        here = [module.name for module in pkgutil.iter_modules([os.getcwd()])]
        near = difflib.get_close_matches(module_name, here, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "run from the folder that holds it, or set PYTHONPATH"
        return f"{setting} is {name!r}, but there is no module {error.name!r}; {hint}"
    return (
        f"{setting} is {name!r}, but importing {module_name!r} fails with {type(error).__name__}: {first_line(error)}; "
        f"see that `python -c 'import {module_name}'` works"
    )
