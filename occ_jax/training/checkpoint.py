"""Saving and restoring all that a run needs to go on as if it had never stopped.

A checkpoint holds parameters, optimizer state (the coefficient and its EMAs in it), step counters,
the random key and how many prompts were drawn. It is written while training goes on: only the copy
from the devices is waited for. Orbax writes to a temporary directory and renames it when it is
whole, then a manifest of all files' digests closes it, and only then may an older checkpoint go. So
a kill at any moment leaves checkpoints that are complete and as they were written, or are refused;
a run falls back to the newest of the former.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp

from occ_jax.errors import UserError, one_line
from occ_jax.files import json_text, write_json
from occ_jax.parallel.exchange import is_first_process, on_first_process
from occ_jax.types import Params, TrainState

_STEP = re.compile(r"\d+")
_MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of a run, `directory`/<step>/ each; a context manager.

    One is written at a time, by threads: orbax's, of all processes together, then the first
    process's, which reads every file back for the manifest. The next `save`, or `close`, raises
    what failed in them.
    """

    def __init__(self, directory: Path, *, keep: int, keep_every: int = 0) -> None:
        """Opens, or makes, the directory and removes what was being written when a run was killed.

        Args:
            directory: of the run's checkpoints.
            keep: how many of the newest are kept; one more while the next is not complete.
            keep_every: checkpoints of its multiples are kept for good; 0 for none.
        """
        self._keep, self._keep_every = keep, keep_every
        self._closing: threading.Thread | None = None
        self._failure: UserError | None = None
        # Old checkpoints are deleted here: orbax would delete the last complete one before the
        # manifest of its successor exists.
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True, enable_background_delete=True
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with suppress(UserError):
                self.close()
        else:
            # Deleting and closing take all processes, of which the others may be anywhere.
            self._join()

    def steps(self) -> list[int]:
        """Returns all steps in order; the newest may still be written."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, prompts_drawn: int) -> None:
        """Begins the checkpoint of `step`; returns when `state` may be donated.

        Args:
            step: later than all saved ones.
            state: what is saved, by all processes together.
            prompts_drawn: by all processes, since the run began.

        Raises:
            UserError: it, or the one before, could not be written.
        """
        self.wait()
        release = _hold_back_orbax()
        rest = {
            "opt_state": state.opt_state,
            "step": state.step,
            "key": jax.random.key_data(state.key),
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(rest),
                    data=ocp.args.JsonSave({"prompts_drawn": prompts_drawn}),
                ),
            )
        except Exception as error:
            raise _unwritten(self._path(step), error) from error
        self._closing = threading.Thread(
            target=self._finish, args=(step, release), name="close checkpoint"
        )
        self._closing.start()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, int]:
        """Reads the checkpoint of `step` into the shapes, types and shardings of `like`.

        These need not be the shardings it was saved with, nor as many processes.

        Args:
            step: one of `steps()`.
            like: from `occ_jax.rl.train_step.abstract_state`.

        Returns:
            The state, and the prompts that had been drawn.

        Raises:
            UserError: the files are damaged or of another model.
        """
        key = jax.eval_shape(jax.random.key_data, like.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=like.step.sharding)
        rest = {"opt_state": like.opt_state, "step": like.step, "key": key}
        with _readable(self._path(step)):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(like.params),
                    rest=ocp.args.StandardRestore(rest),
                    data=ocp.args.JsonRestore(),
                ),
            )
            state = TrainState(
                params=restored["params"],
                opt_state=restored["rest"]["opt_state"],
                step=restored["rest"]["step"],
                key=jax.random.wrap_key_data(restored["rest"]["key"]),
            )
            return state, int(restored["data"]["prompts_drawn"])

    def wait(self) -> None:
        """Returns when the last checkpoint is complete and those that it replaces are gone.

        Raises:
            UserError: it could not be written.
        """
        if not self._join():
            return
        if self._failure is not None:
            raise self._failure
        steps = self.steps()
        for step in steps[: -self._keep]:
            if self._keep_every == 0 or step % self._keep_every != 0:
                self._manager.delete(step)

    def close(self) -> None:
        """Waits for what is under way, and ends the threads.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            with suppress(Exception):  # it would raise again what `wait` has raised
                self._manager.close()

    def _join(self) -> bool:
        """Waits for the last checkpoint; returns False if none is being written."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.join()
        return closing is not None

    def _path(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step)

    def _finish(self, step: int, release: Callable[[], None]) -> None:
        try:
            self._manager.wait_until_finished()
            if is_first_process():
                _close(self._path(step))
            release()
        except Exception as error:  # of a full disk, or a lost one
            self._failure = _unwritten(self._path(step), error)
            self._failure.__cause__ = error


def save_params(directory: Path, params: Params, about: dict[str, Any] | None = None) -> None:
    """Writes parameters alone as item "params" of a checkpoint, and JSON files beside it.

    Raises:
        UserError: they could not be written.
    """
    release = _hold_back_orbax()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                directory.absolute(),
                args=ocp.args.Composite(params=ocp.args.StandardSave(params)),
                force=True,
            )
        if is_first_process():
            for name, value in (about or {}).items():
                write_json(directory / name, value)
            _close(directory)
    except Exception as error:
        raise _unwritten(directory, error) from error
    ocp.multihost.sync_global_processes(f"closed {directory}")
    release()


def _hold_back_orbax() -> Callable[[], None]:
    """Silences orbax while it writes; returns what ends the silence after a successful write.

    When a write fails, orbax logs a traceback for every array, raises the first array's error and
    closes its event loop. The other arrays are reported later, until the process ends: by orbax's
    threads, by asyncio and the interpreter when they are collected, and by tensorstore's threads,
    which find the loop closed. The one line for all of this is the `UserError` of the caller, so
    after a failure the silence must not end.
    """
    verbosity, hook = absl.logging.get_verbosity(), sys.unraisablehook
    tasks = logging.getLogger("asyncio")
    level = tasks.level

    def ignore_closed_loop(unraisable: sys.UnraisableHookArgs) -> None:
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not (closed and unraisable.exc_type is RuntimeError):
            hook(unraisable)

    absl.logging.set_verbosity(absl.logging.FATAL)
    tasks.setLevel(logging.CRITICAL)
    sys.unraisablehook = ignore_closed_loop
    # A filter cannot be removed, and no other coroutine runs in this process.
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)

    def release() -> None:
        absl.logging.set_verbosity(verbosity)
        tasks.setLevel(level)
        sys.unraisablehook = hook

    return release


def _unwritten(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"the checkpoint {directory} could not be written "
        f"({type(error).__name__}: {one_line(error)})"
    )


def restore_params(directory: Path, like: Params) -> Params:
    """Reads the parameters of any checkpoint into the shapes and shardings of `like`.

    Raises:
        UserError: the files are damaged or of another model.
    """
    problem = on_first_process(lambda: damage(directory))
    if problem is not None:
        raise UserError(f"the checkpoint {directory} is damaged: {problem}")
    with _readable(directory), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            directory.absolute(), args=ocp.args.Composite(params=ocp.args.StandardRestore(like))
        ).params


def find_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint of a run directory, or `path` itself if it is a checkpoint.

    Raises:
        UserError: the path holds no complete checkpoint.
    """
    if (path / "params").is_dir():
        return path
    steps = path / "checkpoints"
    complete = [
        entry
        for entry in (steps.iterdir() if steps.is_dir() else ())
        if _STEP.fullmatch(entry.name) and (entry / _MANIFEST).is_file()
    ]
    if not complete:
        raise UserError(
            f"no complete checkpoint at {path}; give a run directory, one of its "
            "checkpoints/<step>, or a Hugging Face directory"
        )
    return max(complete, key=lambda entry: int(entry.name))


