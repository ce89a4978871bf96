"""Rows of local files as their publishers ship them: Parquet or JSON lines, told apart by content.

Every row knows its file and its number, so that whatever is wrong with it can be said in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from occ_jax.errors import UserError, one_line

_BATCH = 4096


class Row(NamedTuple):
    """One row of one file."""

    file: Path
    number: int  # from 1; in JSON lines that of the line
    values: dict[str, Any]

    def at(self, path: str) -> Any:
        """The value of a column; "a.b" is field b of column a.

        Raises:
            UserError: there is none, or it is null.
        """
        found: Any = self.values
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if found is None:
            raise self.error(f"no value of {path}")
        return found

    def error(self, reason: str) -> UserError:
        """What is wrong with this row, to be raised."""
        return UserError(f"{self.file} row {self.number}: {reason}")


def column_names(file: Path) -> list[str]:
    """The columns of a file; of JSON lines, those of its first row.

    Raises:
        UserError: there is no such file, or no row in it, or it cannot be read.
    """
    if _is_parquet(file):
        parquet = _open_parquet(file)
        if parquet.metadata.num_rows == 0:
            raise UserError(f"{file} holds no rows")
        return list(parquet.schema_arrow.names)
    for row in _json_rows(file):
        return list(row.values)
    raise UserError(f"{file} holds no rows")


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """All rows of a file, in order.

    Args:
        file: Parquet or JSON lines.
        columns: what is read of Parquet; JSON lines come whole.

    Raises:
        UserError: the file cannot be read.
    """
    if not _is_parquet(file):
        yield from _json_rows(file)
        return
    number = 0
    batches = _open_parquet(file).iter_batches(batch_size=_BATCH, columns=list(columns))
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:  # pyarrow's own are subclasses
            raise UserError(f"{file} is damaged after row {number}: {one_line(error)}") from error
        if batch is None:
            return
        for values in batch.to_pylist():
            number += 1
            yield Row(file, number, values)


def _is_parquet(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"{file} is empty")
    return start == b"PAR1"


def _open_parquet(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged Parquet: {one_line(error)}") from error


def _json_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = Row(file, number, {})
            try:
                values = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError too
                raise row.error(
                    f"neither Parquet nor JSON lines ({one_line(error)})"
                    if number == 1
                    else f"no valid JSON ({one_line(error)})"
                ) from error
            if not isinstance(values, dict):
                raise row.error(f"a JSON object is expected, not {line[:40]!r}")
            yield row._replace(values=values)
