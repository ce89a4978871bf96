"""Reward functions of users: import by the name in the config, and calls in verifier processes.

    def score(completion: str, answer: str, record: Mapping[str, Any]) -> float: ...

`record` holds the problem's "id", "source" and "prompt". A score of 1 means right and 0 wrong;
other finite numbers are kept as they are. pass@k counts scores of 1 or more as right, and a call
that fails scores 0.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from occ_jax.errors import UserError, one_line

UserFunction = Callable[[str, str, Mapping[str, Any]], float]


class CallFailed(Exception):
    """A reward function raised, or returned no finite number; the message is one line."""


def load_function(name: str) -> UserFunction:
    """Imports "package.module:function" or "path/to/file.py:function".

    Raises:
        UserError: the file, module or function does not exist, or importing it fails.
    """
    location, _, attribute = name.rpartition(":")
    load = _import_file if location.endswith(".py") else importlib.import_module
    try:
        module: Any = load(location)
    except Exception as error:  # importing a user's code may raise anything
        raise UserError(
            f"the reward function {name} cannot be imported: {describe(error)}"
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        fault = "is not callable" if hasattr(module, attribute) else "does not exist"
        raise UserError(f"the reward function {name} {fault}")
    return cast("UserFunction", function)


def call(name: str, function: UserFunction, *arguments: Any) -> float:
    """The function's score of one completion.

    Raises:
        CallFailed: the function raised, or returned no finite number.
    """
    try:
        value: Any = function(*arguments)
    except BaseException as error:  # sys.exit() in a reward function ends no worker
        raise CallFailed(f"the reward function {name} raised {describe(error)}") from error
    try:
        score = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise CallFailed(
            f"the reward function {name} returned {repr(value)[:80]}; it must be a finite number"
        )
    return score


def _import_file(file: str) -> Any:
    """Imports a file as a module; like a script, it may import files of its directory."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    sys.path.insert(0, str(path.parent.resolve()))
    name = f"_reward_function_{path.stem}"  # so that it shadows no other module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has them
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def describe(error: BaseException) -> str:
    """An exception's type and the start of its message."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
