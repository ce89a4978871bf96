"""The log of a run: metrics.jsonl, samples.jsonl, TensorBoard events and charts.

One line of metrics.jsonl is one step, in order, no step twice: a run that resumes from step s drops
the lines that it had written beyond s. Lines up to a checkpoint are on disk before the checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from occ_jax.errors import UserError
from occ_jax.files import Row, read_rows, replace_text
from occ_jax.training.charts import Charts
from occ_jax.training.run_directory import RunDirectory


class RunLog:
    """Open files of a run directory; a context manager.

    All of its methods raise `UserError` where the directory cannot be written.
    """

    def __init__(
        self, directory: RunDirectory, resume_step: int, charts: Charts | None = None
    ) -> None:
        """Opens, and drops rows of steps after `resume_step`; -1 for a fresh run."""
        self._directory, self._charts = directory, charts
        with self._writable():
            self._metrics = _open_after(directory.metrics, resume_step)
            self._samples = _open_after(directory.samples, resume_step)
            directory.events.mkdir(exist_ok=True)
            events = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            # In this thread: for tensorboardX's own one, once a full disk ended it, others wait for
            # ever. Nor is its EventsWriter closed where it cannot be flushed.
            self._events = RecordWriter(str(directory.events / events))
            self._write_event(resume_step + 1, file_version="brain.Event:2")
            start = SessionLog(status=SessionLog.START)  # later steps of earlier files are void
            self._write_event(resume_step + 1, session_log=start)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The error that broke the run is raised, not one that follows from it.
        with suppress(UserError) if kind is not None else nullcontext():
            self.close()

    def write(self, row: Row) -> None:
        """Appends one step; numbers also become TensorBoard scalars and charts."""
        scalars = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        with self._writable():
            self._metrics.write(json.dumps(row) + "\n")
            for name, value in scalars.items():
                self._write_event(row["step"], summary=scalar(name, value))
        if self._charts is not None:
            self._charts.write(row["step"], scalars)

    def write_samples(self, samples: Iterable[Row]) -> None:
        """Appends completions."""
        with self._writable():
            for sample in samples:
                self._samples.write(json.dumps(sample) + "\n")

    def flush(self) -> None:
        """Returns when everything written is on disk."""
        with self._writable():
            for file in (self._metrics, self._samples):
                file.flush()
                os.fsync(file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes, each file though another cannot be written."""
        with self._writable(), ExitStack() as closing:
            for file in (self._metrics, self._samples, self._events):
                closing.callback(file.close)
            self.flush()
        if self._charts is not None:
            self._charts.close()

    def _write_event(self, step: int, **what: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **what)
        self._events.write(event.SerializeToString())

    @contextmanager
    def _writable(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the log of the run in {self._directory.path} cannot be written: {error.strerror}"
            ) from error


def _open_after(path: Path, step: int) -> Any:
    """Opens for appending, keeping rows up to `step` only."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return path.open("a")
