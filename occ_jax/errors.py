"""The error for a user's mistake, a library's message as one line, and how both are reported."""

import importlib.util
import sys
import traceback
from typing import ClassVar


class UserError(Exception):
    """Bad input: the message names the thing, its value and what is allowed.

    The command line prints it as one line.
    """

    exit_status: ClassVar[int] = 2


def one_line(error: BaseException) -> str:
    """The start of a library's message, its line breaks and indentation removed."""
    return " ".join(str(error).split())[:200]


def report(error: BaseException) -> int:
    """Prints what ended a command on standard error; returns the exit status.

    A user's mistake is one line; an error of the program is a traceback.
    """
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def missing_extra(error: ModuleNotFoundError, needed_by: str, extra: str) -> str:
    """One line that says which extra of occ_jax installs the package that was not found.

    Raises:
        ModuleNotFoundError: `error` itself, if the package is installed and lacks a module.
    """
    package = (error.name or "").partition(".")[0]
    if not package or importlib.util.find_spec(package):
        raise error
    extra = package if package == "wandb" else extra
    return f"{needed_by} needs {package}: pip install 'occ_jax[{extra}]'"
