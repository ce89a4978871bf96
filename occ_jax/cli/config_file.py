"""A config file and the command line's overrides in, one checked Config out.

Every mistake in either is a UserError of one line that names the file, and where in it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import io
import re
import runpy
import sys
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path

from occ_jax.config import Config
from occ_jax.errors import UserError, one_line


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Runs a config file's `get_config()` and applies command-line overrides.

    Args:
        path: a Python file that defines `get_config() -> Config`, or the name of a config that
            comes with occ_jax, such as "reverse_digits".
        overrides: such as ["--optimizer.learning-rate", "3e-6"].

    Raises:
        UserError: no such file, no `get_config`, an unknown field, a value that is not allowed.
    """
    path = _find(path)
    with _errors_of(path):
        get_config = runpy.run_path(path).get("get_config")
    if not callable(get_config):
        raise UserError(f"{path} defines no function get_config()")
    with _errors_of(path):
        config = get_config()
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} returns no occ_jax.config.Config")
    config = _of_checkpoint(config, overrides)
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config = tyro.cli(
                Config,
                default=config,
                args=list(overrides),
                prog=f"{program()} COMMAND {path}",
                # The config file decides which parts a model has; overrides change their fields.
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(captured.getvalue())) from None
    if config.model.checkpoint:
        from occ_jax.models.huggingface.load import check_config

        check_config(Path(config.model.checkpoint), config.model)
    return config


def program() -> str:
    """Name of the command line as the user typed it."""
    started = Path(sys.argv[0])
    if started.name == "run.py":
        return "run.py"
    return "python -m occ_jax" if started.parts[-2:] == ("occ_jax", "__main__.py") else "occ-jax"


def _find(config: str) -> str:
    """Path of a config file, given by its path or by the name of one that comes with occ_jax."""
    if Path(config).is_file():
        return config
    if config.endswith(".py") or Path(config).name != config:
        raise UserError(f"no config file {config}")
    installed, repository = (folder / "configs" for folder in Path(__file__).parents[1:3])
    folder = installed if installed.is_dir() else repository
    names = sorted(path.stem for path in folder.glob("*.py"))
    if config not in names:
        similar = difflib.get_close_matches(config, names, 1)
        suggestion = f"did you mean {similar[0]}? " if similar else ""
        raise UserError(f"no config {config}; {suggestion}occ_jax has {', '.join(names)}")
    return str(folder / f"{config}.py")


@contextlib.contextmanager
def _errors_of(path: str) -> Generator[None]:
    """Runs a config file's code: its errors become one line that names the file and the line.

    Meanwhile the file can import others of its folder, which hide no module from elsewhere.
    """
    folder = str(Path(path).resolve().parent)
    sys.path.append(folder)
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)


def _of_checkpoint(config: Config, overrides: Sequence[str]) -> Config:
    """The config with the architecture of the checkpoint that it or the command line names."""
    directory, name = config.model.checkpoint, "--model.checkpoint"
    for position, argument in enumerate(overrides):
        if argument.startswith(f"{name}="):
            directory = argument.removeprefix(f"{name}=")
        elif argument == name:
            directory = "".join(overrides[position + 1 : position + 2])
    if not directory:
        return config
    from occ_jax.models.huggingface.families import read_config

    model = config.model
    read = read_config(directory, model)
    if read.num_mtp_modules == 0:
        # Only the overrides decide whether a model without modules is allowed.
        read = dataclasses.replace(read, num_mtp_modules=model.num_mtp_modules)
    # Set without a check of the whole: the overrides may give the mesh or lengths for this model.
    joined = copy.copy(config)
    object.__setattr__(joined, "model", read)
    return joined


def _one_line(boxed: str) -> str:
    """The text of a boxed message before its first rule, and the field that it suggests."""
    text = [line.strip("│╭╰╮╯ ") for line in boxed.splitlines()]
    body = [line for line in text if line and not line.startswith("─")]
    rules = [i for i, line in enumerate(text) if line.startswith("─") and i > 0]
    message = " ".join(text[1 : rules[0]] if rules else body).strip()
    suggestion = re.search(r"(?:meant|similar)[^-]*(--[\w.-]+)", " ".join(body))
    return message + (f"; did you mean {suggestion.group(1)}?" if suggestion else "")
