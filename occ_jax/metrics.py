"""What a run writes while it goes: metrics.jsonl, samples.jsonl, TensorBoard events, charts.

One line of metrics.jsonl is one step, in order, no step twice: a run that resumes from step s drops
what it had written beyond s. Lines of steps up to a checkpoint are on disk before it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from occ_jax.tracking import Charts

Row = dict[str, Any]


class RunLog:
    """Open files of a run directory."""

    def __init__(self, directory: Path, resume_step: int, charts: Charts | None = None) -> None:
        """Opens, and drops rows of steps after `resume_step`; -1 for a fresh run."""
        self._charts = charts
        self._metrics = _open_after(directory / "metrics.jsonl", resume_step)
        self._samples = _open_after(directory / "samples.jsonl", resume_step)
        self._events = SummaryWriter(
            str(directory / "tensorboard"), purge_step=resume_step + 1, flush_secs=30
        )

    def write(self, row: Row) -> None:
        """Appends one step; numbers also become TensorBoard scalars and charts."""
        self._metrics.write(json.dumps(row) + "\n")
        scalars = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        for name, value in scalars.items():
            self._events.add_scalar(name, value, row["step"])
        if self._charts is not None:
            self._charts.write(row["step"], scalars)

    def write_samples(self, samples: Iterable[Row]) -> None:
        """Appends completions."""
        for sample in samples:
            self._samples.write(json.dumps(sample) + "\n")

    def flush(self) -> None:
        """Returns when everything written is on disk."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._metrics.close()
        self._samples.close()
        self._events.close()
        if self._charts is not None:
            self._charts.close()


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON lines file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows: list[Row] = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _open_after(path: Path, step: int) -> Any:
    """Opens for appending, keeping rows up to `step` only."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)
    return path.open("a")
