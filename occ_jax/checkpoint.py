"""Saving and restoring all that a run needs to go on as if it had never stopped.

A checkpoint holds parameters, optimizer state (the coefficient and its EMAs in it), step counters,
the random key and the data iterator's position. Orbax writes to a temporary directory and renames
it when it is whole, and a manifest of all its files' digests closes it, so a checkpoint is either
complete and as it was written, or refused; a run falls back to the one before.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from occ_jax.errors import UserError, one_line
from occ_jax.files import write_json
from occ_jax.types import Params, TrainState

_STEP = re.compile(r"\d+")
_MANIFEST = "manifest.json"


def open_manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    """A manager of `directory`/<step>/, keeping the `keep` newest checkpoints."""
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False),
    )


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, data: grain.DatasetIterator[Any]
) -> None:
    """Writes the checkpoint of `step`; returns when it is complete on disk."""
    rest = {"opt_state": state.opt_state, "step": state.step, "key": jax.random.key_data(state.key)}
    manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest),
            data=grain.checkpoint.CheckpointSave(data),
        ),
    )
    _close(Path(manager.directory) / str(step))


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    like: TrainState,
    data: grain.DatasetIterator[Any],
) -> TrainState:
    """Reads the checkpoint of `step` into the shapes, types and shardings of `like`.

    Args:
        manager: from `open_manager`.
        step: one of `manager.all_steps()`.
        like: from `occ_jax.rl.train_step.abstract_state`.
        data: an iterator over the same data set; moved to the saved position.

    Raises:
        UserError: the files are damaged or of another model.
    """
    key = jax.eval_shape(jax.random.key_data, like.key)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=like.step.sharding)
    rest = {"opt_state": like.opt_state, "step": like.step, "key": key}
    with _readable(Path(manager.directory) / str(step)):
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                rest=ocp.args.StandardRestore(rest),
                data=grain.checkpoint.CheckpointRestore(data),
            ),
        )
    return TrainState(
        params=found["params"],
        opt_state=found["rest"]["opt_state"],
        step=found["rest"]["step"],
        key=jax.random.wrap_key_data(found["rest"]["key"]),
    )


def save_params(directory: Path, params: Params, about: dict[str, Any] | None = None) -> None:
    """Writes parameters alone as item "params" of a checkpoint, and JSON files beside it."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            directory.absolute(),
            args=ocp.args.Composite(params=ocp.args.StandardSave(params)),
            force=True,
        )
    for name, value in (about or {}).items():
        write_json(directory / name, value)
    _close(directory)


def restore_params(directory: Path, like: Params) -> Params:
    """Reads the parameters of any checkpoint into the shapes and shardings of `like`.

    Raises:
        UserError: the files are damaged or of another model.
    """
    problem = damage(directory)
    if problem is not None:
        raise UserError(f"the checkpoint {directory} is damaged: {problem}")
    with _readable(directory), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            directory.absolute(),
            args=ocp.args.Composite(params=ocp.args.StandardRestore(like)),
        ).params


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run directory, or `path` itself where it is a checkpoint.

    Raises:
        UserError: nothing there.
    """
    if (path / "params").is_dir():
        return path
    steps = path / "checkpoints"
    complete = (
        [entry for entry in steps.iterdir() if _STEP.fullmatch(entry.name)]
        if steps.is_dir()
        else []
    )
    if not complete:
        raise UserError(
            f"no checkpoint at {path}; give a run directory or one of its checkpoints/<step>"
        )
    return max(complete, key=lambda entry: int(entry.name))


def newest_intact(directory: Path, tell: Callable[[str], None]) -> int | None:
    """The newest step of a run whose files are as they were written, None where there is no step.

    Steps after it are renamed, not deleted, to make room for what the run will write again.

    Args:
        directory: of the run's checkpoints.
        tell: receives one line for every damaged checkpoint passed over.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    entries = list(directory.iterdir()) if directory.is_dir() else []
    steps = sorted(int(entry.name) for entry in entries if _STEP.fullmatch(entry.name))
    damaged: dict[int, str] = {}
    while steps and (problem := damage(directory / str(steps[-1]))) is not None:
        damaged[steps.pop()] = problem
    finished = [step for step in damaged if (directory / str(step) / _MANIFEST).exists()]
    if finished and not steps:
        raise UserError(
            f"the checkpoint {directory / str(finished[0])} is damaged: {damaged[finished[0]]}; "
            "there is no earlier one to go back to"
        )
    for step, problem in damaged.items():
        aside = directory / f"damaged-{step}"
        tell(f"the checkpoint {directory / str(step)} is damaged ({problem}): now {aside}")
        if aside.exists():
            shutil.rmtree(aside)
        (directory / str(step)).rename(aside)
    return steps[-1] if steps else None


def damage(directory: Path) -> str | None:
    """What differs from the checkpoint as it was written, None for nothing."""
    try:
        expected = json.loads((directory / _MANIFEST).read_text())
        found = _digests(directory)
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} has changed"
    return None


def _close(directory: Path) -> None:
    """Writes the manifest, whose presence says that the checkpoint is complete."""
    write_json(directory / _MANIFEST, _digests(directory))


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path."""
    digests: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith(_MANIFEST):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(directory).as_posix()] = digest
    return digests


@contextmanager
def _readable(directory: Path) -> Generator[None]:
    """Whatever a reader of damaged files raises, as one line that names them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the checkpoint {directory} cannot be read; it is damaged or of another model "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
