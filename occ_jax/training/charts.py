"""Weights & Biases, if a run asks for it: the rows of metrics.jsonl as charts.

A convenience that no run may wait or fail for: nothing goes to the network unless WANDB_MODE says
"online", what cannot be reached is written to disk instead, and trouble later on ends the charts,
not the training. The package is imported here only, when `run.wandb_project` is set.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from occ_jax.config import Config, to_dict
from occ_jax.errors import UserError
from occ_jax.files import write_json
from occ_jax.training.run_directory import RunDirectory

_MODES = ("online", "offline", "disabled")
_SECONDS_TO_START, _SECONDS_TO_FINISH = 20.0, 60.0


def check_charts(config: Config) -> None:
    """Refuses what `open_charts` could not do.

    Raises:
        UserError: the package is not installed, the project's name or WANDB_MODE is not allowed.
    """
    if not config.run.wandb_project:
        return
    try:
        # A directory named wandb, which wandb itself makes, would import as "wandb".
        importlib.import_module("wandb.errors")
    except ImportError as error:
        raise UserError(
            "run.wandb_project needs the package wandb: pip install 'occ_jax[wandb]'"
        ) from error
    project = config.run.wandb_project
    if len(project) > 128 or set(project) & set("/\\#?%:"):
        raise UserError(
            f"run.wandb_project is {project!r}; it must have at most 128 characters, and none of "
            "/\\#?%:"
        )
    if _mode() not in _MODES:
        raise UserError(f"WANDB_MODE is {_mode()!r}; it must be {', '.join(_MODES)}, or not set")


def open_charts(config: Config, say: Callable[[str], None]) -> Charts | None:
    """Starts, or takes up again, the run's charts; None without `run.wandb_project`.

    The run's id is kept in wandb.json of its directory. Steps that a resumed run repeats are
    dropped by the server, which has them already.

    Args:
        config: the run's directory must exist.
        say: receives one line that tells people where the charts are.
    """
    if not config.run.wandb_project:
        return None
    import wandb
    from wandb.errors import Error

    def start(mode: str) -> Any:
        return wandb.init(
            project=config.run.wandb_project,
            id=_run_id(RunDirectory(Path(config.run.directory))),
            resume="allow",
            name=config.run.directory,
            dir=config.run.directory,
            config=to_dict(config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_SECONDS_TO_START,
                finish_timeout=_SECONDS_TO_FINISH,
            ),
        )

    mode = _mode()
    try:
        run = start(mode)
    except Error as error:
        say(f"Weights & Biases: offline, as it cannot be reached ({str(error).splitlines()[0]})")
        mode = "offline"
        try:
            run = start(mode)
        except Error as again:
            say(f"Weights & Biases: no charts ({str(again).splitlines()[0]})")
            return None
    if mode == "online":
        say(f"Weights & Biases: {run.url}")
    elif mode == "offline":
        parts = Path(config.run.directory) / "wandb" / "offline-run-*"
        say(f"Weights & Biases: offline; to upload, wandb sync {parts}")
    return Charts(run, say)


class Charts:
    """An open run of Weights & Biases."""

    def __init__(self, run: Any, say: Callable[[str], None]) -> None:
        self._run: Any | None = run
        self._say = say

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Queues one step's numbers; nothing is waited for."""
        self._guarded(lambda run: run.log(dict(scalars), step=step))

    def close(self) -> None:
        """Returns when everything is handed over or, online, uploaded; or after a minute."""
        self._guarded(lambda run: run.finish())
        self._run = None

    def _guarded(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # anything: training goes on without charts
            self._run = None
            self._say(f"Weights & Biases: no more charts ({error})")


def _mode() -> str:
    return os.environ.get("WANDB_MODE") or "offline"


def _run_id(directory: RunDirectory) -> str:
    """The id in wandb.json; a new one is written if there is no file."""
    path = directory.chart_id
    try:
        return str(json.loads(path.read_text())["id"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete it to begin new charts") from error
    write_json(path, {"id": secrets.token_hex(4)})
    return _run_id(directory)
