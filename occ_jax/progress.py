"""Progress of long work: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Reports to standard error; `quiet` reports nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        """Prints one line."""
        if not self._quiet:
            self._console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def steps(self, title: str, total: int, done: int) -> Generator[Step]:
        """Shows progress over `total` steps of which `done` are done already."""
        if self._quiet:
            yield Step(None, "", total, self)
        elif sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            with Bar(*columns, console=self._console) as bar:
                bar.add_task(title, total=total, completed=done, figures="")
                yield Step(bar, title, total, self)
        else:
            yield Step(None, title, total, self)


class Step:
    """Advances one progress display."""

    def __init__(self, bar: Bar | None, title: str, total: int, owner: Progress) -> None:
        self._bar, self._title, self._total, self._owner = bar, title, total, owner
        self._last_line = 0.0

    def __call__(self, done: int, figures: dict[str, float]) -> None:
        """Shows that `done` steps are done, with the figures worth watching."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, figures=text)
            return
        now = time.monotonic()
        if done == self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._owner.say(f"{self._title} {done}/{self._total}  {text}")