def newest_intact(directory: Path, tell: Callable[[str], None]) -> int | None:
    """Returns the newest step whose files are as they were written, None if there is no step.

    Steps after it are renamed, not deleted, to make room for what the run will write again; of
    those that were never finished only the last is kept.

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
        if step not in finished:
            for earlier in directory.glob("damaged-*"):
                if not (earlier / _MANIFEST).exists():
                    shutil.rmtree(earlier)
        aside = directory / f"damaged-{step}"
        tell(f"the checkpoint {directory / str(step)} is damaged ({problem}): now {aside}")
        if aside.exists():
            shutil.rmtree(aside)
        (directory / str(step)).rename(aside)
    return steps[-1] if steps else None


def damage(directory: Path) -> str | None:
    """Returns what differs from the checkpoint as it was written, None if nothing does."""
    try:
        written = (directory / _MANIFEST).read_text()
        expected = json.loads(written)
        present = _digests(directory)
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    if written != json_text(expected):
        return f"{_MANIFEST} has changed"
    for name in sorted({*expected, *present}):
        if name not in present:
            return f"{name} is missing"
        if expected.get(name) != present[name]:
            return f"{name} has changed"
    return None


def _close(directory: Path) -> None:
    """Writes the manifest, whose presence says that the checkpoint is complete."""
    write_json(directory / _MANIFEST, _digests(directory))


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path."""
    paths = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(_MANIFEST)
    ]
    # Threads, as the interpreter is free while a file is read and hashed.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = threads.map(_digest, paths)
        names = [path.relative_to(directory).as_posix() for path in paths]
        return dict(zip(names, digests, strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
